"""A worker's crashes, and what follows from them: how long to wait, and when to stop trying."""

from typing import Final

from appliance.config import WorkersSection

_MINUTE_NS: Final = 60_000_000_000
_BACKOFF_LIMIT_SECONDS: Final = 30.0
#: A quarantine that was this long ago makes the next one no longer.
_FORGET_NS: Final = 3_600_000_000_000
#: Quarantines double at most this often.
_MAX_DOUBLINGS: Final = 4


class CrashHistory:
    """Crashes of one instance's worker. Times are nanoseconds of CLOCK_MONOTONIC."""

    def __init__(self, settings: WorkersSection) -> None:
        self._settings = settings
        self._crashes_ns: list[int] = []
        self._backoff_seconds = 0.0
        self._quarantines = 0
        self._released_ns = 0

    def __len__(self) -> int:
        return len(self._crashes_ns)

    def note(self, now_ns: int) -> None:
        """The worker crashed, or could not be started."""
        self._crashes_ns = [*(crash for crash in self._crashes_ns if now_ns - crash < _MINUTE_NS), now_ns]
        if len(self._crashes_ns) == 1:
            self._backoff_seconds = 0.0

    def backoff_seconds(self) -> float:
        """How long to wait before the next start: not at all after a first crash, then ever longer."""
        if len(self._crashes_ns) > 1:
            longer = max(self._backoff_seconds * 2, self._settings.backoff_seconds)
            self._backoff_seconds = min(longer, _BACKOFF_LIMIT_SECONDS)
        return self._backoff_seconds

    def quarantine_seconds(self, now_ns: int) -> float:
        """How long the model is to be left alone; 0 while it may be tried again."""
        if len(self._crashes_ns) < self._settings.crashes_to_quarantine:
            return 0.0
        if now_ns - self._released_ns > _FORGET_NS:
            self._quarantines = 0
        seconds = self._settings.quarantine_seconds * (1 << min(self._quarantines, _MAX_DOUBLINGS))
        self._quarantines += 1
        return seconds

    def release(self, now_ns: int) -> None:
        """A quarantine is over; what led to it is forgotten."""
        self._crashes_ns.clear()
        self._released_ns = now_ns
        self._backoff_seconds = 0.0
