"""Cutting a stream of bytes into frames, without I/O."""

from typing import Final, NamedTuple

from appliance_client.errors import ProtocolError
from appliance_client.wire import native

BUFFER_BYTES: Final = 65536

#: Longest body before WELCOME: a welcome or an error.
HANDSHAKE_BYTES: Final = 4096

#: Requests up to this size are joined and sent at once; of larger ones the parts are sent as they lie.
JOIN_BYTES: Final = 65536

_ALIGNMENT: Final = 16


class Frame(NamedTuple):
    """One frame from the server.

    Attributes:
        kind: Its type, a constant of `wire.native`.
        flags: Its flags.
        identifier: The request or region it is about; 0 for the connection.
        head: Bytes of the message in a RESULT.
        body: What follows the header.
        is_owned: True where `body` is nobody else's; False where it is valid only until bytes are received again.
    """

    kind: int
    flags: int
    identifier: int
    head: int
    body: memoryview
    is_owned: bool


class FrameReader:
    """Takes bytes, gives frames.

    The caller receives into `space()`, tells `received()` how many bytes came, and takes frames from `next()` until it
    gives None. Short frames are views on one buffer used again and again. A frame longer than that buffer is received
    into memory of its own, laid out so that a RESULT's tail begins on a 16-byte boundary: its tensors need no copy.

    Attributes:
        max_body_bytes: Longest body accepted.
    """

    __slots__ = ("_end", "_filled", "_header", "_large", "_start", "_view", "max_body_bytes")

    def __init__(self, max_body_bytes: int) -> None:
        self.max_body_bytes = max_body_bytes
        self._view = memoryview(bytearray(BUFFER_BYTES))
        self._start = 0
        self._end = 0
        self._large: memoryview | None = None
        self._filled = 0
        self._header = (0, 0, 0, 0)

    def space(self) -> memoryview:
        """Where the next bytes go; never empty."""
        if self._large is not None:
            return self._large[self._filled :]
        if self._start == self._end:
            self._start = self._end = 0
            return self._view
        return self._view[self._end :]

    def received(self, count: int) -> None:
        """Say that `count` bytes came into `space()`."""
        if self._large is not None:
            self._filled += count
        else:
            self._end += count

    @property
    def is_empty(self) -> bool:
        """True between two frames."""
        return self._large is None and self._start == self._end

    def next(self) -> Frame | None:
        """The next complete frame, or None until more bytes come.

        Raises:
            ProtocolError: The bytes are no frame, or the frame is longer than `max_body_bytes`.
        """
        if self._large is not None:
            return self._finished_large()
        start = self._start
        available = self._end - start - native.HEADER.size
        if available < 0:
            self._make_room(native.HEADER.size)
            return None
        length, kind, flags, descriptors, identifier, head, _ = native.HEADER.unpack_from(self._view, start)
        if length > available or length > self.max_body_bytes or head > length or descriptors or not 16 <= kind <= 22:
            self._refuse_nonsense(length, kind, descriptors, head)
            if native.HEADER.size + length > BUFFER_BYTES:
                self._begin_large(length, kind, flags, identifier, head)
                return self._finished_large()
            self._make_room(native.HEADER.size + length)
            return None
        start += native.HEADER.size
        self._start = end = start + length
        return Frame(kind, flags, identifier, head, self._view[start:end], False)

    def _refuse_nonsense(self, length: int, kind: int, descriptors: int, head: int) -> None:
        if not native.WELCOME <= kind <= native.GOAWAY:
            raise ProtocolError(f"cannot read the server's frame: type {kind} is not in this protocol")
        if length > self.max_body_bytes:
            raise ProtocolError(
                f"cannot read the server's frame: it announces {length} bytes, at most {self.max_body_bytes} are taken"
            )
        if head > length:
            raise ProtocolError(f"cannot read the server's frame: its head has {head} bytes, its body {length}")
        if descriptors:
            raise ProtocolError(f"cannot read the server's frame: it announces {descriptors} descriptors, none are due")

    def _make_room(self, needed: int) -> None:
        """Move an incomplete frame to the front where the rest would not fit behind it."""
        if self._start + needed > BUFFER_BYTES:
            rest = bytes(self._view[self._start : self._end])
            self._view[: len(rest)] = rest
            self._start, self._end = 0, len(rest)

    def _begin_large(self, length: int, kind: int, flags: int, identifier: int, head: int) -> None:
        pad = -(native.TIMINGS.size + head) % _ALIGNMENT
        self._large = memoryview(bytearray(pad + length))[pad:]
        rest = self._view[self._start + native.HEADER.size : self._end]
        self._large[: len(rest)] = rest
        self._filled = len(rest)
        self._start = self._end = 0
        self._header = (kind, flags, identifier, head)

    def _finished_large(self) -> Frame | None:
        body = self._large
        if body is None or self._filled < len(body):
            return None
        self._large = None
        return Frame(*self._header, body, True)
