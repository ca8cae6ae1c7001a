"""``python -m appliance.worker.probe NAME [--smoke DEVICE]``: what one backend can do here, as JSON on standard output.

With ``--smoke`` it computes something small on one device instead. Standard input holds the inventory as JSON. A
plugin's own prints go to standard error, so they cannot spoil the answer.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from appliance.backend import PRECISIONS, Artifact
from appliance.inventory import Inventory
from appliance.worker.lifeline import die_with_parent
from appliance.worker.messages import presentable
from appliance.worker.plugin import PluginRefused, distribution_of, find_backend
from appliance.worker.smoke import try_device


def examine(name: str, inventory: Inventory) -> dict[str, Any]:
    """Import the backend and ask it everything the daemon wants to know before it loads a model."""
    backend = find_backend(name)
    support = backend.probe(inventory)
    devices = [device for device in inventory.devices if device.id in support.devices and device.is_usable]
    offers = [
        {
            "format": format_,
            "precision": precision,
            "device": device.id,
            "variants": [
                {"precision": one.precision, "options": dict(one.options)}
                for one in backend.candidates(Artifact(Path("model"), format_, precision), device)
            ],
        }
        for format_ in sorted(backend.formats)
        for precision in PRECISIONS
        for device in devices
    ]
    return {
        "distribution": distribution_of(name),
        "runtime": support.runtime,
        "devices": list(support.devices),
        "reason": support.reason,
        "unlisted": dict(support.unlisted),
        "formats": sorted(backend.formats),
        "scope": backend.scope,
        "offers": offers,
    }


def _answer(arguments: list[str], inventory: Inventory) -> dict[str, Any]:
    match arguments:
        case [name]:
            return examine(name, inventory)
        case [name, "--smoke", device]:
            return {"failed": try_device(find_backend(name), inventory, device)}
        case _:
            raise ValueError("the arguments are NAME [--smoke DEVICE]")


def main() -> None:
    """Answer and leave at once: a runtime's own clean-up may hang or crash and would say nothing about the probe."""
    die_with_parent()
    answer_fd = os.dup(1)
    os.dup2(2, 1)
    try:
        document = _answer(sys.argv[1:], Inventory.from_json(json.loads(sys.stdin.read())))
    except PluginRefused as error:
        document = {"failed": str(error)}
    except (Exception, SystemExit) as error:
        document = {"failed": presentable(error)}
    with open(answer_fd, "w", encoding="utf-8") as answer:
        json.dump(document, answer)
    os._exit(0)


if __name__ == "__main__":
    main()
