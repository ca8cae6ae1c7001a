"""What a gRPC client's header block asks for, and the header blocks that answer it.

After the protocol over HTTP/2 (grpc/grpc doc/PROTOCOL-HTTP2.md) and its status codes (doc/statuscodes.md).
"""

import re
from typing import Final, NamedTuple

from appliance.server.h2.fields import Fields, encode_fields, request_is_wellformed
from appliance.server.oip import CALLS
from appliance.server.status import GrpcStatus

SERVICE: Final = "inference.GRPCInferenceService"
HEALTH: Final = "grpc.health.v1.Health"

#: Trailing metadata that carries an error's kind.
KIND_KEY: Final = b"appliance-kind"

#: Bytes of a message at most: it travels percent-encoded in a header, and clients take 8 KiB of headers.
_MAX_MESSAGE_BYTES: Final = 2048

#: Compressions of messages that are understood, in gRPC's words.
ENCODINGS: Final = (b"identity", b"deflate", b"gzip")

_CONTENT_TYPE: Final = re.compile(rb"application/grpc(?:\+proto)?(?:;.*)?", re.DOTALL)
_TIMEOUT: Final = re.compile(rb"([0-9]{1,8})([HMSmun])")
_UNIT_NS: Final = {
    b"H": 3_600_000_000_000, b"M": 60_000_000_000, b"S": 1_000_000_000, b"m": 1_000_000, b"u": 1000, b"n": 1,
}  # fmt: skip

_METHODS: Final[dict[bytes, str]] = {
    f"/{SERVICE}/{method}".encode(): method for method in (*CALLS, "ModelInfer", "ModelStreamInfer")
} | {f"/{HEALTH}/{method}".encode(): method for method in ("Check", "Watch")}

_ANSWER: Final = (
    (b":status", b"200"),
    (b"content-type", b"application/grpc"),
    (b"grpc-accept-encoding", b",".join(ENCODINGS)),
)
#: Before the messages of an answer.
ANSWER_BLOCK: Final = encode_fields(*_ANSWER)
#: Behind them.
OK_BLOCK: Final = encode_fields((b"grpc-status", b"0"))


class GrpcRequest(NamedTuple):
    """A request's header block.

    Attributes:
        method: The method's name without its service.
        is_infer: True for ModelInfer.
        timeout_us: Time limit from now, 0 for none.
        encoding: How messages marked as compressed are compressed.
        refusal: The header block to answer with where the request cannot be served, else empty.
    """

    method: str
    is_infer: bool
    timeout_us: int
    encoding: bytes
    refusal: bytes


def read_request(fields: Fields) -> GrpcRequest | None:
    """What a request's fields ask for; None where they are no request."""
    if not request_is_wellformed(fields):
        return None
    known = dict(reversed(fields))
    if known[b":method"] != b"POST":
        return _refused(encode_fields((b":status", b"405"), (b"allow", b"POST")))
    if not _CONTENT_TYPE.fullmatch(known.get(b"content-type", b"")):
        return _refused(encode_fields((b":status", b"415")))
    method = _METHODS.get(known[b":path"])
    if method is None:
        return _refused(error_block(GrpcStatus.UNIMPLEMENTED, "cannot call the method: this daemon does not offer it"))
    timeout = known.get(b"grpc-timeout")
    timeout_us = 0
    if timeout is not None:
        match = _TIMEOUT.fullmatch(timeout)
        if match is None:
            return _refused(error_block(GrpcStatus.INTERNAL, "cannot read grpc-timeout: it is no number with a unit"))
        timeout_us = max(1, int(match[1]) * _UNIT_NS[match[2]] // 1000)
    encoding = known.get(b"grpc-encoding", b"identity")
    if encoding not in ENCODINGS:
        message = "cannot decompress the message: grpc-encoding may be identity, deflate or gzip"
        return _refused(error_block(GrpcStatus.UNIMPLEMENTED, message))
    return GrpcRequest(method, method == "ModelInfer", timeout_us, encoding, b"")


def _refused(block: bytes) -> GrpcRequest:
    return GrpcRequest("", False, 0, b"identity", block)


def error_block(status: int, message: str, kind: str = "", is_trailer: bool = False) -> bytes:
    """A header block that ends a call with an error; `is_trailer` where messages went before it."""
    fields = [] if is_trailer else list(_ANSWER)
    fields.append((b"grpc-status", b"%d" % status))
    fields.append((b"grpc-message", _percent_encode(message)))
    if kind:
        fields.append((KIND_KEY, kind.encode()))
    return encode_fields(*fields)


def _percent_encode(message: str) -> bytes:
    content = message.encode("utf-8", "replace")[:_MAX_MESSAGE_BYTES].decode("utf-8", "ignore").encode()
    return b"".join(b"%c" % byte if 0x20 <= byte <= 0x7E and byte != 0x25 else b"%%%02X" % byte for byte in content)
