"""``appliancectl doctor``."""

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Final

import click

from appliance_client.errors import ApplianceError, ConnectionLost, DaemonUnreachable, DeadlineExceeded
from appliancectl.failure import OUT_OF_REACH, REFUSED, end
from appliancectl.output import console, print_json, spinner
from appliancectl.target import Target, common_options

#: The daemon may have to read artifacts to know what its measurements are good for.
_ANSWER_SECONDS: Final = 120.0

#: Environment variables that decide what runtimes find and do; the daemon compares them with its own. A name that ends
#: in ``*`` stands for all that begin so.
RUNTIME_VARIABLES: Final = (
    "LD_LIBRARY_PATH", "LD_PRELOAD", "CUDA_*", "NVIDIA_*", "ONEAPI*", "OPENVINO*", "ZE_*", "ASCEND_*", "OMP_*", "KMP_*",
)  # fmt: skip

_STYLES: Final = {"error": "bold red", "warning": "bold yellow", "note": "bold cyan"}
_MAX_COLUMNS: Final = 100
_INDENT: Final = " " * 9


@click.command()
@common_options
def doctor(target: Target) -> None:
    """Look for what is wrong with the installation, and say how to mend it.

    Compares drivers with runtimes, the daemon's permissions, environment and limits with what it needs, and looks at
    its models, measurements, disks and registry. Where the daemon is out of reach, looks for the reason from outside.

    Exit codes: 0 nothing but notes, 1 warnings or errors, 3 the daemon is out of reach.
    """
    try:
        with spinner("looking", wants_json=target.wants_json):
            answer = target.admin(_ANSWER_SECONDS).post("/admin/doctor", {"environment": _environment(os.environ)})
        code = 0 if answer["healthy"] else REFUSED
    except (DaemonUnreachable, ConnectionLost, DeadlineExceeded) as error:
        answer = _from_outside(target, error)
        code = OUT_OF_REACH
    if target.wants_json:
        print_json(answer)
    else:
        _print(answer)
    end(code)


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that matter to runtimes."""
    exact = {name for name in RUNTIME_VARIABLES if not name.endswith("*")}
    beginnings = tuple(name[:-1] for name in RUNTIME_VARIABLES if name.endswith("*"))
    return {name: value for name, value in environment.items() if name in exact or name.startswith(beginnings)}


def _from_outside(target: Target, error: ApplianceError) -> dict[str, Any]:
    from appliancectl.outside import CHECKS, examine

    findings = examine(target.http_socket, error)
    return {
        "error": str(error),
        "kind": error.kind,
        "findings": findings,
        "healthy": False,
        "checks": list(CHECKS),
    }


def _print(answer: Mapping[str, Any]) -> None:
    """One paragraph for each finding, and a last line that counts them."""
    findings: Sequence[Mapping[str, str]] = answer["findings"]
    for finding in findings:
        _print_finding(finding)
    checks = f"{len(answer['checks'])} checks"
    if not findings:
        click.echo(f"nothing to mend: {checks} found nothing")
        return
    counts = [
        f"{count} {severity}{'s' if count > 1 else ''}"
        for severity in _STYLES
        if (count := sum(finding["severity"] == severity for finding in findings))
    ]
    click.echo(f"{', '.join(counts)} from {checks}")


def _print_finding(finding: Mapping[str, str]) -> None:
    from rich.text import Text

    to = console()
    width = min(to.width, _MAX_COLUMNS) if to.is_terminal else to.width
    severity = finding["severity"]
    title = _wrapped(finding["title"], width)
    to.print(Text.assemble((severity.ljust(len(_INDENT)), _STYLES[severity]), (title[len(_INDENT) :], "bold")))
    for text in (finding["reason"], f"fix: {finding['fix']}"):
        to.print(Text(_wrapped(text, width)))
    click.echo()


def _wrapped(text: str, width: int) -> str:
    """`text` below the title; commands in it can be copied, since words are never broken."""
    return textwrap.fill(
        text,
        width,
        initial_indent=_INDENT,
        subsequent_indent=_INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
