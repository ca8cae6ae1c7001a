"""Frames over a blocking Unix socket.

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
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from appliance_client.endpoints import unreachable
from appliance_client.errors import ApplianceError, ConnectionLost, DeadlineExceeded, ProtocolError, lost
from appliance_client.frames import HANDSHAKE_BYTES, Frame, FrameReader
from appliance_client.retry import GRACE_SECONDS
from appliance_client.wire import native

_TIMEVAL: Final = struct.Struct("@ll")


class StaleConnection(ConnectionLost):
    """The other end had closed before a byte of the request was taken: it certainly did not run."""


class Channel:
    """A connected socket, frame by frame; used by one thread at a time.

    Every failure closes the channel.

    Args:
        path: The native socket.
        connect_timeout: Seconds for connecting and the handshake.

    Attributes:
        is_closed: True once closed.
        welcome: What the daemon granted.

    Raises:
        DaemonUnreachable: Nothing listens there, or it may not be opened.
        ConnectionLost: The other end closed during the handshake.
        DeadlineExceeded: The handshake took too long.
        ProtocolError: The other end speaks something else.
    """

    def __init__(self, path: Path, connect_timeout: float) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._send = self._socket.send
        self._receive_into = self._socket.recv_into
        self._reader = FrameReader(HANDSHAKE_BYTES)
        self._arrived: deque[Frame] = deque()
        self._limit: float | None = None
        self.is_closed = False
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

    def _greet(self, deadline: float) -> native.Welcome:
        self.send([native.pack_hello()], deadline)
        frame = self.receive(deadline)
        if frame.kind == native.ERROR:
            raise native.unpack_error(frame.body)
        if frame.kind != native.WELCOME:
            raise ProtocolError(f"cannot speak to the server: it answers hello with a frame of type {frame.kind}")
        return native.unpack_welcome(frame.body)

    @property
    def is_silent(self) -> bool:
        """True where the other end has neither closed nor said anything since the last frame; asks the kernel."""
        if self._arrived or not self._reader.is_empty:
            return False
        try:
            self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def accept_up_to(self, max_body_bytes: int) -> None:
        """Take frames with bodies of this many bytes."""
        self._reader.max_body_bytes = max_body_bytes

    def close(self) -> None:
        """Close at once. Safe to call again."""
        self.is_closed = True
        self._socket.close()

    def begin(self, timeout: float | None) -> float:
        """Set the time limit of what follows; gives the monotonic time at which the client stops waiting."""
        limit = None if timeout is None else timeout + GRACE_SECONDS
        if limit != self._limit:
            self._set_limit(limit)
        return math.inf if limit is None else time.monotonic() + limit

    def send(
        self,
        buffers: list[Any],
        deadline: float,
        *,
        descriptor: int = -1,
        answers_due: bool = False,
        may_be_stale: bool = False,
    ) -> None:
        """Send buffers one after another.

        Args:
            buffers: What to send; the list is used up.
            deadline: When to give up.
            descriptor: A file descriptor to send with the first byte; -1 for none.
            answers_due: While answers are outstanding the daemon may wait for us to read them before it reads on: a
                send that would block receives instead.
            may_be_stale: Where nothing could be sent at all, say so by `StaleConnection`.

        Raises:
            ApplianceError: What became of the connection.
        """
        flags = socket.MSG_DONTWAIT if answers_due else 0
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
                if may_be_stale:
                    raise StaleConnection(str(error)) from None
                raise error from None
            may_be_stale, descriptor = False, -1
            while buffers and sent >= len(buffers[0]):
                sent -= len(buffers.pop(0))
            if sent:
                buffers[0] = memoryview(buffers[0])[sent:]

    def _receive_or_wait(self, deadline: float) -> None:
        """Wait until the socket takes or holds bytes; take what it holds."""
        poller = select.poll()
        poller.register(self._socket, select.POLLIN | select.POLLOUT)
        poller.poll(None if deadline == math.inf else max(0.0, deadline - time.monotonic()) * 1000)
        if self._fill_if_any():
            while (frame := self._next()) is not None:
                self._arrived.append(kept(frame))

    def receive(self, deadline: float) -> Frame:
        """The next frame, waiting for it.

        Raises:
            ApplianceError: What became of the connection.
        """
        while True:
            frame = self._arrived.popleft() if self._arrived else self._next()
            if frame is not None:
                return frame
            self._fill(deadline)

    def receive_if_any(self) -> Frame | None:
        """The next frame, or None where none has come.

        Raises:
            ApplianceError: What became of the connection.
        """
        while True:
            frame = self._arrived.popleft() if self._arrived else self._next()
            if frame is not None or not self._fill_if_any():
                return frame

    def put_back(self, frames: Iterable[Frame]) -> None:
        """Give frames, `kept`, back to be received next."""
        self._arrived.extendleft(reversed(list(frames)))

    def _next(self) -> Frame | None:
        try:
            return self._reader.next()
        except ProtocolError:
            self.close()
            raise

    def _fill(self, deadline: float) -> None:
        """Receive, waiting until something comes."""
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

    def _fill_if_any(self) -> bool:
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

    def _lost(self, problem: OSError | None) -> ApplianceError:
        """Close, and give the error to raise: what the daemon said last about the connection, or that it is gone."""
        said = None if self.is_closed else self._last_words()
        self.close()
        return said or lost(problem, not self._reader.is_empty)

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


def kept(frame: Frame) -> Frame:
    """A frame whose body outlives the next receive."""
    return frame if frame.is_owned else frame._replace(body=memoryview(bytes(frame.body)), is_owned=True)
