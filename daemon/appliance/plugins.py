"""Discovery of backends through the entry-point group ``appliance.backends``.

A plugin is somebody else's code, and importing it may raise, hang, crash or print, so the daemon never does: a
short-lived child (``python -m appliance.worker.probe NAME``) imports it, asks what it can do and answers with one JSON
document. What comes back, or why nothing did, is a value: discovery never raises. Whether a device computes rightly is
asked later and apart (`smoke`), since it means loading a model there.
"""

import asyncio
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from importlib import metadata
from typing import Any, Final

from appliance.backend import ENTRY_POINT_GROUP, Scope, Variant
from appliance.child import ChildFailed, ask
from appliance.inventory import Inventory

#: How long a plugin may take to import its runtime and look for its devices.
PROBE_SECONDS: Final = 20.0

#: How long a device may take to load and run a model of a few numbers. Drivers compile their kernels on first use.
SMOKE_SECONDS: Final = 120.0

#: A model's precision that is offered as another: the daemon lowers neither.
_COUNTS_AS: Final = {"FP64": "FP32"}


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
        variants: What it offers for a plain artifact, by format, artifact precision and device id, the first to try at
            the front.
        unlisted: Why it cannot use a device of a kind it serves, by device id.
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
    variants: Mapping[tuple[str, str, str], tuple[Variant, ...]] = field(default_factory=dict)
    unlisted: Mapping[str, str] = field(default_factory=dict)

    def candidates(self, format_: str, precision: str, device: str) -> tuple[Variant, ...]:
        """Ways to run an artifact on `device`, the one to try first at the front; empty where none.

        Args:
            format_: The artifact's format.
            precision: Precision of its weights, one of `appliance.backend.PRECISIONS` or ``"FP64"``.
            device: Id of a device.
        """
        return self.variants.get((format_, _COUNTS_AS.get(precision, precision), device), ())


def reasons_unlisted(records: Iterable[BackendRecord], device_id: str) -> str:
    """Why backends that serve devices of its kind cannot use a device, each by name; empty where none says anything."""
    reasons = ((record.name, record.unlisted.get(device_id)) for record in records)
    return "; ".join(f"{name}: {reason}" for name, reason in reasons if reason)


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


async def smoke(record: BackendRecord, inventory: Inventory) -> dict[str, str | None]:
    """Have an available backend compute something small on each of its devices, one after the other.

    Each device is tried in a child of its own, so that one that hangs or crashes says nothing about the next. Never
    raises for a plugin's sake.

    Returns:
        By device id: an empty string where the answer was right, else what went wrong; None where it could not be
        tried, since the backend reads no format there is a smoke model of.
    """
    question = asdict(inventory)
    results: dict[str, str | None] = {}
    for device in record.devices:
        command = (*_probe_command(record.python, record.name), "--smoke", device)
        try:
            answer = await ask(command, question, SMOKE_SECONDS)
            failed = answer["failed"]
            results[device] = None if failed is None else str(failed)
        except ChildFailed as error:
            results[device] = str(error)
        except KeyError:
            results[device] = "its answer is not a smoke test's answer"
    return results


def _probe_command(python: str, name: str) -> tuple[str, ...]:
    # -P: the working directory is nobody's place to import from.
    return (python, "-P", "-m", "appliance.worker.probe", name)


async def _record(entry: _Named, inventory: Inventory, disabled: Collection[str]) -> BackendRecord:
    if entry.name in disabled:
        return _unusable(entry, PluginStatus.DISABLED, "the configuration disables it")
    if entry.problem:
        return _unusable(entry, PluginStatus.FAILED, f"cannot use {entry.name!r}: {entry.problem}")
    try:
        answer = await ask(_probe_command(entry.python, entry.name), asdict(inventory), PROBE_SECONDS)
        return _parse(entry, answer)
    except (ChildFailed, ValueError) as error:
        return _unusable(entry, PluginStatus.FAILED, f"cannot probe {entry.name!r}: {error}")


def _unusable(entry: _Named, status: PluginStatus, reason: str) -> BackendRecord:
    return BackendRecord(entry.name, status, reason, distribution=entry.distribution, python=entry.python)


def _parse(entry: _Named, document: Mapping[str, Any]) -> BackendRecord:
    """Read a probe's answer, which is as trustworthy as the plugin.

    Raises:
        ValueError: It is not what `appliance.worker.probe` writes.
    """
    try:
        if failed := document.get("failed"):
            raise ValueError(str(failed))
        devices = tuple(map(str, document["devices"]))
        variants = {
            (str(offer["format"]), str(offer["precision"]), str(offer["device"])): tuple(
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
            unlisted={str(device): str(reason) for device, reason in document["unlisted"].items()},
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("its answer is not a probe's answer") from error
