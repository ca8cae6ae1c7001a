"""One connection to the daemon for asyncio: any number of requests at a time, told apart by their ids.

It reads and writes the socket itself, with the loop's `add_reader` and `add_writer`: a transport cannot send
descriptors.
"""

import array
import asyncio
import math
import socket
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from appliance_client.calls import Call
from appliance_client.connection import JOIN_BYTES, not_due, too_long
from appliance_client.endpoints import unreachable
from appliance_client.errors import ApplianceError, ConnectionLost, DeadlineExceeded, ProtocolError
from appliance_client.frames import HANDSHAKE_BYTES, Frame, FrameReader
from appliance_client.regions import Region, RegionPool
from appliance_client.retry import Deadline, microseconds
from appliance_client.wire import native

if TYPE_CHECKING:
    from appliance_client.messages import Codec, Request

_T = TypeVar("_T")

#: Bytes not yet taken by the kernel from which new requests wait.
_MAX_UNSENT_BYTES: Final = 4 * 1024 * 1024

#: Receives in a row before other tasks of the loop get their turn.
_RECEIVES_PER_TURN: Final = 8

#: Buffers given to the kernel at once; Linux takes 1024.
_MAX_GATHERED: Final = 512

_BACKLOG_PAUSE: Final = 0.01

#: Who waits for the answers under one id: called with an outcome and whether more follow.
Receiver = Callable[[Any, bool], None]


class AsyncConnection:
    """Multiplexes requests on one socket; belongs to one event loop.

    Attributes:
        welcome: What the daemon granted.
    """

    def __init__(
        self, connected: socket.socket, max_answer_bytes: int, region_threshold: int | None, pool_bytes: int
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket = connected
        self._reader = FrameReader(HANDSHAKE_BYTES)
        self._max_answer_bytes = max_answer_bytes
        self._threshold: float = math.inf if region_threshold is None else region_threshold
        self._pool_bytes = pool_bytes
        self._pool = RegionPool(0, 0)
        self._codec: Codec | None = None
        self._receivers: dict[int, tuple[int, Receiver]] = {}
        self._lent: dict[int, Region] = {}
        self._unsent: deque[tuple[Any, int]] = deque()
        self._unsent_bytes = 0
        self._is_flush_due = False
        self._is_writer = False
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._last_id = 0
        self._is_draining = False
        self._failure: ApplianceError | None = None
        self._greeting: asyncio.Future[native.Welcome] = self._loop.create_future()
        self.welcome: native.Welcome
        self._loop.add_reader(self._socket, self._on_readable)

    @classmethod
    async def open(
        cls,
        path: Path,
        *,
        connect_timeout: float,
        max_answer_bytes: int,
        region_threshold: int | None,
        pool_bytes: int,
    ) -> "AsyncConnection":
        """Connect and shake hands.

        Raises:
            DaemonUnreachable: Nothing listens there, or it may not be opened.
            ConnectionLost: The other end closed during the handshake.
            DeadlineExceeded: It took longer than `connect_timeout` seconds.
            ProtocolError: The other end speaks something else.
        """
        try:
            async with asyncio.timeout(connect_timeout):
                connection = cls(await _connect(path), max_answer_bytes, region_threshold, pool_bytes)
                try:
                    connection._write(native.pack_hello())
                    connection.welcome = welcome = await connection._greeting
                except BaseException:
                    connection.close()
                    raise
        except DeadlineExceeded:
            raise
        except TimeoutError:
            raise DeadlineExceeded(f"cannot reach the daemon: it said nothing for {connect_timeout} s") from None
        connection._reader.max_body_bytes = max_answer_bytes
        regions = welcome.max_regions if welcome.max_descriptors_per_frame else 0
        connection._pool = RegionPool(regions, welcome.max_region_bytes, pool_bytes)
        return connection

    @property
    def is_usable(self) -> bool:
        """True while new requests may be sent."""
        return self._failure is None and not self._is_draining

    @property
    def is_closed(self) -> bool:
        """True once closed."""
        return self._failure is not None

    @property
    def is_silent(self) -> bool:
        """True unless nothing is outstanding and the other end has closed or spoken; asks the kernel."""
        if self._receivers:
            return True
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def close(self, reason: ApplianceError | None = None) -> None:
        """Close at once; what is outstanding fails with `reason`, or as lost. Safe to call again."""
        if self._failure is not None:
            return
        self._failure = reason or ConnectionLost("cannot finish the request: the connection was closed")
        self._loop.remove_reader(self._socket)
        if self._is_writer:
            self._loop.remove_writer(self._socket)
        self._socket.close()
        self._unsent.clear()
        self._pool.close()
        for region in self._lent.values():
            region.close()
        self._lent.clear()
        if not self._greeting.done():
            self._greeting.set_exception(self._failure)
        receivers, self._receivers = self._receivers, {}
        for _, receive in receivers.values():
            receive(self._failure, False)
        self._wake()

    async def infer(self, codec: "Codec", request: "Request", deadline: Deadline, receive: Receiver) -> int:
        """Send one inference; gives its id, once the daemon's bound on requests in flight and the socket allow it.

        Args:
            codec: Encodes and decodes.
            request: The request.
            deadline: When the daemon may give up.
            receive: Called with each answer, or with the error that ends it.

        Raises:
            InvalidRequest: It is longer than the daemon takes.
            DeadlineExceeded: The deadline passed before it could be sent.
            ApplianceError: What became of the connection.
        """
        self._codec = codec
        await self._vacancy()
        region = None
        head, tail_size = request.head, request.byte_size
        if request.largest >= self._threshold and self._pool.is_usable:
            offsets, region_size = request.region_offsets()
            region = await self._region(region_size)
            if region is not None:
                request.write(region.memory, offsets)
                head, tail_size = codec.region_head(request, region.identifier, offsets), 0
        try:
            await self._vacancy()
            timeout_us = microseconds(deadline.remaining())
            if timeout_us > native.MAX_TIMEOUT_US:
                head, timeout_us = codec.long_timeout_head(head, timeout_us), 0
            length = len(head) + tail_size
            if length > self.welcome.max_frame_bytes:
                raise too_long(length, self.welcome.max_frame_bytes)
        except BaseException:
            if region is not None:
                self._give_back(region)
            raise
        self._last_id = identifier = self._last_id + 1
        if region is not None:
            self._lent[identifier] = region
        is_alone = not self._receivers
        self._receivers[identifier] = native.RESULT, receive
        prefix = native.HEADER.pack(length, native.INFER, 0, 0, identifier, len(head), timeout_us) + head
        if not tail_size:
            self._queue(prefix)
        elif length <= JOIN_BYTES:
            self._queue(prefix + request.tail())
        else:
            self._queue(prefix)
            for buffer in request.buffers():
                # The caller may change an array before the kernel has taken it.
                self._queue(bytes(buffer))
        if is_alone:
            self._flush()
        elif not self._is_flush_due:
            self._is_flush_due = True
            self._loop.call_soon(self._flush)
        return identifier

    async def call(self, call: Call[_T], timeout_us: int) -> _T:
        """Call a method.

        Raises:
            ApplianceError: What the daemon answered, or what became of the connection.
        """
        if self._failure is not None:
            raise self._failure
        self._last_id = identifier = self._last_id + 1
        reply: asyncio.Future[bytes] = self._loop.create_future()
        self._receivers[identifier] = native.REPLY, lambda outcome, _: complete(reply, outcome)
        self._write(native.pack_call(identifier, call.method, call.message, min(timeout_us, native.MAX_TIMEOUT_US)))
        return call.read(await reply)

    def cancel(self, identifier: int) -> None:
        """Withdraw a request; its last answer still arrives, and nobody hears of it."""
        if identifier in self._receivers:
            self._receivers[identifier] = native.RESULT, _ignore
            self._write(native.pack_cancel(identifier))

    async def _region(self, byte_size: int) -> Region | None:
        """A region of at least `byte_size`, or None where the inputs are to travel in the frame."""
        region = self._pool.take(byte_size)
        if region is not None:
            return region
        self._last_id = identifier = self._last_id + 1
        region, surplus = self._pool.make(identifier, byte_size)
        for old in surplus:
            self._write(native.pack_release(old.identifier))
        if region is None:
            return None
        ready: asyncio.Future[None] = self._loop.create_future()
        self._receivers[identifier] = native.REGION_READY, lambda outcome, _: complete(ready, outcome)
        self._write(native.pack_region(identifier, region.byte_size), region)
        try:
            await asyncio.shield(ready)
        except asyncio.CancelledError:
            ready.add_done_callback(lambda done: self._settle_region(region, done))
            raise
        except ApplianceError:
            self._settle_region(region, ready)
            if self._failure is not None:
                raise self._failure from None
            return None
        region.forget_descriptor()
        return region

    def _settle_region(self, region: Region, ready: "asyncio.Future[None]") -> None:
        """Take in a region nobody waits for, or drop it where the daemon refused it."""
        error = ready.exception()
        if error is None:
            region.forget_descriptor()
            self._give_back(region)
            return
        if isinstance(error, ApplianceError) and not error.is_retryable and self._failure is None:
            self._pool.refuse()
        self._pool.discard(region)

    def _give_back(self, region: Region) -> None:
        surplus = self._pool.give_back(region)
        if surplus is not None:
            self._write(native.pack_release(surplus.identifier))

    def _on_readable(self) -> None:
        reader = self._reader
        for _ in range(_RECEIVES_PER_TURN):
            try:
                count = self._socket.recv_into(reader.space())
            except (BlockingIOError, InterruptedError):
                return
            except OSError as problem:
                self._lose(problem)
                return
            if not count:
                self._lose(None)
                return
            reader.received(count)
            try:
                while (frame := reader.next()) is not None:
                    self._take(frame)
                    if self._failure is not None:
                        return
            except ProtocolError as error:
                self.close(error)
                return

    def _take(self, frame: Frame) -> None:
        """Hand one frame to whom it concerns.

        Raises:
            ProtocolError: It concerns nobody, or is not what was due.
        """
        kind, identifier = frame.kind, frame.identifier
        if kind == native.RESULT and self._codec is not None:
            outcome: Any = self._codec.answer(frame.head, frame.body, frame.is_owned)
            has_more = bool(frame.flags & native.FLAG_MORE)
        elif kind == native.ERROR:
            outcome, has_more = native.unpack_error(frame.body), False
            if not identifier:
                self.close(outcome)
                return
        elif kind == native.REPLY:
            outcome, has_more = bytes(frame.body), False
        elif kind == native.REGION_READY:
            outcome, has_more = None, False
        elif kind == native.WELCOME and not self._greeting.done():
            self._greeting.set_result(native.unpack_welcome(frame.body))
            return
        elif kind == native.GOAWAY:
            self._is_draining = True
            self._close_when_drained()
            return
        elif kind == native.RELEASED:
            return
        else:
            raise ProtocolError(f"cannot read the answer: a frame of type {kind} was not due")
        due, receive = self._receivers.get(identifier, (0, _ignore))
        if kind not in (due, native.ERROR) or not due:
            raise not_due(identifier)
        if not has_more:
            del self._receivers[identifier]
            region = self._lent.pop(identifier, None)
            if region is not None:
                self._give_back(region)
            self._wake()
        receive(outcome, has_more)
        self._close_when_drained()

    def _close_when_drained(self) -> None:
        if self._is_draining and not self._receivers:
            self.close()

    def _lose(self, problem: OSError | None) -> None:
        where = "" if self._reader.is_empty else " in the middle of a frame"
        reason = "it was closed" if problem is None or not problem.strerror else problem.strerror.lower()
        self.close(ConnectionLost(f"cannot finish the request: the connection to the daemon ended{where}, {reason}"))

    def _write(self, frame: bytes, region: Region | None = None) -> None:
        if self._failure is None:
            self._unsent.append((frame, -1 if region is None else region.descriptor))
            self._unsent_bytes += len(frame)
            self._flush()

    def _queue(self, buffer: bytes) -> None:
        self._unsent.append((buffer, -1))
        self._unsent_bytes += len(buffer)

    def _flush(self) -> None:
        """Give the kernel what it takes now, the rest when it takes more."""
        self._is_flush_due = False
        if self._failure is not None:
            return
        unsent = self._unsent
        try:
            while unsent:
                sent = self._send_some()
                self._unsent_bytes -= sent
                while unsent and sent >= len(unsent[0][0]):
                    sent -= len(unsent.popleft()[0])
                if sent:
                    unsent[0] = (memoryview(unsent[0][0])[sent:], -1)
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as problem:
            # What the daemon said before it closed is still there to read, and says more than the broken pipe.
            self._unsent.clear()
            self._unsent_bytes = 0
            self._on_readable()
            self._lose(problem)
            return
        if bool(unsent) != self._is_writer:
            self._is_writer = not self._is_writer
            if self._is_writer:
                self._loop.add_writer(self._socket, self._flush)
            else:
                self._loop.remove_writer(self._socket)
                self._wake()

    def _send_some(self) -> int:
        buffer, descriptor = self._unsent[0]
        if descriptor >= 0:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
            return self._socket.sendmsg([buffer], rights)
        if len(self._unsent) == 1:
            return self._socket.send(buffer)
        together: list[Any] = []
        for buffer, descriptor in self._unsent:
            if descriptor >= 0 or len(together) == _MAX_GATHERED:
                break
            together.append(buffer)
        return self._socket.sendmsg(together)

    async def _vacancy(self) -> None:
        """Wait until the daemon's bound and the socket allow one more request.

        Raises:
            ApplianceError: What became of the connection.
        """
        is_first_try = True
        while self._failure is None and (
            len(self._receivers) >= self.welcome.max_requests_in_flight or self._unsent_bytes > _MAX_UNSENT_BYTES
        ):
            waiter = self._loop.create_future()
            if is_first_try:
                self._waiting.append(waiter)
            else:
                self._waiting.appendleft(waiter)  # it was its turn
            is_first_try = False
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():
                    self._wake()  # its turn is the next one's
                raise
        if self._failure is not None:
            raise self._failure

    def _wake(self) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                if self._failure is None:
                    return


async def _connect(path: Path) -> socket.socket:
    """A connected socket that does not block.

    A full backlog gives EAGAIN at once, and a Unix socket then does not become writable when there is room: it takes
    another try (connect(2)).
    """
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        while True:
            try:
                connected.connect(str(path))
            except BlockingIOError:
                await asyncio.sleep(_BACKLOG_PAUSE)
            except OSError as problem:
                raise unreachable(path, problem) from None
            else:
                return connected
    except BaseException:
        connected.close()
        raise


def complete(future: "asyncio.Future[Any]", outcome: Any) -> None:
    """Give a future its outcome, unless it was cancelled."""
    if future.done():
        return
    if isinstance(outcome, ApplianceError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _ignore(_outcome: Any, _has_more: bool) -> None:
    """Receiver of answers to a request that was withdrawn."""
