"""A LoadGen scenario, seen from the command: a process of its own runs it and tells what came of it.

MLPerf's load generator cannot be interrupted: it calls back into Python from native code that an exception must not
cross. The process can be, and with it everything the generator holds.
"""

import importlib.util
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any, Final

import click

from appliance_client.errors import ConnectionLost, DaemonUnreachable, error_of
from appliancectl.bench.progress import Advance
from appliancectl.bench.table import LATENCIES, cell, latencies
from appliancectl.failure import InputError
from appliancectl.output import print_table
from appliancectl.target import Target

SCENARIOS: Final = ("single-stream", "multi-stream", "server", "offline")

#: Where the generator's process writes what it has to say beside its logs.
_MESSAGES: Final = "harness.txt"

#: Seconds it takes to start, and to measure the floor.
_START_SECONDS: Final = 2.0

#: Part of the duration that is run before LoadGen begins, and the bounds of that in seconds.
_WARM_UP: Final = 0.1
_LEAST_WARM_UP: Final = 0.2
_MOST_WARM_UP: Final = 2.0

_TELL_SECONDS: Final = 0.1


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is run.

    Attributes:
        name: One of `SCENARIOS`.
        model: The model's name.
        given: Values of its inputs, as for ``infer``; empty for made-up ones.
        duration_s: Seconds LoadGen is to take at least.
        clients: Connections.
        priority: As of `Client.infer`.
        seed: Of everything LoadGen draws.
        target_qps: Queries a second: what ``server`` sends, what ``offline`` expects; None where it is measured first.
        target_latency_ms: What the 99th percentile of ``server`` is held against.
    """

    name: str
    model: str
    given: tuple[str, ...]
    duration_s: float
    clients: int
    priority: int | str
    seed: int
    target_qps: float | None
    target_latency_ms: float

    @property
    def warm_up_s(self) -> float:
        """Seconds of requests before LoadGen begins."""
        return min(max(_LEAST_WARM_UP, self.duration_s * _WARM_UP), _MOST_WARM_UP)

    @property
    def expected_s(self) -> float:
        """Seconds all of it takes, about."""
        return _START_SECONDS + self.warm_up_s + self.duration_s


def check_installed() -> None:
    """Refuse where LoadGen is missing.

    Raises:
        InputError: It is not installed.
    """
    if importlib.util.find_spec("mlperf_loadgen") is None:
        raise InputError(
            "cannot run a LoadGen scenario: mlcommons-loadgen is not installed beside appliancectl\n"
            "  pip install 'inference-appliance[bench]' brings it, on Linux on x86-64 with Python 3.11 to 3.13; "
            "elsewhere pip install mlcommons-loadgen compiles it"
        )


def run_scenario(target: Target, scenario: Scenario, logs: Path | None, advance: Advance) -> dict[str, Any]:
    """Run a scenario and give its figures, with those of the same scenario against nobody.

    Args:
        target: The daemon.
        scenario: What is run.
        logs: Directory to keep LoadGen's logs in; None to delete them.
        advance: Told how far it is.

    Raises:
        ApplianceError: What the daemon answered, where no other answer was to be had.
        InputError: An input does not fit, or the logs cannot be kept.
        ClickException: The generator's process ended without a result.
    """
    check_installed()
    with _directory(logs) as directory:
        watched, lifeline = os.pipe()
        socket_dir = None if target.directory is None else str(target.directory)
        order = asdict(scenario) | {
            "warm_up_s": scenario.warm_up_s,
            "socket_dir": socket_dir,
            "logs": str(directory),
            "lifeline": watched,
        }
        try:
            with (directory / _MESSAGES).open("wb") as messages:
                child = subprocess.Popen(
                    [sys.executable, "-P", "-m", "appliancectl.bench.harness", json.dumps(order)],
                    stdout=subprocess.PIPE,
                    stderr=messages,
                    pass_fds=(watched,),
                    start_new_session=True,  # Ctrl-C is for this process, which ends that one
                )
        finally:
            os.close(watched)
        with child:
            try:
                outcome = _outcome(child, advance)
            finally:
                child.kill()
                os.close(lifeline)
        if not outcome:
            raise click.ClickException(_unexpected(child.returncode, directory / _MESSAGES))
    return _result(json.loads(outcome)) | {"logs": None if logs is None else str(logs)}


@contextmanager
def _directory(kept: Path | None) -> Iterator[Path]:
    if kept is None:
        with TemporaryDirectory(prefix="appliancectl-") as path:
            yield Path(path)
        return
    try:
        kept.mkdir(parents=True, exist_ok=True)
        (kept / _MESSAGES).touch()
    except OSError as error:
        raise InputError(f"cannot keep logs in {str(kept)!r}: {(error.strerror or 'no access').lower()}") from error
    yield kept


def _outcome(child: "subprocess.Popen[bytes]", advance: Advance) -> bytes:
    """The last line of the child's output, which is all of it; empty where it ended without one."""
    if child.stdout is None:
        raise TypeError("the child has no standard output")
    written = b""
    told = monotonic()
    while True:
        readable, _, _ = select.select([child.stdout], [], [], _TELL_SECONDS)
        now = monotonic()
        advance(now - told)
        told = now
        if readable:
            chunk = os.read(child.stdout.fileno(), 65536)
            if not chunk:
                return written
            written += chunk


def _unexpected(code: int, messages: Path) -> str:
    said = messages.read_text(errors="replace").strip().splitlines()
    return f"cannot finish the scenario: LoadGen's process ended with {code}: {said[-1] if said else 'it said nothing'}"


def _result(outcome: dict[str, Any]) -> dict[str, Any]:
    """The figures in an outcome; raises the error in it."""
    if "error" not in outcome:
        return outcome
    message, kind = outcome["error"], outcome["kind"]
    if kind is None:
        raise InputError(message)
    for error in (ConnectionLost, DaemonUnreachable):
        if kind == error.kind:
            raise error(message)
    raise error_of(kind, message, outcome["is_retryable"])


def print_scenario(result: dict[str, Any]) -> None:
    """LoadGen's verdict, and its figures beside the harness's own."""
    measured, floor = result["measured"], result["floor"]
    verdict = "valid" if measured["valid"] else f"not valid: {'; '.join(measured['reasons'])}"
    click.echo(f"LoadGen scenario {result['scenario']}: {verdict}; queries: {measured['queries']}")
    print_table(
        ("against", ">samples/s", *(f">{name}" for name in LATENCIES)),
        [
            (name, cell(row["samples_per_s"], 1), *latencies(row, digits=3))
            for name, row in ((result["model"], measured), ("nobody", floor))
        ],
        "nothing was measured",
    )
    if result["refused"]:
        refused = " ".join(f"{kind}: {count}" for kind, count in result["refused"].items())
        click.echo(f"refused and sent again, which counts in the latency: {refused}")
    click.echo("nobody: the same scenario answered inside this program, the harness's floor; no MLPerf result")
    if result["logs"] is not None:
        click.echo(f"LoadGen's logs: {result['logs']}")
