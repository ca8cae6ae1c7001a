"""Checks of the disks, directories and the registry."""

from collections.abc import Iterator
from shlex import quote
from typing import Final

from appliance.doctor import Finding, Severity
from appliance.doctor.facts import Directory, Facts
from appliance.registry import FILE_NAME

_GIB: Final = 1 << 30
#: Less is too little, whatever the size.
_LITTLE_BYTES: Final = _GIB
#: So is less than this share, up to as much.
_LITTLE_SHARE: Final = 0.05
_ENOUGH_BYTES: Final = 20 * _GIB
#: Nothing of use can be written any more.
_FULL_BYTES: Final = 64 << 20


def disk_space(facts: Facts) -> Iterator[Finding]:
    """A file system the daemon needs is full, or nearly."""
    disks: dict[tuple[int, int], list[Directory]] = {}
    for each in facts.directories:  # those of one file system have the same numbers
        disks.setdefault((each.total_bytes, each.free_bytes), []).append(each)
    for (total, free), directories in disks.items():
        if total and free < max(_LITTLE_BYTES, min(_LITTLE_SHARE * total, _ENOUGH_BYTES)):
            purposes = " and ".join(each.purpose for each in directories)
            yield Finding(
                "disk-space",
                Severity.ERROR if free < _FULL_BYTES else Severity.WARNING,
                f"the disk of {purposes} is {'full' if free < _FULL_BYTES else 'nearly full'}",
                f"{free >> 20} of {total >> 20} MiB are free at {directories[0].path}",
                f"du -xh {quote(directories[0].path)} | sort -h shows what takes the space; appliancectl quantize NAME "
                "--remove VARIANT deletes variants; what is in repository.cache may be deleted while the daemon is "
                "stopped; or set repository.path, cache or state to a larger disk",
            )


def directory(facts: Facts) -> Iterator[Finding]:
    """A directory cannot be used as the daemon must."""
    for each in facts.directories:
        if each.problem:
            verb = "read" if each.purpose == "models" else "written"
            key = "path" if each.purpose == "models" else each.purpose
            yield Finding(
                "directory",
                Severity.ERROR,
                f"the {each.purpose} directory cannot be {verb}",
                f"{each.path}: {each.problem}; the daemon runs as {facts.service.user}",
                f"sudo install -d -o {facts.service.user} {quote(each.path)} makes it and gives it to that user, once "
                f"nothing else stands there; or set repository.{key} to another directory",
            )


def registry(facts: Facts) -> Iterator[Finding]:
    """Measurements, evidence and pins cannot be kept, or were lost."""
    health = facts.registry
    state = next((each.path for each in facts.directories if each.purpose == "state"), "the state directory")
    memory = "; what is learned is in memory alone until that is mended"
    if health.reason:
        yield _unusable_registry(state, health.reason, memory)
    elif health.problems:
        yield Finding(
            "registry",
            Severity.ERROR,
            "the registry is damaged",
            "; ".join(health.problems) + memory,
            f"stop the daemon, move {_beside(state, FILE_NAME)} away and start it again: it begins a new one; then "
            "appliancectl tune MODEL",
        )
    if facts.registry_moved_aside:
        yield Finding(
            "registry",
            Severity.WARNING,
            "the registry was damaged and began anew",
            "measurements, evidence and pins from before are lost to the daemon; the damaged file is "
            f"{facts.registry_moved_aside}",
            "appliancectl tune MODEL measures again; pin again what was pinned; sudo dmesg shows disk errors; then "
            f"rm {_beside(state, facts.registry_moved_aside)}",
        )
    elif health.moved_aside:
        yield Finding(
            "registry",
            Severity.NOTE,
            "damaged registries are kept",
            f"they were replaced by a new one in the past: {', '.join(health.moved_aside)}",
            f"rm {' '.join(_beside(state, name) for name in health.moved_aside)}",
        )


def _beside(state: str, name: str) -> str:
    return quote(f"{state}/{name}")


def _unusable_registry(state: str, reason: str, memory: str) -> Finding:
    if "locked" in reason:
        fix = f"sudo fuser -v {_beside(state, FILE_NAME)} names the process that holds it; end it"
    elif "newer version" in reason:
        fix = (
            "install the newer version of the appliance again; or stop the daemon, move "
            f"{_beside(state, FILE_NAME)} away and start it: it begins a new one"
        )
    elif "another program" in reason:
        fix = f"set repository.state to a directory of the appliance's own; {state} has another program's {FILE_NAME}"
    elif "full" in reason:
        fix = f"make room on the disk of {state}: df -h {quote(state)}"
    else:
        fix = f"see that {state} is a directory that the daemon's user can write: ls -ld {quote(state)}"
    return Finding("registry", Severity.ERROR, "the registry cannot be used", reason + memory, fix)
