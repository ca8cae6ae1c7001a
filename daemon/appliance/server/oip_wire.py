"""Reading serialised messages without letting them grow, and without copying large tensors.

Protobuf may take a hundred times a message's size in memory, since two bytes make an empty sub-message. So a long
message is first walked field by field (protobuf.dev/programming-guides/encoding): its raw tensors are left where they
lie, and the rest must be short.
"""

from collections.abc import Iterator, Sequence
from typing import Final, TypeVar

from google.protobuf.message import DecodeError, Message

from appliance.errors import InvalidRequest
from appliance.types import Buffer
from appliance.wire.open_inference_pb2 import ModelInferRequest

#: A message without its tensors; smaller ones are parsed without looking first.
MAX_HEAD_BYTES: Final = 64 * 1024
#: Tensors sent as typed contents, as they lie in the message.
MAX_TYPED_BYTES: Final = 16 * 1024 * 1024
#: Fields of one message, repeated ones counted each.
MAX_FIELDS: Final = 1024

_INPUTS_TAG: Final = 5 << 3 | 2
_CONTENTS_TAG: Final = 5 << 3 | 2
_RAW_INPUT_TAG: Final = 7 << 3 | 2

M = TypeVar("M", bound=Message)


def parse_message(kind: type[M], body: Buffer) -> M:
    """Parse a message of at most MAX_HEAD_BYTES.

    Raises:
        InvalidRequest: It is longer, or no such message.
    """
    if len(body) > MAX_HEAD_BYTES:
        raise InvalidRequest(f"cannot read the message: it has {len(body)} bytes, and the limit is {MAX_HEAD_BYTES}")
    return _parse(kind, body)


def parse_infer(body: Buffer) -> tuple[ModelInferRequest, Sequence[Buffer]]:
    """Parse a serialised ModelInferRequest without copying large tensors.

    Returns:
        The message, and its raw inputs, which may be views on `body`; take them from here only.

    Raises:
        InvalidRequest: It cannot be parsed, or holds more than the limits allow.
    """
    if len(body) <= MAX_HEAD_BYTES:
        message = _parse(ModelInferRequest, body)
        return message, message.raw_input_contents
    head, raw = _split_raw(body)
    return _parse(ModelInferRequest, head), raw


def varint(value: int) -> bytes:
    """`value`, not negative, as protobuf writes lengths."""
    if value < 0x80:
        return bytes((value,))
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _parse(kind: type[M], body: Buffer) -> M:
    try:
        return kind.FromString(body)  # type: ignore[arg-type] # views do as well
    except DecodeError as error:
        raise InvalidRequest(f"cannot read the message: it is no {kind.DESCRIPTOR.name}") from error


def _split_raw(body: Buffer) -> tuple[bytes, list[Buffer]]:
    view = memoryview(body)
    head: list[Buffer] = []
    raw: list[Buffer] = []
    head_bytes = 0
    typed_bytes = 0
    for tag, start, inner, stop in field_spans(body, 0, len(body)):
        if tag == _RAW_INPUT_TAG:
            raw.append(view[inner:stop])
            continue
        head.append(view[start:stop])
        head_bytes += stop - start
        if tag == _INPUTS_TAG and stop - start > 1024:
            typed_bytes += sum(e - s for t, s, _, e in field_spans(body, inner, stop) if t == _CONTENTS_TAG)
    if typed_bytes > MAX_TYPED_BYTES:
        raise InvalidRequest(
            f"cannot take {typed_bytes} bytes of typed contents: the limit is {MAX_TYPED_BYTES}, use raw_input_contents"
        )
    if head_bytes - typed_bytes > MAX_HEAD_BYTES:
        raise InvalidRequest(
            f"cannot take {head_bytes - typed_bytes} bytes of names, shapes and parameters: the limit is "
            f"{MAX_HEAD_BYTES}"
        )
    return b"".join(head), raw


def field_spans(body: Buffer, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Tag, start, start of the value and end of each field of the message in ``body[position:end]``."""
    for _ in range(MAX_FIELDS + 1):
        if position == end:
            return
        start = position
        tag, position = _read_varint(body, position, end)
        inner = position
        match tag & 7:
            case 0:
                _, position = _read_varint(body, position, end)
            case 1:
                position += 8
            case 2:
                length, inner = _read_varint(body, position, end)
                position = inner + length
            case 5:
                position += 4
            case _:
                raise InvalidRequest("cannot read the message: it is no ModelInferRequest")
        if position > end:
            raise InvalidRequest("cannot read the message: it is truncated")
        yield tag, start, inner, position
    raise InvalidRequest(f"cannot take the request: it has more than {MAX_FIELDS} fields")


def _read_varint(body: Buffer, position: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            break
        byte = body[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise InvalidRequest("cannot read the message: it is truncated")
