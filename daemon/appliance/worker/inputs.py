"""Inputs to measure a loaded model with: any number of rows, as like those of its sample as can be."""

import math
from collections import Counter
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from appliance.worker.model import ServedModel
from appliance.worker.samples import SampleReader
from appliance.worker.synthetic import plain_inputs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from appliance.manifest import Manifest

#: More of a sample is not read: enough to tell which lengths are common, little beside a model.
_MAX_ROWS: Final = 256
_MAX_BYTES: Final = 32 << 20


class MeasuringInputs:
    """Batches of any size, all rows of the shape that is most common in the sample; without a sample made up."""

    def __init__(self, model: ServedModel, manifest: "Manifest", directory: Path, sample: Path | None) -> None:
        """Read the sample.

        Raises:
            ApplianceError: As `SampleReader` and its `rows` say.
        """
        self._model = model
        self._manifest = manifest
        self._rows: list[dict[str, NDArray[Any]]] = []
        if sample is not None:
            self._rows = _most_common(model, manifest, directory, sample)

    def batch(self, rows: int) -> "dict[str, NDArray[Any]]":
        """Feeds of `rows` rows; 0 for a model without batch dimension."""
        if not self._rows:
            return plain_inputs(self._model.inputs, self._manifest.text, rows, self._model.length)
        if rows == 0:
            return self._rows[0]
        chosen = list(islice(cycle(self._rows), rows))
        return {name: np.concatenate([row[name] for row in chosen]) for name in chosen[0]}

    @property
    def tokens(self) -> int:
        """Length of the first dynamic dimension other than the batch's, such as tokens of a text; 0 without any."""
        skipped = 1 if self._model.max_batch_size else 0
        feeds = self.batch(skipped)
        for spec in self._model.inputs:
            for axis, size in enumerate(spec.shape[skipped:], skipped):
                if size < 0:
                    return int(feeds[spec.name].shape[axis])
        return 0

    @property
    def units(self) -> int:
        """Elements of a row's dynamic dimensions, those of the largest input; 0 without any."""
        skipped = 1 if self._model.max_batch_size else 0
        feeds = self.batch(skipped)
        found = 0
        for spec in self._model.inputs:
            pairs = list(zip(spec.shape, feeds[spec.name].shape, strict=True))[skipped:]
            if any(size < 0 for size, _ in pairs):
                found = max(found, math.prod(actual for size, actual in pairs if size < 0))
        return found


def _most_common(
    model: ServedModel, manifest: "Manifest", directory: Path, sample: Path
) -> "list[dict[str, NDArray[Any]]]":
    reader = SampleReader(model.inputs, manifest, directory, is_batched=model.max_batch_size > 0)
    by_shape: dict[tuple[tuple[int, ...], ...], list[dict[str, NDArray[Any]]]] = {}
    shapes: Counter[tuple[tuple[int, ...], ...]] = Counter()
    taken = 0
    for row in reader.rows(sample, _MAX_ROWS):
        shape = tuple(row.feeds[spec.name].shape for spec in model.inputs)
        shapes[shape] += 1
        by_shape.setdefault(shape, []).append(row.feeds)
        taken += sum(array.nbytes for array in row.feeds.values())
        if taken > _MAX_BYTES:
            break
    return by_shape[shapes.most_common(1)[0][0]]
