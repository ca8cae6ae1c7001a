"""Messages in the content of a gRPC stream: a flag, a length, and the message (grpc/grpc doc/PROTOCOL-HTTP2.md)."""

import struct
import zlib
from typing import Final

from appliance.server.status import GrpcStatus
from appliance.types import Buffer

#: Whether it is compressed, and its length.
PREFIX: Final = struct.Struct(">BI")

#: zlib's window bits; deflate is zlib's own format here.
_WINDOW_BITS: Final = {b"gzip": 31, b"deflate": 15}


class CallRefused(Exception):
    """A call ends with a status that is gRPC's own, not an error of the daemon's."""

    def __init__(self, status: GrpcStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class MessageReader:
    """Cuts the content of one stream into messages.

    Attributes:
        missing: Bytes still to come of a message that has begun.
    """

    __slots__ = ("_buffer", "_max_bytes", "missing")

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()
        self.missing = 0

    @property
    def held(self) -> int:
        """Bytes that wait, the beginnings of messages included."""
        return len(self._buffer)

    def feed(self, content: Buffer) -> None:
        """Take content.

        Raises:
            CallRefused: The next message is too large, or is none.
        """
        self._buffer += content
        self._look()

    def _look(self) -> None:
        if len(self._buffer) < PREFIX.size:
            self.missing = 0
            return
        flag, length = PREFIX.unpack_from(self._buffer)
        if flag > 1:
            raise CallRefused(GrpcStatus.INTERNAL, f"cannot read the message: its first byte is {flag}, not 0 or 1")
        check_length(length, self._max_bytes)
        self.missing = max(0, PREFIX.size + length - len(self._buffer))

    def take(self) -> tuple[bool, Buffer] | None:
        """The next message and whether it is compressed; None while it is not complete.

        Raises:
            CallRefused: The message behind it is too large, or is none.
        """
        buffer = self._buffer
        if len(buffer) < PREFIX.size or self.missing:
            return None
        flag, length = PREFIX.unpack_from(buffer)
        stop = PREFIX.size + length
        if len(buffer) == stop:  # a large message is not copied again
            self._buffer = bytearray()
            return bool(flag), memoryview(buffer)[PREFIX.size :].toreadonly()
        message = bytes(memoryview(buffer)[PREFIX.size : stop])
        del buffer[:stop]
        self._look()
        return bool(flag), message


def check_length(length: int, max_bytes: int) -> None:
    """Refuse a message by its length.

    Raises:
        CallRefused: It is larger than `max_bytes`.
    """
    if length > max_bytes:
        raise CallRefused(
            GrpcStatus.RESOURCE_EXHAUSTED,
            f"cannot take the message: its {length} bytes exceed the limit of {max_bytes}",
        )


def decompress(message: Buffer, encoding: bytes, max_bytes: int) -> bytes:
    """A message as it was before the client compressed it; takes long for large ones.

    Raises:
        CallRefused: It is larger than `max_bytes`, or not compressed as it says.
    """
    if encoding not in _WINDOW_BITS:
        raise CallRefused(GrpcStatus.INTERNAL, "cannot read the message: it is compressed without grpc-encoding")
    decompressor = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        content = decompressor.decompress(message, max_bytes + 1)
    except zlib.error as error:
        raise CallRefused(GrpcStatus.INTERNAL, "cannot decompress the message") from error
    if len(content) > max_bytes:
        raise CallRefused(
            GrpcStatus.RESOURCE_EXHAUSTED, f"cannot take the message: decompressed it exceeds {max_bytes} bytes"
        )
    if not decompressor.eof:
        raise CallRefused(GrpcStatus.INTERNAL, "cannot decompress the message: it is truncated")
    return content
