"""``appliancectl hardware`` and ``backends``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from appliancectl.output import print_json, print_pairs, print_table, size, spinner
from appliancectl.target import Target, common_options

# the daemon may still be probing its backends, each for up to 20 s
_ANSWER_SECONDS = 60.0


@click.command()
@click.option("--refresh", is_flag=True, help="Look at the machine and ask every backend anew.")
@click.option(
    "--record",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write all that is read of the machine to a file, for a report of a problem.",
)
@common_options
def hardware(target: Target, refresh: bool, record: Path | None) -> None:
    """Show the devices that models can run on, how far each can be used, and what helps where not."""
    admin = target.admin(_ANSWER_SECONDS)
    if record is not None:
        with spinner("recording the hardware", wants_json=target.wants_json):
            _write(record, admin.post("/admin/hardware/record"))
    with spinner("looking at the hardware", wants_json=target.wants_json):
        answer = admin.post("/admin/hardware/refresh") if refresh else admin.get("/admin/hardware")
    if target.wants_json:
        print_json(answer)
        return
    _print_inventory(answer)
    if record is not None:
        click.echo(f"\nrecorded in {record}; it names the user, groups, mounted file systems and what runs on the GPUs")


def _write(path: Path, recording: Any) -> None:
    try:
        path.write_text(json.dumps(recording, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"cannot write {str(path)!r}: {error.strerror}") from error


def _print_inventory(inventory: Mapping[str, Any]) -> None:
    print_table(
        ("device", "kind", "name", ">memory", "driver", "usable"),
        [
            (
                device["id"],
                device["kind"],
                device["name"],
                size(device["memory_bytes"]) if device["memory_bytes"] else "-",
                device["driver"] or "-",
                _verdict(device),
            )
            for device in inventory["devices"]
        ],
        "no device was found",
    )
    for device in inventory["devices"]:
        rung = _failed(device)
        if rung is not None:
            click.echo(f"\n{device['id']} is not usable: {rung['reason']}\n  fix: {rung['fix']}")
    for device in inventory["devices"]:
        click.echo(f"\n{device['id']}")
        print_pairs(list(_facts(device)))
    click.echo("\nhost")
    print_pairs(list(_host(inventory)))
    for disk in inventory["disks"]:
        click.echo(f"{disk['purpose']}: {_disk(disk)}")
    for problem in inventory["problems"]:
        click.echo(f"problem: {problem}")


def _failed(device: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return next((rung for rung in device["ladder"] if rung["passed"] is False), None)


#: What a device lacks where a rung failed, in a word.
_LACKS = {
    "present": "absent",
    "driver": "driver",
    "openable": "access",
    "listed": "not listed",
    "smoke-tested": "fails",
}


def _verdict(device: Mapping[str, Any]) -> str:
    """``"yes"`` once a backend has computed on it, ``"no"`` with what it lacks, else ``"untried"``."""
    rung = _failed(device)
    if rung is not None:
        return f"no: {_LACKS[rung['step']]}"
    steps = {each["step"]: each["passed"] for each in device["ladder"]}
    return "yes" if steps.get("smoke-tested") else "untried"


def _facts(device: Mapping[str, Any]) -> list[tuple[str, str]]:
    ladder = " → ".join({True: "", False: "✗ ", None: "? "}[rung["passed"]] + rung["step"] for rung in device["ladder"])
    uuid = device["uuid"] if device["uuid"] not in device["details"].values() else ""
    facts = [
        ("features", " ".join(device["features"])),
        ("vendor", device["vendor"]),
        *device["details"].items(),
        ("id", uuid),
    ]
    return [("ladder", ladder), *((name, value) for name, value in facts if value)]


def _host(inventory: Mapping[str, Any]) -> list[tuple[str, str]]:
    memory = inventory["memory"]
    facts = [("cores", f"{inventory['cores']} may be used"), ("memory", f"{size(memory['total'])} may be used")]
    if memory["limit"]:
        facts.append(("memory limit", f"{size(memory['limit'])} by control group, of {size(memory['machine'])}"))
    if memory["available"]:
        facts.append(("memory available", size(memory["available"])))
    if memory["huge_pages"]:
        facts.append(("huge pages", f"{memory['huge_pages']} of {size(memory['huge_page_bytes'])}"))
    return [*facts, *inventory["host"].items()]


def _disk(disk: Mapping[str, Any]) -> str:
    kind = {True: ", rotating", False: ", solid state", None: ""}[disk["is_rotational"]]
    free, total = size(disk["free_bytes"]), size(disk["total_bytes"])
    return f"{free} free of {total} on {disk['device']} ({disk['file_system']}{kind})"


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
