"""Frames over a Unix socket for asyncio.

It reads and writes the socket itself, with the loop's `add_reader` and `add_writer`: a transport cannot send
descriptors.
"""

import array
import asyncio
import socket
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from appliance_client.endpoints import unreachable
from appliance_client.errors import ApplianceError, ProtocolError, lost
from appliance_client.frames import HANDSHAKE_BYTES, Frame, FrameReader

#: Receives in a row before other tasks of the loop get their turn.
_RECEIVES_PER_TURN: Final = 8

#: Buffers given to the kernel at once; Linux takes 1024.
_MAX_GATHERED: Final = 512

_BACKLOG_PAUSE: Final = 0.01


class AsyncChannel:
    """A connected socket, frame by frame; belongs to one event loop.

    Args:
        connected: The socket; it does not block.
        on_frame: Called with each frame; may raise an ApplianceError, which closes the channel.
        on_room: Called when the kernel has taken everything that waited to be sent.
        on_close: Called once, with the reason.

    Attributes:
        failure: Why the channel is closed; None while it is open.
        unsent_bytes: Bytes the kernel has not taken yet.
    """

    def __init__(
        self,
        connected: socket.socket,
        on_frame: Callable[[Frame], None],
        on_room: Callable[[], None],
        on_close: Callable[[ApplianceError], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket = connected
        self._on_frame = on_frame
        self._on_room = on_room
        self._on_close = on_close
        self._reader = FrameReader(HANDSHAKE_BYTES)
        self._unsent: deque[tuple[Any, int]] = deque()
        self._is_flush_due = False
        self._is_writer = False
        self.unsent_bytes = 0
        self.failure: ApplianceError | None = None
        self._loop.add_reader(self._socket, self._on_readable)

    @property
    def is_silent(self) -> bool:
        """True where the other end has neither closed nor said anything not yet received; asks the kernel."""
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def accept_up_to(self, max_body_bytes: int) -> None:
        """Take frames with bodies of this many bytes."""
        self._reader.max_body_bytes = max_body_bytes

    def close(self, reason: ApplianceError) -> None:
        """Close at once. Safe to call again; the first reason counts."""
        if self.failure is not None:
            return
        self.failure = reason
        self._loop.remove_reader(self._socket)
        if self._is_writer:
            self._loop.remove_writer(self._socket)
        self._socket.close()
        self._unsent.clear()
        self.unsent_bytes = 0
        self._on_close(reason)

    def write(self, frame: bytes, descriptor: int = -1) -> None:
        """Send a frame now, or as soon as the socket takes it; a closed channel drops it."""
        if self.failure is None:
            self._unsent.append((frame, descriptor))
            self.unsent_bytes += len(frame)
            self.flush()

    def queue(self, buffer: bytes) -> None:
        """Send bytes with the next flush."""
        self._unsent.append((buffer, -1))
        self.unsent_bytes += len(buffer)

    def flush_soon(self) -> None:
        """Flush when the tasks that are ready have had their turn: what they send goes out together."""
        if not self._is_flush_due:
            self._is_flush_due = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Give the kernel what it takes now, the rest when it takes more."""
        self._is_flush_due = False
        if self.failure is not None:
            return
        unsent = self._unsent
        try:
            while unsent:
                sent = self._send_some()
                self.unsent_bytes -= sent
                while unsent and sent >= len(unsent[0][0]):
                    sent -= len(unsent.popleft()[0])
                if sent:
                    unsent[0] = (memoryview(unsent[0][0])[sent:], -1)
        except BlockingIOError:
            pass
        except OSError as problem:
            # What the daemon said before it closed is still there to read, and says more than the broken pipe.
            unsent.clear()
            self._on_readable()
            self.close(lost(problem, not self._reader.is_empty))
            return
        if bool(unsent) != self._is_writer:
            self._is_writer = not self._is_writer
            if self._is_writer:
                self._loop.add_writer(self._socket, self.flush)
            else:
                self._loop.remove_writer(self._socket)
                self._on_room()

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

    def _on_readable(self) -> None:
        reader = self._reader
        for _ in range(_RECEIVES_PER_TURN):
            try:
                count = self._socket.recv_into(reader.space())
            except BlockingIOError:
                return
            except OSError as problem:
                self.close(lost(problem, not reader.is_empty))
                return
            if not count:
                self.close(lost(None, not reader.is_empty))
                return
            reader.received(count)
            try:
                while (frame := reader.next()) is not None:
                    self._on_frame(frame)
                    if self.failure is not None:
                        return
            except ProtocolError as error:
                self.close(error)
                return


async def connect(path: Path) -> socket.socket:
    """A connected socket that does not block.

    A full backlog gives EAGAIN at once, and a Unix socket then does not become writable when there is room: it takes
    another try (connect(2)).

    Raises:
        DaemonUnreachable: Nothing listens there, or it may not be opened.
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
