"""The numbers of `appliance.quality.Comparison`.

Where a reference row is not finite, such as a mask of minus infinities, those elements are left out. A variant's row
with a NaN or an infinity elsewhere counts as the worst there is: a wrong class, a cosine of 0, a relative L2 of 1.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from appliance.errors import BackendError, InvalidRequest
from appliance.quality import Comparison
from appliance.worker.outputs import Outputs

if TYPE_CHECKING:
    from numpy.typing import NDArray


def compare(
    metric: str, variant: Outputs, reference: Outputs, labels: Sequence[int] | None, *, is_synthetic: bool
) -> Comparison:
    """Compare the outputs for the same rows.

    Args:
        metric: One of `appliance.quality.Comparison`'s. ``accuracy`` without labels becomes ``agreement``.
        variant: Of at least one row.
        reference: Of as many rows or more; those beyond the variant's are left out.
        labels: The right class of each row, or None.
        is_synthetic: What the comparison is to say.

    Raises:
        InvalidRequest: The reference is of other inputs.
        BackendError: The variant gave outputs of another size.
    """
    if len(reference.rows) < len(variant.rows) or list(reference.inputs[: len(variant.inputs)]) != list(variant.inputs):
        raise InvalidRequest("cannot compare with the reference: it was made with other inputs")
    pairs = list(zip(variant.rows, reference.rows, strict=False))
    for place, (own, other) in enumerate(pairs):
        if own.size != other.size or variant.classes != reference.classes:
            raise BackendError(
                f"cannot compare with the reference: row {place} has {own.size} outputs in {variant.classes} classes, "
                f"the reference {other.size} in {reference.classes}"
            )
    spoilt = [_is_spoilt(own, other) for own, other in pairs]
    if metric in ("accuracy", "agreement"):
        metric = "accuracy" if metric == "accuracy" and labels is not None else "agreement"
        value, best, worst = _by_class(pairs, spoilt, variant.classes, labels if metric == "accuracy" else None)
    else:
        scores = [_score(metric, own, other, bad) for (own, other), bad in zip(pairs, spoilt, strict=True)]
        value = float(np.mean(scores))
        worst = max(scores) if metric == "relative-l2" else min(scores)
        best = 0.0 if metric == "relative-l2" else 1.0
    return Comparison(
        metric=metric,
        value=value,
        reference=best,
        worst=worst,
        count=len(pairs),
        not_finite=sum(spoilt),
        is_synthetic=is_synthetic,
    )


def _is_spoilt(own: "NDArray[Any]", reference: "NDArray[Any]") -> bool:
    return bool((np.isfinite(reference) & ~np.isfinite(own)).any())


def _by_class(
    pairs: "Sequence[tuple[NDArray[Any], NDArray[Any]]]",
    spoilt: Sequence[bool],
    classes: int,
    labels: Sequence[int] | None,
) -> tuple[float, float, float]:
    """The variant's score, the reference's, and the share of rows with equal classes."""
    chosen = [(_classes_of(own, classes), _classes_of(other, classes)) for own, other in pairs]
    equal = [not bad and own == other for (own, other), bad in zip(chosen, spoilt, strict=True)]
    agreement = sum(equal) / len(equal)
    if labels is None:
        return agreement, 1.0, agreement
    right = [not bad and own == [label] for (own, _), bad, label in zip(chosen, spoilt, labels, strict=True)]
    right_before = [other == [label] for (_, other), label in zip(chosen, labels, strict=True)]
    return sum(right) / len(right), sum(right_before) / len(right_before), agreement


def _classes_of(row: "NDArray[Any]", classes: int) -> list[int]:
    """The greatest of each `classes` elements; more than one where the model classifies each position of a row."""
    logits = row.reshape(-1, classes) if classes else row.reshape(1, -1)
    best: list[int] = np.where(np.isnan(logits), -np.inf, logits).argmax(axis=-1).tolist() if logits.size else []
    return best


def _score(metric: str, own: "NDArray[Any]", reference: "NDArray[Any]", is_spoilt: bool) -> float:
    is_l2 = metric == "relative-l2"
    if is_spoilt:
        return 1.0 if is_l2 else 0.0
    kept = np.isfinite(reference)
    a, b = own[kept].astype(np.float64), reference[kept].astype(np.float64)
    norm_a, norm_b = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if norm_a == 0.0 or norm_b == 0.0:
        is_equal = norm_a == norm_b
        return float(not is_equal) if is_l2 else float(is_equal)
    if is_l2:
        return float(np.linalg.norm(a - b)) / norm_b
    # Each to length 1 first: the product of two norms of large vectors may be infinite.
    return min(1.0, max(-1.0, float(np.dot(a / norm_a, b / norm_b))))
