"""Frames of the native protocol as a client needs them; docs/protocol.md has every byte, with test vectors.

Written against the document, not shared with the daemon: the vectors hold the two together.
"""

import struct
from typing import Final, NamedTuple

from appliance_client.errors import ApplianceError, ProtocolError, error_of

MAGIC: Final = b"IAP1"
VERSION: Final = 1

#: length u32, type u8, flags u8, descriptors u16, id u64, head u32, timeout_us u32
HEADER: Final = struct.Struct("<IBBHQII")
#: decode, tokenise, queue, copy, compute, postprocess in microseconds, rows of the batch
TIMINGS: Final = struct.Struct("<7I")

_HELLO: Final = struct.Struct("<4sHH")
_WELCOME: Final = struct.Struct("<4sHHIIIIQ")
_REGION_SIZE: Final = struct.Struct("<Q")

# Plain numbers: comparing an enum's members costs several times as much, and this is the request path.
HELLO: Final = 1
INFER: Final = 2
CANCEL: Final = 3
REGION: Final = 4
RELEASE: Final = 5
CALL: Final = 6
WELCOME: Final = 16
RESULT: Final = 17
ERROR: Final = 18
REPLY: Final = 19
REGION_READY: Final = 20
RELEASED: Final = 21
GOAWAY: Final = 22

#: Flag of RESULT: more results follow under the same id.
FLAG_MORE: Final = 1

MAX_TIMEOUT_US: Final = 0xFFFFFFFF


class Welcome(NamedTuple):
    """What the server granted this connection.

    Attributes:
        version: Protocol version spoken from here on.
        max_frame_bytes: Longest body the server takes.
        max_requests_in_flight: Requests it takes before it has answered one.
        max_regions: Regions a connection may hold; 0 where the server takes none.
        max_descriptors_per_frame: File descriptors a frame may carry.
        max_region_bytes: Largest region.
        server_version: The daemon's version, for display.
    """

    version: int
    max_frame_bytes: int
    max_requests_in_flight: int
    max_regions: int
    max_descriptors_per_frame: int
    max_region_bytes: int
    server_version: str

    @property
    def regions_usable(self) -> int:
        """Regions that can really be registered: none where no descriptor may travel."""
        return self.max_regions if self.max_descriptors_per_frame else 0


def pack_hello() -> bytes:
    """The first frame of a connection."""
    body = _HELLO.pack(MAGIC, VERSION, 0)
    return HEADER.pack(len(body), HELLO, 0, 0, 0, 0, 0) + body


def unpack_welcome(body: memoryview) -> Welcome:
    """What the server granted.

    Raises:
        ProtocolError: Not this protocol, or a version this client does not speak.
    """
    if len(body) < _WELCOME.size:
        raise ProtocolError(
            f"cannot speak to the server: its welcome has {len(body)} bytes of at least {_WELCOME.size}"
        )
    magic, version, _, frame, requests, regions, descriptors, region = _WELCOME.unpack_from(body)
    if magic != MAGIC:
        raise ProtocolError(f"cannot speak to the server: its welcome begins with {magic!r}, not {MAGIC!r}")
    if not 1 <= version <= VERSION:
        raise ProtocolError(
            f"cannot speak to the server: it chose version {version}, this client speaks 1 to {VERSION}"
        )
    name = bytes(body[_WELCOME.size :]).decode("utf-8", "replace")
    return Welcome(version, frame, max(requests, 1), regions, descriptors, region, name)


def pack_cancel(identifier: int) -> bytes:
    """Withdraw a request."""
    return HEADER.pack(0, CANCEL, 0, 0, identifier, 0, 0)


def pack_region(identifier: int, byte_size: int) -> bytes:
    """Offer a region; the memfd travels with the first byte."""
    return HEADER.pack(_REGION_SIZE.size, REGION, 0, 1, identifier, 0, 0) + _REGION_SIZE.pack(byte_size)


def pack_release(identifier: int) -> bytes:
    """Give a region back."""
    return HEADER.pack(0, RELEASE, 0, 0, identifier, 0, 0)


def pack_call(identifier: int, method: str, message: bytes, timeout_us: int = 0) -> bytes:
    """Call a method other than inference."""
    name = method.encode("ascii")
    length = 1 + len(name) + len(message)
    return HEADER.pack(length, CALL, 0, 0, identifier, 0, timeout_us) + bytes((len(name),)) + name + message


def unpack_error(body: memoryview) -> ApplianceError:
    """The exception in an ERROR frame.

    Raises:
        ProtocolError: The body is truncated.
    """
    if len(body) < 2 or len(body) < 2 + body[1]:
        raise ProtocolError("cannot read the server's error: it is truncated")
    end = 2 + body[1]
    kind = bytes(body[2:end]).decode("ascii", "replace")
    return error_of(kind, bytes(body[end:]).decode("utf-8", "replace"), bool(body[0]))
