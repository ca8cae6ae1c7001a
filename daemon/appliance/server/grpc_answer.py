"""Answers to ModelInfer, framed by hand: the message, its gRPC prefix and the three HTTP/2 frames around it."""

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from appliance.server.grpc_request import ANSWER_BLOCK, OK_BLOCK
from appliance.server.h2 import frames
from appliance.server.oip_wire import varint
from appliance.types import Buffer, Timings

RAW_OUTPUT_TAG: Final = b"\x32"

_HEADERS_START: Final = frames.frame(frames.HEADERS, frames.END_HEADERS, 0, ANSWER_BLOCK)[:5]
_TRAILERS_START: Final = frames.frame(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, 0, OK_BLOCK)[:5]

#: A HEADERS frame, the header of a DATA frame with its length in two parts, and the message's prefix.
_BEFORE: Final = struct.Struct(f">5sI{len(ANSWER_BLOCK)}sHBHIBI")
_AFTER: Final = struct.Struct(f">5sI{len(OK_BLOCK)}s")


def frame_answer(stream: int, message: Sequence[Buffer], length: int) -> bytes:
    """A whole answer in one DATA frame, for a message of `length` bytes given in parts."""
    content = length + 5
    return b"".join(
        (
            _BEFORE.pack(
                _HEADERS_START, stream, ANSWER_BLOCK, content >> 8, content & 0xFF, frames.DATA << 8, stream, 0, length
            ),
            *message,
            _AFTER.pack(_TRAILERS_START, stream, OK_BLOCK),
        )
    )


class TimingParameters:
    """Encodes the timings of answers; what the calls of a batch have in common is encoded once."""

    def __init__(self) -> None:
        self._timings: Timings | None = None
        self._common = b""

    def encode(self, timings: Timings, tokenise_ns: int, queue_ns: int) -> bytes:
        """The field ``parameters`` of a ModelInferResponse, in microseconds."""
        if timings is not self._timings:
            self._timings = timings
            self._common = b"".join(
                (
                    _parameter("decode_us", timings.decode_ns // 1000),
                    _parameter("copy_us", timings.copy_ns // 1000),
                    _parameter("compute_us", timings.compute_ns // 1000),
                    _parameter("postprocess_us", timings.postprocess_ns // 1000),
                    _parameter("batch_rows", timings.batch_rows),
                )
            )
        return self._common + _parameter("tokenise_us", tokenise_ns // 1000) + _parameter("queue_us", queue_ns // 1000)


@lru_cache(maxsize=2048)
def _parameter(key: str, value: int) -> bytes:
    """An entry of ``map<string, InferParameter> parameters = 4`` with an ``int64_param = 2``, which is not negative."""
    choice = b"\x10" + varint(value)
    name = key.encode()
    entry = b"\x0a" + varint(len(name)) + name + b"\x12" + varint(len(choice)) + choice
    return b"\x22" + varint(len(entry)) + entry
