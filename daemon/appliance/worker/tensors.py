"""Open Inference Protocol tensors as numpy arrays, and back."""

import struct
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from appliance.types import TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Array element by datatype. BF16 travels as the upper halves of FP32, BYTES as objects of type bytes.
DTYPES: Final[dict[str, "np.dtype[Any]"]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "BF16": np.dtype(np.uint16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(object),
}

_LENGTH: Final = struct.Struct("<I")


def split_elements(content: bytes, count: int) -> list[bytes]:
    """The `count` elements of a BYTES tensor, each preceded by a 4-byte little-endian length.

    Raises:
        ValueError: The lengths do not add up to the content.
    """
    elements: list[bytes] = []
    start, end = 0, len(content)
    for _ in range(count):
        if end - start < _LENGTH.size:
            raise ValueError(f"cannot read the BYTES tensor: {end} bytes hold fewer than {count} elements")
        (length,) = _LENGTH.unpack_from(content, start)
        start += _LENGTH.size
        if length > end - start:
            raise ValueError(f"cannot read the BYTES tensor: element {len(elements)} is longer than what is left")
        elements.append(content[start : start + length])
        start += length
    if start != end:
        raise ValueError(f"cannot read the BYTES tensor: {end - start} bytes follow its {count} elements")
    return elements


def join_elements(elements: Iterable[bytes]) -> bytes:
    """The content of a BYTES tensor, without a table of rows."""
    return b"".join(chain.from_iterable((_LENGTH.pack(len(element)), element) for element in elements))


def join_rows(array: "NDArray[Any]", rows: int) -> bytes:
    """An output of datatype BYTES as `appliance.wire.worker` lays it out: a table of `rows` + 1 offsets, the rows."""
    elements = array.reshape(-1).tolist()
    per_row = len(elements) // rows
    contents = [join_elements(elements[row * per_row : (row + 1) * per_row]) for row in range(rows)]
    table = struct.pack(f"<{rows + 1}Q", *accumulate(map(len, contents), initial=0))
    return b"".join((table, *contents))


def array_of_elements(elements: Sequence[bytes], shape: tuple[int, ...]) -> "NDArray[np.object_]":
    """An array of objects; numpy's own conversion would make fixed-width strings and drop trailing NULs."""
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array.reshape(shape)


def fits(shape: tuple[int, ...], spec: TensorSpec) -> bool:
    """True where `shape` is one that `spec` allows."""
    return len(shape) == len(spec.shape) and all(
        actual >= 0 and wanted in (-1, actual) for actual, wanted in zip(shape, spec.shape, strict=True)
    )


def widen_bf16(array: "NDArray[np.uint16]") -> "NDArray[np.float32]":
    """FP32 values of a BF16 array."""
    return (array.astype(np.uint32) << 16).view(np.float32)


def narrow_to_bf16(array: "NDArray[np.float32]") -> "NDArray[np.uint16]":
    """The nearest BF16 values, ties to even; NaN stays NaN."""
    bits = array.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(array), np.uint32(0x7FC0), rounded).astype(np.uint16)
