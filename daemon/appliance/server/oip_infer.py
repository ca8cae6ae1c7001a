"""Inference messages of the Open Inference Protocol to and from the engine's values.

The rules are the protocol's (kserve/open-inference-protocol, inference_grpc.md): tensors lie either all in
``raw_input_contents``, in the order of ``inputs``, or each in its own ``contents``; FP16 has no typed field. Parameters
follow Triton's reserved names.
"""

import struct
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Final

from appliance.clients import Client
from appliance.errors import InvalidRequest
from appliance.server.oip_wire import varint
from appliance.server.options import RESERVED, read_options
from appliance.types import (
    ITEM_BYTES,
    NO_OPTIONS,
    Buffer,
    InferRequest,
    InferResult,
    Peer,
    RequestOptions,
    Tensor,
)
from appliance.wire.elements import join_elements
from appliance.wire.open_inference_pb2 import (
    InferParameter,
    InferTensorContents,
    ModelInferRequest,
    ModelInferResponse,
)

MAX_TENSORS: Final = 256
MAX_RANK: Final = 32
MAX_ELEMENTS: Final = 1 << 40
MAX_ID_CHARACTERS: Final = 256
#: Elements converted one by one on the event loop: typed integers and BYTES. 30 ms at most.
MAX_CONVERTED_ELEMENTS: Final = 1 << 20

#: Typed field by datatype, and the element's struct code; None where the packed field already is the raw tensor.
_TYPED: Final[dict[str, tuple[str, str | None]]] = {
    "BOOL": ("bool_contents", None),
    "INT8": ("int_contents", "b"),
    "INT16": ("int_contents", "h"),
    "INT32": ("int_contents", "i"),
    "INT64": ("int64_contents", "q"),
    "UINT8": ("uint_contents", "B"),
    "UINT16": ("uint_contents", "H"),
    "UINT32": ("uint_contents", "I"),
    "UINT64": ("uint64_contents", "Q"),
    "FP32": ("fp32_contents", None),
    "FP64": ("fp64_contents", None),
    "BYTES": ("bytes_contents", "s"),
}

_RAW_OUTPUT_TAG: Final = b"\x32"


def request_from_message(
    message: ModelInferRequest,
    peer: Peer | None,
    timeout_us: int = 0,
    raw: Sequence[Buffer] | None = None,
    client: Client | None = None,
) -> InferRequest:
    """Check a parsed request and convert it; what it says about the model is left to the engine.

    Args:
        message: The request.
        peer: Who sent it.
        timeout_us: The transport's own time limit, 0 for none.
        raw: The raw inputs where they do not lie in the message.
        client: Whose account it goes on.

    Raises:
        InvalidRequest: With the rule that was broken.
    """
    if message.id:
        check_request_id(message.id)
    options = read_parameters(message.parameters) if message.parameters else NO_OPTIONS
    if raw is None:
        raw = message.raw_input_contents
    return InferRequest(
        message.model_name,
        message.model_version,
        _read_inputs(message, raw),
        read_outputs(message) if message.outputs else (),
        timeout_us,
        peer,
        options,
        client,
    )


def check_request_id(request_id: str) -> None:
    """Accept the client's own name for a request.

    Raises:
        InvalidRequest: It has more than MAX_ID_CHARACTERS, or one that does not print: ids end up in logs.
    """
    if len(request_id) > MAX_ID_CHARACTERS:
        raise InvalidRequest(
            f"cannot use the request id: it has {len(request_id)} characters, the limit is {MAX_ID_CHARACTERS}"
        )
    if not request_id.isprintable():
        raise InvalidRequest(
            f"cannot use {shown(request_id)} as a request id: it holds a character that does not print"
        )


def message_from_result(result: InferResult, request_id: str = "", with_content: bool = True) -> ModelInferResponse:
    """The answer as a message, timings as int64 parameters in microseconds.

    Args:
        result: The answer.
        request_id: The client's own id, sent back.
        with_content: False leaves ``raw_output_contents`` to the caller.
    """
    message = ModelInferResponse(model_name=result.model, model_version=result.version, id=request_id)
    timings = result.timings
    parameters = message.parameters
    parameters["decode_us"].int64_param = timings.decode_ns // 1000
    parameters["tokenise_us"].int64_param = timings.tokenise_ns // 1000
    parameters["queue_us"].int64_param = timings.queue_ns // 1000
    parameters["copy_us"].int64_param = timings.copy_ns // 1000
    parameters["compute_us"].int64_param = timings.compute_ns // 1000
    parameters["postprocess_us"].int64_param = timings.postprocess_ns // 1000
    parameters["batch_rows"].int64_param = timings.batch_rows
    for tensor in result.outputs:
        message.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        if with_content:
            message.raw_output_contents.append(bytes(tensor.content))
    return message


def serialise_result(message: ModelInferResponse, result: InferResult) -> bytes:
    """Serialise `message`, made without content, and append the tensors of `result`: one copy instead of three."""
    parts: list[Buffer] = [message.SerializeToString()]
    for tensor in result.outputs:
        content = tensor.content
        parts += (_RAW_OUTPUT_TAG, varint(len(content)), content)
    return b"".join(parts)


def shown(name: str) -> str:
    """A client's word as an error message may carry it: quoted, escaped and short."""
    return ascii(name[:64]) + ("..." if len(name) > 64 else "")


def read_parameters(parameters: Mapping[str, InferParameter]) -> RequestOptions:
    """How a request asks to be scheduled.

    Raises:
        InvalidRequest: See `read_options`.
    """
    values: dict[str, object] = {}
    for name in RESERVED:
        if name in parameters:  # reading a map's missing key would add it
            choice = parameters[name].WhichOneof("parameter_choice")
            values[name] = getattr(parameters[name], choice) if choice else None
    return read_options(values) if values else NO_OPTIONS


def _read_inputs(message: ModelInferRequest, raw: Sequence[Buffer]) -> list[Tensor]:
    entries = message.inputs
    count = len(entries)
    if count > MAX_TENSORS:
        raise InvalidRequest(f"cannot take {count} inputs: the limit is {MAX_TENSORS}")
    is_raw = len(raw) > 0
    if is_raw and len(raw) != count:
        raise InvalidRequest(
            f"cannot match {len(raw)} raw_input_contents to {count} inputs: there must be one for each"
        )
    tensors: list[Tensor] = []
    for position, entry in enumerate(entries):
        name = entry.name
        datatype = entry.datatype
        if datatype not in ITEM_BYTES:
            raise InvalidRequest(
                f"cannot take input {shown(name)}: {shown(datatype)} is no datatype; they are {', '.join(ITEM_BYTES)}"
            )
        if entry.parameters and "shared_memory_region" in entry.parameters:
            raise InvalidRequest(
                f"cannot take input {shown(name)} from shared memory: shared-memory regions are passed by descriptor "
                "on infer.sock"
            )
        shape = tuple(entry.shape)
        elements = count_elements(name, shape)
        if is_raw:
            if entry.HasField("contents") and entry.contents.ByteSize():
                raise InvalidRequest(f"cannot take input {shown(name)}: it has contents beside raw_input_contents")
            content = raw[position]
        else:
            content = _read_contents(name, datatype, elements, entry.contents)
        tensors.append(Tensor(name, datatype, shape, content))
    if count > 1 and len({tensor.name for tensor in tensors}) != count:
        raise InvalidRequest("cannot take the inputs: a name occurs more than once")
    return tensors


def count_elements(name: str, shape: tuple[int, ...]) -> int:
    """Elements of a tensor of `shape`.

    Raises:
        InvalidRequest: More than MAX_RANK dimensions, a negative one, or more than MAX_ELEMENTS elements.
    """
    if len(shape) > MAX_RANK:
        raise InvalidRequest(
            f"cannot take input {shown(name)}: it has {len(shape)} dimensions, the limit is {MAX_RANK}"
        )
    for length in shape:
        # each length is bounded too: otherwise a zero beside it would hide it
        if not 0 <= length <= MAX_ELEMENTS:
            raise InvalidRequest(
                f"cannot take input {shown(name)}: a dimension of {length} is not between 0 and {MAX_ELEMENTS}"
            )
    elements = prod(shape)
    if elements > MAX_ELEMENTS:
        raise InvalidRequest(f"cannot take input {shown(name)}: its shape has more than {MAX_ELEMENTS} elements")
    return elements


def _read_contents(name: str, datatype: str, elements: int, contents: InferTensorContents) -> bytes:
    typed = _TYPED.get(datatype)
    if typed is None:
        raise InvalidRequest(
            f"cannot take input {shown(name)}: {datatype} has no typed contents, use raw_input_contents"
        )
    field, code = typed
    for descriptor, _ in contents.ListFields():
        if descriptor.name != field:
            raise InvalidRequest(
                f"cannot take input {shown(name)}: {datatype} goes into {field}, not into {descriptor.name}"
            )
    values = getattr(contents, field)
    count = len(values)
    if count != elements:
        raise InvalidRequest(f"cannot take input {shown(name)}: {field} has {count} elements, and its shape {elements}")
    if code is None:
        # a packed field of floats, doubles or bools is a tag, a length and then exactly the raw tensor
        contents.DiscardUnknownFields()
        return contents.SerializeToString()[-count * ITEM_BYTES[datatype] :] if count else b""
    if count > MAX_CONVERTED_ELEMENTS:
        raise InvalidRequest(
            f"cannot take input {shown(name)}: {count} elements of typed {datatype} are more than "
            f"{MAX_CONVERTED_ELEMENTS}, use raw_input_contents"
        )
    if code == "s":
        return join_elements(values)
    try:
        return struct.pack(f"<{count}{code}", *values)
    except struct.error as error:
        raise InvalidRequest(
            f"cannot take input {shown(name)}: an element is out of the range of {datatype}"
        ) from error


def read_outputs(message: ModelInferRequest) -> tuple[str, ...]:
    """Names of the outputs a request wants.

    Raises:
        InvalidRequest: Too many, one twice, or one with a parameter that is not offered.
    """
    entries = message.outputs
    if len(entries) > MAX_TENSORS:
        raise InvalidRequest(f"cannot give {len(entries)} outputs: the limit is {MAX_TENSORS}")
    for entry in entries:
        if entry.parameters:
            _refuse_output_parameters(entry.name, entry.parameters)
    names = tuple([entry.name for entry in entries])
    if len(set(names)) != len(names):
        raise InvalidRequest("cannot give the outputs: a name is asked for more than once")
    return names


def _refuse_output_parameters(name: str, parameters: Any) -> None:
    if "shared_memory_region" in parameters:
        raise InvalidRequest(
            f"cannot put output {shown(name)} into shared memory: shared-memory regions are passed by descriptor on "
            "infer.sock"
        )
    if "classification" in parameters and parameters["classification"].int64_param:
        raise InvalidRequest(
            f"cannot classify output {shown(name)}: the classification extension is not offered; a model with labels "
            "has outputs of its own for them"
        )
