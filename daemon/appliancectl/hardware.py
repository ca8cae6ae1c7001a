"""``appliancectl hardware`` and ``backends``."""

import click

from appliancectl.output import print_json, print_table, size
from appliancectl.target import Target, common_options

# the daemon may still be probing its backends, each for up to 20 s
_ANSWER_SECONDS = 60.0


@click.command()
@common_options
def hardware(target: Target) -> None:
    """Show the devices that models can run on."""
    answer = target.admin(_ANSWER_SECONDS).get("/admin/hardware")
    if target.wants_json:
        print_json(answer)
        return
    click.echo(f"{answer['cores']} cores, {size(answer['memory_bytes'])} of memory")
    print_table(
        ("device", "kind", "name", ">memory", "features"),
        [
            (device["id"], device["kind"], device["name"], size(device["memory_bytes"]), " ".join(device["features"]))
            for device in answer["devices"]
        ],
        "no device is usable",
    )


@click.command()
@common_options
def backends(target: Target) -> None:
    """Show every backend, usable or not, and why not."""
    answer = target.admin(_ANSWER_SECONDS).get("/admin/backends")
    if target.wants_json:
        print_json(answer)
        return
    print_table(
        ("backend", "status", "runtime", "devices", "from", "reason"),
        [
            (
                record["name"],
                record["status"],
                record["runtime"] or "-",
                " ".join(record["devices"]) or "-",
                record["distribution"] or "-",
                record["reason"] or "-",
            )
            for record in answer["backends"]
        ],
        "no backend is installed",
    )
