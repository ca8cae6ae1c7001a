"""Requests of ModelInfer that look alike: validated once, then found again by their bytes.

A serialised request is names, shapes and parameters, then the tensors in ``raw_input_contents``; only those, and the
request's id, differ from one request of a client to the next.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from appliance.call import Call, Sink
from appliance.clients import Client
from appliance.planner import check_contents
from appliance.server.native_head import Head, check_inline, read_inline
from appliance.server.oip_infer import MAX_ID_CHARACTERS
from appliance.server.oip_wire import field_spans, parse_infer, varint
from appliance.types import Buffer, Peer

if TYPE_CHECKING:
    from appliance.engine import Engine

_MAX_NAMES: Final = 64
_MAX_HEADS_PER_NAME: Final = 8
_MAX_HEAD_BYTES: Final = 4096
#: Tensors up to this size are copied out of the message rather than viewed.
_COPIED_BYTES: Final = 4096

_NAME_TAG: Final = 0x0A
_VERSION_TAG: Final = 0x12
_ID_TAG: Final = 0x1A
_RAW_TAG: Final = 0x3A
#: Parameters, inputs and outputs.
_HEAD_TAGS: Final = frozenset((0x22, 0x2A, 0x32))


class _Known(NamedTuple):
    """A validated head: the bytes between the id and the tensors, and what they mean."""

    content: bytes
    head: Head


class InferHeads:
    """The heads that all connections of a server have in common."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._known: dict[bytes, list[_Known]] = {}

    def read(self, body: Buffer, peer: Peer, client: Client, sink: Sink, number: int) -> tuple[Head, Call, bytes]:
        """Validate a serialised ModelInferRequest.

        Returns:
            Its head, a call for it, and its id as a field of the answer.

        Raises:
            ApplianceError: The request cannot run.
        """
        try:
            # model name, version and id, each optional, each shorter than 128 bytes
            position = 0
            if body[0] == _NAME_TAG:
                position = 2 + _short(body[1])
            if body[position] == _VERSION_TAG:
                position += 2 + _short(body[position + 1])
            names = bytes(body[:position])
            id_field = b""
            if body[position] == _ID_TAG:
                stop = position + 2 + _short(body[position + 1])
                id_field = bytes(body[position:stop])
                position = stop
            for known in self._known.get(names, ()):
                content, head = known
                start = position + len(content)
                if body[position:start] == content and body[start] == _RAW_TAG and head.plan.instance.accepts:
                    contents = _split_raw(body, start)
                    if _fits(head, contents) and (not id_field or _id_is_valid(id_field)):
                        call = Call(head.plan, contents, sink, number, 0, client)
                        if head.plan.has_bytes:
                            call.nbytes = check_contents(head.plan, head.names, contents)
                        return head, call, id_field
        except (IndexError, ValueError):
            return self._read_new(body, peer, client, sink, number, None)
        return self._read_new(body, peer, client, sink, number, (names, position))

    def _read_new(
        self, body: Buffer, peer: Peer, client: Client, sink: Sink, number: int, split: tuple[bytes, int] | None
    ) -> tuple[Head, Call, bytes]:
        message, raw = parse_infer(body)
        head, contents = read_inline(self._engine, message, raw, peer)
        call = Call(head.plan, contents, sink, number, 0, client)
        call.nbytes = check_inline(head, contents)
        request_id = message.id.encode()
        id_field = b"\x1a" + varint(len(request_id)) + request_id if request_id else b""
        # heads of sequences, a new one for each, would drive the others out
        if split is not None and len(raw) == len(head.names) > 0 and head.options.sequence is None:
            self._remember(body, *split, head)
        return head, call, id_field

    def _remember(self, body: Buffer, names: bytes, position: int, head: Head) -> None:
        """Keep a head, if its bytes are in the order in which they are serialised and nothing is said twice."""
        start = position
        is_raw = False
        for tag, _, _, stop in field_spans(body, position, len(body)):
            if tag == _RAW_TAG:
                is_raw = True
            elif is_raw or tag not in _HEAD_TAGS:
                return
            else:
                start = stop
        if start - position > _MAX_HEAD_BYTES:
            return
        heads = self._known.setdefault(names, [])
        heads[:] = [known for known in heads if known.head.plan.instance.accepts][: _MAX_HEADS_PER_NAME - 1]
        heads.insert(0, _Known(bytes(body[position:start]), head))
        if len(self._known) > _MAX_NAMES:
            self._known.clear()


def _short(length: int) -> int:
    if length >= 0x80:
        raise ValueError(length)
    return length


def _id_is_valid(id_field: bytes) -> bool:
    text = id_field[2:].decode()
    return len(text) <= MAX_ID_CHARACTERS and text.isprintable()


def _split_raw(body: Buffer, position: int) -> Sequence[Buffer]:
    """The entries of ``raw_input_contents`` from `position` to the end.

    Raises:
        IndexError, ValueError: There is anything else.
    """
    end = len(body)
    contents: list[Buffer] = []
    while position < end:
        if body[position] != _RAW_TAG:
            raise ValueError(position)
        length = body[position + 1]
        position += 2
        if length >= 0x80:
            length &= 0x7F
            shift = 7
            while True:
                byte = body[position]
                position += 1
                length |= (byte & 0x7F) << shift
                if byte < 0x80:
                    break
                shift += 7
                if shift > 35:
                    raise ValueError(position)
        stop = position + length
        if stop > end:
            raise ValueError(position)
        contents.append(body[position:stop] if length <= _COPIED_BYTES else memoryview(body)[position:stop])
        position = stop
    return contents


def _fits(head: Head, contents: Sequence[Buffer]) -> bool:
    """Whether the tensors are as many and as large as the plan has them; texts are looked at later."""
    sizes = head.sizes
    if len(sizes) == 1:
        return len(contents) == 1 and sizes[0] in (-1, len(contents[0]))
    return len(contents) == len(sizes) and all(
        size in (-1, len(content)) for size, content in zip(sizes, contents, strict=True)
    )
