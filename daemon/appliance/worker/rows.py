"""Finds out whether a model has a batch dimension where its manifest does not say."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from appliance.backend import Session
from appliance.types import TensorSpec
from appliance.worker.synthetic import one_row, varied_inputs
from appliance.worker.tensors import widen_bf16

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Relative difference between a row alone and in company that rounding explains, by precision of the computation.
_TOLERANCE: Final = {"FP32": 1e-3, "FP64": 1e-3}
_LOW_PRECISION_TOLERANCE: Final = 5e-2


def has_batch_dimension(
    session: Session, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], length: int, precision: str
) -> bool:
    """True where every first dimension is dynamic and two rows together give what each gives alone."""
    if any(not spec.shape or spec.shape[0] != -1 for spec in (*inputs, *outputs)):
        return False
    names = [spec.name for spec in outputs]
    both = varied_inputs(inputs, 2, length)
    try:
        alone = [_owned(session.run(one_row(both, row), names)) for row in range(2)]
        together = session.run(both, names)
        return all(
            _agree(spec, np.concatenate([alone[0][spec.name], alone[1][spec.name]]), together[spec.name], precision)
            for spec in outputs
        )
    except Exception:  # a model that refuses two rows, for whatever reason, has no batch dimension for us
        return False


def _owned(results: "Any") -> "dict[str, NDArray[Any]]":
    """Copies, since the next run may reuse the arrays."""
    return {name: np.array(array) for name, array in results.items()}


def _agree(spec: TensorSpec, expected: "NDArray[Any]", actual: "NDArray[Any]", precision: str) -> bool:
    if expected.shape != actual.shape:
        return False
    if spec.datatype == "BF16":
        expected, actual = widen_bf16(expected), widen_bf16(actual)
    if expected.dtype.kind != "f":
        return bool(np.array_equal(expected, actual))
    tolerance = _TOLERANCE.get(precision, _LOW_PRECISION_TOLERANCE)
    if expected.dtype.itemsize < 4 or spec.datatype == "BF16":
        tolerance = max(tolerance, _LOW_PRECISION_TOLERANCE)
    finite = expected[np.isfinite(expected)]
    scale = float(np.abs(finite).max(initial=0.0))
    return bool(np.allclose(expected, actual, rtol=tolerance, atol=tolerance * scale, equal_nan=True))
