"""Inputs made up for warm-up and for finding out whether a model's rows are independent."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from appliance.types import TensorSpec
from appliance.worker.tensors import DTYPES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from appliance.manifest import TextSection

#: Lengths tried for dimensions that nothing fixes; convolutions often refuse small ones, attention large ones.
FREE_LENGTHS: Final = (8, 64, 224)

_SEED: Final = 20260101


def free_lengths(specs: Sequence[TensorSpec], text: "TextSection | None", *, is_batched: bool) -> tuple[int, ...]:
    """Lengths worth trying for the dynamic dimensions of `specs`; one where there are none or the tokenizer says."""
    if text is not None:
        return (text.buckets[0],)
    is_free = any(-1 in spec.shape[1 if is_batched else 0 :] for spec in specs)
    return FREE_LENGTHS if is_free else FREE_LENGTHS[:1]


def plain_inputs(
    specs: Sequence[TensorSpec], text: "TextSection | None", rows: int, length: int
) -> "dict[str, NDArray[Any]]":
    """`rows` equal rows: padding with a mask of ones for a text model, zeros and empty strings otherwise."""
    return {spec.name: _plain(spec, text, _shape(spec, rows, length)) for spec in specs}


def varied_inputs(specs: Sequence[TensorSpec], rows: int, length: int) -> "dict[str, NDArray[Any]]":
    """`rows` different rows. Integers are 0 or 1, which even a small vocabulary has."""
    random = np.random.default_rng(_SEED)
    return {spec.name: _varied(spec, _shape(spec, rows, length), random) for spec in specs}


def one_row(inputs: "Mapping[str, NDArray[Any]]", row: int) -> "dict[str, NDArray[Any]]":
    """Row `row` alone, still with a batch dimension."""
    return {name: np.ascontiguousarray(array[row : row + 1]) for name, array in inputs.items()}


def _shape(spec: TensorSpec, rows: int, length: int) -> tuple[int, ...]:
    """`rows` of 0 stands for a model without batch dimension."""
    if rows and spec.shape:
        return (rows, *(length if size < 0 else size for size in spec.shape[1:]))
    return tuple(length if size < 0 else size for size in spec.shape)


def _plain(spec: TensorSpec, text: "TextSection | None", shape: tuple[int, ...]) -> "NDArray[Any]":
    dtype = DTYPES[spec.datatype]
    if spec.datatype == "BYTES":
        return np.full(shape, b"", dtype=dtype)
    if text is not None and spec.name in (text.ids, text.mask):
        return np.full(shape, text.pad_id if spec.name == text.ids else 1, dtype=dtype)
    return np.zeros(shape, dtype=dtype)


def _varied(spec: TensorSpec, shape: tuple[int, ...], random: np.random.Generator) -> "NDArray[Any]":
    dtype = DTYPES[spec.datatype]
    if spec.datatype == "BYTES":
        array = np.empty(shape, dtype=dtype)
        array.reshape(-1)[:] = [b"ab"[i % 2 : i % 2 + 1] for i in range(array.size)]
        return array
    if spec.datatype == "BF16":
        return (random.standard_normal(shape, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if dtype.kind == "f":
        return random.standard_normal(shape).astype(dtype)
    return random.integers(0, 2, shape).astype(dtype)
