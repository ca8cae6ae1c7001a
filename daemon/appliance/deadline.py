"""Deadlines of calls: one heap and one timer for a whole loop, nothing at all for calls without a deadline."""

import asyncio
import heapq
import time
from collections.abc import Callable
from typing import Final

from appliance.call import FINISHED, Call

#: Finished calls in the heap before it is rebuilt.
_MAX_STALE: Final = 4096


class Deadlines:
    """Tells of calls whose deadline passed before they finished."""

    def __init__(self, loop: asyncio.AbstractEventLoop, expire: Callable[[Call], None]) -> None:
        self._loop = loop
        self._expire = expire
        self._heap: list[tuple[int, int, Call]] = []
        self._sequence = 0
        self._limit = _MAX_STALE
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ns = 0

    def add(self, call: Call) -> None:
        """Watch `call`, which has a deadline."""
        self._sequence += 1
        heapq.heappush(self._heap, (call.deadline_ns, self._sequence, call))
        if len(self._heap) > self._limit:
            self._heap = [entry for entry in self._heap if entry[2].state is not FINISHED]
            heapq.heapify(self._heap)
            self._limit = max(_MAX_STALE, 2 * len(self._heap))
        if self._timer is None or call.deadline_ns < self._timer_ns:
            self._arm(call.deadline_ns)

    def _arm(self, deadline_ns: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        delay = max(0.0, (deadline_ns - time.monotonic_ns()) / 1e9)
        self._timer_ns = deadline_ns
        self._timer = self._loop.call_later(delay, self._fire)

    def _fire(self) -> None:
        self._timer = None
        heap = self._heap
        now = time.monotonic_ns()
        while heap and (heap[0][0] <= now or heap[0][2].state is FINISHED):
            call = heapq.heappop(heap)[2]
            if call.state is not FINISHED:
                self._expire(call)
        if heap:
            self._arm(heap[0][0])
