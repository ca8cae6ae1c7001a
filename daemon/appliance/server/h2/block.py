"""A header block on its way: HEADERS and the CONTINUATION frames behind it (RFC 9113, sections 6.2 and 6.10)."""

from typing import Final, NamedTuple

from appliance.server.h2 import frames
from appliance.server.h2.fields import MAX_BLOCK_BYTES
from appliance.server.h2.frames import Code, ConnectionBroken

_MAX_CONTINUATIONS: Final = 16


class Block(NamedTuple):
    """A complete header block.

    Attributes:
        stream: The stream it is for.
        content: Its bytes, as HPACK encoded them.
        ends: True where the client sends nothing behind it.
    """

    stream: int
    content: bytes
    ends: bool


class BlockGatherer:
    """Puts header blocks together.

    Attributes:
        stream: The stream whose block is incomplete, 0 for none; nothing but its CONTINUATION may come.
    """

    def __init__(self) -> None:
        self.stream = 0
        self._ends = False
        self._content = bytearray()
        self._continuations = 0

    def begin(self, flags: int, stream: int, payload: bytes) -> Block | None:
        """Take HEADERS; returns its block if that is complete.

        Raises:
            ConnectionBroken: The frame is malformed, or the block too large.
        """
        if not stream & 1:
            raise ConnectionBroken(Code.PROTOCOL_ERROR, "HEADERS for a stream a client cannot open")
        if flags & (frames.PADDED | frames.WITH_PRIORITY):
            payload = _without_padding(flags, payload)
        ends = flags & frames.END_STREAM != 0
        if flags & frames.END_HEADERS and len(payload) <= MAX_BLOCK_BYTES:
            return Block(stream, payload, ends)
        self.stream, self._ends, self._continuations = stream, ends, 0
        return self._add(flags, payload)

    def go_on(self, flags: int, stream: int, payload: bytes) -> Block | None:
        """Take CONTINUATION; returns the block if that is complete now.

        Raises:
            ConnectionBroken: It continues nothing, or the block is too large.
        """
        if not self.stream or stream != self.stream:
            raise ConnectionBroken(Code.PROTOCOL_ERROR, "CONTINUATION without its HEADERS")
        self._continuations += 1
        return self._add(flags, payload)

    def _add(self, flags: int, payload: bytes) -> Block | None:
        self._content += payload
        if len(self._content) > MAX_BLOCK_BYTES or self._continuations > _MAX_CONTINUATIONS:
            raise ConnectionBroken(Code.ENHANCE_YOUR_CALM, "a header block is too large")
        if not flags & frames.END_HEADERS:
            return None
        block = Block(self.stream, bytes(self._content), self._ends)
        self.stream = 0
        self._content.clear()
        return block


def _without_padding(flags: int, payload: bytes) -> bytes:
    start = padding = 0
    if flags & frames.PADDED:
        if not payload:
            raise ConnectionBroken(Code.FRAME_SIZE_ERROR, "HEADERS is too short")
        padding, start = payload[0], 1
    if flags & frames.WITH_PRIORITY:
        start += 5
    if start + padding > len(payload):
        raise ConnectionBroken(Code.PROTOCOL_ERROR, "a frame is padded beyond its length")
    return payload[start : len(payload) - padding]
