"""Tensors of one row, as a sample file writes them: nested lists, texts, or base64."""

import base64
import binascii
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from appliance.errors import InvalidRequest
from appliance.types import TensorSpec
from appliance.worker.tensors import DTYPES, array_of_elements, fits, narrow_to_bf16

if TYPE_CHECKING:
    from numpy.typing import NDArray


def bytes_of(value: Any) -> bytes:
    """The bytes that a JSON value stands for: a text's UTF-8, or what ``{"base64": ...}`` holds.

    Raises:
        InvalidRequest: It is neither, or no base64.
    """
    if isinstance(value, str):
        try:
            return value.encode()
        except UnicodeEncodeError as error:  # JSON can write half a surrogate pair, which is no character
            raise InvalidRequest("a text is not UTF-8") from error
    if isinstance(value, dict) and isinstance(value.get("base64"), str):
        try:
            return base64.b64decode(value["base64"], validate=True)
        except (binascii.Error, ValueError) as error:
            raise InvalidRequest("a value is not base64") from error
    raise InvalidRequest('a value is neither a text nor {"base64": ...}')


def tensor_of(value: Any, spec: TensorSpec) -> "NDArray[Any]":
    """A JSON value as a tensor of `spec`.

    Args:
        value: Nested lists of numbers, truth values, texts or ``{"base64": ...}``; or ``{"base64": ...}`` with all the
            little-endian elements (of BYTES: the one element), and ``"shape"`` where `spec` leaves more than one length
            open. BF16 is written as numbers.
        spec: Of one row.

    Raises:
        InvalidRequest: It is of another datatype or shape, or a number does not fit the datatype.
    """
    is_raw = isinstance(value, dict) and spec.datatype != "BYTES"
    array = _raw_tensor(value, spec) if is_raw else _listed_tensor(value, spec)
    if not fits(array.shape, spec):
        if spec.datatype == "BYTES" and array.ndim == 0 and fits((1,) * len(spec.shape), spec):
            return array.reshape((1,) * len(spec.shape))
        raise InvalidRequest(f"input {spec.name!r} has shape {list(array.shape)} and must have {list(spec.shape)}")
    return array


def array_of(array: "NDArray[Any]", spec: TensorSpec) -> "NDArray[Any]":
    """An array, as a file holds it, as a tensor of `spec`: C-contiguous, of its element type.

    Raises:
        InvalidRequest: It is of another datatype or shape, or a number does not fit the datatype.
    """
    if spec.datatype == "BYTES":
        if array.dtype.kind not in "SU":
            raise _wrong_datatype(spec, str(array.dtype))
        elements = [one.encode() if isinstance(one, str) else one for one in array.reshape(-1).tolist()]
        cast = array_of_elements(elements, array.shape)
    elif spec.datatype == "BF16" and array.dtype == DTYPES["BF16"]:
        cast = np.ascontiguousarray(array).reshape(array.shape)
    else:
        cast = _cast(array, spec)
    if not fits(cast.shape, spec):
        raise InvalidRequest(f"input {spec.name!r} has shape {list(cast.shape)} and must have {list(spec.shape)}")
    return cast


def _raw_tensor(value: dict[str, Any], spec: TensorSpec) -> "NDArray[Any]":
    dtype = DTYPES[spec.datatype]
    content = bytes_of(value)
    if len(content) % dtype.itemsize:
        raise InvalidRequest(f"input {spec.name!r} has {len(content)} bytes, which is no number of {spec.datatype}")
    array = np.frombuffer(content, dtype=dtype.newbyteorder("<")).astype(dtype)
    shape = value.get("shape", _only_shape(array.size, spec.shape))
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise InvalidRequest(
            f"input {spec.name!r} has {array.size} elements of {spec.datatype}, which do not make up "
            f'{list(spec.shape)} in one way only; "shape" says how'
        )
    if prod(shape) != array.size:
        raise InvalidRequest(f"input {spec.name!r} has {array.size} elements and its shape is {shape}")
    return array.reshape(shape)


def _only_shape(count: int, shape: tuple[int, ...]) -> list[int] | None:
    """The one shape of `count` elements that `shape` allows, or None."""
    fixed = prod(size for size in shape if size >= 0)
    if shape.count(-1) == 0:
        return list(shape) if fixed == count else None
    if shape.count(-1) > 1 or fixed == 0 or count % fixed:
        return None
    return [count // fixed if size < 0 else size for size in shape]


def _listed_tensor(value: Any, spec: TensorSpec) -> "NDArray[Any]":
    if spec.datatype == "BYTES":
        shape, elements = _flattened(value)
        if prod(shape) != len(elements):
            raise InvalidRequest(f"input {spec.name!r} has rows of unequal length")
        return array_of_elements([bytes_of(one) for one in elements], shape)
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(f"input {spec.name!r} has rows of unequal length") from error
    if spec.datatype == "UINT64" and array.dtype == np.float64:  # what numpy makes of numbers beyond INT64 among others
        exact = np.asarray(value, dtype=object)
        if all(type(one) is int and 0 <= one < 1 << 64 for one in exact.reshape(-1).tolist()):
            array = exact.astype(np.uint64)
    if array.size == 0:
        array = array.astype(DTYPES[spec.datatype])
    return _cast(array, spec)


def _flattened(value: Any) -> tuple[tuple[int, ...], list[Any]]:
    """The shape of nested lists, and all that is in them; of ragged ones a shape that does not hold them."""
    shape: list[int] = []
    level = [value]
    while level and isinstance(level[0], list):
        shape.append(len(level[0]))
        if any(not isinstance(inner, list) or len(inner) != shape[-1] for inner in level):
            return (), []
        level = [one for inner in level for one in inner]
    return tuple(shape), level


def _cast(array: "NDArray[Any]", spec: TensorSpec) -> "NDArray[Any]":
    """`array` as C-contiguous elements of the datatype, where every value survives but for rounding."""
    dtype: np.dtype[Any] = np.dtype(np.float32) if spec.datatype == "BF16" else DTYPES[spec.datatype]
    kind = array.dtype.kind
    if kind == "O" and all(isinstance(one, int) for one in array.reshape(-1).tolist()):
        raise InvalidRequest(f"input {spec.name!r} has a value that does not fit {spec.datatype}")
    if kind not in {"b": "b", "f": "fiu"}.get(dtype.kind, "iu"):
        raise _wrong_datatype(spec, str(array.dtype) if kind not in "OUS" else "something else than numbers")
    if dtype.kind in "iu" and array.size:
        limits = np.iinfo(dtype)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise InvalidRequest(f"input {spec.name!r} has a value that does not fit {spec.datatype}")
    with np.errstate(over="ignore"):  # a float too large is an infinity of the narrower type, as in the model itself
        cast = np.ascontiguousarray(array, dtype=dtype).reshape(array.shape)
    return narrow_to_bf16(cast) if spec.datatype == "BF16" else cast


def _wrong_datatype(spec: TensorSpec, found: str) -> InvalidRequest:
    return InvalidRequest(f"input {spec.name!r} is {found} and must be {spec.datatype}")
