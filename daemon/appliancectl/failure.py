"""How a command ends when it cannot do what was asked: a message, what to do, and an exit code."""

import json
import sys
from typing import Final

import click

from appliance_client.errors import ApplianceError, ConnectionLost, DaemonUnreachable

REFUSED: Final = 1
USAGE: Final = 2
OUT_OF_REACH: Final = 3
INTERRUPTED: Final = 130

_ADVICE: Final = {
    "model-not-found": "`appliancectl models` lists the models there are",
    "model-not-ready": "`appliancectl models NAME` says why; `appliancectl load NAME` loads it",
    "permission-denied": "run it as root, as the daemon's user, or as a user named in access.admin_uids",
    "overloaded": "try again, or raise the bound in the daemon's configuration",
    "conflict": "try again in a moment",
    "worker-lost": "try again; `appliancectl models NAME` shows how often the worker was restarted",
    "device-lost": "try again; `appliancectl hardware` shows what is there now",
    "no-placement": "`appliancectl backends` says what each backend lacks",
    "artifact-corrupt": "copy the model's files again",
    "invalid-manifest": "correct the model's model.toml and load it again",
    "deadline-exceeded": "allow more time, or send less at once",
    "shutting-down": "try again once the daemon has started anew",
    "connection-lost": "`appliancectl status` says whether the daemon runs",
}


class InputError(click.ClickException):
    """An input on the command line cannot be used; refused before anything is sent."""

    exit_code = REFUSED


def exit_code(error: ApplianceError) -> int:
    """The exit code for an error: 3 where the daemon is out of reach, else 1."""
    return OUT_OF_REACH if isinstance(error, (DaemonUnreachable, ConnectionLost)) else REFUSED


def report(message: str, kind: str, *, wants_json: bool) -> None:
    """Say what went wrong: JSON on standard output where wanted, else text on standard error."""
    if wants_json:
        click.echo(json.dumps({"error": message, "kind": kind}, ensure_ascii=False))
        return
    click.echo(message, err=True)
    advice = _ADVICE.get(kind)
    if advice:
        click.echo(f"  {advice}", err=True)


def end(code: int) -> None:
    """Leave with `code`, also where the reader of standard output has gone."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = None  # nothing is flushed again on the way out
    sys.exit(code)
