"""One blocking connection to the daemon.

Time limits are the kernel's (SO_RCVTIMEO, SO_SNDTIMEO): a socket in Python's own timeout mode polls before every
receive, one system call more per request. They are set again only when the limit changes.
"""

import array
import math
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Final

from appliance_client.calls import Call
from appliance_client.endpoints import unreachable
from appliance_client.errors import (
    ApplianceError,
    ConnectionLost,
    DeadlineExceeded,
    InvalidRequest,
    ProtocolError,
)
from appliance_client.frames import HANDSHAKE_BYTES, Frame, FrameReader
from appliance_client.regions import Region, RegionPool
from appliance_client.retry import GRACE_SECONDS, microseconds
from appliance_client.wire import native

if TYPE_CHECKING:
    from typing import Any, TypeVar

    from appliance_client.answer import Answer
    from appliance_client.messages import Codec, Request

    _T = TypeVar("_T")

#: Requests up to this size are joined and sent at once; larger ones are gathered by the kernel.
JOIN_BYTES: Final = 65536

_TIMEVAL: Final = struct.Struct("@ll")
#: Id of a request, its answer or error, and whether more answers follow.
Outcome = tuple[int, "Answer | ApplianceError", bool]


class StaleConnection(ConnectionLost):
    """The other end had closed before a byte of the request was taken: it certainly did not run."""


class Connection:
    """Sends requests and receives answers on one socket; used by one thread at a time.

    Args:
        path: The native socket.
        connect_timeout: Seconds for connecting and the handshake.
        max_answer_bytes: Longest answer accepted.
        region_threshold: Bytes from which an input travels in a region; None for never.
        pool_bytes: Bytes of regions to keep.

    Attributes:
        welcome: What the daemon granted.

    Raises:
        DaemonUnreachable: Nothing listens there, or it may not be opened.
        ConnectionLost: The other end closed during the handshake.
        DeadlineExceeded: The handshake took too long.
        ProtocolError: The other end speaks something else.
    """

    def __init__(
        self,
        path: Path,
        *,
        connect_timeout: float,
        max_answer_bytes: int,
        region_threshold: int | None,
        pool_bytes: int,
    ) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._send = self._socket.send
        self._receive_into = self._socket.recv_into
        self._reader = FrameReader(HANDSHAKE_BYTES)
        self._arrived: deque[Frame] = deque()
        self._lent: dict[int, Region] = {}
        self._limit: float | None = None
        self._last_id = 0
        self._outstanding = 0
        self._was_used = False
        self._is_draining = False
        self._is_closed = False
        self._pool = RegionPool(0, 0)
        try:
            self._set_limit(connect_timeout)
            try:
                self._socket.connect(str(path))
            except OSError as problem:
                raise unreachable(path, problem) from None
            self.welcome = self._greet(time.monotonic() + connect_timeout)
        except BaseException:
            self.close()
            raise
        self._reader.max_body_bytes = max_answer_bytes
        regions = self.welcome.max_regions if self.welcome.max_descriptors_per_frame else 0
        self._pool = RegionPool(regions, self.welcome.max_region_bytes, pool_bytes)
        self._threshold: float = math.inf if region_threshold is None else region_threshold

    def _greet(self, deadline: float) -> native.Welcome:
        try:
            self._send(native.pack_hello())
        except OSError as problem:
            raise self._lost(problem) from None
        frame = self._next_frame(deadline)
        if frame.kind == native.ERROR:
            raise native.unpack_error(frame.body)
        if frame.kind != native.WELCOME:
            raise ProtocolError(f"cannot speak to the server: it answers hello with a frame of type {frame.kind}")
        return native.unpack_welcome(frame.body)

    @property
    def is_idle(self) -> bool:
        """True where the connection can take another caller: nothing outstanding, not closed, not draining."""
        return not (self._outstanding or self._is_draining or self._is_closed)

    @property
    def is_closed(self) -> bool:
        """True once closed."""
        return self._is_closed

    @property
    def is_silent(self) -> bool:
        """True where the other end has neither closed nor said anything since the last answer; asks the kernel."""
        if self._arrived or not self._reader.is_empty:
            return False
        try:
            self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def close(self) -> None:
        """Close at once; the daemon withdraws what was outstanding. Safe to call again."""
        self._is_closed = True
        self._socket.close()
        self._pool.close()
        for region in self._lent.values():
            region.close()
        self._lent.clear()

    def infer(self, codec: "Codec", request: "Request", timeout: float | None) -> "Answer":
        """One request and its one answer.

        Raises:
            ApplianceError: What the daemon answered, or what became of the connection.
        """
        timeout_us = microseconds(timeout)
        deadline = self.begin(timeout)
        identifier = self.send(codec, request, timeout_us, deadline)
        frame = self._next_frame(deadline)
        while frame.identifier != identifier or frame.kind != native.RESULT:
            outcome = self._outcome(codec, frame)
            if outcome is not None:
                raise self._unexpected(*outcome)
            frame = self._next_frame(deadline)
        if frame.flags & native.FLAG_MORE:
            raise several_answers()
        answer = self._answer(codec, frame)
        self._settle(identifier)
        return answer

    def call(self, call: "Call[_T]", timeout: float | None) -> "_T":
        """One method call and its reply.

        Raises:
            ApplianceError: What the daemon answered, or what became of the connection.
        """
        timeout_us = min(microseconds(timeout), native.MAX_TIMEOUT_US)
        deadline = self.begin(timeout)
        self._last_id = identifier = self._last_id + 1
        self._outstanding += 1
        self._send_all([native.pack_call(identifier, call.method, call.message, timeout_us)], deadline)
        while True:
            frame = self._next_frame(deadline)
            if frame.identifier == identifier and frame.kind == native.REPLY:
                self._settle(identifier)
                return call.read(bytes(frame.body))
            outcome = self._outcome(None, frame)
            if outcome is not None:
                raise self._unexpected(*outcome)

    def begin(self, timeout: float | None) -> float:
        """Set the time limit of what follows; gives the monotonic time at which the client stops waiting."""
        limit = None if timeout is None else timeout + GRACE_SECONDS
        if limit != self._limit:
            self._set_limit(limit)
        return math.inf if limit is None else time.monotonic() + limit

    def send(self, codec: "Codec", request: "Request", timeout_us: int, deadline: float) -> int:
        """Send one inference; gives the id its answers carry.

        Raises:
            InvalidRequest: It is longer than the server takes.
            ApplianceError: What became of the connection.
        """
        head = request.head
        tail_size = request.byte_size
        region = None
        if request.largest >= self._threshold and self._pool.is_usable:
            offsets, region_size = request.region_offsets()
            region = self._region(region_size, deadline)
            if region is not None:
                request.write(region.memory, offsets)
                head = codec.region_head(request, region.identifier, offsets)
                tail_size = 0
        if timeout_us > native.MAX_TIMEOUT_US:
            head, timeout_us = codec.long_timeout_head(head, timeout_us), 0
        length = len(head) + tail_size
        self._last_id = identifier = self._last_id + 1
        if region is not None:
            self._lent[identifier] = region
        if length > self.welcome.max_frame_bytes:
            self._return_region(identifier)
            raise too_long(length, self.welcome.max_frame_bytes)
        header = native.HEADER.pack(length, native.INFER, 0, 0, identifier, len(head), timeout_us)
        self._outstanding += 1
        if not tail_size:
            buffers: list[Any] = [header + head]
        elif length <= JOIN_BYTES:
            buffers = [header + head + request.tail()]
        else:
            buffers = [header + head, *request.buffers()]
        self._send_all(buffers, deadline)
        return identifier

    def receive(self, codec: "Codec", due: Container[int], deadline: float) -> Outcome:
        """The next outcome of one of the requests that are `due`, waiting for it.

        Raises:
            ApplianceError: What became of the connection.
        """
        while True:
            outcome = self._outcome(codec, self._next_frame(deadline))
            if outcome is not None:
                return self._checked(outcome, due)

    def receive_if_any(self, codec: "Codec", due: Container[int]) -> Outcome | None:
        """As `receive`, but None where nothing has come.

        Raises:
            ApplianceError: What became of the connection.
        """
        while True:
            frame = self._frame_if_any()
            if frame is None:
                if not self._receive_if_any():
                    return None
                continue
            outcome = self._outcome(codec, frame)
            if outcome is not None:
                return self._checked(outcome, due)

    def _checked(self, outcome: Outcome, due: Container[int]) -> Outcome:
        if outcome[0] not in due:
            self.close()
            raise _not_due(outcome[0])
        return outcome

    def _outcome(self, codec: "Codec | None", frame: Frame) -> Outcome | None:
        """What a frame means to a request; None where it means nothing to one."""
        identifier = frame.identifier
        if frame.kind == native.RESULT and codec is not None:
            answer = self._answer(codec, frame)
            has_more = bool(frame.flags & native.FLAG_MORE)
            if not has_more:
                self._settle(identifier)
            return identifier, answer, has_more
        if frame.kind == native.ERROR:
            error = self._error(frame)
            if identifier == 0:
                self.close()
                raise error
            self._settle(identifier)
            return identifier, error, False
        if frame.kind == native.GOAWAY:
            self._is_draining = True
            return None
        if frame.kind in (native.RELEASED, native.REGION_READY):
            return None
        self.close()
        raise ProtocolError(f"cannot read the answer: a frame of type {frame.kind} was not due")

    def _answer(self, codec: "Codec", frame: Frame) -> "Answer":
        try:
            return codec.answer(frame.head, frame.body, frame.is_owned)
        except ProtocolError:
            self.close()
            raise

    def _error(self, frame: Frame) -> ApplianceError:
        try:
            return native.unpack_error(frame.body)
        except ProtocolError:
            self.close()
            raise

    def _unexpected(self, identifier: int, outcome: "Answer | ApplianceError", has_more: bool) -> ApplianceError:
        """The error to raise for an outcome where one caller waits for one answer."""
        if isinstance(outcome, ApplianceError) and identifier == self._last_id:
            return outcome
        self.close()
        return _not_due(identifier)

    def _settle(self, identifier: int) -> None:
        self._outstanding -= 1
        self._was_used = True
        if self._lent:
            self._return_region(identifier)

    def _return_region(self, identifier: int) -> None:
        region = self._lent.pop(identifier, None)
        if region is not None:
            surplus = self._pool.give_back(region)
            if surplus is not None:
                self._send_all([native.pack_release(surplus.identifier)], math.inf)

    def _region(self, byte_size: int, deadline: float) -> Region | None:
        """A region of at least `byte_size`, or None where the inputs are to travel in the frame."""
        region = self._pool.take(byte_size)
        if region is not None:
            return region
        self._last_id = identifier = self._last_id + 1
        region, surplus = self._pool.make(identifier, byte_size)
        for old in surplus:
            self._send_all([native.pack_release(old.identifier)], deadline)
        if region is None:
            return None
        self._outstanding += 1
        self._send_all([native.pack_region(identifier, region.byte_size)], deadline, region.descriptor)
        region.forget_descriptor()
        early: list[Frame] = []
        while True:
            frame = self._next_frame(deadline)
            if frame.identifier != identifier:
                if frame.identifier:
                    early.append(_kept(frame))
                else:
                    self._outcome(None, frame)
                continue
            self._outstanding -= 1
            self._arrived.extendleft(reversed(early))
            if frame.kind == native.REGION_READY:
                return region
            error = self._error(frame)
            if not error.is_retryable:
                self._pool.refuse()
            self._pool.discard(region)
            return None

    def _send_all(self, buffers: "list[Any]", deadline: float, descriptor: int = -1) -> None:
        """Send buffers one after another.

        While answers are outstanding the daemon may be waiting for us to read them before it reads on, so a send that
        would block receives instead.
        """
        flags = socket.MSG_DONTWAIT if self._outstanding > 1 else 0
        is_first = True
        while buffers:
            try:
                if descriptor >= 0:
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
                    sent = self._socket.sendmsg(buffers, rights, flags)
                elif len(buffers) == 1:
                    sent = self._send(buffers[0], flags)
                else:
                    sent = self._socket.sendmsg(buffers, (), flags)
            except BlockingIOError:
                if not flags or time.monotonic() >= deadline:
                    raise self._late() from None
                self._receive_or_wait(deadline)
                continue
            except OSError as problem:
                error = self._lost(problem)
                if is_first and self._was_used and self._outstanding <= 1:
                    raise StaleConnection(str(error)) from None
                raise error from None
            is_first, descriptor = False, -1
            while buffers and sent >= len(buffers[0]):
                sent -= len(buffers.pop(0))
            if sent:
                buffers[0] = memoryview(buffers[0])[sent:]

    def _receive_or_wait(self, deadline: float) -> None:
        """Wait until the socket takes or holds bytes; take what it holds."""
        poller = select.poll()
        poller.register(self._socket, select.POLLIN | select.POLLOUT)
        wait = None if deadline == math.inf else max(0.0, deadline - time.monotonic()) * 1000
        poller.poll(wait)
        if self._receive_if_any():
            while (frame := self._frame_of_reader()) is not None:
                self._arrived.append(_kept(frame))

    def _next_frame(self, deadline: float) -> Frame:
        """The next frame, waiting for it.

        Raises:
            ApplianceError: What became of the connection; it is closed then.
        """
        while True:
            frame = self._frame_if_any()
            if frame is not None:
                return frame
            self._receive(deadline)

    def _frame_if_any(self) -> Frame | None:
        """The next frame among those already received."""
        return self._arrived.popleft() if self._arrived else self._frame_of_reader()

    def _frame_of_reader(self) -> Frame | None:
        try:
            return self._reader.next()
        except ProtocolError:
            self.close()
            raise

    def _receive_if_any(self) -> bool:
        """Receive without waiting; False where nothing has come."""
        try:
            count = self._receive_into(self._reader.space(), 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError as problem:
            raise self._lost(problem) from None
        if not count:
            raise self._lost(None)
        self._reader.received(count)
        return True

    def _receive(self, deadline: float) -> None:
        reader = self._reader
        flags = 0
        if self._limit is not None and deadline != math.inf:
            left = deadline - time.monotonic()
            if left <= 0:
                flags = socket.MSG_DONTWAIT  # what has come already still counts
            elif left < 0.9 * self._limit:
                self._set_limit(left)
        try:
            count = self._receive_into(reader.space(), 0, flags)
        except BlockingIOError:
            raise self._late() from None
        except OSError as problem:
            raise self._lost(problem) from None
        if not count:
            raise self._lost(None)
        reader.received(count)

    def _lost(self, problem: OSError | None) -> ApplianceError:
        """Close, and give the error to raise: what the daemon said last about the connection, or that it is gone."""
        said = None if self._is_closed else self._last_words()
        where = "" if self._reader.is_empty else " in the middle of a frame"
        self.close()
        if said is not None:
            return said
        reason = "it was closed" if problem is None or not problem.strerror else problem.strerror.lower()
        return ConnectionLost(f"cannot finish the request: the connection to the daemon ended{where}, {reason}")

    def _last_words(self) -> ApplianceError | None:
        """An ERROR about the connection among the bytes that came before it closed."""
        reader = self._reader
        try:
            while True:
                frame = reader.next()
                if frame is None:
                    count = self._receive_into(reader.space(), 0, socket.MSG_DONTWAIT)
                    if not count:
                        return None
                    reader.received(count)
                elif frame.kind == native.ERROR and frame.identifier == 0:
                    return native.unpack_error(frame.body)
        except (OSError, ProtocolError):
            return None

    def _late(self) -> DeadlineExceeded:
        self.close()
        return DeadlineExceeded("cannot finish the request: the daemon did not answer within the timeout")

    def _set_limit(self, limit: float | None) -> None:
        seconds, rest = divmod(0.0 if limit is None else max(limit, 1e-6), 1.0)
        value = _TIMEVAL.pack(int(seconds), int(rest * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
        self._limit = limit


def _kept(frame: Frame) -> Frame:
    """A frame whose body outlives the next receive."""
    return frame if frame.is_owned else frame._replace(body=memoryview(bytes(frame.body)), is_owned=True)


def several_answers() -> InvalidRequest:
    """The error where a model gives several answers and the caller takes one."""
    return InvalidRequest("cannot give one answer: the model gives several to a request; iterate over results()")


def too_long(length: int, limit: int) -> InvalidRequest:
    """The error for a request that exceeds the server's bound."""
    return InvalidRequest(f"cannot send the request: it has {length} bytes, and the daemon takes at most {limit}")


def not_due(identifier: int) -> ProtocolError:
    """The error for an answer to nothing."""
    return ProtocolError(f"cannot read the answer: id {identifier} was not asked for")
