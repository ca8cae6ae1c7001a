"""One connection to the daemon for asyncio: any number of requests at a time, told apart by their ids."""

import asyncio
import math
import socket
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from appliance_client.async_channel import AsyncChannel, connect
from appliance_client.calls import Call
from appliance_client.errors import (
    ApplianceError,
    ConnectionLost,
    DeadlineExceeded,
    ProtocolError,
    not_due,
    too_long,
)
from appliance_client.frames import JOIN_BYTES, Frame
from appliance_client.regions import Region, RegionPool
from appliance_client.retry import Deadline, microseconds
from appliance_client.wire import native

if TYPE_CHECKING:
    from appliance_client.messages import Codec, Request

_T = TypeVar("_T")

#: Bytes not yet taken by the kernel from which new requests wait.
_MAX_UNSENT_BYTES: Final = 4 * 1024 * 1024

#: Who waits for the answers under one id: called with an outcome and whether more follow.
Receiver = Callable[[Any, bool], None]


class AsyncConnection:
    """Multiplexes requests on one socket; belongs to one event loop.

    Attributes:
        welcome: What the daemon granted.
    """

    def __init__(self, connected: socket.socket, region_threshold: int | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._threshold: float = math.inf if region_threshold is None else region_threshold
        self._pool = RegionPool(0, 0)
        self._codec: Codec | None = None
        self._receivers: dict[int, tuple[int, Receiver]] = {}
        self._lent: dict[int, Region] = {}
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._last_id = 0
        self._is_draining = False
        self._greeting: asyncio.Future[native.Welcome] = self._loop.create_future()
        self.welcome: native.Welcome
        self._channel = AsyncChannel(connected, self._take, self._wake, self._fail)

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
                connection = cls(await connect(path), region_threshold)
                try:
                    connection._channel.write(native.pack_hello())
                    connection.welcome = welcome = await connection._greeting
                except BaseException:
                    connection.close()
                    raise
        except DeadlineExceeded:
            raise
        except TimeoutError:
            raise DeadlineExceeded(f"cannot reach the daemon: it said nothing for {connect_timeout} s") from None
        connection._channel.accept_up_to(max_answer_bytes)
        connection._pool = RegionPool(welcome.regions_usable, welcome.max_region_bytes, pool_bytes)
        return connection

    @property
    def is_usable(self) -> bool:
        """True while new requests may be sent."""
        return self._channel.failure is None and not self._is_draining

    @property
    def is_closed(self) -> bool:
        """True once closed."""
        return self._channel.failure is not None

    @property
    def is_silent(self) -> bool:
        """True unless nothing is outstanding and the other end has closed or spoken; asks the kernel."""
        return bool(self._receivers) or self._channel.is_silent

    def close(self) -> None:
        """Close at once; what is outstanding fails as lost. Safe to call again."""
        self._channel.close(ConnectionLost("cannot finish the request: the connection was closed"))

    def _fail(self, reason: ApplianceError) -> None:
        """The channel is closed: everybody who waits hears of it."""
        self._pool.close()
        for region in self._lent.values():
            region.close()
        self._lent.clear()
        complete(self._greeting, reason)
        receivers, self._receivers = self._receivers, {}
        for _, receive in receivers.values():
            receive(reason, False)
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
            self._channel.queue(prefix)
        elif length <= JOIN_BYTES:
            self._channel.queue(prefix + request.tail())
        else:
            self._channel.queue(prefix)
            for buffer in request.buffers():
                # The caller may change an array before the kernel has taken it.
                self._channel.queue(bytes(buffer))
        if is_alone:
            self._channel.flush()
        else:
            self._channel.flush_soon()
        return identifier

    async def call(self, call: Call[_T], timeout_us: int) -> _T:
        """Call a method.

        Raises:
            ApplianceError: What the daemon answered, or what became of the connection.
        """
        if self._channel.failure is not None:
            raise self._channel.failure
        self._last_id = identifier = self._last_id + 1
        reply: asyncio.Future[bytes] = self._loop.create_future()
        self._receivers[identifier] = native.REPLY, lambda outcome, _: complete(reply, outcome)
        self._channel.write(
            native.pack_call(identifier, call.method, call.message, min(timeout_us, native.MAX_TIMEOUT_US))
        )
        return call.read(await reply)

    def cancel(self, identifier: int) -> None:
        """Withdraw a request; its last answer still arrives, and nobody hears of it."""
        if identifier in self._receivers:
            self._receivers[identifier] = native.RESULT, _ignore
            self._channel.write(native.pack_cancel(identifier))

    async def _region(self, byte_size: int) -> Region | None:
        """A region of at least `byte_size`, or None where the inputs are to travel in the frame."""
        region = self._pool.take(byte_size)
        if region is not None:
            return region
        self._last_id = identifier = self._last_id + 1
        region, surplus = self._pool.make(identifier, byte_size)
        for old in surplus:
            self._channel.write(native.pack_release(old.identifier))
        if region is None:
            return None
        ready: asyncio.Future[None] = self._loop.create_future()
        self._receivers[identifier] = native.REGION_READY, lambda outcome, _: complete(ready, outcome)
        self._channel.write(native.pack_region(identifier, region.byte_size), region.descriptor)
        try:
            await asyncio.shield(ready)
        except asyncio.CancelledError:
            ready.add_done_callback(lambda done: self._settle_region(region, done))
            raise
        except ApplianceError:
            self._settle_region(region, ready)
            if self._channel.failure is not None:
                raise self._channel.failure from None
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
        if isinstance(error, ApplianceError) and not error.is_retryable and self._channel.failure is None:
            self._pool.refuse()
        self._pool.discard(region)

    def _give_back(self, region: Region) -> None:
        surplus = self._pool.give_back(region)
        if surplus is not None:
            self._channel.write(native.pack_release(surplus.identifier))

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
                self._channel.close(outcome)
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

    async def _vacancy(self) -> None:
        """Wait until the daemon's bound and the socket allow one more request.

        Raises:
            ApplianceError: What became of the connection.
        """
        is_first_try = True
        while self._channel.failure is None and (
            len(self._receivers) >= self.welcome.max_requests_in_flight
            or self._channel.unsent_bytes > _MAX_UNSENT_BYTES
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
        if self._channel.failure is not None:
            raise self._channel.failure

    def _wake(self) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                if self._channel.failure is None:
                    return


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
