"""Frames of HTTP/2: their numbers and their bytes (RFC 9113, sections 4, 6, 7 and 11)."""

import struct
from enum import IntEnum
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

#: Length (24 bits, in two parts), type, flags, stream.
HEADER: Final = struct.Struct(">HBBBI")
SETTING: Final = struct.Struct(">HI")
U32: Final = struct.Struct(">I")
_GOAWAY: Final = struct.Struct(">II")

# Types, as plain numbers: every frame is compared with them, and enum members cost ten times as much to read.
DATA: Final = 0
HEADERS: Final = 1
PRIORITY: Final = 2
RST_STREAM: Final = 3
SETTINGS: Final = 4
PUSH_PROMISE: Final = 5
PING: Final = 6
GOAWAY: Final = 7
WINDOW_UPDATE: Final = 8
CONTINUATION: Final = 9

END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
WITH_PRIORITY: Final = 0x20

HEADER_TABLE_SIZE: Final = 1
ENABLE_PUSH: Final = 2
MAX_CONCURRENT_STREAMS: Final = 3
INITIAL_WINDOW_SIZE: Final = 4
MAX_FRAME_SIZE: Final = 5
MAX_HEADER_LIST_SIZE: Final = 6

MAX_WINDOW: Final = 0x7FFFFFFF
MAX_STREAM_ID: Final = 0x7FFFFFFF
#: What both sides have until they say otherwise.
DEFAULT_WINDOW: Final = 65535
DEFAULT_FRAME_SIZE: Final = 16384


class Code(IntEnum):
    """Error codes."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    SETTINGS_TIMEOUT = 0x4
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    ENHANCE_YOUR_CALM = 0xB


class ConnectionBroken(Exception):
    """The peer broke a rule that ends the connection."""

    def __init__(self, code: Code, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class StreamBroken(Exception):
    """The peer broke a rule that ends one stream."""

    def __init__(self, code: Code) -> None:
        super().__init__(code.name)
        self.code = code


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One frame."""
    length = len(payload)
    return HEADER.pack(length >> 8, length & 0xFF, kind, flags, stream) + payload


def settings(values: dict[int, int]) -> bytes:
    """SETTINGS."""
    return frame(SETTINGS, 0, 0, b"".join(SETTING.pack(key, value) for key, value in values.items()))


def window_update(stream: int, increment: int) -> bytes:
    """WINDOW_UPDATE; stream 0 is the connection."""
    return frame(WINDOW_UPDATE, 0, stream, U32.pack(increment))


def rst_stream(stream: int, code: Code) -> bytes:
    """RST_STREAM."""
    return frame(RST_STREAM, 0, stream, U32.pack(code))


def goaway(last_stream: int, code: Code, reason: str) -> bytes:
    """GOAWAY with its debug data."""
    return frame(GOAWAY, 0, 0, _GOAWAY.pack(last_stream, code) + reason.encode("ascii", "replace"))
