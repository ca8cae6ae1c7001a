"""The worker's end of the socket to the front-end."""

import array
import os
import socket
from collections.abc import Sequence
from typing import Final

from appliance.wire.worker import MAX_PACKET_BYTES

#: Descriptors that come with one packet at most: the two slabs of a slot.
_MAX_FDS: Final = 2
# Plain numbers: arithmetic on the socket module's flags costs a microsecond, and every packet needs it.
_CLOEXEC: Final = int(socket.MSG_CMSG_CLOEXEC)
_TRUNCATED: Final = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)


class LinkBroken(Exception):
    """The front-end sent something the worker cannot go on from; the message says what."""


class Link:
    """Blocking packets over an inherited ``SOCK_SEQPACKET`` socket.

    Several threads may send at the same time, since the kernel takes a packet as a whole; one receives at a time.

    Attributes:
        buffer: Holds the packet last received; the next `receive` overwrites it.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)  # whoever made the pair may have left it otherwise
        self._sock = sock
        self._fds: list[int] = []
        content = bytearray(MAX_PACKET_BYTES)
        self.buffer = memoryview(content)
        self._buffers = [content]
        self._ancillary_bytes = socket.CMSG_SPACE(_MAX_FDS * array.array("i").itemsize)

    def receive(self) -> int:
        """Wait for a packet; returns its length, 0 when the front-end is gone.

        Raises:
            LinkBroken: The packet was longer than the protocol allows.
        """
        length, ancillary, flags, _ = self._sock.recvmsg_into(self._buffers, self._ancillary_bytes, _CLOEXEC)
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._fds.extend(array.array("i", content))
        if flags & _TRUNCATED:
            raise LinkBroken("a packet or its descriptors were truncated")
        return length

    def take_fds(self, count: int) -> list[int]:
        """The descriptors of the packet last received, now the caller's to close.

        Raises:
            LinkBroken: They are not `count`.
        """
        fds, self._fds = self._fds, []
        if len(fds) != count:
            for fd in fds:
                os.close(fd)
            raise LinkBroken(f"{len(fds)} descriptors came where {count} were announced")
        return fds

    def send(self, packet: bytes | bytearray, fds: Sequence[int] = ()) -> None:
        """Send one packet, with copies of `fds`.

        Raises:
            OSError: The front-end is gone.
        """
        if fds:
            socket.send_fds(self._sock, [packet], list(fds))
        else:
            self._sock.send(packet)
