"""How much of the processor others used while something was measured, and whether this process was suspended."""

import os
import resource
import signal
import time
from collections.abc import Collection
from pathlib import Path
from types import FrameType
from typing import Final

_STAT: Final = Path("/proc/stat")
_TICKS: Final = os.sysconf("SC_CLK_TCK")

#: Columns of a core's line in /proc/stat (proc(5)) that mean work: user, nice, system, irq, softirq, steal. The time of
#: guests is part of user and nice.
_WORK: Final = (1, 2, 3, 6, 7, 8)


def busy_seconds(stat: str, cores: Collection[int]) -> float | None:
    """Seconds that `cores` have worked since boot, by the text of /proc/stat; None where they are not all listed."""
    wanted = {f"cpu{core}" for core in cores}
    ticks = 0
    for line in stat.splitlines():
        fields = line.split()
        if fields and fields[0] in wanted:
            wanted.remove(fields[0])
            if len(fields) <= _WORK[-1] or not all(field.isdecimal() for field in fields[1:]):
                return None
            ticks += sum(int(fields[column]) for column in _WORK)
    return None if wanted else ticks / _TICKS


class Window:
    """A stretch of time, from its construction on, and what others did in it."""

    def __init__(self) -> None:
        self._cores = os.sched_getaffinity(0)
        self._busy = _busy_now(self._cores)
        self._own = _own_seconds()
        self._began_ns = time.monotonic_ns()

    @property
    def elapsed_ns(self) -> int:
        """How long it has lasted."""
        return time.monotonic_ns() - self._began_ns

    def core_seconds(self) -> tuple[float, float]:
        """Core time that other processes used, and all there was; nobody's where the system does not tell."""
        whole = self.elapsed_ns / 1e9 * len(self._cores)
        own = _own_seconds() - self._own
        busy = _busy_now(self._cores)
        if self._busy is None or busy is None:
            return 0.0, whole
        return max(busy - self._busy - own, 0.0), whole


def _busy_now(cores: Collection[int]) -> float | None:
    try:
        return busy_seconds(_STAT.read_text(), cores)
    except (OSError, UnicodeDecodeError):
        return None


def _own_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Suspensions:
    """Counts how often this process was continued after a stop; a stop itself cannot be caught.

    The clock goes on while a process is stopped, so what was being timed then says nothing.
    """

    def __init__(self) -> None:
        self.count = 0
        signal.signal(signal.SIGCONT, self._continued)

    def _continued(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
