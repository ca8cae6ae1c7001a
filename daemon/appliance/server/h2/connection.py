"""A client's HTTP/2 connection (RFC 9113): frames in and out, flow control, and bounds on everything.

It knows nothing of what is asked and answered: a header block becomes whatever the `Application` makes of it, content
is handed over as it comes, answers are header blocks and bytes. Nothing awaits.
"""

import asyncio
from typing import Any, Final, cast

from appliance.server.h2 import frames
from appliance.server.h2.block import BlockGatherer
from appliance.server.h2.contract import Application, Lobby
from appliance.server.h2.fields import MAX_BLOCK_BYTES, FieldBlocks
from appliance.server.h2.frames import Code, ConnectionBroken, StreamBroken
from appliance.server.h2.inflow import FIRST_WINDOW
from appliance.server.h2.outflow import Outflow
from appliance.server.h2.patience import Patience
from appliance.server.h2.stream import Stream
from appliance.types import Buffer

#: Largest frame taken. Only DATA may be that large; its payload is handed on as it comes, never gathered.
_MAX_FRAME: Final = 1 << 20
#: Largest frame that is gathered before it is read.
_MAX_GATHERED: Final = MAX_BLOCK_BYTES + 256 + 5
#: What the connection may send. Memory is bounded by the windows of its streams.
_WINDOW: Final = 1 << 30
#: Streams ended before the client had sent everything, whose last frames are still on their way.
_MAX_CUT: Final = 1024

#: A connection that takes nothing of its answers for this long is closed.
_STALL_SECONDS: Final = 60.0


class Connection(asyncio.Protocol):
    """One connection.

    Attributes:
        streams: The streams that are not closed, by number.
        outflow: Its way out.
    """

    outflow: Outflow
    _application: Application
    _blocks: FieldBlocks[Any]

    def __init__(self, lobby: Lobby) -> None:
        self._lobby = lobby
        self._loop = asyncio.get_running_loop()
        self._is_admitted = False
        self._is_greeted = False
        self._is_set_up = False
        self._is_over = False
        self._partial = b""
        # the rest of a frame whose payload is handed on as it comes
        self._left = 0
        self._left_stream: Stream | None = None
        self._left_padding = 0
        self._left_ends = False
        self._gatherer = BlockGatherer()
        self.streams: dict[int, Stream] = {}
        self._cut: dict[int, None] = {}
        self._last_stream = 0
        self._goaway_after = frames.MAX_STREAM_ID
        self._window = frames.DEFAULT_WINDOW
        self._waiting_since: float | None = self._loop.time()
        self._patience = Patience(lobby.max_streams)

    # ---------------------------------------------------------------- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send our preface, or close where the server is full."""
        self._transport = cast(asyncio.Transport, transport)
        application = self._lobby.admit(self, self._transport)
        if application is None:
            self._is_over = True
            self._transport.abort()
            return
        self._is_admitted = True
        self._application = application
        self._blocks = FieldBlocks(application.interpret)
        self.outflow = Outflow(self._transport, self.streams, self._sent)
        self.outflow.out += (
            frames.settings(
                {
                    frames.MAX_CONCURRENT_STREAMS: self._lobby.max_streams,
                    frames.INITIAL_WINDOW_SIZE: FIRST_WINDOW,
                    frames.MAX_FRAME_SIZE: _MAX_FRAME,
                    frames.MAX_HEADER_LIST_SIZE: MAX_BLOCK_BYTES,
                }
            ),
            frames.window_update(0, _WINDOW - self._window),
        )
        self._window = _WINDOW
        self.outflow.flush()

    def data_received(self, data: bytes) -> None:
        """Read frames."""
        if self._is_over:
            return
        if self._partial:
            data, self._partial = self._partial + data, b""
        try:
            self._read(data)
        except ConnectionBroken as problem:
            self._end(problem.code, str(problem))
        else:
            self.outflow.push_blocked()
        self.flush()

    def eof_received(self) -> bool:
        """The client is gone: nobody half-closes an HTTP/2 connection and waits."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Withdraw everything."""
        self._is_over = True
        if not self._is_admitted:
            return
        for stream in tuple(self.streams.values()):
            stream.is_open = False
        self.outflow.close()
        self._application.lost()
        self.streams.clear()
        self._lobby.left(self)

    def pause_writing(self) -> None:
        """The client takes no answers: read nothing more from it until it does."""
        self.outflow.is_stuck = True
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        """The client reads again."""
        self.outflow.resume()
        if not self._transport.is_closing():
            self._transport.resume_reading()

    # ---------------------------------------------------------------- frames in

    def _read(self, data: bytes) -> None:
        position, end = 0, len(data)
        if not self._is_greeted:
            there = data[: len(frames.PREFACE)]
            if not frames.PREFACE.startswith(there):
                self.abort()
                return
            if len(there) < len(frames.PREFACE):
                self._partial = data
                return
            self._is_greeted = True
            position = len(there)
        if self._left:
            position = self._read_rest(data)
        unpack = frames.HEADER.unpack_from
        while end - position >= 9:
            high, low, kind, flags, number = unpack(data, position)
            length = high << 8 | low
            number &= 0x7FFFFFFF
            start = position + 9
            stop = start + length
            if length > _MAX_FRAME:
                raise ConnectionBroken(Code.FRAME_SIZE_ERROR, "a frame is larger than SETTINGS_MAX_FRAME_SIZE")
            if self._gatherer.stream and kind != frames.CONTINUATION:
                raise ConnectionBroken(Code.PROTOCOL_ERROR, "a header block is interrupted")
            if not self._is_set_up and (kind != frames.SETTINGS or flags & frames.ACK):
                raise ConnectionBroken(Code.PROTOCOL_ERROR, "the first frame is not SETTINGS")
            if kind == frames.DATA and not flags & frames.PADDED:
                stream = self._charge(number, length, flags)
                if stop > end:
                    self._read_later(stream, length, 0, flags)
                    self._read_rest(data[start:])
                    return
                if stream is not None:
                    stream.is_received = flags & frames.END_STREAM != 0
                    self._application.received(stream, data[start:stop])
            elif kind > frames.CONTINUATION:
                if stop > end:
                    self._patience.nothing()
                    self._read_later(None, length, 0, 0)
                    self._read_rest(data[start:])
                    return
                self._patience.nothing()
            elif kind == frames.DATA:
                if end == start and length:
                    break
                padding = data[start] if length else 0
                if padding >= length:
                    raise ConnectionBroken(Code.PROTOCOL_ERROR, "a frame is padded beyond its length")
                stream = self._charge(number, length, flags)
                self._read_later(stream, length - 1, padding, flags)
                if self._read_rest(data[start + 1 : stop]) < length - 1:
                    return
            elif stop > end:
                if length > _MAX_GATHERED:
                    raise ConnectionBroken(Code.ENHANCE_YOUR_CALM, "a frame is too large for its type")
                break
            else:
                self._read_control(kind, flags, number, data[start:stop])
            if self._is_over:
                return
            position = stop
        if position < end:
            self._partial = data[position:]
            if self._waiting_since is None or (position and not self._gatherer.stream):
                self._waiting_since = self._loop.time()
        elif self._is_set_up and not self._gatherer.stream and not self._left:
            self._waiting_since = None

    def _read_later(self, stream: Stream | None, left: int, padding: int, flags: int) -> None:
        self._left = left
        self._left_stream = stream
        self._left_padding = padding
        self._left_ends = flags & frames.END_STREAM != 0
        if not left:
            self._hand_over(b"", True)

    def _read_rest(self, data: bytes) -> int:
        """Hand on what is here of a frame's payload; returns how many bytes of `data` belonged to it."""
        if not self._left:
            return 0
        size = min(self._left, len(data))
        content = max(0, min(size, self._left - self._left_padding))
        self._left -= size
        self._waiting_since = self._loop.time() if self._left else None
        if size:
            self._hand_over(memoryview(data)[:content], not self._left)
        return size

    def _hand_over(self, content: Buffer, is_last: bool) -> None:
        stream = self._left_stream
        if is_last:
            self._left_stream = None
        if stream is None or not stream.is_open or self.streams.get(stream.id) is not stream:
            return
        stream.is_received = is_last and self._left_ends
        if len(content) or stream.is_received:
            self._application.received(stream, content)

    def _charge(self, number: int, length: int, flags: int) -> Stream | None:
        """Count a DATA frame against the windows; returns its stream, or None if nobody wants it."""
        if not number:
            raise ConnectionBroken(Code.PROTOCOL_ERROR, "DATA without a stream")
        self._window -= length
        if self._window < _WINDOW >> 1:
            if self._window < 0:
                raise ConnectionBroken(Code.FLOW_CONTROL_ERROR, "the connection's window is exceeded")
            self.outflow.out.append(frames.window_update(0, _WINDOW - self._window))
            self._window = _WINDOW
        if not length and not flags & frames.END_STREAM:
            self._patience.nothing()
        stream = self.streams.get(number)
        if stream is None:
            self._check_known(number)
            if flags & frames.END_STREAM:
                self._cut.pop(number, None)
            return None
        if stream.is_received:
            self._break(stream, Code.STREAM_CLOSED)
            return None
        stream.receive_window -= length
        if stream.receive_window < 0:
            self._break(stream, Code.FLOW_CONTROL_ERROR)
            return None
        return stream

    def _check_known(self, number: int) -> None:
        """A frame for a stream that is not there is an error, unless we ended the stream before the client did."""
        if number > self._last_stream or not number & 1:
            raise ConnectionBroken(Code.PROTOCOL_ERROR, "a frame for an idle stream")
        if number not in self._cut and number <= self._goaway_after:
            raise ConnectionBroken(Code.STREAM_CLOSED, "a frame for a closed stream")

    def _read_control(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        """Every frame but DATA."""
        if kind == frames.HEADERS:
            block = self._gatherer.begin(flags, number, payload)
            if block is not None:
                self._open(*block)
            else:
                self._waiting_since = self._loop.time()
        elif kind == frames.WINDOW_UPDATE:
            self._read_window_update(number, payload)
        elif kind == frames.PING:
            if number or len(payload) != 8:
                code = Code.PROTOCOL_ERROR if number else Code.FRAME_SIZE_ERROR
                raise ConnectionBroken(code, "PING has a stream or not 8 bytes")
            self._patience.ping()
            if not flags & frames.ACK:
                self.outflow.out.append(frames.frame(frames.PING, frames.ACK, 0, payload))
        elif kind == frames.SETTINGS:
            self._read_settings(flags, number, payload)
        elif kind == frames.RST_STREAM:
            self._read_reset(number, payload)
        elif kind == frames.CONTINUATION:
            block = self._gatherer.go_on(flags, number, payload)
            if block is not None:
                self._open(*block)
        elif kind == frames.PRIORITY:
            self._patience.nothing()
            if not number:
                raise ConnectionBroken(Code.PROTOCOL_ERROR, "PRIORITY without a stream")
            if len(payload) != 5:
                raise ConnectionBroken(Code.FRAME_SIZE_ERROR, "PRIORITY has not 5 bytes")
        elif kind == frames.GOAWAY:
            self._patience.nothing()
            if number:
                raise ConnectionBroken(Code.PROTOCOL_ERROR, "GOAWAY has a stream")
            if len(payload) < 8:
                raise ConnectionBroken(Code.FRAME_SIZE_ERROR, "GOAWAY has less than 8 bytes")
        else:
            raise ConnectionBroken(Code.PROTOCOL_ERROR, "a client sent PUSH_PROMISE")

    # ---------------------------------------------------------------- header blocks

    def _open(self, number: int, block: bytes, ends: bool) -> None:
        if number <= self._last_stream:
            self._read_trailers(number, block, ends)
            return
        self._last_stream = number
        request = self._blocks.read(block)
        if number > self._goaway_after:
            return  # the client knows that this stream was never seen, and sends the request elsewhere
        if request is None or len(self.streams) >= self._lobby.max_streams:
            code = Code.PROTOCOL_ERROR if request is None else Code.REFUSED_STREAM
            self._patience.reset()
            if not ends:
                self._remember_cut(number)
            self.outflow.out.append(frames.rst_stream(number, code))
            return
        stream = Stream(number, request, FIRST_WINDOW, self.outflow.initial_window, ends)
        self.streams[number] = stream
        self._application.opened(stream)

    def _read_trailers(self, number: int, block: bytes, ends: bool) -> None:
        """A second header block of a stream; gRPC clients have nothing to say there."""
        self._blocks.decode(block)
        stream = self.streams.get(number)
        if stream is None:
            self._check_known(number)
            if ends:
                self._cut.pop(number, None)
        elif stream.is_received:
            self._break(stream, Code.STREAM_CLOSED)
        elif not ends:
            self._break(stream, Code.PROTOCOL_ERROR)
        else:
            stream.is_received = True
            self._application.received(stream, b"")

    # ---------------------------------------------------------------- other frames

    def _read_window_update(self, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionBroken(Code.FRAME_SIZE_ERROR, "WINDOW_UPDATE has not 4 bytes")
        increment = frames.U32.unpack(payload)[0] & 0x7FFFFFFF
        if not number:
            if not increment:
                raise ConnectionBroken(Code.PROTOCOL_ERROR, "WINDOW_UPDATE by 0")
            self.outflow.widen(increment)
            return
        stream = self.streams.get(number)
        if stream is None:
            if number > self._last_stream:
                raise ConnectionBroken(Code.PROTOCOL_ERROR, "a frame for an idle stream")
            return
        try:
            if not increment:
                raise StreamBroken(Code.PROTOCOL_ERROR)
            self.outflow.widen_stream(stream, increment)
        except StreamBroken as problem:
            self._break(stream, problem.code)

    def _read_settings(self, flags: int, number: int, payload: bytes) -> None:
        if number:
            raise ConnectionBroken(Code.PROTOCOL_ERROR, "SETTINGS has a stream")
        if len(payload) % 6 or (flags & frames.ACK and payload):
            raise ConnectionBroken(Code.FRAME_SIZE_ERROR, "SETTINGS has a wrong length")
        self._patience.settings()
        if flags & frames.ACK:
            return
        for key, value in frames.SETTING.iter_unpack(payload):
            if key == frames.INITIAL_WINDOW_SIZE:
                if value > frames.MAX_WINDOW:
                    raise ConnectionBroken(Code.FLOW_CONTROL_ERROR, "SETTINGS_INITIAL_WINDOW_SIZE is too large")
                self.outflow.set_initial_window(value)
            elif key == frames.MAX_FRAME_SIZE:
                if not frames.DEFAULT_FRAME_SIZE <= value <= 0xFFFFFF:
                    raise ConnectionBroken(Code.PROTOCOL_ERROR, "SETTINGS_MAX_FRAME_SIZE is out of range")
                self.outflow.max_frame = value
            elif key == frames.ENABLE_PUSH and value > 1:
                raise ConnectionBroken(Code.PROTOCOL_ERROR, "SETTINGS_ENABLE_PUSH is neither 0 nor 1")
        self._is_set_up = True
        self.outflow.out.append(frames.frame(frames.SETTINGS, frames.ACK, 0, b""))

    def _read_reset(self, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionBroken(Code.FRAME_SIZE_ERROR, "RST_STREAM has not 4 bytes")
        if not number or number > self._last_stream:
            raise ConnectionBroken(Code.PROTOCOL_ERROR, "RST_STREAM for an idle stream")
        self._patience.reset()
        self._cut.pop(number, None)
        stream = self.streams.get(number)
        if stream is not None:
            self._forget(stream)
            self._application.withdrawn(stream)

    # ---------------------------------------------------------------- answers

    def give_window(self, stream: Stream, size: int) -> None:
        """Let the client send `size` more bytes on a stream."""
        if size > 0 and stream.is_open and not stream.is_received:
            stream.receive_window += size
            self.outflow.out.append(frames.window_update(stream.id, size))

    def flush(self) -> None:
        """Write the frames made so far; a client that leaves too much unread is cut off."""
        if self._is_over:
            return
        if self.outflow.flush() > self._lobby.max_unsent_bytes:
            self.abort()

    def _sent(self, stream: Stream) -> None:
        """The end of an answer is framed."""
        self._forget(stream)
        if not stream.is_received:
            self._remember_cut(stream.id)
            self.outflow.out.append(frames.rst_stream(stream.id, Code.NO_ERROR))

    def _break(self, stream: Stream, code: Code) -> None:
        """End a stream on which the client broke a rule."""
        self._patience.reset()
        self._forget(stream)
        if not stream.is_received:
            self._remember_cut(stream.id)
        self.outflow.out.append(frames.rst_stream(stream.id, code))
        self._application.withdrawn(stream)

    def _remember_cut(self, number: int) -> None:
        if len(self._cut) >= _MAX_CUT:
            del self._cut[next(iter(self._cut))]
        self._cut[number] = None

    def _forget(self, stream: Stream) -> None:
        stream.is_open = False
        self.outflow.drop(stream)
        self.streams.pop(stream.id, None)
        if not self.streams and self._goaway_after != frames.MAX_STREAM_ID:
            self._loop.call_soon(self._close_idle)

    # ---------------------------------------------------------------- ending

    def drain(self) -> None:
        """Take no new stream, and close once the open ones are answered."""
        if self._is_over or self._goaway_after != frames.MAX_STREAM_ID:
            return
        self._goaway_after = self._last_stream
        self.outflow.out.append(frames.goaway(self._last_stream, Code.NO_ERROR, ""))
        self.flush()
        self._close_idle()

    def _close_idle(self) -> None:
        if not self.streams and not self._is_over:
            self.close()

    def close(self) -> None:
        """Close after what is written has left."""
        if not self._is_over:
            self.flush()
        if not self._is_over:
            self._is_over = True
            self._waiting_since = self._loop.time()  # the client owes the taking of what is written
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._is_over = True
        self._transport.abort()

    def _end(self, code: Code, reason: str) -> None:
        self.outflow.out.append(frames.goaway(self._last_stream, code, reason))
        self.close()

    def sweep(self, now: float, header_seconds: float) -> None:
        """A regular look: close where a handshake, frame or block is owed, or answers lie unread, for too long."""
        self._patience.renew()
        if self._waiting_since is not None and self.outflow.is_stuck and not self._is_over:
            self._waiting_since = now  # it is the server that does not read
        is_late = self._waiting_since is not None and now - self._waiting_since > header_seconds
        if is_late or self.outflow.stalled_for(now) > _STALL_SECONDS:
            self.abort()
