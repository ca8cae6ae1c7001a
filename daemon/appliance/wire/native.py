"""Frames of the native protocol on ``infer.sock``; docs/protocol.md says the same byte by byte, with test vectors.

A frame is HEADER and then ``length`` bytes of body. All numbers are little-endian::

    HEADER  length u32, type u8, flags u8, descriptors u16, id u64, head u32, timeout_us u32     (24 bytes)

``head`` is how many bytes of the body the protobuf message takes; the rest, the tail, holds raw tensors.
``descriptors`` is how many file descriptors travel with the frame's first byte as SCM_RIGHTS. ``id`` is the client's
own number for a request or a region.
"""

import struct
from enum import IntEnum
from typing import Final

MAGIC: Final = b"IAP1"
VERSION: Final = 1

HEADER: Final = struct.Struct("<IBBHQII")
HELLO: Final = struct.Struct("<4sHH")
WELCOME: Final = struct.Struct("<4sHHIIIIQ")
TIMINGS: Final = struct.Struct("<7I")
REGION_SIZE: Final = struct.Struct("<Q")

#: Bytes of the head a server keeps a validated plan for; longer heads are parsed each time.
MAX_CACHED_HEAD_BYTES: Final = 4096


class Frame(IntEnum):
    """Types of frames; below 16 from the client, from 16 on from the server."""

    HELLO = 1  #: body HELLO: magic, version, reserved
    INFER = 2  #: head: ModelInferRequest; tail: raw inputs in order, unless the message holds them
    CANCEL = 3  #: id: the request to withdraw; no body
    REGION = 4  #: id: the region's number; body REGION_SIZE; one memfd
    RELEASE = 5  #: id: the region to give back; no body
    CALL = 6  #: body: method length u8, method name, the method's OIP message

    WELCOME = 16  #: body WELCOME, then the server's version as UTF-8
    RESULT = (
        17  #: body: TIMINGS, head: ModelInferResponse without raw contents (TIMINGS not counted), tail: raw outputs
    )
    ERROR = 18  #: body: is_retryable u8, kind length u8, kind, message as UTF-8
    REPLY = 19  #: answer to CALL; body: the method's OIP message
    REGION_READY = 20  #: answer to REGION; no body
    RELEASED = 21  #: answer to RELEASE, once nothing uses the region; no body
    GOAWAY = 22  #: the server drains: requests in flight are answered, new ones refused; no body


#: Flag of RESULT: more results follow under the same id.
FLAG_MORE: Final = 1


def pack_error(kind: str, message: str, is_retryable: bool) -> bytes:
    """Body of an ERROR frame."""
    name = kind.encode("ascii")
    return bytes((is_retryable, len(name))) + name + message.encode("utf-8", "replace")


def unpack_error(body: bytes | memoryview) -> tuple[str, str, bool]:
    """Kind, message and retryability from the body of an ERROR frame.

    Raises:
        ValueError: The body is truncated.
    """
    content = bytes(body)
    if len(content) < 2 or len(content) < 2 + content[1]:
        raise ValueError("cannot read the error frame: it is truncated")
    end = 2 + content[1]
    return content[2:end].decode("ascii", "replace"), content[end:].decode("utf-8", "replace"), bool(content[0])
