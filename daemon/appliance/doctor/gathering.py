"""Looks at everything a diagnosis needs. Only reads, and computes nothing on the event loop."""

import asyncio
import os
import re
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final

from appliance.doctor.facts import Directory, Environment, Facts, ModelFacts
from appliance.doctor.hardware import RIVALS
from appliance.doctor.surroundings import relevant
from appliance.errors import ApplianceError
from appliance.inventory import Inventory, Memory
from appliance.inventory.asking import directories_of
from appliance.inventory.cgroup import Limits, read_limits
from appliance.inventory.memory import parse_meminfo, read_memory
from appliance.inventory.system import Identity, Live, System, peek
from appliance.plugins import BackendRecord
from appliance.types import ModelState

if TYPE_CHECKING:
    from appliance.config import Config
    from appliance.models import Model
    from appliance.registry import Registry
    from appliance.tuner import Tuner

_RIVALS: Final = frozenset().union(*RIVALS.values())

#: What systemd gives to every process of a unit, systemd.exec(5).
_UNIT_VARIABLE: Final = "INVOCATION_ID"


@dataclass(frozen=True, slots=True)
class _System:
    """What a thread reads of the system."""

    directories: tuple[Directory, ...]
    environments: tuple[Environment, ...]
    memory: Memory
    limits: Limits
    swapped: Mapping[int, int]
    service: Identity


async def gather_facts(
    inventory: Inventory,
    backends: Mapping[str, BackendRecord],
    models: Sequence["Model"],
    tuner: "Tuner",
    registry: "Registry",
    config: "Config",
    caller_environment: Mapping[str, str],
) -> Facts:
    """Look.

    Args:
        inventory: The machine as last surveyed.
        backends: Every plugin by name.
        models: Every model of the repository.
        tuner: Knows what is measured.
        registry: Looked at closely.
        config: The daemon's.
        caller_environment: Environment variables of whoever asks.
    """
    pids = [status.pid for model in models if (status := model.status()).pid is not None]
    pythons = sorted({sys.executable, *(record.python for record in backends.values())})
    system = await asyncio.to_thread(_read_system, config, pythons, pids)
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Facts(
        inventory=inventory,
        backends=backends,
        models=tuple([await _model_facts(model, tuner, registry, system.swapped) for model in models]),
        registry=await registry.check(),
        registry_moved_aside=registry.moved_aside,
        directories=system.directories,
        environments=system.environments,
        memory=system.memory,
        cpu_quota=system.limits.quota,
        descriptors=sys.maxsize if descriptors == resource.RLIM_INFINITY else descriptors,
        max_connections=config.limits.max_connections,
        service=system.service,
        is_unit=_UNIT_VARIABLE in os.environ,
        service_environment=relevant(os.environ),
        caller_environment=relevant(caller_environment),
    )


async def _model_facts(model: "Model", tuner: "Tuner", registry: "Registry", swapped: Mapping[int, int]) -> ModelFacts:
    status = model.status()
    facts = ModelFacts(
        status,
        fallback_policy=model.manifest.fallback if model.manifest is not None else "warn",
        swapped_bytes=swapped.get(status.pid, 0) if status.pid is not None else 0,
    )
    if status.state is not ModelState.READY:
        return facts
    stored = registry.placement(status.name, status.version)
    if stored is not None and stored.is_pinned:
        facts = replace(facts, pinned=stored.variant)
    try:
        options = await tuner.options(status.name)
    except ApplianceError:  # its files changed since it was loaded; loading it will say so
        return facts
    known = {key.computation.id for key in options.keys.values()}  # cores may have been split otherwise for a while
    of_version = [each for each in registry.measurements(status.name) if each.version == options.version]
    return replace(
        facts,
        ways=len(options.candidates.found),
        unmeasured=len(tuner.missing(options)),
        outdated=sum(each.measurement.key.computation.id not in known for each in of_version),
    )


# ---------------------------------------------------------------- in a thread


def _read_system(config: "Config", pythons: Iterable[str], pids: Iterable[int]) -> _System:
    system = Live()
    limits = read_limits(system)
    return _System(
        directories=tuple(
            directory_facts(purpose, Path(path).absolute()) for purpose, path in directories_of(config).items()
        ),
        environments=tuple(Environment(python, _rivals_beside(python)) for python in pythons),
        memory=_memory(system, limits),
        limits=limits,
        swapped={pid: _swapped_bytes(system, pid) for pid in pids},
        service=system.identity(),
    )


def _memory(system: System, limits: Limits) -> Memory:
    try:
        return read_memory(system, limits)
    except (OSError, ValueError):  # the survey has said so
        return Memory()


def _swapped_bytes(system: System, pid: int) -> int:
    """What of a process is swapped out: proc_pid_status(5)."""
    return parse_meminfo(peek(system, f"/proc/{pid}/status")).get("VmSwap", 0)


def directory_facts(purpose: str, path: Path) -> Directory:
    """Whether the daemon can read (models) or write (all else) `path`, and the room there is.

    A directory that is missing is made when it is needed, so what counts is the nearest one there is.
    """
    nearest = path
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    total = free = 0
    try:
        space = os.statvfs(nearest)
        total, free = space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
        problem = _directory_problem(purpose, path, nearest)
    except OSError as error:
        problem = (error.strerror or "it cannot be looked at").lower()
    return Directory(purpose, str(path), problem, total, free)


def _directory_problem(purpose: str, path: Path, nearest: Path) -> str:
    is_missing = nearest != path
    if not nearest.is_dir():
        return f"{nearest} is a file" if is_missing else "a file stands in its place"
    if is_missing and not os.access(nearest, os.X_OK, effective_ids=True):
        return f"the mode of {nearest} does not let the daemon in"
    if purpose == "models":
        if is_missing:
            return "it does not exist"
        return "" if os.access(path, os.R_OK | os.X_OK, effective_ids=True) else "its mode does not allow it"
    if os.access(nearest, os.W_OK | os.X_OK, effective_ids=True):
        return ""
    if os.statvfs(nearest).f_flag & os.ST_RDONLY:
        return "its file system is mounted read-only"
    return f"it does not exist, and the mode of {nearest} allows no new one" if is_missing else "its mode forbids it"


def _rivals_beside(python: str) -> frozenset[str]:
    """Which distributions of `RIVALS` the environment of an interpreter has."""
    if python == sys.executable:
        places = sys.path
    else:
        places = [str(place) for place in Path(python).parent.parent.glob("lib*/python3*/site-packages")]
    return frozenset(name for each in metadata.distributions(path=places) if (name := _normal(each.name)) in _RIVALS)


def _normal(name: str | None) -> str:
    """A distribution's name as PEP 503 compares it; None where its metadata is damaged."""
    return re.sub(r"[-_.]+", "-", name or "").lower()
