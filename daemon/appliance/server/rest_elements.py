"""Tensor elements between JSON values and raw bytes. No numpy: the front-end has `array` and `memoryview`."""

import base64
import math
import struct
from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Any, Final

from appliance.errors import BackendError, InvalidRequest
from appliance.types import Tensor
from appliance.wire.elements import join_elements, split_elements

#: `array` and `memoryview` type codes by datatype; native order, which is little-endian wherever the daemon runs.
_CODES: Final = {
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "FP32": "f",
    "FP64": "d",
}

_FP32_MAX: Final = struct.unpack("<f", b"\xff\xff\x7f\x7f")[0]


def _flatten(values: list[Any], shape: Sequence[int], where: str) -> list[Any]:
    """Elements in row-major order of a flat list, or of lists nested exactly as `shape` says."""
    dimensions = [len(values)]
    while list in (kinds := set(map(type, values))):
        lengths = set(map(len, values)) if kinds == {list} else set()
        if len(lengths) != 1:
            raise InvalidRequest(f"cannot use {where}: its lists are nested unevenly")
        dimensions.append(lengths.pop())
        values = list(chain.from_iterable(values))
    if len(dimensions) > 1 and dimensions != list(shape):
        raise InvalidRequest(f"cannot use {where}: its lists are nested as {dimensions} and the shape is {list(shape)}")
    if len(values) != math.prod(shape):
        raise InvalidRequest(
            f"cannot use {where}: it has {len(values)} elements and the shape {list(shape)} has {math.prod(shape)}"
        )
    return values


def _wrong_type(values: list[Any], allowed: set[type], where: str, rule: str) -> InvalidRequest:
    index = next(i for i, value in enumerate(values) if type(value) not in allowed)
    name = {type(None): "null", bool: "a boolean", str: "a string", dict: "an object", float: "a fraction"}.get(
        type(values[index]), "a number"
    )
    return InvalidRequest(f"cannot use {where}: element {index} is {name}, and {rule}")


def _strings(values: list[Any], is_base64: bool, where: str) -> bytes:
    if set(map(type, values)) - {str}:
        raise _wrong_type(values, {str}, where, "BYTES elements must be strings")
    if not is_base64:
        return join_elements([value.encode("utf-8") for value in values])
    try:
        return join_elements([base64.b64decode(value, validate=True) for value in values])
    except ValueError as error:
        raise InvalidRequest(f"cannot use {where}: an element is not base64") from error


def elements_to_bytes(name: str, datatype: str, shape: Sequence[int], values: Any, is_base64: bool) -> bytes:
    """Raw content of an input whose elements came as JSON.

    Args:
        name: The input, for messages.
        datatype: An Open Inference Protocol datatype.
        shape: Full shape, no negative dimension.
        values: The value of ``data``.
        is_base64: BYTES elements are base64 rather than UTF-8 text; other datatypes have no such form.

    Raises:
        InvalidRequest: An element's type, range or number is wrong; the message names the input and the element.
    """
    where = f"data of input {name!r}"
    if type(values) is not list:
        raise InvalidRequest(f"cannot use {where}: it must be a list")
    flat = _flatten(values, shape, where)
    if datatype == "BYTES":
        return _strings(flat, is_base64, where)
    if datatype == "BOOL":
        if set(map(type, flat)) - {bool}:
            raise _wrong_type(flat, {bool}, where, "BOOL elements must be true or false")
        return bytes(flat)
    code = _CODES.get(datatype)
    if code is None:
        raise InvalidRequest(f"cannot use {where}: {datatype} has no form in JSON, send it as binary data")
    is_fraction = datatype in ("FP32", "FP64")
    allowed: set[type] = {int, float} if is_fraction else {int}
    if set(map(type, flat)) - allowed:
        rule = (
            f"{datatype} elements must be numbers"
            if is_fraction
            else f"{datatype} elements must be integers of 64 bits"
        )
        raise _wrong_type(flat, allowed, where, rule)
    if datatype == "FP32" and flat and (max(flat) > _FP32_MAX or min(flat) < -_FP32_MAX):
        raise InvalidRequest(f"cannot use {where}: an element is out of FP32's range")
    try:
        return array(code, flat).tobytes()
    except OverflowError as error:
        raise InvalidRequest(f"cannot use {where}: an element is out of {datatype}'s range") from error


def elements_of(tensor: Tensor) -> list[Any]:
    """Elements of an output as JSON values, row-major. FP16 and BF16 are widened; NaN and infinities become null later.

    Raises:
        InvalidRequest: A BYTES element is not UTF-8, so that only binary data can carry it.
        BackendError: The content does not fit the datatype.
    """
    content = memoryview(tensor.content)
    try:
        if tensor.datatype == "BYTES":
            elements = split_elements(content, math.prod(tensor.shape), tensor.name)
            return [element.decode("utf-8") for element in elements]
        if tensor.datatype == "BOOL":
            return [value != 0 for value in content]
        if tensor.datatype == "FP16":
            return list(struct.unpack(f"<{len(content) // 2}e", content))
        if tensor.datatype == "BF16":
            widened = bytearray(2 * len(content))
            widened[2::4], widened[3::4] = content[0::2], content[1::2]
            return memoryview(widened).cast("f").tolist()
        values: array[Any] = array(_CODES[tensor.datatype])
        values.frombytes(content)
        return values.tolist()
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"cannot send output {tensor.name!r} as JSON: an element is not UTF-8; ask for it with binary_data"
        ) from error
    except (InvalidRequest, ValueError, struct.error) as error:
        raise BackendError(f"cannot send output {tensor.name!r}: its content does not fit {tensor.datatype}") from error
