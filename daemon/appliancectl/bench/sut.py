"""Systems under test, as LoadGen calls them: how its queries reach what answers them.

LoadGen calls from its own thread with the interpreter's lock held, and no exception may reach it.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NoReturn, TypeVar

import mlperf_loadgen

_T = TypeVar("_T")


class DirectSystem:
    """Answers in LoadGen's own thread, one sample after another: for the scenario that has one in flight.

    Args:
        ask: Answers a sample, by its index.
        fail: Ends the process with the error it is given.
    """

    def __init__(self, ask: Callable[[int], object], fail: Callable[[BaseException], NoReturn]) -> None:
        self._ask = ask
        self._fail = fail

    def issue(self, identifiers: list[int], indices: list[int]) -> None:
        """Answer a query."""
        try:
            for identifier, index in zip(identifiers, indices, strict=True):
                self._ask(index)
                _complete(identifier)
        except BaseException as error:
            self._fail(error)


class LoopSystem:
    """Answers on an event loop in a thread of its own, many samples at a time.

    Args:
        fail: Ends the process with the error it is given.
        window: Samples in flight, at most; others wait here.
    """

    def __init__(self, fail: Callable[[BaseException], NoReturn], window: int) -> None:
        self._ask: Callable[[int], Awaitable[object]]
        self._fail = fail
        self._window = window
        self._waiting: deque[tuple[int, int]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="requests")
        self._thread.start()

    def answer_with(self, ask: Callable[[int], Awaitable[object]]) -> None:
        """Set what answers a sample, by its index."""
        self._ask = ask

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run something on the loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def issue(self, identifiers: list[int], indices: list[int]) -> None:
        """Take in a query."""
        try:
            samples = list(zip(identifiers, indices, strict=True))
            self._loop.call_soon_threadsafe(self._take, samples)
        except BaseException as error:
            self._fail(error)

    def close(self) -> None:
        """End the thread; nothing may be in flight."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _take(self, samples: list[tuple[int, int]]) -> None:
        self._waiting.extend(samples)
        self._send()

    def _send(self) -> None:
        while self._waiting and len(self._tasks) < self._window:
            task = self._loop.create_task(self._answer(*self._waiting.popleft()))
            self._tasks.add(task)
            task.add_done_callback(self._done)

    async def _answer(self, identifier: int, index: int) -> None:
        await self._ask(index)
        _complete(identifier)

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        error = task.exception()
        if error is not None:
            self._fail(error)
        self._send()


def _complete(identifier: int) -> None:
    mlperf_loadgen.QuerySamplesComplete([mlperf_loadgen.QuerySampleResponse(identifier, 0, 0)])
