"""Whether a variant's outputs stay close to the reference's. Values and rules; the numbers come from a worker."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from appliance.measurement import VariantKey

#: Precisions offered where a model has no evaluation sample: rounding alone, no calibration that could have gone wrong.
WITHOUT_SAMPLE: Final = frozenset({"FP32", "BF16", "FP16"})

#: Metric of a task. ``accuracy``: share of rows whose best class is the label's; without labels ``agreement``: share of
#: rows whose best class is the reference's. ``cosine``: mean cosine of each row with the reference's row.
#: ``relative-l2``: mean over rows of ‖output − reference‖₂ ÷ ‖reference‖₂; less is better.
METRIC_OF_TASK: Final = {
    "text-classification": "accuracy",
    "image-classification": "accuracy",
    "embedding": "cosine",
    "tensor": "relative-l2",
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """A variant's outputs beside the reference's, on the same inputs. Made by ``appliance.worker.evaluation``.

    Attributes:
        metric: ``accuracy``, ``agreement``, ``cosine`` or ``relative-l2``.
        value: The variant's, over all rows.
        reference: What the reference itself scores: its accuracy; 1 for agreement and cosine, 0 for relative-l2.
        worst: The worst single row: its cosine or relative L2; for classifiers the share of rows that agree with the
            reference's best class.
        count: Rows compared.
        not_finite: Rows of the variant with a NaN or an infinity where the reference has none.
        is_synthetic: True where the inputs were made up, since the model brings no sample.
    """

    metric: str
    value: float
    reference: float
    worst: float
    count: int
    not_finite: int = 0
    is_synthetic: bool = False

    @property
    def loss(self) -> float:
        """How much worse than the reference: 0.01 is 1 %; negative where better."""
        return self.value - self.reference if self.metric == "relative-l2" else self.reference - self.value


@dataclass(frozen=True, slots=True)
class Evidence:
    """A verdict with what it rests on.

    Attributes:
        key: The variant judged.
        reference: `VariantKey.id` of the reference.
        sample: Hex sha256 of the sample, or ``"synthetic"``.
        bound: The most `Comparison.loss` may be.
        comparison: The numbers; None where the variant could not be run.
        problem: Why it could not.
        judged_at: ISO 8601 in UTC, for people.
    """

    key: VariantKey
    reference: str
    sample: str
    bound: float
    comparison: Comparison | None
    problem: str = ""
    judged_at: str = ""

    @property
    def refusal(self) -> str:
        """Why the variant must not serve; empty where it may."""
        found = self.comparison
        if found is None:
            return self.problem or "it could not be compared with the reference"
        if found.not_finite:
            return f"{found.not_finite} of {found.count} rows are NaN or infinite where the reference's are not"
        if found.count == 0:
            return "the sample is empty"
        if not found.loss <= self.bound:  # a NaN is no pass
            return (
                f"{found.metric} {found.value:.4f} against {found.reference:.4f} of the reference on {found.count} "
                f"rows: {found.loss:.2%} worse, and the bound is {self.bound:.2%}"
            )
        return ""

    def as_json(self) -> dict[str, Any]:
        """As the registry keeps it."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Evidence":
        """The inverse of `as_json`.

        Raises:
            KeyError, TypeError: `document` is something else.
        """
        values = dict(document)
        key = VariantKey(**values.pop("key"))
        compared = values.pop("comparison")
        return cls(key=key, comparison=Comparison(**compared) if compared is not None else None, **values)
