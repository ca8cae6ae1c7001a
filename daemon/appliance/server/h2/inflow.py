"""Which stream may send how much: windows for messages larger than the first window."""

from collections.abc import Callable
from typing import Final

from appliance.server.h2.stream import Stream

#: What a stream may send before anything is known about its message.
FIRST_WINDOW: Final = 262144


class Inflow:
    """Lends windows out of one budget, oldest need first, so that large messages finish one after the other.

    Args:
        budget: Bytes lent at once; one message larger than this still gets its window when nothing else is lent.
        give: Sends the window.
    """

    def __init__(self, budget: int, give: Callable[[Stream, int], None]) -> None:
        self._budget = budget
        self._give = give
        self._lent: dict[int, int] = {}
        self._total = 0
        self._waiting: dict[int, tuple[Stream, int]] = {}

    def want(self, stream: Stream, size: int) -> None:
        """Lend `size` bytes to a stream, now or when others are done. A stream that waits already goes on waiting."""
        if stream.id in self._waiting:
            return
        if self._waiting or not self._has_room(size):
            self._waiting[stream.id] = (stream, size)
        else:
            self._lend(stream, size)

    def release(self, stream: Stream) -> None:
        """The stream's message is complete, or the stream is closed."""
        self._total -= self._lent.pop(stream.id, 0)
        while self._waiting:
            number, (first, size) = next(iter(self._waiting.items()))
            if first.is_open and not first.is_received:
                if not self._has_room(size):
                    return
                self._lend(first, size)
            del self._waiting[number]

    def _has_room(self, size: int) -> bool:
        return not self._total or self._total + size <= self._budget

    def _lend(self, stream: Stream, size: int) -> None:
        self._lent[stream.id] = self._lent.get(stream.id, 0) + size
        self._total += size
        self._give(stream, size)
