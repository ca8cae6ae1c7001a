"""Heads of requests and answers: protobuf messages, serialised or parsed once for each combination of shapes.

A server keeps what it derived from a head by the head's bytes, so the same shapes must give the same bytes; both caches
here serve that as much as speed.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from appliance_client import tensors
from appliance_client.answer import Answer, Parameter
from appliance_client.errors import InvalidRequest, ProtocolError
from appliance_client.wire import native
from appliance_client.wire import open_inference_pb2 as oip

#: Heads kept for each direction; beyond it the cache starts afresh.
MAX_CACHED_HEADS: Final = 1024

#: Longest head of an answer that is worth keeping.
MAX_CACHED_HEAD_BYTES: Final = 4096

#: Where inputs begin in a region.
REGION_ALIGNMENT: Final = 64

_TIMINGS_SIZE: Final = native.TIMINGS.size

_PARAMETER_FIELDS: Final = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}

_MAX_I64: Final = (1 << 63) - 1

#: What determines a head: model, version, outputs, parameters, then name, datatype and shape of each input.
Signature = tuple[Any, ...]


class Request(NamedTuple):
    """One inference, ready to be framed.

    Attributes:
        signature: What its head is determined by.
        head: The head for a request whose inputs travel in the frame.
        contents: Each input's elements; arrays may be non-contiguous.
        byte_size: Bytes of all inputs.
        largest: Bytes of the largest input.
    """

    signature: Signature
    head: bytes
    contents: "list[bytes | np.ndarray[Any, Any]]"
    byte_size: int
    largest: int

    def tail(self) -> bytes:
        """All inputs one after another."""
        contents = self.contents
        if len(contents) == 1:
            content = contents[0]
            return content if type(content) is bytes else content.tobytes()  # type: ignore[union-attr]
        return b"".join([content if type(content) is bytes else content.tobytes() for content in contents])  # type: ignore[union-attr]

    def buffers(self) -> list[Any]:
        """All inputs as flat buffers, without copying those that are contiguous."""
        return [
            content if isinstance(content, bytes) else np.ascontiguousarray(content).reshape(-1).view(np.uint8).data
            for content in self.contents
        ]

    def region_offsets(self) -> tuple[list[int], int]:
        """Where each input goes in a region, and how many bytes that takes."""
        offsets: list[int] = []
        end = 0
        for content in self.contents:
            begin = -(-end // REGION_ALIGNMENT) * REGION_ALIGNMENT
            offsets.append(begin)
            end = begin + _size_of(content)
        return offsets, end

    def write(self, memory: Any, offsets: Sequence[int]) -> None:
        """Copy every input into `memory` at its offset: the one copy a large input costs."""
        for content, offset in zip(self.contents, offsets, strict=True):
            if isinstance(content, bytes):
                memory[offset : offset + len(content)] = content
            else:
                np.copyto(np.ndarray(content.shape, content.dtype, memory, offset), content)


def _size_of(content: "bytes | np.ndarray[Any, Any]") -> int:
    return len(content) if isinstance(content, bytes) else content.nbytes


class _AnswerLayout(NamedTuple):
    model: str
    version: str
    parameters: Mapping[str, Parameter]
    outputs: tuple[tensors.OutputLayout, ...]


class Codec:
    """Turns values into requests and frames into answers; keeps heads. Threads may share one."""

    def __init__(self) -> None:
        self._heads: dict[Signature, bytes] = {}
        self._layouts: dict[bytes, _AnswerLayout] = {}

    def request(
        self,
        model: str,
        inputs: Mapping[str, Any],
        outputs: Sequence[str],
        version: str,
        parameters: Mapping[str, Parameter] | None,
    ) -> Request:
        """Encode one inference.

        Raises:
            InvalidRequest: A value is no tensor, or a name or parameter is of the wrong type.
        """
        key: list[Any] = [model, version, tuple(outputs), _parameter_key(parameters) if parameters else ()]
        contents: list[bytes | np.ndarray[Any, Any]] = []
        byte_size = largest = 0
        for name, value in inputs.items():
            if type(value) is np.ndarray and (datatype := tensors.DATATYPES.get(value.dtype)) is not None:
                key += (name, datatype, value.shape)
                contents.append(value)
                size = value.nbytes
            else:
                datatype, shape, content = tensors.encode(name, value)
                key += (name, datatype, shape)
                contents.append(content)
                size = _size_of(content)
            byte_size += size
            if size > largest:
                largest = size
        signature = tuple(key)
        head = self._heads.get(signature)
        if head is None:
            head = self._keep(signature, _request_head(signature))
        return Request(signature, head, contents, byte_size, largest)

    def region_head(self, request: Request, region: int, offsets: Sequence[int]) -> bytes:
        """The head for a request whose inputs lie in a region.

        Args:
            request: The request.
            region: The region's number.
            offsets: Where each input begins.
        """
        sizes = tuple(_size_of(content) for content in request.contents)
        signature = (*request.signature, region, sizes)
        head = self._heads.get(signature)
        if head is None:
            places = [(region, *place) for place in zip(offsets, sizes, strict=True)]
            head = self._keep(signature, _request_head(request.signature, places))
        return head

    def long_timeout_head(self, head: bytes, timeout_us: int) -> bytes:
        """A head that carries a timeout too long for the frame's header."""
        message = oip.ModelInferRequest.FromString(head)
        message.parameters["timeout"].int64_param = timeout_us
        return message.SerializeToString(deterministic=True)

    def answer(self, head_size: int, body: memoryview, is_owned: bool) -> Answer:
        """The answer in the body of a RESULT frame.

        Raises:
            ProtocolError: The body is truncated, or is no answer.
        """
        begin = _TIMINGS_SIZE + head_size
        if len(body) < begin:
            raise ProtocolError(f"cannot read the answer: it has {len(body)} bytes of at least {begin}")
        timings = native.TIMINGS.unpack_from(body)
        head = bytes(body[_TIMINGS_SIZE:begin])
        layout = self._layouts.get(head)
        if layout is None:
            layout = _answer_layout(head)
            if head_size <= MAX_CACHED_HEAD_BYTES:
                if len(self._layouts) >= MAX_CACHED_HEADS:
                    self._layouts.clear()
                self._layouts[head] = layout
        model, version, parameters, outputs = layout
        return Answer(model, version, tensors.decode(outputs, body[begin:], is_owned), timings, parameters)

    def _keep(self, signature: Signature, head: bytes) -> bytes:
        if len(self._heads) >= MAX_CACHED_HEADS:
            self._heads.clear()
        self._heads[signature] = head
        return head


def _parameter_key(parameters: Mapping[str, Parameter]) -> tuple[tuple[str, str, Parameter], ...]:
    """Parameters in one order, with the field each travels in: True and 1 are equal, and not the same parameter."""
    key = []
    for name, value in sorted(parameters.items()):
        field = _PARAMETER_FIELDS.get(type(value))
        if field is None:
            raise InvalidRequest(
                f"cannot send parameter {name!r}: it is a {type(value).__name__}, not a bool, int, float or str"
            )
        if field == "int64_param" and value > _MAX_I64:  # type: ignore[operator] # an int, by its field
            field = "uint64_param"
        key.append((name, field, value))
    return tuple(key)


def _request_head(signature: Signature, places: Sequence[tuple[int, int, int]] = ()) -> bytes:
    model, version, outputs, parameters = signature[:4]
    try:
        message = oip.ModelInferRequest(model_name=model, model_version=version)
        for name in outputs:
            message.outputs.add(name=name)
        for name, field, value in parameters:
            setattr(message.parameters[name], field, value)
        for index, position in enumerate(range(4, len(signature), 3)):
            name, datatype, shape = signature[position : position + 3]
            tensor = message.inputs.add(name=name, datatype=datatype, shape=shape)
            if places:
                region, offset, byte_size = places[index]
                tensor.parameters["shared_memory_region"].int64_param = region
                tensor.parameters["shared_memory_offset"].int64_param = offset
                tensor.parameters["shared_memory_byte_size"].int64_param = byte_size
    except (TypeError, ValueError) as problem:
        raise InvalidRequest(f"cannot make a request for model {model!r}: {problem}") from None
    return message.SerializeToString(deterministic=True)


def _answer_layout(head: bytes) -> _AnswerLayout:
    try:
        message = oip.ModelInferResponse.FromString(head)
    except DecodeError:
        raise ProtocolError("cannot read the answer: its head is no ModelInferResponse") from None
    parameters = {
        name: getattr(parameter, choice)
        for name, parameter in message.parameters.items()
        if (choice := parameter.WhichOneof("parameter_choice")) is not None
    }
    outputs = tuple(
        tensors.output_layout(output.name, output.datatype, tuple(output.shape)) for output in message.outputs
    )
    return _AnswerLayout(message.model_name, message.model_version, parameters, outputs)
