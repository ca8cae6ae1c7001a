"""Logits to labels and scores."""

from typing import TYPE_CHECKING, Any

import numpy as np

from appliance.errors import InvalidManifest
from appliance.types import TensorSpec
from appliance.worker.tensors import widen_bf16

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from appliance.manifest import ClassificationSection

_LOGITS = ("FP16", "BF16", "FP32", "FP64")


class Classifier:
    """Makes the outputs ``label`` and ``score`` of one model."""

    def __init__(self, section: "ClassificationSection", labels: list[str], logits: TensorSpec) -> None:
        """Check that the labels belong to the output.

        Raises:
            InvalidManifest: The output's datatype or last dimension does not suit, or there are too few labels.
        """
        if logits.datatype not in _LOGITS or not logits.shape:
            raise InvalidManifest(
                f"cannot classify by output {logits.name!r}: it is {logits.datatype} {list(logits.shape)} and must be "
                f"{', '.join(_LOGITS)} with the classes in the last dimension"
            )
        if logits.shape[-1] not in (-1, len(labels)):
            raise InvalidManifest(
                f"cannot classify by output {logits.name!r}: it has {logits.shape[-1]} classes and {len(labels)} labels"
            )
        if section.top_k > len(labels):
            raise InvalidManifest(f"cannot give the best {section.top_k}: there are {len(labels)} labels")
        self.logits = logits.name
        self._is_bf16 = logits.datatype == "BF16"
        self._top_k = section.top_k
        self._labels = np.empty(len(labels), dtype=object)
        self._labels[:] = [label.encode() for label in labels]
        shape = (*logits.shape[:-1], section.top_k)
        #: The outputs made, label first.
        self.outputs = (
            TensorSpec(section.label_output, "BYTES", shape),
            TensorSpec(section.score_output, "FP32", shape),
        )

    def classify(self, logits: "NDArray[Any]") -> "dict[str, NDArray[Any]]":
        """Labels and their softmax scores, the most likely first. NaN logits give NaN scores.

        Raises:
            ValueError: The classes are not as many as the labels.
        """
        if logits.shape[-1] != len(self._labels):
            raise ValueError(f"it gave {logits.shape[-1]} classes for {len(self._labels)} labels")
        values = widen_bf16(logits) if self._is_bf16 else logits.astype(np.float32)
        with np.errstate(all="ignore"):  # infinities and NaN are the model's answer, not our error
            values = np.exp(values - values.max(axis=-1, keepdims=True))
            values /= values.sum(axis=-1, keepdims=True)
        if self._top_k == 1:
            best = values.argmax(axis=-1)[..., np.newaxis]
        else:
            best = np.argsort(-values, axis=-1, kind="stable")[..., : self._top_k]
        label, score = (spec.name for spec in self.outputs)
        return {label: self._labels[best], score: np.take_along_axis(values, best, axis=-1)}


def read_labels(text: str) -> list[str]:
    """Labels of ``labels.txt``, one a line, in the order of the classes."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
