"""What the control groups around this process let it have, version 1 and 2.

Formats: cgroups(7) and the kernel's cgroup-v2.rst. A limit binds everything below it, so each is looked for from our
own group up to the topmost one that can be seen, and the tightest counts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from appliance.inventory.mounts import Mount, parse_mountinfo
from appliance.inventory.system import System, peek

#: Version 1 says "no limit" with a number near 2^63.
_NO_LIMIT_BYTES = 1 << 60


@dataclass(frozen=True, slots=True)
class Limits:
    """The tightest limits.

    Attributes:
        quota: CPU time, in cores; None for no limit.
        cpus: Cores of the cpuset; None where it is not known.
        memory: Bytes; 0 for no limit.
        memory_left: Bytes that can be had below the limit; None without one.
    """

    quota: float | None = None
    cpus: frozenset[int] | None = None
    memory: int = 0
    memory_left: int | None = None


def parse_cpu_list(text: str) -> frozenset[int]:
    """Ids of a list such as ``"0-3,8"``; what is no number is left out."""
    ids: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit() and (last or first).isdigit():
            ids.update(range(int(first), int(last or first) + 1))
    return frozenset(ids)


def parse_cpu_max(text: str) -> float | None:
    """Cores of version 2's cpu.max, ``"150000 100000"`` or ``"max 100000"``; None for no limit."""
    words = text.split()
    if len(words) != 2 or not words[0].isdigit() or not words[1].isdigit() or not int(words[1]):
        return None
    return int(words[0]) / int(words[1])


def parse_bytes(text: str) -> int:
    """A memory limit in bytes; 0 for none."""
    return int(text) if text.isdigit() and int(text) < _NO_LIMIT_BYTES else 0


def parse_groups(text: str) -> dict[str, str]:
    """Our group by controller from the text of /proc/self/cgroup; version 2's by the empty name."""
    groups = {}
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, separator, path = rest.partition(":")
        if separator:
            groups.update(dict.fromkeys(controllers.split(","), path))
    return groups


def read_limits(system: System) -> Limits:
    """The limits of this process."""
    groups = parse_groups(peek(system, "/proc/self/cgroup"))
    mounts = parse_mountinfo(peek(system, "/proc/self/mountinfo"))
    limits = _Tightest()
    for mount in mounts:
        if mount.file_system == "cgroup2":
            for directory in _upwards(mount, groups.get("", "/")):
                limits.take_version_2(system, directory)
        elif mount.file_system == "cgroup":
            for controller in ("cpu", "cpuset", "memory"):
                if controller in mount.options:
                    for directory in _upwards(mount, groups.get(controller, "/")):
                        limits.take_version_1(system, directory, controller)
    return limits.limits()


def _upwards(mount: Mount, group: str) -> Iterator[str]:
    """Directories of `group` and of those above it, as far as they can be seen below the mount point."""
    root = mount.root.rstrip("/")
    # Inside a container the group may be named as the host sees it while its directory alone is mounted.
    below = group[len(root) :] if group == root or group.startswith(f"{root}/") else ""
    parts = [part for part in below.split("/") if part not in ("", "..")]
    for count in range(len(parts), -1, -1):
        yield "/".join((mount.point, *parts[:count]))


class _Tightest:
    """Limits met so far."""

    def __init__(self) -> None:
        self._quotas: list[float] = []
        self._cpus: list[frozenset[int]] = []
        self._memory: list[tuple[int, int]] = []

    def take_version_2(self, system: System, directory: str) -> None:
        quota = parse_cpu_max(peek(system, f"{directory}/cpu.max"))
        if quota:
            self._quotas.append(quota)
        self._take_cpus(peek(system, f"{directory}/cpuset.cpus.effective"))
        # Above memory.high the kernel slows a group down until it is of no use, so it is a limit as well.
        found = (parse_bytes(peek(system, f"{directory}/memory.{name}")) for name in ("max", "high"))
        if bounds := [limit for limit in found if limit]:
            used, files = peek(system, f"{directory}/memory.current"), peek(system, f"{directory}/memory.stat")
            self._take_memory(min(bounds), used, files, "inactive_file")

    def take_version_1(self, system: System, directory: str, controller: str) -> None:
        if controller == "cpu":
            words = (peek(system, f"{directory}/cpu.cfs_{name}_us") for name in ("quota", "period"))
            quota = parse_cpu_max(" ".join(words))
            if quota:
                self._quotas.append(quota)
        elif controller == "cpuset":
            self._take_cpus(
                peek(system, f"{directory}/cpuset.effective_cpus") or peek(system, f"{directory}/cpuset.cpus")
            )
        elif limit := parse_bytes(peek(system, f"{directory}/memory.limit_in_bytes")):
            used, files = peek(system, f"{directory}/memory.usage_in_bytes"), peek(system, f"{directory}/memory.stat")
            self._take_memory(limit, used, files, "total_inactive_file")

    def _take_cpus(self, text: str) -> None:
        if ids := parse_cpu_list(text):
            self._cpus.append(ids)

    def _take_memory(self, limit: int, used: str, statistics: str, cached: str) -> None:
        # Pages of files that nobody uses are given up before anything is refused.
        lines = (line.split() for line in statistics.splitlines())
        spare = next((int(words[1]) for words in lines if words[:1] == [cached] and words[1].isdigit()), 0)
        taken = max(int(used) - spare, 0) if used.isdigit() else 0
        self._memory.append((limit, max(limit - taken, 0)))

    def limits(self) -> Limits:
        return Limits(
            quota=min(self._quotas, default=None),
            cpus=frozenset.intersection(*self._cpus) if self._cpus else None,
            memory=min((limit for limit, _ in self._memory), default=0),
            memory_left=min((left for _, left in self._memory), default=None),
        )
