"""Discovery of backends through the entry-point group ``appliance.backends``.

A plugin is somebody else's code, and importing it may raise, hang, crash or print, so the daemon never does: a
short-lived child (``python -m appliance.worker.probe NAME``) imports it, asks what it can do and answers with one JSON
document. What comes back, or why nothing did, is a value: discovery never raises.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from importlib import metadata
from typing import Any, Final

from appliance.backend import ENTRY_POINT_GROUP, Scope, Variant
from appliance.inventory import Inventory

#: How long a plugin may take to import its runtime and look for its devices.
PROBE_SECONDS: Final = 20.0

#: More than this from a probe is no answer.
MAX_ANSWER_BYTES: Final = 262144


class PluginStatus(StrEnum):
    """What became of a plugin. Only `AVAILABLE` backends serve models."""

    AVAILABLE = "available"
    UNSUPPORTED = "unsupported"
    DISABLED = "disabled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class BackendRecord:
    """One plugin, usable or not.

    Attributes:
        name: Entry-point name.
        status: Whether it can serve.
        reason: Why it cannot; empty when available.
        distribution: Name and version of the distribution that brings it, such as ``"inference-appliance 0.1.0"``.
        runtime: Name and version of the vendor runtime, such as ``"onnxruntime 1.31.1"``.
        devices: Ids of the devices it can use.
        formats: Artifact formats it reads.
        scope: ``"model"`` or ``"device"``: what one worker process holds.
        python: Interpreter its workers run under.
        variants: What it offers for a plain artifact, by format and device id, the first to try at the front.
    """

    name: str
    status: PluginStatus
    reason: str = ""
    distribution: str = ""
    runtime: str = ""
    devices: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    scope: Scope = "model"
    python: str = sys.executable
    variants: Mapping[tuple[str, str], tuple[Variant, ...]] = field(default_factory=dict)

    def candidates(self, format_: str, device: str) -> tuple[Variant, ...]:
        """Ways to run an artifact of `format_` on `device`, the one to try first at the front; empty where none."""
        return self.variants.get((format_, device), ())


@dataclass(frozen=True, slots=True)
class _Named:
    """A backend that is to be probed."""

    name: str
    distribution: str
    python: str
    problem: str = ""


async def discover(
    inventory: Inventory, disabled: Collection[str] = (), pythons: Mapping[str, str] | None = None
) -> dict[str, BackendRecord]:
    """Find and probe every backend, all at once. Never raises for a plugin's sake.

    Args:
        inventory: The machine.
        disabled: Names that are not to be probed.
        pythons: Interpreter by backend name, for backends with an environment of their own; a name that no
            distribution of this environment offers is looked for there alone.

    Returns:
        A record of each backend, by name, in order of names.
    """
    named = await asyncio.to_thread(_named, pythons or {})
    records = await asyncio.gather(*(_record(entry, inventory, disabled) for entry in named))
    return {record.name: record for record in records}


def _named(pythons: Mapping[str, str]) -> list[_Named]:
    found: dict[str, _Named] = {}
    try:
        points = metadata.entry_points(group=ENTRY_POINT_GROUP)
    except Exception:  # one distribution with unreadable metadata must not take the daemon down
        points = metadata.EntryPoints()
    for point in points:
        distribution = f"{point.dist.name} {point.dist.version}" if point.dist else ""
        python = pythons.get(point.name, sys.executable)
        problem = ""
        if point.name in found:
            problem = f"two distributions offer it: {found[point.name].distribution} and {distribution}"
        found[point.name] = _Named(point.name, distribution, python, problem)
    for name, python in pythons.items():
        found.setdefault(name, _Named(name, "", python))
    return [found[name] for name in sorted(found)]


async def _record(entry: _Named, inventory: Inventory, disabled: Collection[str]) -> BackendRecord:
    if entry.name in disabled:
        return _unusable(entry, PluginStatus.DISABLED, "the configuration disables it")
    if entry.problem:
        return _unusable(entry, PluginStatus.FAILED, f"cannot use {entry.name!r}: {entry.problem}")
    try:
        return _parse(entry, await _ask(entry, inventory))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return _unusable(entry, PluginStatus.FAILED, f"cannot probe {entry.name!r}: {reason}")


def _unusable(entry: _Named, status: PluginStatus, reason: str) -> BackendRecord:
    return BackendRecord(entry.name, status, reason, distribution=entry.distribution, python=entry.python)


async def _ask(entry: _Named, inventory: Inventory) -> bytes:
    """The probe's answer.

    Raises:
        OSError: The interpreter cannot be started.
        ValueError: The probe hung, crashed or answered too much; the message says which.
    """
    # -P: the working directory is nobody's place to import from.
    child = await asyncio.create_subprocess_exec(
        *(entry.python, "-P", "-m", "appliance.worker.probe", entry.name),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            answer = await _converse(child, json.dumps(asdict(inventory)).encode())
            status = await child.wait()
    except TimeoutError as error:
        raise ValueError(f"it gave no answer within {PROBE_SECONDS:g} s") from error
    finally:
        # The whole group, since a plugin may have started processes of its own.
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        await child.wait()
    if status < 0:
        raise ValueError(
            f"its process was killed by {signal.Signals(-status).name} while it was being imported or asked"
        )
    if status != 0 and not answer:
        raise ValueError(f"its process ended with status {status} and no answer")
    return answer


async def _converse(child: asyncio.subprocess.Process, question: bytes) -> bytes:
    if child.stdin is None or child.stdout is None:
        raise ValueError("its process has no pipes")
    with suppress(BrokenPipeError, ConnectionResetError):
        child.stdin.write(question)
        await child.stdin.drain()
        child.stdin.close()
    parts: list[bytes] = []
    length = 0
    while part := await child.stdout.read(65536):
        parts.append(part)
        length += len(part)
        if length > MAX_ANSWER_BYTES:
            raise ValueError(f"its answer is longer than {MAX_ANSWER_BYTES} bytes")
    return b"".join(parts)


def _parse(entry: _Named, answer: bytes) -> BackendRecord:
    """Read a probe's answer, which is as trustworthy as the plugin.

    Raises:
        ValueError: It is not what `appliance.worker.probe` writes.
    """
    try:
        document: dict[str, Any] = json.loads(answer)
        if failed := document.get("failed"):
            raise ValueError(str(failed))
        devices = tuple(map(str, document["devices"]))
        variants = {
            (str(offer["format"]), str(offer["device"])): tuple(
                Variant(entry.name, str(offer["device"]), str(one["precision"]), dict(one["options"]))
                for one in offer["variants"]
            )
            for offer in document["offers"]
        }
        return BackendRecord(
            name=entry.name,
            status=PluginStatus.AVAILABLE if devices else PluginStatus.UNSUPPORTED,
            reason="" if devices else str(document["reason"]) or "it found no device it can use",
            distribution=entry.distribution or str(document["distribution"]),
            runtime=str(document["runtime"]),
            devices=devices,
            formats=tuple(map(str, document["formats"])),
            scope="device" if document["scope"] == "device" else "model",
            python=entry.python,
            variants=variants,
        )
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("its answer is not a probe's answer") from error
