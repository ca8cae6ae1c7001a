"""``python -m appliance.worker.probe NAME``: what one backend can do on this machine, as JSON on standard output.

Standard input holds the inventory as JSON. A plugin's own prints go to standard error, so they cannot spoil the answer.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from appliance.backend import Artifact
from appliance.inventory import Device, Inventory
from appliance.worker.lifeline import die_with_parent
from appliance.worker.messages import presentable
from appliance.worker.plugin import PluginRefused, distribution_of, find_backend


def parse_inventory(text: str) -> Inventory:
    """Read an inventory as `appliance.plugins` writes it."""
    document = json.loads(text)
    devices = tuple(Device(**{**device, "features": tuple(device["features"])}) for device in document["devices"])
    return Inventory(devices=devices, cores=document["cores"], memory_bytes=document["memory_bytes"])


def examine(name: str, inventory: Inventory) -> dict[str, Any]:
    """Import the backend and ask it everything the daemon wants to know before it loads a model."""
    backend = find_backend(name)
    support = backend.probe(inventory)
    offers = []
    for format_ in sorted(backend.formats):
        nominal = Artifact(path=Path("model"), format=format_)
        for device in inventory.devices:
            if device.id not in support.devices:
                continue
            variants = backend.candidates(nominal, device)
            offers.append(
                {
                    "format": format_,
                    "device": device.id,
                    "variants": [{"precision": one.precision, "options": dict(one.options)} for one in variants],
                }
            )
    return {
        "distribution": distribution_of(name),
        "runtime": support.runtime,
        "devices": list(support.devices),
        "reason": support.reason,
        "formats": sorted(backend.formats),
        "scope": backend.scope,
        "offers": offers,
    }


def main() -> None:
    """Answer and leave at once: a runtime's own clean-up may hang or crash and would say nothing about the probe."""
    die_with_parent()
    answer_fd = os.dup(1)
    os.dup2(2, 1)
    try:
        document = examine(sys.argv[1], parse_inventory(sys.stdin.read()))
    except PluginRefused as error:
        document = {"failed": str(error)}
    except (Exception, SystemExit) as error:
        document = {"failed": presentable(error)}
    with open(answer_fd, "w", encoding="utf-8") as answer:
        json.dump(document, answer)
    os._exit(0)


if __name__ == "__main__":
    main()
