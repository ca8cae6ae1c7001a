"""``appliancectl status`` and ``version``."""

from typing import Any

import click

from appliance_client.errors import DaemonUnreachable
from appliancectl.models import print_models
from appliancectl.output import duration, print_json, print_pairs, size
from appliancectl.target import Target, common_options

_ANSWER_SECONDS = 10.0


@click.command()
@common_options
def status(target: Target) -> None:
    """Show whether the daemon runs, and how its models stand."""
    answer: dict[str, Any] = target.admin(_ANSWER_SECONDS).get("/admin/status")
    if target.wants_json:
        print_json(answer)
        return
    state = "ready" if answer["ready"] else "starting" if answer["accepting"] else "stopping"
    print_pairs(
        [
            ("daemon", state),
            ("version", answer["version"]),
            ("pid", str(answer["pid"])),
            ("up for", duration(answer["uptime_s"])),
            ("memory", f"{size(answer['rss_bytes'])} (front-end)"),
            *((f"{name} at", address) for name, address in sorted(answer["sockets"].items())),
        ]
    )
    click.echo()
    print_models(answer["models"])


@click.command()
@common_options
def version(target: Target) -> None:
    """Show the version of this program, and of the daemon if it runs."""
    from importlib.metadata import version as installed

    own = installed("inference-appliance")
    try:
        daemon = target.admin(_ANSWER_SECONDS).get("/v2")["version"]
    except DaemonUnreachable:
        daemon = None
    if target.wants_json:
        print_json({"appliancectl": own, "applianced": daemon})
        return
    click.echo(f"appliancectl {own}")
    click.echo(f"applianced {daemon}" if daemon else "applianced is out of reach")
