"""Between values of a caller (numpy arrays, lists, text) and tensors of the wire.

The only module that needs numpy; it loads with the first inference.
"""

import struct
from collections.abc import Sequence
from math import prod
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from appliance_client.errors import InvalidRequest, ProtocolError

#: numpy's type of every datatype that has elements of fixed size. BF16 stands as its bits.
DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}

#: Datatypes that follow from numpy's type.
DATATYPES: Final[dict[np.dtype[Any], str]] = {dtype: name for name, dtype in DTYPES.items() if name != "BF16"}

_LENGTH: Final = struct.Struct("<I")
_WIDER: Final = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}
_MAX_DIMENSIONS: Final = 64


class Tensor:
    """A value together with the datatype it is to travel as.

    Needed for BF16, whose bits numpy holds as uint16, and convenient for lists: ``Tensor([0.5, 1.5], "FP32")``.

    Args:
        values: What numpy can make an array of; for BF16 the bits as uint16, or an array of a type named bfloat16; for
            BYTES nested lists of str or bytes.
        datatype: An Open Inference Protocol datatype.

    Raises:
        InvalidRequest: No such datatype, or `values` does not fit it without loss.
    """

    __slots__ = ("content", "datatype", "shape")

    def __init__(self, values: ArrayLike, datatype: str) -> None:
        self.datatype = datatype
        self.shape: tuple[int, ...]
        self.content: bytes | NDArray[Any]
        if datatype == "BYTES":
            self.shape, self.content = _bytes_tensor(values)
            return
        if datatype not in DTYPES:
            raise InvalidRequest(
                f"cannot make a tensor: {datatype!r} is no datatype; there are {', '.join(DTYPES)}, BYTES"
            )
        self.content = _cast(values, datatype)
        self.shape = self.content.shape


def _cast(values: Any, datatype: str) -> NDArray[Any]:
    dtype = DTYPES[datatype]
    array = _as_array(values)
    if datatype == "BF16":
        if array.dtype.name == "bfloat16":
            array = array.view(np.uint16)
        if array.dtype != dtype:
            raise InvalidRequest(
                f"cannot make a BF16 tensor of {array.dtype.name}: give its bits as uint16, or bfloat16"
            )
        return array
    if array.dtype == dtype:
        return array
    if array.size == 0:
        return array.astype(dtype)
    if array.dtype.kind not in _WIDER[dtype.kind]:
        raise InvalidRequest(f"cannot make a {datatype} tensor of {array.dtype.name}: values would be lost")
    converted = array.astype(dtype)
    if dtype.kind in "iu" and not np.array_equal(converted, array):
        raise InvalidRequest(f"cannot make a {datatype} tensor: a value is out of its range")
    return converted


def _as_array(values: Any) -> NDArray[Any]:
    try:
        return np.asarray(values)
    except (ValueError, TypeError, OverflowError) as problem:
        raise InvalidRequest(f"cannot make a tensor of {type(values).__name__}: {problem}") from None


def encode(name: str, value: Any) -> tuple[str, tuple[int, ...], bytes | NDArray[Any]]:
    """Datatype, shape and content of one input.

    The datatype follows from numpy's type, text and bytes become BYTES, and no dimension is added.

    Raises:
        InvalidRequest: The value is no tensor.
    """
    if isinstance(value, Tensor):
        return value.datatype, value.shape, value.content
    if _leaf_is_text(value):
        return "BYTES", *_bytes_tensor(value, name)
    array = _as_array(value)
    if array.dtype.kind in "OSUT":
        return "BYTES", *_bytes_tensor(value if isinstance(value, (list, tuple)) else array, name)
    if array.dtype.name == "bfloat16":
        return "BF16", array.shape, array.view(np.uint16)
    little = array.dtype.newbyteorder("<")
    datatype = DATATYPES.get(little)
    if datatype is None:
        raise InvalidRequest(f"cannot send input {name!r}: {array.dtype.name} has no datatype in the protocol")
    return datatype, array.shape, array.astype(little, copy=False)


def _leaf_is_text(value: Any) -> bool:
    """True for text, bytes and nested lists of them; numpy would cut trailing zero bytes off those."""
    for _ in range(_MAX_DIMENSIONS):
        if isinstance(value, (str, bytes, bytearray, memoryview)):
            return True
        if not isinstance(value, (list, tuple)) or not value:
            return False
        value = value[0]
    return False


def _bytes_tensor(values: Any, name: str = "") -> tuple[tuple[int, ...], bytes]:
    """Shape and content of a BYTES tensor: every element preceded by its length."""
    if isinstance(values, np.ndarray):
        shape, elements = tuple(values.shape), list(values.ravel().tolist())
    else:
        shape, elements = _flatten(values)
    parts: list[bytes] = []
    for element in elements:
        if isinstance(element, str):
            content = element.encode()
        elif isinstance(element, (bytes, bytearray, memoryview)):
            content = bytes(element)
        else:
            of = f"input {name!r}" if name else "a BYTES tensor"
            raise InvalidRequest(f"cannot send {of}: element {element!r:.40} is neither str nor bytes")
        parts.append(_LENGTH.pack(len(content)))
        parts.append(content)
    return shape, b"".join(parts)


def _flatten(values: Any) -> tuple[tuple[int, ...], list[Any]]:
    shape: list[int] = []
    level: list[Any] = [values]
    while level and all(isinstance(item, (list, tuple)) for item in level):
        length = len(level[0])
        if any(len(item) != length for item in level):
            raise InvalidRequest("cannot make a BYTES tensor: its nested lists differ in length")
        shape.append(length)
        level = [element for item in level for element in item]
        if len(shape) > _MAX_DIMENSIONS:
            raise InvalidRequest(f"cannot make a BYTES tensor: it has more than {_MAX_DIMENSIONS} dimensions")
    return tuple(shape), level


class OutputLayout(NamedTuple):
    """One output as the head of an answer describes it.

    Attributes:
        name: The output.
        datatype: Its datatype.
        shape: Its shape.
        dtype: numpy's type of the elements on the wire; None for BYTES.
        byte_size: Bytes in the tail; for BYTES unknown, and 0.
        elements: How many elements.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any] | None
    byte_size: int
    elements: int


def output_layout(name: str, datatype: str, shape: tuple[int, ...]) -> OutputLayout:
    """The layout of one output.

    Raises:
        ProtocolError: The datatype or the shape is impossible.
    """
    if any(dimension < 0 for dimension in shape):
        raise ProtocolError(f"cannot read output {name!r}: its shape {list(shape)} has a negative dimension")
    if len(shape) > _MAX_DIMENSIONS:
        raise ProtocolError(f"cannot read output {name!r}: it has {len(shape)} dimensions, at most {_MAX_DIMENSIONS}")
    count = prod(shape)
    if datatype == "BYTES":
        return OutputLayout(name, datatype, shape, None, 0, count)
    dtype = DTYPES.get(datatype)
    if dtype is None:
        raise ProtocolError(f"cannot read output {name!r}: {datatype!r} is no datatype")
    return OutputLayout(name, datatype, shape, dtype, count * dtype.itemsize, count)


def decode(outputs: Sequence[OutputLayout], tail: memoryview, is_owned: bool) -> dict[str, NDArray[Any]]:
    """Arrays of an answer's tail.

    BYTES outputs become object arrays of bytes, BF16 outputs float32, which holds them without loss.

    Args:
        outputs: What the tail holds, in order.
        tail: The bytes.
        is_owned: True where arrays may keep views on `tail`.

    Raises:
        ProtocolError: The tail is shorter or longer than the outputs say.
    """
    arrays: dict[str, NDArray[Any]] = {}
    offset = 0
    for name, datatype, shape, dtype, byte_size, count in outputs:
        if dtype is None:
            arrays[name], offset = _decode_bytes(name, shape, count, tail, offset)
            continue
        end = offset + byte_size
        if end > len(tail):
            raise _wrong_length(name, byte_size, len(tail) - offset)
        try:
            array: NDArray[Any] = np.ndarray(shape, dtype, tail, offset)
        except ValueError as problem:
            raise ProtocolError(f"cannot read output {name!r}: {problem}") from None
        if datatype == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        elif not is_owned or offset % dtype.itemsize:
            array = array.copy()
        arrays[name] = array
        offset = end
    if offset != len(tail):
        raise ProtocolError(f"cannot read the answer: {len(tail) - offset} bytes are left after its outputs")
    return arrays


def _decode_bytes(
    name: str, shape: tuple[int, ...], count: int, tail: memoryview, offset: int
) -> tuple[NDArray[Any], int]:
    size = len(tail)
    if count > (size - offset) // _LENGTH.size:
        raise _wrong_length(name, count * _LENGTH.size, size - offset)
    elements = np.empty(count, dtype=object)
    for position in range(count):
        begin = offset + _LENGTH.size
        if begin > size:
            raise _wrong_length(name, _LENGTH.size, size - offset)
        (length,) = _LENGTH.unpack_from(tail, offset)
        offset = begin + length
        if offset > size:
            raise _wrong_length(name, length, size - begin)
        elements[position] = bytes(tail[begin:offset])
    return elements.reshape(shape), offset


def _wrong_length(name: str, expected: int, found: int) -> ProtocolError:
    return ProtocolError(f"cannot read output {name!r}: it needs {expected} bytes, {found} are left")
