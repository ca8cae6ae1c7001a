"""Rows made up for judging a model that brings no sample: different from each other, and the same every time."""

import hashlib
import string
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from appliance.types import TensorSpec
from appliance.worker.model import ServedModel
from appliance.worker.samples import Row, SampleReader
from appliance.worker.synthetic import varied_inputs

if TYPE_CHECKING:
    from appliance.manifest import Manifest

_SEED: Final = 20260102
_MAX_WORDS: Final = 24
_MAX_LETTERS: Final = 9


def made_up_rows(model: ServedModel, manifest: "Manifest", directory: Path, length: int, count: int) -> Iterator[Row]:
    """`count` rows: of a text model texts of made-up words, where the tokenizer makes all its inputs; else noise.

    Args:
        model: The loaded model.
        manifest: Its manifest.
        directory: Its directory.
        length: Of dynamic dimensions.
        count: Rows wanted.

    Raises:
        ApplianceError: The tokenizer cannot be used.
    """
    text = manifest.text
    is_batched = model.max_batch_size > 0
    if text is not None and {spec.name for spec in model.inputs} <= {text.ids, text.mask}:
        reader = SampleReader(model.inputs, manifest, directory, is_batched=is_batched)
        for sentence in _sentences(count):
            yield reader.row({text.input: sentence})
        return
    # With a dimension for the rows in any case, since each call for one row would give the same noise again.
    specs = [spec if is_batched else TensorSpec(spec.name, spec.datatype, (-1, *spec.shape)) for spec in model.inputs]
    feeds = varied_inputs(specs, count, length)
    for row in range(count):
        digest = hashlib.sha256(f"made up: row {row} of {count}, {length} long".encode()).digest()
        yield Row(
            {name: array[row : row + 1] if is_batched else array[row] for name, array in feeds.items()}, None, digest
        )


def _sentences(count: int) -> Iterator[str]:
    random = np.random.default_rng(_SEED)
    letters = np.array(list(string.ascii_lowercase))
    for _ in range(count):
        sizes = random.integers(1, _MAX_LETTERS + 1, random.integers(1, _MAX_WORDS + 1))
        yield " ".join("".join(random.choice(letters, size)) for size in sizes)
