"""Open Inference Protocol REST: an infer request's body to engine values, and the result back.

The binary-tensor extension follows Triton's extension_binary_data: a JSON header of Inference-Header-Content-Length
bytes, then the raw content of every tensor that has the parameter ``binary_data_size``, in order. A BYTES input may
carry the parameter ``"content_encoding": "base64"``, this daemon's own addition for pictures in plain JSON.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from appliance.clients import Client
from appliance.errors import InvalidRequest, Overloaded
from appliance.server.options import read_options
from appliance.server.rest_elements import elements_of, elements_to_bytes
from appliance.types import ITEM_BYTES, Buffer, InferRequest, InferResult, Peer, Tensor, Timings

#: Bytes of a request's JSON. JSON grows twentyfold when parsed; large tensors belong in binary data.
MAX_JSON_BYTES: Final = 16777216

#: Characters of a request's ``id``, which comes back in the answer.
MAX_ID_CHARACTERS: Final = 256

_MAX_DIMENSIONS: Final = 32
_MAX_TENSORS: Final = 1024


@dataclass(frozen=True, slots=True)
class RestInfer:
    """A decoded infer request.

    Attributes:
        request: What the engine takes.
        id: The client's own id, echoed; empty for none.
        binary: Whether an output goes out as binary data, by name.
        binary_default: The same for outputs not named.
    """

    request: InferRequest
    id: str
    binary: Mapping[str, bool]
    binary_default: bool

    def is_binary(self, output: str) -> bool:
        """True where `output` goes out as binary data."""
        return self.binary.get(output, self.binary_default)


def _field(mapping: Mapping[str, Any], key: str, kind: type, where: str, default: Any = None) -> Any:
    value = mapping.get(key)
    if value is None:
        if default is None:
            raise InvalidRequest(f"cannot decode the request: {where}{key} is missing")
        return default
    if type(value) is not kind:
        names = {str: "a string", list: "a list", dict: "an object", int: "an integer", bool: "true or false"}
        raise InvalidRequest(f"cannot decode the request: {where}{key} must be {names[kind]}")
    return value


def _shape(values: list[Any], where: str) -> tuple[int, ...]:
    if len(values) > _MAX_DIMENSIONS or any(type(v) is not int or not 0 <= v < 2**63 for v in values):
        raise InvalidRequest(
            f"cannot decode the request: {where}shape must be at most {_MAX_DIMENSIONS} integers, none negative"
        )
    return tuple(values)


def _refuse_unoffered(parameters: Mapping[str, Any], where: str) -> None:
    if "shared_memory_region" in parameters:
        raise InvalidRequest(
            f"cannot use {where}shared_memory_region: HTTP takes tensors inline; the native socket takes memory regions"
        )
    if "classification" in parameters:
        raise InvalidRequest(f"cannot use {where}classification: ask for the model's label and score outputs instead")


class _Tail:
    """The raw tensors behind the JSON header, taken in order."""

    def __init__(self, content: memoryview) -> None:
        self._content = content
        self._position = 0

    def take(self, size: int, where: str) -> memoryview:
        end = self._position + size
        if end > len(self._content):
            left = len(self._content) - self._position
            raise InvalidRequest(
                f"cannot decode the request: {where}binary_data_size is {size} and {left} bytes are left"
            )
        part = self._content[self._position : end]
        self._position = end
        return part

    def check_spent(self) -> None:
        left = len(self._content) - self._position
        if left:
            raise InvalidRequest(f"cannot decode the request: {left} bytes follow the last binary tensor")


def split_body(body: bytes, header_length: bytes | None) -> tuple[memoryview, memoryview]:
    """JSON and raw tensors of an infer request's body.

    Args:
        body: The decompressed body.
        header_length: The value of Inference-Header-Content-Length, or None where it is absent: the body is all JSON.

    Raises:
        InvalidRequest: The header is no number, or larger than the body.
        Overloaded: The JSON exceeds `MAX_JSON_BYTES`.
    """
    size = len(body)
    if header_length is not None:
        if not header_length.isdigit() or len(header_length) > 18 or int(header_length) > size:
            raise InvalidRequest(
                f"cannot decode the request: Inference-Header-Content-Length must be a number up to {size}, the body"
            )
        size = int(header_length)
    if size > MAX_JSON_BYTES:
        raise Overloaded(
            f"cannot take the request: its JSON has {size} bytes, the limit is {MAX_JSON_BYTES}; send binary data"
        )
    view = memoryview(body)
    return view[:size], view[size:]


def parse_object(content: Buffer) -> dict[str, Any]:
    """A JSON object; an empty body counts as an empty one.

    Raises:
        InvalidRequest: It is no JSON (NaN is none), nested deeper than 1024, or no object.
    """
    if not content:
        return {}
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(
            f"cannot decode the request: {error.msg} at line {error.lineno} column {error.colno}"
        ) from error
    if type(value) is not dict:
        raise InvalidRequest("cannot decode the request: the JSON must be an object")
    return value


def decode_infer(
    model: str, version: str, json: Buffer, tail: memoryview, peer: Peer | None, client: Client | None = None
) -> RestInfer:
    """Turn an infer request's body into what the engine takes; binary tensors stay views on the body.

    Raises:
        InvalidRequest: A field is missing, of the wrong type or out of range, or asks for shared memory, the
            classification extension; the message names it.
    """
    header = parse_object(json)
    identity = _field(header, "id", str, "", default="")
    if len(identity) > MAX_ID_CHARACTERS or not identity.isprintable():
        raise InvalidRequest(f"cannot decode the request: id may hold {MAX_ID_CHARACTERS} printable characters")
    parameters = _field(header, "parameters", dict, "", default={})
    options = read_options({key: value for key, value in parameters.items() if value is not None})
    entries = _field(header, "inputs", list, "")
    wanted = _field(header, "outputs", list, "", default=[])
    if len(entries) > _MAX_TENSORS or len(wanted) > _MAX_TENSORS:
        raise InvalidRequest(f"cannot decode the request: inputs and outputs may name {_MAX_TENSORS} tensors each")
    raw = _Tail(tail)
    inputs = [_decode_input(entry, index, raw) for index, entry in enumerate(entries)]
    raw.check_spent()
    names, binary = _decode_outputs(wanted)
    request = InferRequest(model, version, inputs, names, 0, peer, options, client)
    return RestInfer(
        request=request,
        id=identity,
        binary=binary,
        binary_default=_field(parameters, "binary_data_output", bool, "parameters.", default=False),
    )


def _decode_input(entry: Any, index: int, raw: _Tail) -> Tensor:
    where = f"inputs[{index}]."
    if type(entry) is not dict:
        raise InvalidRequest(f"cannot decode the request: inputs[{index}] must be an object")
    name = _field(entry, "name", str, where)
    datatype = _field(entry, "datatype", str, where)
    if datatype not in ITEM_BYTES:
        raise InvalidRequest(
            f"cannot decode the request: {where}datatype {datatype[:32]!r} is none of {', '.join(ITEM_BYTES)}"
        )
    shape = _shape(_field(entry, "shape", list, where), where)
    parameters = _field(entry, "parameters", dict, where, default={})
    _refuse_unoffered(parameters, f"{where}parameters.")
    if "binary_data_size" in parameters:
        if "data" in entry:
            raise InvalidRequest(f"cannot decode the request: {where}data and binary_data_size exclude each other")
        size = _field(parameters, "binary_data_size", int, f"{where}parameters.")
        if size < 0:
            raise InvalidRequest(f"cannot decode the request: {where}parameters.binary_data_size must not be negative")
        return Tensor(name, datatype, shape, raw.take(size, f"{where}parameters."))
    encoding = _field(parameters, "content_encoding", str, f"{where}parameters.", default="")
    if encoding not in ("", "base64") or (encoding and datatype != "BYTES"):
        raise InvalidRequest(
            f'cannot decode the request: {where}parameters.content_encoding may be "base64", for the datatype BYTES'
        )
    values = _field(entry, "data", list, where)
    return Tensor(name, datatype, shape, elements_to_bytes(name, datatype, shape, values, encoding == "base64"))


def _decode_outputs(entries: list[Any]) -> tuple[list[str], dict[str, bool]]:
    names: list[str] = []
    binary: dict[str, bool] = {}
    for index, entry in enumerate(entries):
        where = f"outputs[{index}]."
        if type(entry) is not dict:
            raise InvalidRequest(f"cannot decode the request: outputs[{index}] must be an object")
        name = _field(entry, "name", str, where)
        parameters = _field(entry, "parameters", dict, where, default={})
        _refuse_unoffered(parameters, f"{where}parameters.")
        if "binary_data" in parameters:
            binary[name] = _field(parameters, "binary_data", bool, f"{where}parameters.")
        names.append(name)
    return names, binary


def timing_parameters(timings: Timings) -> dict[str, int]:
    """Stage times as response parameters, in microseconds, and the rows of the batch."""
    return {
        "decode_us": timings.decode_ns // 1000,
        "tokenise_us": timings.tokenise_ns // 1000,
        "queue_us": timings.queue_ns // 1000,
        "copy_us": timings.copy_ns // 1000,
        "compute_us": timings.compute_ns // 1000,
        "postprocess_us": timings.postprocess_ns // 1000,
        "batch_rows": timings.batch_rows,
    }


def encode_infer(call: RestInfer, result: InferResult) -> tuple[list[Buffer], int | None]:
    """The answer's body in parts, and the value of Inference-Header-Content-Length where binary data follows the JSON.

    NaN and infinities, which JSON cannot say, become null.

    Raises:
        InvalidRequest: An output that JSON cannot carry was asked for as JSON.
    """
    outputs: list[dict[str, Any]] = []
    tail: list[Buffer] = []
    for tensor in result.outputs:
        output: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
        if call.is_binary(tensor.name):
            output["parameters"] = {"binary_data_size": len(tensor.content)}
            tail.append(tensor.content)
        else:
            output["data"] = elements_of(tensor)
        outputs.append(output)
    answer: dict[str, Any] = {"model_name": result.model, "model_version": result.version}
    if call.id:
        answer["id"] = call.id
    answer["parameters"] = timing_parameters(result.timings)
    answer["outputs"] = outputs
    json = orjson.dumps(answer)
    return [json, *tail], (len(json) if tail else None)
