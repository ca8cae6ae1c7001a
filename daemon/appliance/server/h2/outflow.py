"""The way out of a connection: frames gathered into one write, and content that waits for the peer's windows."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

from appliance.server.h2 import frames
from appliance.server.h2.frames import Code, ConnectionBroken, StreamBroken
from appliance.server.h2.stream import Stream
from appliance.types import Buffer

#: Frames are joined into one buffer up to this size; larger ones are written as they lie.
_JOIN_BYTES: Final = 65536
#: Unsent bytes above which nothing more is read from the client.
_PAUSE_BYTES: Final = 1 << 20


class Outflow:
    """What one connection sends.

    Attributes:
        out: Frames that go with the next `flush`; each owns its bytes.
        window: Bytes of content the peer takes on the whole connection.
        initial_window: The same for a stream that opens now.
        max_frame: Largest payload the peer takes.
        is_stuck: The transport holds so much that it wants no more.
    """

    def __init__(
        self, transport: asyncio.Transport, streams: Mapping[int, Stream], on_end: Callable[[Stream], None]
    ) -> None:
        self.out: list[Buffer] = []
        self.window = frames.DEFAULT_WINDOW
        self.initial_window = frames.DEFAULT_WINDOW
        self.max_frame = frames.DEFAULT_FRAME_SIZE
        self.is_stuck = False
        self._transport = transport
        self._streams = streams
        self._on_end = on_end
        self._blocked: dict[int, Stream] = {}
        self._pending_bytes = 0
        self._waiters: list[asyncio.Future[None]] = []
        self._stalled: tuple[float, int] | None = None
        transport.set_write_buffer_limits(high=_PAUSE_BYTES)

    # ---------------------------------------------------------------- answers

    def send_headers(self, stream: Stream, block: bytes, ends: bool = False) -> None:
        """A header block, at the beginning of an answer or as all of it."""
        flags = frames.END_HEADERS | frames.END_STREAM if ends else frames.END_HEADERS
        self.out.append(frames.frame(frames.HEADERS, flags, stream.id, block))
        if ends:
            self._on_end(stream)

    def send_content(self, stream: Stream, content: bytes) -> None:
        """Content of an answer, as far as the windows allow; the rest waits for them."""
        self._pending_bytes += len(content)
        stream.queue(content)
        self._push(stream)

    def send_trailers(self, stream: Stream, block: bytes) -> None:
        """The end of an answer, behind its content."""
        stream.trailers = block
        self._push(stream)

    def room(self, stream: Stream) -> int:
        """Bytes of content that can go out on a stream now, in one frame."""
        return 0 if stream.pending else min(self.window, stream.send_window, self.max_frame)

    def send_framed(self, stream: Stream, framed: bytes, size: int) -> None:
        """A whole answer that the caller has framed, with `size` bytes of content for which there is `room`."""
        self.out.append(framed)
        self.window -= size
        self._on_end(stream)

    async def drained(self, stream: Stream) -> None:
        """Wait until nothing of the stream is pending and the transport takes more, or the stream is closed."""
        while stream.is_open and (stream.pending or self.is_stuck):
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    # ---------------------------------------------------------------- windows

    def widen(self, increment: int) -> None:
        """The peer takes more on the connection.

        Raises:
            ConnectionBroken: More than it may take.
        """
        self.window += increment
        if self.window > frames.MAX_WINDOW:
            raise ConnectionBroken(Code.FLOW_CONTROL_ERROR, "the connection's window is too large")

    def push_blocked(self) -> None:
        """Frame what the connection's window allows, a frame of each stream in turn."""
        if not self._blocked or self.window <= 0:
            return
        ready = [stream for stream in self._blocked.values() if stream.send_window > 0]
        while ready and self.window > 0:
            for stream in ready:
                self._push(stream, 1)
            ready = [stream for stream in ready if stream.pending and stream.send_window > 0]

    def widen_stream(self, stream: Stream, increment: int) -> None:
        """The peer takes more on a stream.

        Raises:
            StreamBroken: More than it may take.
        """
        stream.send_window += increment
        if stream.send_window > frames.MAX_WINDOW:
            raise StreamBroken(Code.FLOW_CONTROL_ERROR)
        if stream.pending:
            self._push(stream)

    def set_initial_window(self, size: int) -> None:
        """The peer's windows, those of open streams included, change (RFC 9113, section 6.9.2).

        Nothing is sent yet: the peer counts with the new windows from the acknowledgement on.

        Raises:
            ConnectionBroken: A window becomes larger than it may be.
        """
        change, self.initial_window = size - self.initial_window, size
        for stream in self._streams.values():
            stream.send_window += change
            if stream.send_window > frames.MAX_WINDOW:
                raise ConnectionBroken(Code.FLOW_CONTROL_ERROR, "a stream's window is too large")

    def _push(self, stream: Stream, max_frames: int = frames.MAX_WINDOW) -> None:
        """Frame what the windows allow of a stream's pending content, and its end behind it."""
        pending = stream.pending
        while pending and max_frames:
            content = pending[0]
            size = min(self.window, stream.send_window, self.max_frame, len(content))
            if size <= 0 < len(content):
                break
            max_frames -= 1
            self.out += (frames.HEADER.pack(size >> 8, size & 0xFF, frames.DATA, 0, stream.id), content[:size])
            self.window -= size
            stream.send_window -= size
            self._pending_bytes -= size
            self._stalled = None
            if size == len(content):
                pending.popleft()
            else:
                pending[0] = content[size:]
        if pending:
            self._blocked[stream.id] = stream
            return
        self._blocked.pop(stream.id, None)
        self._wake()
        if stream.trailers is not None:
            block, stream.trailers = stream.trailers, None
            self.send_headers(stream, block, ends=True)

    def drop(self, stream: Stream) -> None:
        """The stream is closed: what is pending goes nowhere."""
        if stream.pending:
            self._pending_bytes -= sum(len(content) for content in stream.pending)
            stream.pending.clear()
            self._blocked.pop(stream.id, None)
        self._wake()

    # ---------------------------------------------------------------- writing

    def flush(self) -> int:
        """Write what is framed; returns the bytes that the peer has still to take."""
        out = self.out
        if out:
            self.out = []
            if len(out) == 1:
                self._transport.write(out[0])
            elif sum(map(len, out)) <= _JOIN_BYTES:
                self._transport.write(b"".join(out))
            else:
                self._transport.writelines(out)
        if self._pending_bytes or self.is_stuck:
            return self._pending_bytes + self._transport.get_write_buffer_size()
        return 0

    def resume(self) -> None:
        """The transport takes more."""
        self.is_stuck = False
        self._wake()

    def close(self) -> None:
        """The connection is gone."""
        self.out.clear()
        self._blocked.clear()
        self._pending_bytes = 0
        self.is_stuck = False
        self._wake()

    def _wake(self) -> None:
        if self._waiters:
            waiters, self._waiters = self._waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    def stalled_for(self, now: float) -> float:
        """Seconds for which the peer has taken nothing of what waits for it, as far as earlier calls can tell."""
        unsent = self._pending_bytes + self._transport.get_write_buffer_size()
        if not unsent:
            self._stalled = None
        elif self._stalled is None or self._stalled[1] != unsent:
            self._stalled = (now, unsent)
        return now - self._stalled[0] if self._stalled is not None else 0.0
