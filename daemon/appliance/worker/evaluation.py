"""Task ``evaluate``: runs a sample through a variant and compares the outputs with the reference's."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from appliance.errors import ApplianceError, BackendError, InvalidRequest
from appliance.types import TensorSpec
from appliance.wire import worker_pb2
from appliance.worker.comparing import compare
from appliance.worker.loading import labels_of, load, manifest_of
from appliance.worker.made_up import made_up_rows
from appliance.worker.messages import presentable
from appliance.worker.model import ContractBroken, ServedModel
from appliance.worker.outputs import Outputs
from appliance.worker.question import Say, count_of, load_of, path_of
from appliance.worker.samples import Batch, Row, SampleReader, batches
from appliance.worker.tensors import DTYPES, widen_bf16

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from appliance.manifest import Manifest

_MAX_BATCH_ROWS: Final = 32

_SYNTHETIC_ROWS: Final = 32

#: Outputs of a sample that would take more memory are not all kept: the rows that fit are compared.
MAX_OUTPUT_BYTES: Final = 256 << 20

_METRICS: Final = ("accuracy", "agreement", "cosine", "relative-l2")
_FLOATS: Final = frozenset({"FP16", "BF16", "FP32", "FP64"})

_PROGRESS_NS: Final = 100_000_000


def evaluate(question: Mapping[str, Any], say: Say) -> None:
    """Load the variant of `question`, run its sample and say the comparison with the reference.

    Without a reference the outputs become one: they are saved, and compared with themselves.

    Raises:
        ApplianceError: The variant cannot be loaded or run, the sample is of no use, or the reference is another's.
    """
    message = load_of(question)
    metric = question.get("metric")
    if metric not in _METRICS:
        raise InvalidRequest(f"cannot do the task: 'metric' must be one of {', '.join(_METRICS)}, not {metric!r}")
    limit = count_of(question, "limit")
    sample, reference_path, save = (path_of(question, name) for name in ("sample", "reference", "save"))
    reference = Outputs.read(reference_path) if reference_path is not None else None

    say({"progress": {"step": "loading", "done": 0, "total": 1}})
    model, _ = load(message)
    manifest = manifest_of(message)
    if reference is not None:
        limit = min(limit, len(reference.rows))
    length = reference.length if reference is not None else model.length
    directory = Path(message.directory)
    if sample is not None:
        reader = SampleReader(model.inputs, manifest, directory, is_batched=model.max_batch_size > 0)
        limit = reader.count(sample, limit)
        rows = reader.rows(sample, limit)
    else:
        limit = min(limit, _SYNTHETIC_ROWS)
        rows = islice(made_up_rows(model, manifest, directory, length, _SYNTHETIC_ROWS), limit)
    run = _Run(model, _chosen(model.outputs, manifest, metric))
    run.all(rows, limit, say)
    outputs = run.outputs(length)
    if save is not None:
        try:
            outputs.save(save)
        except OSError as error:
            raise InvalidRequest(f"cannot save the reference {save.name!r}: {error.strerror}") from error
    labels = _label_places(run.labels, message, manifest, outputs)
    comparison = compare(metric, outputs, reference or outputs, labels, is_synthetic=sample is None)
    say({"result": {"comparison": asdict(comparison)}})


def _chosen(outputs: Sequence[TensorSpec], manifest: "Manifest", metric: str) -> list[TensorSpec]:
    """The outputs that matter: a classifier's logits, else all in floating point, else all numbers.

    Raises:
        InvalidRequest: The model gives nothing but bytes.
    """
    if manifest.classification is not None:
        return [spec for spec in outputs if spec.name == manifest.classification.logits]
    floats = [spec for spec in outputs if spec.datatype in _FLOATS]
    numbers = floats or [spec for spec in outputs if spec.datatype != "BYTES"]
    if not numbers:
        raise InvalidRequest("cannot evaluate the model: its outputs are no numbers")
    return numbers[:1] if metric in ("accuracy", "agreement") else numbers


class _Run:
    """Runs a sample and keeps what comes out, by row."""

    def __init__(self, model: ServedModel, chosen: Sequence[TensorSpec]) -> None:
        self._model = model
        self._chosen = chosen
        self._names = [spec.name for spec in chosen]
        self._rows: dict[int, NDArray[Any]] = {}
        self._taken = 0
        self._digests: list[bytes] = []
        self._classes = 0
        self.labels: list[str | None] = []

    def all(self, rows: Iterator[Row], total: int, say: Say) -> None:
        """Run all `rows`, or as many as fit into memory.

        Raises:
            ApplianceError: A run failed, or a row cannot be read.
        """
        say({"progress": {"step": "running", "done": 0, "total": total}})
        said = time.monotonic_ns()
        size = min(self._model.max_batch_size, _MAX_BATCH_ROWS)
        for batch in batches(self._noted(rows), size):
            self._run(batch)
            if time.monotonic_ns() - said > _PROGRESS_NS:
                said = time.monotonic_ns()
                say({"progress": {"step": "running", "done": len(self._rows), "total": total}})
        say({"progress": {"step": "running", "done": len(self._rows), "total": len(self._rows)}})

    def outputs(self, length: int) -> Outputs:
        """What came out, in the order of the sample."""
        return Outputs([self._rows[place] for place in range(len(self._rows))], self._digests, self._classes, length)

    def _noted(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Pass rows on while there is memory for their outputs."""
        for row in rows:
            if self._taken > MAX_OUTPUT_BYTES:
                return
            self._digests.append(row.digest)
            self.labels.append(row.label)
            yield row

    def _run(self, batch: Batch) -> None:
        model = self._model
        try:
            results = model.session.run(batch.feeds, self._names)
            arrays = [
                _wide(spec, model.check_output(spec, results.get(spec.name), len(batch.rows))) for spec in self._chosen
            ]
        except ContractBroken as error:
            raise BackendError(f"cannot evaluate the model: the backend broke its contract: {error}") from error
        except ApplianceError:
            raise
        except Exception as error:  # whatever the runtime raises
            raise BackendError(f"cannot evaluate the model: {presentable(error)}") from error
        first = arrays[0]
        self._classes = first.shape[-1] if first.ndim > (1 if model.max_batch_size else 0) else 1
        for index, place in enumerate(batch.places):
            parts = [(array[index] if model.max_batch_size else array).reshape(-1) for array in arrays]
            # Copied in any case: the next run may reuse the arrays.
            self._rows[place] = np.concatenate(parts)
            self._taken += self._rows[place].nbytes


def _wide(spec: TensorSpec, array: "NDArray[Any]") -> "NDArray[Any]":
    """As FP32, or as FP64 where FP32 would not hold it."""
    if spec.datatype == "BF16":
        return widen_bf16(array)
    holds = DTYPES[spec.datatype].kind == "f" and DTYPES[spec.datatype].itemsize <= 4
    return array.astype(np.float32 if holds or DTYPES[spec.datatype].itemsize <= 2 else np.float64)


def _label_places(
    labels: Sequence[str | None], message: worker_pb2.Load, manifest: "Manifest", outputs: Outputs
) -> list[int] | None:
    """The class of each row by its label; None where one has no label, or the model gives more than a class a row.

    Raises:
        InvalidRequest: A label is none of the model's.
    """
    section = manifest.classification
    if section is None or any(row.size != outputs.classes for row in outputs.rows):
        return None
    known = {label: place for place, label in enumerate(labels_of(section, Path(message.directory)))}
    places: list[int] = []
    for row, label in enumerate(labels):
        if label is None:
            return None
        if label not in known:
            raise InvalidRequest(f"cannot evaluate the model: label {label!r} of row {row} is none of its labels")
        places.append(known[label])
    return places
