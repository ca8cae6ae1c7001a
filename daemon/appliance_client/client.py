"""The blocking client."""

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from appliance_client import calls, endpoints
from appliance_client.channel import StaleConnection
from appliance_client.connection import Connection
from appliance_client.errors import ApplianceError, ConnectionLost
from appliance_client.pipeline import Pipeline
from appliance_client.regions import DEFAULT_POOL_BYTES, DEFAULT_THRESHOLD_BYTES
from appliance_client.retry import Deadline, microseconds, pause_before, should_retry
from appliance_client.scheduling import scheduled

if TYPE_CHECKING:
    from appliance_client.answer import Answer, Parameter
    from appliance_client.messages import Codec

_T = TypeVar("_T")

#: Longest answer accepted unless the caller says otherwise.
DEFAULT_MAX_ANSWER_BYTES: Final = 1 << 30

_CLIENTS: "Final[weakref.WeakSet[Client]]" = weakref.WeakSet()


class Client:
    """Calls models over the daemon's native socket.

    Connects on first use and again whenever the connection was lost. Threads may share one client: each call takes an
    idle connection or opens one, up to `max_connections`, so calls do not wait for one another. A client used in a
    forked child opens connections of its own.

    Inputs are numpy arrays, whose type gives the datatype; lists of numbers, which numpy makes into INT64 or FP64; str,
    bytes and lists of them, which become BYTES; or a `Tensor`, which names its datatype. No dimension is added: a model
    with a batch dimension wants it in the value.

    Args:
        path: The native socket; by default ``$APPLIANCE_SOCKET``, else the user's own daemon, else the service.
        timeout: Seconds each call may take unless it says otherwise; None for no limit.
        retries: How often a call that failed before any answer, with an error that is retryable, is tried again.
        connect_timeout: Seconds to connect and shake hands.
        max_connections: Connections open at most.
        max_answer_bytes: Longest answer accepted.
        region_threshold: Bytes from which an input travels in shared memory instead of the socket; None for never.
        region_pool_bytes: Shared memory a connection keeps for the next call.

    Every method raises an `ApplianceError`: the daemon's own, or `DaemonUnreachable`, `ConnectionLost`,
    `DeadlineExceeded`, `ProtocolError`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        timeout: float | None = None,
        retries: int = 0,
        connect_timeout: float = 5.0,
        max_connections: int = 16,
        max_answer_bytes: int = DEFAULT_MAX_ANSWER_BYTES,
        region_threshold: int | None = DEFAULT_THRESHOLD_BYTES,
        region_pool_bytes: int = DEFAULT_POOL_BYTES,
    ) -> None:
        self._path = None if path is None else Path(path)
        self._timeout = timeout
        self._retries = retries
        self._connect_timeout = connect_timeout
        self._max_connections = max_connections
        self._max_answer_bytes = max_answer_bytes
        self._region_threshold = region_threshold
        self._region_pool_bytes = region_pool_bytes
        self._codec: Codec | None = None
        self._is_closed = False
        self._start_empty()
        _CLIENTS.add(self)

    def _start_empty(self) -> None:
        # Idle connections are taken and put back by single operations of the deque, without the lock; the lock and its
        # condition serve only the opening of connections and those who wait because all are busy.
        self._idle: deque[Connection] = deque()
        self._open_count = 0
        self._waiting = 0
        self._returned = threading.Condition()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every idle connection now and every busy one when its call is done. Safe to call again."""
        self._is_closed = True
        while True:
            try:
                self._idle.pop().close()
            except IndexError:
                return

    def infer(
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
        """Send one request and wait for its answer.

        Args:
            model: The model's name.
            inputs: Values by input name.
            outputs: Names of the outputs wanted; empty for all.
            version: The model's version; empty for its default.
            timeout: Seconds the call may take.
            parameters: Parameters of the request, such as those of a generation.
            priority: 1 is the most urgent; 0 stands for the model's default. ``"interactive"``, ``"default"`` and
                ``"background"`` are 1, 2 and 3, the levels of a model that has no others.
            sequence_id: The sequence it belongs to, for a model that keeps state: a number or a string of the caller's
                choice; 0 or empty for none.
            sequence_start: It is the first request of the sequence.
            sequence_end: It is the last.

        Raises:
            InvalidRequest: A value is no tensor, or the model does not take it, or gives several answers.
            ApplianceError: As the class says.
        """
        codec = self._codec or self._load_codec()
        if priority or sequence_id or sequence_start or sequence_end:
            parameters = scheduled(parameters, priority, sequence_id, sequence_start, sequence_end)
        request = codec.request(model, inputs, outputs, version, parameters)
        if timeout is None:
            timeout = self._timeout
        return self._attempt(lambda connection, left: connection.infer(codec, request, left), timeout)

    def results(
        self,
        model: str,
        inputs: Mapping[str, Any],
        *,
        outputs: Sequence[str] = (),
        version: str = "",
        timeout: float | None = None,
        parameters: "Mapping[str, Parameter] | None" = None,
        priority: int | str = 0,
    ) -> "Iterator[Answer]":
        """Send one request and iterate over its answers, for models that give several.

        A last answer without outputs, which only says that it is the last, is not given. Leaving the loop early
        withdraws the request. Arguments as `infer`; the timeout is for all answers together.
        """
        codec = self._codec or self._load_codec()
        if priority:
            parameters = scheduled(parameters, priority)
        request = codec.request(model, inputs, outputs, version, parameters)
        if timeout is None:
            timeout = self._timeout

        with self._lent(timeout) as connection:
            timeout_us = microseconds(timeout)
            deadline = connection.begin(timeout)
            identifier = connection.send(codec, request, timeout_us, deadline)
            has_more = True
            while has_more:
                _, outcome, has_more = connection.receive(codec, {identifier}, deadline)
                if isinstance(outcome, ApplianceError):
                    raise outcome
                if has_more or len(outcome):
                    yield outcome

    def stream(
        self,
        model: str,
        inputs: Iterable[Mapping[str, Any]],
        *,
        max_in_flight: int = 16,
        outputs: Sequence[str] = (),
        version: str = "",
        timeout: float | None = None,
        priority: int | str = 0,
        return_errors: bool = False,
    ) -> "Iterator[Answer | ApplianceError]":
        """Send many requests, several at a time on one connection, and iterate over their answers in order.

        Args:
            model: The model's name.
            inputs: Values by input name for each request; read only as far ahead as `max_in_flight`.
            max_in_flight: Requests sent and not yet answered, at most; the daemon's own bound applies too.
            outputs: Names of the outputs wanted; empty for all.
            version: The model's version; empty for its default.
            timeout: Seconds each request may take.
            priority: Of each request; see `infer`.
            return_errors: Give the error in the place of the answer it stands for. Otherwise the first error is raised
                in its turn and the rest is withdrawn.
        """
        codec = self._codec or self._load_codec()
        if timeout is None:
            timeout = self._timeout
        parameters = scheduled(None, priority) if priority else None
        source = iter(inputs)
        is_exhausted = False
        with self._lent(timeout) as connection:
            bound = min(max_in_flight, connection.welcome.max_requests_in_flight)
            pipeline = Pipeline(connection, codec, timeout)
            while True:
                while not is_exhausted and len(pipeline) < bound and not pipeline.is_ready():
                    values = next(source, None)
                    if values is None:
                        is_exhausted = True
                    else:
                        pipeline.send(model, values, outputs, version, parameters)
                if not len(pipeline):
                    return
                outcome = pipeline.take()
                if isinstance(outcome, ApplianceError) and not return_errors:
                    raise outcome
                yield outcome

    def server_live(self, *, timeout: float | None = None) -> bool:
        """True where the daemon runs."""
        return self._call(calls.server_live(), timeout)

    def server_ready(self, *, timeout: float | None = None) -> bool:
        """True where the daemon is ready for inference."""
        return self._call(calls.server_ready(), timeout)

    def server_metadata(self, *, timeout: float | None = None) -> calls.ServerMetadata:
        """The daemon's name, version and extensions."""
        return self._call(calls.server_metadata(), timeout)

    def model_ready(self, model: str, version: str = "", *, timeout: float | None = None) -> bool:
        """True where the model answers requests."""
        return self._call(calls.model_ready(model, version), timeout)

    def model_metadata(self, model: str, version: str = "", *, timeout: float | None = None) -> calls.ModelMetadata:
        """Inputs and outputs of a model."""
        return self._call(calls.model_metadata(model, version), timeout)

    def statistics(
        self, model: str = "", version: str = "", *, timeout: float | None = None
    ) -> tuple[calls.ModelStatistics, ...]:
        """Counters of a model, or of all."""
        return self._call(calls.statistics(model, version), timeout)

    def repository_index(self, *, ready: bool = False, timeout: float | None = None) -> tuple[calls.ModelIndex, ...]:
        """Every model of the repository, or only those that are ready."""
        return self._call(calls.repository_index(ready), timeout)

    def load(self, model: str, *, timeout: float | None = None) -> None:
        """Load a model and wait until it is ready; needs the admin role."""
        self._call(calls.load(model), timeout)

    def unload(self, model: str, *, timeout: float | None = None) -> None:
        """Unload a model; needs the admin role."""
        self._call(calls.unload(model), timeout)

    def _call(self, call: calls.Call[_T], timeout: float | None) -> _T:
        if timeout is None:
            timeout = self._timeout
        return self._attempt(lambda connection, left: connection.call(call, left), timeout)

    def _load_codec(self) -> "Codec":
        from appliance_client.messages import Codec  # brings numpy, which only inference needs

        self._codec = codec = Codec()
        return codec

    def _attempt(self, action: Callable[[Connection, float | None], _T], timeout: float | None) -> _T:
        """Run `action` on an idle connection, on a fresh one where that was stale, and again as `retries` allows."""
        deadline = Deadline(timeout) if self._retries else None
        attempt = 0
        while True:
            try:
                try:
                    connection = self._idle.pop()
                except IndexError:
                    deadline = deadline or Deadline(timeout)
                    connection = self._open(deadline)
                try:
                    return action(connection, timeout if deadline is None else deadline.remaining())
                finally:
                    self._give_back(connection)
            except StaleConnection:
                continue
            except ApplianceError as error:
                pause = pause_before(attempt)
                if deadline is None or not should_retry(error, attempt, self._retries, pause, deadline):
                    raise
            attempt += 1
            time.sleep(pause)

    @contextmanager
    def _lent(self, timeout: float | None) -> Iterator[Connection]:
        """A connection for as long as the context lasts; one that the other end has closed is not lent."""
        deadline = Deadline(timeout)
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = self._open(deadline)
                break
            if connection.is_silent:
                break
            self._drop(connection)
        try:
            yield connection
        finally:
            self._give_back(connection)

    def _open(self, deadline: Deadline) -> Connection:
        """A new connection, or an idle one as soon as one is given back where no more may be opened."""
        with self._returned:
            while True:
                if self._is_closed:
                    raise ConnectionLost("cannot send the request: the client is closed", is_retryable=False)
                if self._open_count < self._max_connections:
                    self._open_count += 1
                    break
                self._waiting += 1
                try:
                    # After the count is up: who gives back either sees it or has put the connection where we look.
                    return self._idle.pop()
                except IndexError:
                    self._returned.wait(deadline.remaining())
                finally:
                    self._waiting -= 1
        try:
            left = deadline.remaining()
            return Connection(
                self._path or endpoints.inference_socket(),
                connect_timeout=self._connect_timeout if left is None else min(left, self._connect_timeout),
                max_answer_bytes=self._max_answer_bytes,
                region_threshold=self._region_threshold,
                pool_bytes=self._region_pool_bytes,
            )
        except BaseException:
            self._forget_one()
            raise

    def _give_back(self, connection: Connection) -> None:
        if self._is_closed or not connection.is_idle:
            self._drop(connection)
            return
        self._idle.append(connection)
        if self._waiting:
            with self._returned:
                self._returned.notify()
        if self._is_closed:
            self.close()

    def _drop(self, connection: Connection) -> None:
        connection.close()
        self._forget_one()

    def _forget_one(self) -> None:
        with self._returned:
            self._open_count -= 1
            self._returned.notify()

    def _forget_all(self) -> None:
        """In a forked child: the connections are the parent's, and a thread that held the lock is gone."""
        for connection in self._idle:
            connection.close()
        self._start_empty()


def _after_fork() -> None:
    for client in list(_CLIENTS):
        client._forget_all()


os.register_at_fork(after_in_child=_after_fork)
