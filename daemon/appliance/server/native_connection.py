"""One client of the native protocol: frames in, calls to the engine, frames out.

The socket is read and written directly rather than through an asyncio transport, because transports can neither receive
descriptors nor gather buffers into one write. Nothing here awaits on the way of a request; answers come back through
the `Sink` methods.
"""

import array
import asyncio
import logging
import os
import socket
import struct
import time
import uuid
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Protocol

from appliance import __version__
from appliance.call import Call, OutputTable
from appliance.config import LimitsSection
from appliance.errors import ApplianceError, InvalidRequest, Overloaded
from appliance.region import Region
from appliance.server import native_head
from appliance.server.access import authorise
from appliance.server.budget import BodyBudget
from appliance.server.native_large import LargeFrame
from appliance.server.oip import dispatch_unary, parse_infer
from appliance.slab import Slab
from appliance.types import NO_OPTIONS, Buffer, Peer, Timings
from appliance.wire import native
from appliance.wire.native import HEADER, Frame

if TYPE_CHECKING:
    from appliance.engine import Engine

_log = logging.getLogger("appliance.native")

_RECEIVE_BYTES: Final = 65536
#: Descriptors one frame may bring, and the room for them.
_MAX_DESCRIPTORS: Final = 1
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(4 * array.array("i").itemsize)
#: Heads kept per connection; all are dropped when there are more.
_MAX_HEADS: Final = 64
#: Unsent bytes above which nothing more is read from the client.
_PAUSE_BYTES: Final = 1 << 20
#: Answers gathered into one write up to this size are joined; larger ones are written as they lie.
_JOIN_BYTES: Final = 16384
_MAX_BUFFERS: Final = 512
_MAX_U32: Final = 0xFFFFFFFF
_HEADER_BYTES: Final = HEADER.size
#: A first frame is HELLO, and no longer than this.
_MAX_HELLO_BYTES: Final = 256
# Plain numbers for what every request compares: enum members cost ten times as much to read.
_INFER: Final = int(Frame.INFER)
_RESULT: Final = int(Frame.RESULT)
_CLOEXEC: Final = int(socket.MSG_CMSG_CLOEXEC)
_TRUNCATED: Final = int(socket.MSG_CTRUNC)


class Lobby(Protocol):
    """What a connection needs of the server that accepted it."""

    engine: "Engine"
    limits: LimitsSection
    budget: BodyBudget
    regions: int  # registered on all connections
    max_regions: int

    def left(self, connection: "NativeConnection") -> None:
        """The connection is closed."""
        ...


class _ProtocolBroken(Exception):
    """The client broke the protocol; the connection ends with this error under this id."""

    def __init__(self, message: str, error: type[ApplianceError] = InvalidRequest, number: int = 0) -> None:
        super().__init__(message)
        self.error = error(message)
        self.number = number


class NativeConnection:
    """A connected client.

    Attributes:
        peer: Who it is.
    """

    def __init__(self, lobby: Lobby, connection: socket.socket, peer: Peer) -> None:
        self._lobby = lobby
        self._engine = lobby.engine
        self._limits = lobby.limits
        self._socket = connection
        self._fd = connection.fileno()
        self._loop = asyncio.get_running_loop()
        self.peer = peer
        self._client = lobby.engine.clients.enter(peer)
        self._waiting_since_ns = time.monotonic_ns()  # for the rest of the handshake or of a frame; 0: nothing is owed
        self._unread_since_ns = 0  # since when too many answers lie unread; 0: they do not
        self._pause_bytes = min(_PAUSE_BYTES, lobby.limits.max_unsent_bytes)
        self._is_greeted = False
        self._is_closed = False
        self._is_paused = False
        self._partial = b""
        self._large: LargeFrame | None = None
        self._descriptors: deque[int] = deque()
        self._heads: dict[bytes, native_head.Head] = {}
        self._calls: dict[int, Call] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._regions: dict[int, Region] = {}
        self._out: list[Buffer] = []
        self._backlog = bytearray()
        self._loop.add_reader(self._fd, self._on_readable)

    # ---------------------------------------------------------------- reading

    def _on_readable(self) -> None:
        try:
            if self._large is not None:
                self._read_large(self._large)
                return
            content, ancillary, flags, _ = self._socket.recvmsg(_RECEIVE_BYTES, _ANCILLARY_BYTES, _CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        except _ProtocolBroken as problem:
            self._end(problem)
            return
        if not content:
            self.close()
            return
        try:
            if ancillary or flags & _TRUNCATED:
                self._take_descriptors(ancillary, flags)
            if self._partial:
                content = self._partial + content
                self._partial = b""
            self._parse(content)
        except _ProtocolBroken as problem:
            self._end(problem)
        if self._out:
            self.flush()

    def _parse(self, content: bytes) -> None:
        position = 0
        end = len(content)
        unpack = HEADER.unpack_from
        while end - position >= _HEADER_BYTES:
            length, kind, _, descriptors, number, head, timeout_us = unpack(content, position)
            start = position + _HEADER_BYTES
            if length > self._limits.max_request_bytes or head > length or not self._is_greeted:
                self._check_header(length, kind, number, head)
            if end - start < length:
                if length > _RECEIVE_BYTES:
                    self._large = LargeFrame(content[position:], _HEADER_BYTES + length, self._lobby.budget)
                    self._owe_rest(position)
                    return
                break
            position = start + length
            if kind == _INFER and self._is_greeted:
                self._infer(number, content[start : start + head], content[start + head : position], timeout_us)
            else:
                self._dispatch(kind, number, descriptors, content[start:position])
            if self._is_closed:
                return
        if position < end:
            self._partial = content[position:]
            self._owe_rest(position)
        else:
            if self._descriptors:
                raise _ProtocolBroken("cannot read the frame: descriptors came without a frame that takes them")
            if self._is_greeted:
                self._waiting_since_ns = 0

    def _owe_rest(self, done: int) -> None:
        """The client owes the rest of a frame: from now on if others were complete before it, else since it began."""
        if done or not self._waiting_since_ns:
            self._waiting_since_ns = time.monotonic_ns()

    def _check_header(self, length: int, kind: int, number: int, head: int) -> None:
        """End the connection over a header that cannot be followed by a frame."""
        if not self._is_greeted and (kind != Frame.HELLO or length > _MAX_HELLO_BYTES):
            raise _ProtocolBroken("cannot talk: the first frame must be HELLO of the appliance's native protocol")
        if head > length:
            raise _ProtocolBroken("cannot read the frame: its head is longer than the frame")
        limit = self._limits.max_request_bytes
        if length > limit:
            message = f"cannot take the frame: it has {length} bytes and the limit is {limit}"
            raise _ProtocolBroken(message, Overloaded, number)

    def _read_large(self, large: LargeFrame) -> None:
        if not large.receive(self._socket):
            return
        self._large = None
        large.release()
        self._waiting_since_ns = 0
        _, kind, _, descriptors, number, head, timeout_us = large.header
        body = large.body()
        if large.refusal is not None:
            self._send_error(number, large.refusal)
        elif kind == _INFER:
            self._infer(number, bytes(body[:head]), body[head:], timeout_us)
        else:
            self._dispatch(kind, number, descriptors, bytes(body))
        if self._descriptors:
            raise _ProtocolBroken("cannot read the frame: descriptors came without a frame that takes them")
        if self._out:
            self.flush()

    def _take_descriptors(self, ancillary: list[tuple[int, int, bytes]], flags: int) -> None:
        received = array.array("i")
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received.frombytes(content[: len(content) - len(content) % received.itemsize])
        self._descriptors.extend(received)
        if flags & _TRUNCATED or len(self._descriptors) > _MAX_DESCRIPTORS:
            raise _ProtocolBroken(f"cannot take the descriptors: a frame may bring {_MAX_DESCRIPTORS}")

    # ---------------------------------------------------------------- requests

    def _infer(self, number: int, head_bytes: bytes, tail: Buffer, timeout_us: int) -> None:
        if number in self._calls or number in self._tasks:
            raise _ProtocolBroken(f"cannot take request {number}: a request of that id is in flight")
        try:
            if len(self._calls) >= self._limits.max_requests_in_flight:
                raise Overloaded(
                    f"cannot take the request: {len(self._calls)} of this connection are in flight and "
                    f"max_requests_in_flight is {self._limits.max_requests_in_flight}"
                )
            head = self._heads.get(head_bytes)
            if head is not None and head.plan.instance.accepts and head.tail == len(tail) and not head.has_regions:
                if len(head.sizes) == 1:
                    contents: list[Buffer] = [tail]
                else:
                    contents, _, _ = native_head.split_tail(head, tail, self._regions)
                call = Call(head.plan, contents, self, number, 0, self._client)
            else:
                head, call = self._first_call(number, head_bytes, tail, head)
            if head.options is not NO_OPTIONS:
                call.ask(head.options, timeout_us)
            elif timeout_us or head.plan.instance.default_timeout_us:
                call.limit(timeout_us, head.plan.instance.default_timeout_us)
            self._calls[number] = call
            self._engine.submit(head.model, call)
        except ApplianceError as error:
            self._calls.pop(number, None)
            self._send_error(number, error)

    def _first_call(
        self, number: int, head_bytes: bytes, tail: Buffer, head: native_head.Head | None
    ) -> tuple[native_head.Head, Call]:
        """A call whose head is new, uses regions, or needs its elements walked.

        Raises:
            ApplianceError: The request cannot run.
        """
        if head is None or not head.plan.instance.accepts:
            authorise(self.peer, "ModelInfer")
            self._heads.pop(head_bytes, None)
            message, raw = parse_infer(head_bytes)
            if native_head.has_inline_contents(message, raw):
                if len(tail):
                    raise InvalidRequest("cannot read the request: it has tensors both in its message and behind it")
                head, inline = native_head.read_inline(self._engine, message, raw, self.peer)
                call = Call(head.plan, inline, self, number, 0, self._client)
                call.nbytes = native_head.check_inline(head, inline)
                return head, call
            head = native_head.read_head(self._engine, message)
            if len(head_bytes) <= native.MAX_CACHED_HEAD_BYTES:
                if len(self._heads) >= _MAX_HEADS:
                    self._heads.clear()
                self._heads[head_bytes] = head
        contents, views, total = native_head.split_tail(head, tail, self._regions)
        call = Call(head.plan, contents, self, number, 0, self._client)
        call.nbytes = total
        if views:
            call.use_regions(views)
        return head, call

    def _dispatch(self, kind: int, number: int, descriptors: int, body: bytes) -> None:
        """Every frame but INFER."""
        if not self._is_greeted:
            self._greet(kind, body)
        elif kind == Frame.CANCEL:
            call = self._calls.pop(number, None)
            if call is not None:
                call.plan.instance.cancel(call)
                self._send_error(number, native_head.CANCELLED)
        elif kind == Frame.REGION:
            self._register(number, descriptors, body)
        elif kind == Frame.RELEASE:
            region = self._regions.pop(number, None)
            if region is None:
                self._send_error(number, InvalidRequest(f"cannot release region {number}: it is not registered"))
            else:
                region.release()
        elif kind == Frame.CALL:
            self._call(number, body)
        else:
            raise _ProtocolBroken(f"cannot read the frame: type {kind} is not one a client sends")

    def _greet(self, kind: int, body: bytes) -> None:
        if kind != Frame.HELLO or len(body) < native.HELLO.size:
            raise _ProtocolBroken("cannot talk: the first frame must be HELLO of the appliance's native protocol")
        magic, version, _ = native.HELLO.unpack_from(body)
        if magic != native.MAGIC or version != native.VERSION:
            raise _ProtocolBroken(f"cannot talk: this daemon speaks version {native.VERSION} of the native protocol")
        self._is_greeted = True
        limits = self._limits
        welcome = native.WELCOME.pack(
            native.MAGIC, native.VERSION, 0, limits.max_request_bytes, limits.max_requests_in_flight,
            limits.max_regions, _MAX_DESCRIPTORS, limits.max_region_bytes,
        )  # fmt: skip
        self._send(Frame.WELCOME, 0, welcome + __version__.encode())

    def _register(self, number: int, descriptors: int, body: bytes) -> None:
        fd = self._descriptors.popleft() if self._descriptors else -1
        try:
            if descriptors != 1 or fd < 0 or len(body) != native.REGION_SIZE.size:
                raise _ProtocolBroken("cannot register the region: the frame needs one descriptor and an 8-byte size")
            (size,) = native.REGION_SIZE.unpack(body)
            if number in self._regions:
                raise InvalidRequest(f"cannot register region {number}: it is registered already")
            if len(self._regions) >= self._limits.max_regions:
                raise Overloaded(f"cannot register the region: max_regions is {self._limits.max_regions}")
            if self._lobby.regions >= self._lobby.max_regions:
                raise Overloaded("cannot register the region: all connections together hold as many as they may")
            if size > self._limits.max_region_bytes:
                raise InvalidRequest(
                    f"cannot register the region: it has {size} bytes and max_region_bytes is "
                    f"{self._limits.max_region_bytes}"
                )
            taken, fd = fd, -1
            self._regions[number] = Region(Slab.adopt(taken, size), lambda: self._freed(number))
            self._lobby.regions += 1
            self._send(Frame.REGION_READY, number, b"")
        except ApplianceError as error:
            self._send_error(number, error)
        finally:
            if fd >= 0:
                os.close(fd)

    def _freed(self, number: int) -> None:
        self._lobby.regions -= 1
        self._send(Frame.RELEASED, number, b"")

    def _call(self, number: int, body: bytes) -> None:
        if number in self._calls or number in self._tasks:
            raise _ProtocolBroken(f"cannot take call {number}: a request of that id is in flight")
        if not body or len(body) < 1 + body[0]:
            raise _ProtocolBroken("cannot read the call: the method's name is truncated")
        if len(self._tasks) >= self._limits.max_requests_in_flight:
            self._send_error(number, Overloaded("cannot take the call: too many of this connection are in flight"))
            return
        method = body[1 : 1 + body[0]].decode("ascii", "replace")
        self._tasks[number] = self._loop.create_task(self._answer_call(number, method, body[1 + body[0] :]))

    async def _answer_call(self, number: int, method: str, body: bytes) -> None:
        try:
            reply = await dispatch_unary(self._engine, self.peer, method, body)
            self._send(Frame.REPLY, number, reply)
        except ApplianceError as error:
            self._send_error(number, error)
        except Exception:
            reference = uuid.uuid4().hex
            _log.exception("request %s failed", reference)
            self._send_error(number, ApplianceError(f"internal error; the log has it as {reference}"))
        finally:
            self._tasks.pop(number, None)

    # ---------------------------------------------------------------- answers

    def deliver(self, call: Call, table: OutputTable, memory: memoryview, row: int, timings: Timings) -> None:
        """Frame an answer; it goes out at the next `flush`."""
        if self._calls.pop(call.id, None) is None:
            return
        if self._unread_since_ns:
            self._frame_error(call.id, Overloaded("cannot send the answer: too many answers before it lie unread"))
            return
        plan = call.plan
        head = plan.heads.get(table.signature)
        if head is None:
            if len(plan.heads) >= native_head.MAX_ANSWER_HEADS:
                plan.heads.clear()
            head = plan.heads[table.signature] = native_head.encode_answer_head(plan, table)
        rows = plan.rows
        contents = [table.view(index, memory, row, rows)[1] for index in plan.outputs]
        length = native.TIMINGS.size + len(head)
        for content in contents:
            length += len(content)
        if length > _MAX_U32:
            self._frame_error(call.id, InvalidRequest("cannot send the answer: it is larger than a frame can be"))
            return
        self._out.append(
            HEADER.pack(length, _RESULT, 0, 0, call.id, len(head), 0) + _pack_timings(call, timings) + head
        )
        self._out += contents

    def fail(self, call: Call, error: ApplianceError) -> None:
        """Frame an error; it goes out at the next `flush`."""
        if self._calls.pop(call.id, None) is not None:
            self._frame_error(call.id, error)

    def _send_error(self, number: int, error: ApplianceError) -> None:
        self._send(Frame.ERROR, number, native.pack_error(error.kind, str(error), error.is_retryable))

    def _frame_error(self, number: int, error: ApplianceError) -> None:
        self._frame(Frame.ERROR, number, native.pack_error(error.kind, str(error), error.is_retryable))

    def _frame(self, kind: Frame, number: int, body: bytes) -> None:
        self._out.append(HEADER.pack(len(body), kind, 0, 0, number, 0, 0) + body)

    def _send(self, kind: Frame, number: int, body: bytes) -> None:
        if not self._is_closed:
            self._frame(kind, number, body)
            self.flush()

    @property
    def has_unsent(self) -> bool:
        """True while the client has answers to take."""
        return bool(self._backlog)

    def go_away(self) -> None:
        """Tell the client that the daemon drains."""
        self._send(Frame.GOAWAY, 0, b"")

    def flush(self) -> None:
        """Write what is framed; what the socket does not take is copied and kept."""
        out, self._out = self._out, []
        if not out or self._is_closed:
            return
        if self._backlog:
            for part in out:
                self._backlog += part
            self._check_backlog()
            return
        total = 0
        for part in out:
            total += len(part)
        try:
            if total <= _JOIN_BYTES:
                joined: Buffer = out[0] if len(out) == 1 else b"".join(out)
                sent = self._socket.send(joined)
                if sent == total:
                    return
                self._backlog += memoryview(joined)[sent:]
            else:
                self._write_parts(out)
        except BlockingIOError:
            for part in out:
                self._backlog += part
        except OSError:
            self.close()
            return
        if self._backlog:
            self._loop.add_writer(self._fd, self._on_writable)
            self._check_backlog()

    def _write_parts(self, out: list[Buffer]) -> None:
        """Write many or large parts without joining them; the rest goes to the backlog."""
        place = 0
        while place < len(out):
            chunk: list[Any] = out[place : place + _MAX_BUFFERS]
            wanted = sum(len(part) for part in chunk)
            try:
                sent = self._socket.sendmsg(chunk)
            except BlockingIOError:
                sent = 0
            place += len(chunk)
            if sent < wanted:
                for part in chunk:
                    if sent >= len(part):
                        sent -= len(part)
                    else:
                        self._backlog += memoryview(part)[sent:]
                        sent = 0
                for part in out[place:]:
                    self._backlog += part
                return

    def _on_writable(self) -> None:
        try:
            sent = self._socket.send(self._backlog)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        del self._backlog[:sent]
        if not self._backlog:
            self._loop.remove_writer(self._fd)
        if self._unread_since_ns:
            is_too_much = len(self._backlog) > self._limits.max_unsent_bytes
            self._unread_since_ns = time.monotonic_ns() if is_too_much else 0
        if self._is_paused and len(self._backlog) < self._pause_bytes:
            self._is_paused = False
            if self._waiting_since_ns:
                self._waiting_since_ns = time.monotonic_ns()
            self._loop.add_reader(self._fd, self._on_readable)

    def _check_backlog(self) -> None:
        """A client that reads too slowly is not read from; one with far too much unread gets errors for answers."""
        if len(self._backlog) > self._pause_bytes and not self._is_paused:
            self._is_paused = True
            self._loop.remove_reader(self._fd)
        if len(self._backlog) > self._limits.max_unsent_bytes and not self._unread_since_ns:
            self._unread_since_ns = time.monotonic_ns()

    # ---------------------------------------------------------------- ending

    def _end(self, problem: _ProtocolBroken) -> None:
        """Say why, and close."""
        self._send_error(problem.number, problem.error)
        self.close()

    def is_overdue(self, limit_ns: int) -> bool:
        """True where the client has owed a frame's rest, or read nothing of far too many answers, since `limit_ns`."""
        since = self._unread_since_ns if self._is_paused else self._waiting_since_ns
        return 0 < since < limit_ns

    def close(self) -> None:
        """Close at once; what is in flight is withdrawn, regions go when nothing uses them."""
        if self._is_closed:
            return
        self._is_closed = True
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._socket.close()
        for fd in self._descriptors:
            os.close(fd)
        self._descriptors.clear()
        if self._large is not None:
            self._large.release()
            self._large = None
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.plan.instance.cancel(call)
        for task in tuple(self._tasks.values()):
            task.cancel()
        regions, self._regions = self._regions, {}
        for region in regions.values():
            region.release()
        self._heads.clear()
        self._out.clear()
        self._backlog.clear()
        self._engine.clients.leave(self._client)
        self._lobby.left(self)


def _pack_timings(call: Call, timings: Timings) -> bytes:
    stages = (
        timings.decode_ns // 1000,
        call.tokenise_ns // 1000,
        call.queue_ns // 1000,
        timings.copy_ns // 1000,
        timings.compute_ns // 1000,
        timings.postprocess_ns // 1000,
        timings.batch_rows,
    )
    try:
        return native.TIMINGS.pack(*stages)
    except struct.error:  # 71 minutes are the most a field holds
        return native.TIMINGS.pack(*(min(stage, _MAX_U32) for stage in stages))
