"""The client for asyncio."""

import asyncio
import os
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from appliance_client import calls, endpoints
from appliance_client.async_connection import AsyncConnection, complete
from appliance_client.client import DEFAULT_MAX_ANSWER_BYTES
from appliance_client.errors import ApplianceError, ConnectionLost, DeadlineExceeded, several_answers
from appliance_client.regions import DEFAULT_POOL_BYTES, DEFAULT_THRESHOLD_BYTES
from appliance_client.retry import GRACE_SECONDS, Deadline, microseconds, pause_before, should_retry
from appliance_client.scheduling import scheduled

if TYPE_CHECKING:
    from appliance_client.answer import Answer, Parameter
    from appliance_client.messages import Codec

_T = TypeVar("_T")


class AsyncClient:
    """Calls models over the daemon's native socket, any number of them at a time on one connection.

    Belongs to one event loop. Connects on first use and again whenever the connection was lost. Cancelling the task
    that awaits a call withdraws the request from the daemon. Encoding and decoding run on the loop: they copy a large
    input or answer once.

    Inputs and arguments as `appliance_client.client.Client`; the daemon's bound on requests in flight is kept by
    waiting.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        timeout: float | None = None,
        retries: int = 0,
        connect_timeout: float = 5.0,
        max_answer_bytes: int = DEFAULT_MAX_ANSWER_BYTES,
        region_threshold: int | None = DEFAULT_THRESHOLD_BYTES,
        region_pool_bytes: int = DEFAULT_POOL_BYTES,
    ) -> None:
        self._path = None if path is None else Path(path)
        self._timeout = timeout
        self._retries = retries
        self._connect_timeout = connect_timeout
        self._max_answer_bytes = max_answer_bytes
        self._region_threshold = region_threshold
        self._region_pool_bytes = region_pool_bytes
        self._codec: Codec | None = None
        self._current: AsyncConnection | None = None
        self._draining: list[AsyncConnection] = []
        self._opening = asyncio.Lock()
        self._is_closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close at once; calls under way fail as lost. Safe to call again."""
        self._is_closed = True
        for connection in (self._current, *self._draining):
            if connection is not None:
                connection.close()
        self._current = None
        self._draining.clear()

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, Any],
        *,
        outputs: Sequence[str] = (),
        version: str = "",
        timeout: float | None = None,
        parameters: "Mapping[str, Parameter] | None" = None,
        priority: int | str = 0,
        sequence_id: int | str = 0,
        sequence_start: bool = False,
        sequence_end: bool = False,
    ) -> "Answer":
        """Send one request and wait for its answer; arguments and errors as `Client.infer`."""
        codec = self._codec or self._load_codec()
        if priority or sequence_id or sequence_start or sequence_end:
            parameters = scheduled(parameters, priority, sequence_id, sequence_start, sequence_end)
        request = codec.request(model, inputs, outputs, version, parameters)

        async def once(connection: AsyncConnection, deadline: Deadline) -> "Answer":
            answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

            def receive(outcome: Any, has_more: bool) -> None:
                complete(answer, several_answers() if has_more else outcome)

            identifier = await connection.infer(codec, request, deadline, receive)
            try:
                return await answer
            finally:
                connection.cancel(identifier)

        return await self._attempt(once, timeout)

    async def results(
        self,
        model: str,
        inputs: Mapping[str, Any],
        *,
        outputs: Sequence[str] = (),
        version: str = "",
        timeout: float | None = None,
        parameters: "Mapping[str, Parameter] | None" = None,
        priority: int | str = 0,
    ) -> "AsyncGenerator[Answer, None]":
        """Send one request and iterate over its answers, for models that give several; as `Client.results`."""
        codec = self._codec or self._load_codec()
        if priority:
            parameters = scheduled(parameters, priority)
        request = codec.request(model, inputs, outputs, version, parameters)
        deadline = Deadline(self._timeout if timeout is None else timeout)
        arrived: asyncio.Queue[tuple[Any, bool]] = asyncio.Queue()
        connection = await self._connection(deadline)
        async with _Backstop(deadline):
            identifier = await connection.infer(codec, request, deadline, lambda *result: arrived.put_nowait(result))
        try:
            has_more = True
            while has_more:
                if arrived.empty():
                    async with _Backstop(deadline):
                        outcome, has_more = await arrived.get()
                else:
                    outcome, has_more = arrived.get_nowait()
                if isinstance(outcome, ApplianceError):
                    raise outcome
                if has_more or len(outcome):
                    yield outcome
        finally:
            connection.cancel(identifier)

    async def stream(
        self,
        model: str,
        inputs: Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]],
        *,
        max_in_flight: int = 16,
        outputs: Sequence[str] = (),
        version: str = "",
        timeout: float | None = None,
        priority: int | str = 0,
        return_errors: bool = False,
    ) -> "AsyncGenerator[Answer | ApplianceError, None]":
        """Send many requests, several at a time, and iterate over their answers in order.

        `inputs` may be an asynchronous iterable; an answer is given as soon as it is its turn, whether or not the next
        input has come. Otherwise as `Client.stream`.
        """
        source = inputs if isinstance(inputs, AsyncIterable) else _asynchronous(inputs)
        iterator = aiter(source)
        window: deque[asyncio.Task[Answer]] = deque()
        pull: asyncio.Task[Mapping[str, Any]] | None = None
        is_exhausted = False
        try:
            while True:
                if pull is None and not is_exhausted and len(window) < max(1, max_in_flight):
                    pull = asyncio.ensure_future(_next(iterator))
                awaited: list[asyncio.Task[Any]] = [*([pull] if pull else []), *([window[0]] if window else [])]
                if not awaited:
                    return
                await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
                if pull is not None and pull.done():
                    try:
                        values = pull.result()
                    except StopAsyncIteration:
                        is_exhausted = True
                    else:
                        call = self.infer(
                            model, values, outputs=outputs, version=version, timeout=timeout, priority=priority
                        )
                        window.append(asyncio.ensure_future(call))
                    pull = None
                while window and window[0].done():
                    first = window.popleft()
                    error = first.exception()
                    if error is None:
                        yield first.result()
                    elif return_errors and isinstance(error, ApplianceError):
                        yield error
                    else:
                        raise error
        finally:
            rest = [*window, *([pull] if pull else [])]
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

    async def server_live(self, *, timeout: float | None = None) -> bool:
        """True where the daemon runs."""
        return await self._call(calls.server_live(), timeout)

    async def server_ready(self, *, timeout: float | None = None) -> bool:
        """True where the daemon is ready for inference."""
        return await self._call(calls.server_ready(), timeout)

    async def server_metadata(self, *, timeout: float | None = None) -> calls.ServerMetadata:
        """The daemon's name, version and extensions."""
        return await self._call(calls.server_metadata(), timeout)

    async def model_ready(self, model: str, version: str = "", *, timeout: float | None = None) -> bool:
        """True where the model answers requests."""
        return await self._call(calls.model_ready(model, version), timeout)

    async def model_metadata(
        self, model: str, version: str = "", *, timeout: float | None = None
    ) -> calls.ModelMetadata:
        """Inputs and outputs of a model."""
        return await self._call(calls.model_metadata(model, version), timeout)

    async def statistics(
        self, model: str = "", version: str = "", *, timeout: float | None = None
    ) -> tuple[calls.ModelStatistics, ...]:
        """Counters of a model, or of all."""
        return await self._call(calls.statistics(model, version), timeout)

    async def repository_index(
        self, *, ready: bool = False, timeout: float | None = None
    ) -> tuple[calls.ModelIndex, ...]:
        """Every model of the repository, or only those that are ready."""
        return await self._call(calls.repository_index(ready), timeout)

    async def load(self, model: str, *, timeout: float | None = None) -> None:
        """Load a model and wait until it is ready; needs the admin role."""
        await self._call(calls.load(model), timeout)

    async def unload(self, model: str, *, timeout: float | None = None) -> None:
        """Unload a model; needs the admin role."""
        await self._call(calls.unload(model), timeout)

    async def _call(self, call: calls.Call[_T], timeout: float | None) -> _T:
        async def once(connection: AsyncConnection, deadline: Deadline) -> _T:
            return await connection.call(call, microseconds(deadline.remaining()))

        return await self._attempt(once, timeout)

    def _load_codec(self) -> "Codec":
        from appliance_client.messages import Codec  # brings numpy, which only inference needs

        self._codec = codec = Codec()
        return codec

    async def _attempt(self, once: Callable[[AsyncConnection, Deadline], Awaitable[_T]], timeout: float | None) -> _T:
        """Run `once` on the connection, and again as `retries` allows."""
        deadline = Deadline(self._timeout if timeout is None else timeout)
        attempt = 0
        while True:
            try:
                async with _Backstop(deadline):
                    return await once(await self._connection(deadline), deadline)
            except ApplianceError as error:
                pause = pause_before(attempt)
                if not should_retry(error, attempt, self._retries, pause, deadline):
                    raise
            attempt += 1
            await asyncio.sleep(pause)

    async def _connection(self, deadline: Deadline) -> AsyncConnection:
        """The connection, opened anew where it was lost or drains."""
        current = self._current
        if current is not None and current.is_usable and current.is_silent:
            return current
        async with self._opening:
            if self._current is not current and self._current is not None and self._current.is_usable:
                return self._current  # another task was faster
            if self._is_closed:
                raise ConnectionLost("cannot send the request: the client is closed", is_retryable=False)
            self._draining = [old for old in (*self._draining, self._current) if old is not None and not old.is_closed]
            self._current = None
            left = deadline.remaining()
            self._current = connection = await AsyncConnection.open(
                self._path or endpoints.inference_socket(),
                connect_timeout=self._connect_timeout if left is None else min(left, self._connect_timeout),
                max_answer_bytes=self._max_answer_bytes,
                region_threshold=self._region_threshold,
                pool_bytes=self._region_pool_bytes,
            )
            return connection


class _Backstop:
    """Bounds a wait by a deadline and the grace the daemon gets to say so itself."""

    __slots__ = ("_timeout",)

    def __init__(self, deadline: Deadline) -> None:
        left = deadline.remaining()
        self._timeout = None if left is None else asyncio.timeout(left + GRACE_SECONDS)

    async def __aenter__(self) -> None:
        if self._timeout is not None:
            await self._timeout.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timeout is not None:
            try:
                await self._timeout.__aexit__(kind, error, trace)
            except TimeoutError:
                raise DeadlineExceeded(
                    "cannot finish the request: the daemon did not answer within the timeout"
                ) from None


async def _next(iterator: AsyncIterator[_T]) -> _T:
    return await anext(iterator)


async def _asynchronous(values: Iterable[_T]) -> AsyncGenerator[_T, None]:
    for value in values:
        yield value
