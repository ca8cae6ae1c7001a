"""When to try again, and how long a caller is willing to wait."""

import random
import time
from typing import Final

from appliance_client.errors import ApplianceError, DeadlineExceeded

#: How long the client waits beyond the timeout for the daemon's own word on it.
GRACE_SECONDS: Final = 0.25

_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 2.0


class Deadline:
    """A point in time, or none at all.

    Args:
        timeout: Seconds from now, or None for no limit.
    """

    __slots__ = ("_at",)

    def __init__(self, timeout: float | None) -> None:
        self._at = None if timeout is None else time.monotonic() + timeout

    def remaining(self) -> float | None:
        """Seconds left, or None for no limit.

        Raises:
            DeadlineExceeded: None is left.
        """
        if self._at is None:
            return None
        left = self._at - time.monotonic()
        if left <= 0:
            raise _passed()
        return left

    def allows(self, pause: float) -> bool:
        """True where there is time left after `pause` seconds."""
        return self._at is None or time.monotonic() + pause < self._at


def microseconds(timeout: float | None) -> int:
    """A timeout as the wire carries it: 0 for none, and never 0 for a short one.

    Raises:
        DeadlineExceeded: The timeout is not positive.
    """
    if timeout is None:
        return 0
    if timeout <= 0:
        raise _passed()
    return max(1, int(timeout * 1e6))


def pause_before(attempt: int) -> float:
    """Seconds to wait before retry number `attempt`, counted from 0: doubling, bounded, spread by half."""
    longest = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(attempt, 16))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, guards nothing


def should_retry(error: ApplianceError, attempt: int, retries: int, pause: float, deadline: Deadline) -> bool:
    """True where the same request may succeed later and there is an attempt and time left."""
    return error.is_retryable and attempt < retries and deadline.allows(pause)


def _passed() -> DeadlineExceeded:
    return DeadlineExceeded("cannot send the request: its timeout passed before it could be sent")
