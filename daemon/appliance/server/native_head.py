"""The head of an INFER frame: parsed and validated once, then found again by its bytes."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from appliance.call import OutputTable, Plan, RegionView
from appliance.errors import Cancelled, InvalidRequest
from appliance.planner import check_contents
from appliance.region import Region
from appliance.server.oip_infer import check_request_id, read_outputs, read_parameters, request_from_message, shown
from appliance.types import NO_OPTIONS, Buffer, Peer, RequestOptions
from appliance.wire.elements import check_elements, end_of_elements
from appliance.wire.open_inference_pb2 import InferParameter, ModelInferRequest, ModelInferResponse

if TYPE_CHECKING:
    from appliance.engine import Engine

_REGION = "shared_memory_region"
_OFFSET = "shared_memory_offset"
_SIZE = "shared_memory_byte_size"
_REGION_PARAMETERS = frozenset((_REGION, _OFFSET, _SIZE))

#: Bytes of a BYTES tensor in a region, which is copied before it is checked.
_MAX_COPIED_BYTES: Final = 1 << 26
#: Output tables whose encoded heads a plan keeps; shapes that follow content would pile up without end.
MAX_ANSWER_HEADS: Final = 64

#: Datatypes the worker may read where a client can change them meanwhile; integers may be indices.
_IN_PLACE: Final = frozenset(("FP16", "BF16", "FP32", "FP64", "UINT8", "INT8"))

#: Answer to CANCEL.
CANCELLED = Cancelled("the request was cancelled")


class RegionSource(NamedTuple):
    """Where an input's bytes lie, in the client's numbers."""

    region: int
    offset: int
    size: int


class Head(NamedTuple):
    """A validated head.

    Attributes:
        model: Model name.
        plan: What to run.
        names: Inputs in order.
        sources: For each input the region its bytes lie in, or None for the tail.
        sizes: For each input its bytes, -1 for BYTES.
        tail: Bytes the tail must have; -1 where an input of BYTES makes that a matter of its content.
        options: What its parameters ask for; NO_OPTIONS itself where they ask for nothing.
        has_regions: True where a source is a region.
    """

    model: str
    plan: Plan
    names: tuple[str, ...]
    sources: tuple[RegionSource | None, ...]
    sizes: tuple[int, ...]
    tail: int
    options: RequestOptions
    has_regions: bool


def read_head(engine: "Engine", message: ModelInferRequest) -> Head:
    """Validate a head whose tensors are in the tail or in regions.

    Raises:
        ApplianceError: The request cannot run.
    """
    if message.id:
        check_request_id(message.id)
    options = read_parameters(message.parameters) if message.parameters else NO_OPTIONS
    heads = [(tensor.name, tensor.datatype, tuple(tensor.shape)) for tensor in message.inputs]
    sources = tuple(_source(tensor.name, tensor.parameters) for tensor in message.inputs)
    plan = engine.plan(message.model_name, message.model_version, heads, read_outputs(message))
    sizes = tuple(tensor.byte_length for tensor in plan.tensors)
    tail = 0
    for name, source, size in zip((head[0] for head in heads), sources, sizes, strict=True):
        if source is not None and size >= 0 and source.size != size:
            raise InvalidRequest(
                f"cannot take input {name!r}: {_SIZE} is {source.size} and its shape and datatype need {size}"
            )
        if source is not None and size < 0 and source.size > _MAX_COPIED_BYTES:
            raise InvalidRequest(
                f"cannot take input {name!r}: {_SIZE} is {source.size} and BYTES may have {_MAX_COPIED_BYTES}"
            )
        if source is None:
            tail = -1 if size < 0 or tail < 0 else tail + size
    names = tuple(head[0] for head in heads)
    has_regions = any(source is not None for source in sources)
    return Head(message.model_name, plan, names, sources, sizes, tail, options, has_regions)


def _source(name: str, parameters: Mapping[str, InferParameter]) -> RegionSource | None:
    if not parameters:
        return None
    unknown = sorted(set(parameters) - _REGION_PARAMETERS)
    if unknown:
        raise InvalidRequest(f"cannot take input {shown(name)}: its parameter {shown(unknown[0])} is not known here")
    values = []
    for key in (_REGION, _OFFSET, _SIZE):
        parameter = parameters.get(key)
        value = 0 if parameter is None and key == _OFFSET else _number(parameter)
        if value < 0:
            raise InvalidRequest(f"cannot take input {shown(name)}: its parameter {key} must be a number from 0")
        values.append(value)
    return RegionSource(*values)


def _number(parameter: InferParameter | None) -> int:
    """The parameter's number; -1 where it has none."""
    choice = parameter.WhichOneof("parameter_choice") if parameter is not None else None
    return getattr(parameter, choice) if choice in ("int64_param", "uint64_param") else -1


def has_inline_contents(message: ModelInferRequest, raw: Sequence[Buffer]) -> bool:
    """True where the message itself holds tensors, so that it is no head to keep."""
    return len(raw) > 0 or any(tensor.HasField("contents") for tensor in message.inputs)


def read_inline(
    engine: "Engine", message: ModelInferRequest, raw: Sequence[Buffer], peer: Peer
) -> tuple[Head, Sequence[Buffer]]:
    """Validate a message that holds its tensors itself; returns its head and contents.

    Raises:
        ApplianceError: The request cannot run.
    """
    request = request_from_message(message, peer, raw=raw)
    heads = [(tensor.name, tensor.datatype, tensor.shape) for tensor in request.inputs]
    plan = engine.plan(request.model, request.version, heads, request.outputs)
    names = tuple(tensor.name for tensor in request.inputs)
    sizes = tuple(tensor.byte_length for tensor in plan.tensors)
    head = Head(request.model, plan, names, (None,) * len(names), sizes, 0, request.options, False)
    return head, [tensor.content for tensor in request.inputs]


def check_inline(head: Head, contents: Sequence[Buffer]) -> int:
    """Check the tensors of a message that holds them itself; returns how many bytes they are.

    Raises:
        InvalidRequest: A tensor has too few or too many bytes or elements.
    """
    return check_contents(head.plan, head.names, contents)


def split_tail(
    head: Head, tail: Buffer, regions: Mapping[int, Region]
) -> tuple[list[Buffer], Sequence[RegionView | None], int]:
    """The bytes of each input, where a region is used its view, and how many bytes there are in all.

    Raises:
        InvalidRequest: The tail is too short or too long, or a region is unknown or too small.
    """
    contents: list[Buffer] = []
    views: list[RegionView | None] = []
    position = 0
    total = 0
    for name, source, size, tensor in zip(head.names, head.sources, head.sizes, head.plan.tensors, strict=True):
        if source is not None:
            region = regions.get(source.region)
            if region is None:
                raise InvalidRequest(f"cannot take input {name!r}: region {source.region} is not registered")
            content: Buffer = region.view(source.offset, source.size)
            if size < 0:
                # The client could change lengths after they were checked, so they are checked on a copy.
                content = bytes(content)
                check_elements(content, tensor.elements, name)
            views.append(RegionView(region, source.offset, tensor.datatype in _IN_PLACE) if size >= 0 else None)
        else:
            end = position + size if size >= 0 else end_of_elements(tail, position, tensor.elements, name)
            content = tail[position:end]
            if len(content) != end - position:
                raise InvalidRequest(
                    f"cannot take input {name!r}: the frame's tail ends after {len(content)} of its {size} bytes"
                )
            position = end
            views.append(None)
        contents.append(content)
        total += len(content)
    if position != len(tail):
        raise InvalidRequest(f"cannot read the request: its tail has {len(tail)} bytes and its tensors take {position}")
    return contents, views if head.has_regions else (), total


def encode_answer_head(plan: Plan, table: OutputTable) -> bytes:
    """ModelInferResponse without contents for calls of `plan` in batches that look like `table`."""
    load = plan.instance.placement.load
    message = ModelInferResponse(model_name=load.model, model_version=load.version)
    for index in plan.outputs:
        layout = table.tensors[index]
        shape = (plan.rows, *layout.shape[1:]) if table.is_batched else layout.shape
        message.outputs.add(name=table.names[index], datatype=layout.datatype, shape=shape)
    return message.SerializeToString()
