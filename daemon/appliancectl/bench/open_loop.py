"""An open loop: requests are sent when they are due, whatever became of those before."""

import asyncio
import selectors
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from itertools import cycle, takewhile
from typing import Final

from appliance_client import ApplianceError, AsyncClient
from appliancectl.bench.load import Load
from appliancectl.bench.progress import Advance
from appliancectl.bench.tally import Tally, check_passing

#: Part of a step's duration that is run before counting begins.
_WARM_UP: Final = 0.1

_CONNECT_SECONDS: Final = 10.0

#: How long after the last one was due a request may still be answered.
_DRAIN_SECONDS: Final = 10.0

#: Requests waiting for an answer at one time, at most: what a stalled daemon costs here stays bounded.
_MAX_IN_FLIGHT: Final = 65536


def run_open_loop(load: Load, due_s: Iterator[float], advance: Advance) -> Tally:
    """Send requests for the load's duration, each when it is due.

    A latency is counted from the moment the request was due, so that a daemon which stalls, or a sender that lags, is
    not flattered by the requests it kept from being sent ("coordinated omission", Gil Tene).

    Args:
        load: What is asked.
        due_s: Seconds from the start, ascending, without end.
        advance: Told how far it is.

    Raises:
        ApplianceError: What every further request would meet too.
    """
    with asyncio.Runner(loop_factory=_precise_loop) as runner:
        return runner.run(_run(load, due_s, advance))


def _precise_loop() -> asyncio.AbstractEventLoop:
    """A loop that wakes to the microsecond: epoll, the default, counts in milliseconds and rounds up."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


async def _run(load: Load, due_s: Iterator[float], advance: Advance) -> Tally:
    tally = Tally(load.timeout_s)
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(load.target.async_client()) for _ in range(load.clients)]
        for client in clients:
            await client.server_live(timeout=_CONNECT_SECONDS)
        loop = _OpenLoop(load, clients, tally)
        try:
            await loop.run(due_s, advance)
        except* ApplianceError as group:
            raise group.exceptions[0] from None
    return tally


class _OpenLoop:
    """Sends, counts what comes back, and does not let the one wait for the other.

    Args:
        load: What is asked.
        clients: Take turns.
        tally: Where it is counted.
    """

    def __init__(self, load: Load, clients: list[AsyncClient], tally: Tally) -> None:
        self._load = load
        self._clients = cycle(clients)
        self._tally = tally
        self._in_flight = 0
        self._last_answer = 0.0
        now = time.monotonic()
        self._begin = now
        self._counted_from = now + load.duration_s * _WARM_UP
        self._end = self._counted_from + load.duration_s

    async def run(self, due_s: Iterator[float], advance: Advance) -> None:
        """Send everything that is due until the end, and wait for the answers."""
        tally = self._tally
        begin = told = self._begin
        try:
            async with asyncio.timeout_at(self._end + _DRAIN_SECONDS), asyncio.TaskGroup() as requests:
                for offset in takewhile(lambda offset: begin + offset < self._end, due_s):
                    due = begin + offset
                    now = time.monotonic()
                    if due > now:
                        if now - told > 0.1:
                            advance(now - told)
                            told = now
                        await asyncio.sleep(due - now)
                    is_counted = due >= self._counted_from
                    tally.offered += is_counted
                    if self._in_flight < _MAX_IN_FLIGHT:
                        self._in_flight += 1
                        tally.in_flight = max(tally.in_flight, self._in_flight)
                        requests.create_task(self._request(due, is_counted))
                    elif is_counted:
                        tally.errors["not-sent"] += 1
                await asyncio.sleep(self._end - time.monotonic())
        except TimeoutError:
            pass  # what is left was counted when it was cancelled
        tally.elapsed_s = max(self._end, self._last_answer) - self._counted_from

    async def _request(self, due: float, is_counted: bool) -> None:
        load, tally = self._load, self._tally
        sent = time.monotonic()
        try:
            left_s = None if load.timeout_s is None else due + load.timeout_s - sent
            answer = await load.send(next(self._clients), left_s)
            now = time.monotonic()
            if is_counted:
                tally.answered(now - due, answer.timings)
                self._last_answer = now
        except ApplianceError as error:
            check_passing(error)
            if is_counted:
                tally.refused(error)
        except asyncio.CancelledError:
            if is_counted:
                tally.errors["unanswered"] += 1
            raise
        finally:
            self._in_flight -= 1
            if is_counted:
                tally.lateness_s.append(sent - due)
