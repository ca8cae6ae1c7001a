"""LOAD: from the front-end's message to a model that has proved that it runs."""

import json
import mmap
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Final, cast

from appliance.artifacts import resolve_inside, verify_digest
from appliance.backend import MAX_STREAMS, Artifact, Backend, Execution, Session, Variant
from appliance.errors import ApplianceError, BackendError, InvalidManifest, NoPlacement
from appliance.inventory import Inventory
from appliance.inventory.cpu import read_inventory
from appliance.types import TensorSpec
from appliance.wire import worker_pb2
from appliance.worker.classification import Classifier, read_labels
from appliance.worker.image import Decoder
from appliance.worker.messages import presentable
from appliance.worker.model import ContractBroken, Pictures, ServedModel
from appliance.worker.plugin import PluginRefused, find_backend
from appliance.worker.rows import has_batch_dimension
from appliance.worker.specs import check_batch_dimension, check_session_specs, narrow
from appliance.worker.state import States, check_sequence
from appliance.worker.synthetic import free_lengths, plain_inputs
from appliance.worker.tensors import fits

if TYPE_CHECKING:
    from appliance.manifest import ClassificationSection, ImageSection, Manifest

#: Rows of a batch where the manifest does not say and the model has a batch dimension.
DEFAULT_MAX_BATCH_SIZE: Final = 64

#: Warming up with more rows than this costs time and teaches the runtime nothing.
_MAX_WARMUP_ROWS: Final = 8


def load(message: worker_pb2.Load) -> tuple[ServedModel, worker_pb2.Loaded]:
    """Verify, load, warm up and describe a model.

    Raises:
        ApplianceError: It cannot be served; the message says why.
    """
    started = time.monotonic_ns()
    manifest = manifest_of(message)
    path = Path(message.artifact_path)
    verify_digest(path, message.artifact_sha256 or None, path.name)
    artifact = Artifact(path, message.artifact_format, message.artifact_precision, message.artifact_sha256)
    variant = Variant(message.backend, message.device, message.precision, dict(message.options))
    backend, runtime = _usable_backend(message)
    try:
        session = backend.load(artifact, variant)
    except Exception as error:
        raise _as_backend_error("load the model", error) from error
    loaded = time.monotonic_ns()
    check_session_specs(session.inputs, session.outputs)
    inputs, outputs = narrow(manifest, session.inputs, session.outputs)
    if manifest.sequence is not None:
        check_sequence(manifest.sequence, inputs, outputs, manifest.max_batch_size)
    length = _first_run(session, inputs, outputs, manifest)
    max_batch_size = manifest.max_batch_size
    if max_batch_size is None:
        is_batched = has_batch_dimension(session, inputs, outputs, length, variant.precision)
        max_batch_size = DEFAULT_MAX_BATCH_SIZE if is_batched else 0
    elif max_batch_size:
        check_batch_dimension(max_batch_size, (*inputs, *outputs), manifest.name)
    model = ServedModel(
        session=session,
        inputs=inputs,
        outputs=outputs,
        max_batch_size=max_batch_size,
        pictures=_pictures(manifest.image, inputs, max_batch_size) if manifest.image else None,
        classifier=_classifier(manifest.classification, outputs, Path(message.directory))
        if manifest.classification
        else None,
        length=length,
        streams=_streams(session),
        states=States(manifest.sequence, inputs, outputs, max_batch_size) if manifest.sequence else None,
    )
    _check_edge_names(model)
    execution = _warm_up(model, manifest, length)
    _check_placement(message, manifest, execution)
    return model, _loaded(model, execution, loaded - started, time.monotonic_ns() - loaded, runtime)


def manifest_of(message: worker_pb2.Load) -> "Manifest":
    """The manifest that the front-end validated, read as it is: importing pydantic costs a worker 70 ms and 12 MB.

    Raises:
        InvalidManifest: It is no JSON object.
    """
    try:
        manifest = json.loads(message.manifest, object_hook=lambda fields: SimpleNamespace(**fields))
    except ValueError as error:
        raise InvalidManifest(f"cannot use the manifest of {message.model!r}: it is not JSON") from error
    if not isinstance(manifest, SimpleNamespace):
        raise InvalidManifest(f"cannot use the manifest of {message.model!r}: it is no JSON object")
    return cast("Manifest", manifest)


def _usable_backend(message: worker_pb2.Load) -> tuple[Backend, str]:
    try:
        backend = find_backend(message.backend)
        support = backend.probe(inventory_of(message))
    except PluginRefused as error:
        raise NoPlacement(f"cannot use backend {message.backend!r}: {error}") from error
    except Exception as error:
        raise _as_backend_error(f"use backend {message.backend!r}", error) from error
    if message.device not in support.devices:
        reason = support.reason or f"it can use {', '.join(support.devices)}"
        raise NoPlacement(f"cannot use device {message.device!r} with backend {message.backend!r}: {reason}")
    if message.artifact_format not in backend.formats:
        raise NoPlacement(
            f"cannot load {message.artifact_format!r} with backend {message.backend!r}: it is none of its formats"
        )
    return backend, support.runtime


def inventory_of(message: worker_pb2.Load) -> Inventory:
    """The machine as the front-end sees it; read anew, the CPU alone, where the message does not say."""
    return Inventory.from_json(json.loads(message.inventory)) if message.inventory else read_inventory()


def _check_placement(message: worker_pb2.Load, manifest: "Manifest", execution: Execution) -> None:
    """Refuse a session that landed on another device than it was to, where the manifest forbids that.

    Raises:
        NoPlacement: It did; the message gives the runtime's reason.
    """
    if execution.device != message.device and manifest.fallback == "forbid":
        raise NoPlacement(
            f"cannot place model {message.model!r} on {message.device!r}: {message.backend} ran it on "
            f"{execution.device!r}, and fallback is 'forbid': {execution.reason or 'the runtime gives no reason'}"
        )


def _as_backend_error(what: str, error: Exception) -> ApplianceError:
    return error if isinstance(error, ApplianceError) else BackendError(f"cannot {what}: {presentable(error)}")


def _first_run(
    session: Session, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], manifest: "Manifest"
) -> int:
    """Run one row; returns the length that dynamic dimensions had when it worked."""
    is_batched = manifest.max_batch_size != 0 and all(spec.shape and spec.shape[0] == -1 for spec in inputs)
    names = [spec.name for spec in outputs]
    *others, last = free_lengths(inputs, manifest.text, is_batched=is_batched)
    for length in others:
        try:
            session.run(plain_inputs(inputs, manifest.text, 1 if is_batched else 0, length), names)
        except Exception:  # noqa: S112 - a guessed length may be wrong; the last one is reported
            continue
        return length
    try:
        session.run(plain_inputs(inputs, manifest.text, 1 if is_batched else 0, last), names)
    except Exception as error:
        raise _as_backend_error("warm the model up", error) from error
    return last


def _streams(session: Session) -> int:
    """Runs that a session says it takes at the same time.

    Raises:
        BackendError: It is not a number that the contract allows.
    """
    streams = getattr(session, "streams", 1)
    if type(streams) is not int or not 1 <= streams <= MAX_STREAMS:
        raise BackendError(
            f"cannot load the model: the backend broke its contract: its session has {streams!r} streams, which must "
            f"be a number from 1 to {MAX_STREAMS}"
        )
    return streams


def _warm_up(model: ServedModel, manifest: "Manifest", length: int) -> Execution:
    sizes = {1, min(model.max_batch_size, _MAX_WARMUP_ROWS)} if model.max_batch_size else {0}
    names = [spec.name for spec in model.outputs]

    def run(rows: int) -> None:
        results = model.session.run(plain_inputs(model.inputs, manifest.text, rows, length), names)
        for spec in model.outputs:
            model.check_output(spec, results.get(spec.name), rows)

    try:
        for rows in sorted(sizes):
            run(rows)
        if model.streams > 1:  # what each stream does at first is done now, and that they get on is seen
            with ThreadPoolExecutor(model.streams, "warm-up") as threads:
                list(threads.map(run, [max(sizes)] * model.streams))
        return model.session.executed_on()
    except ContractBroken as error:
        if tuple(model.outputs) != tuple(model.session.outputs):  # narrowed, so the manifest is at fault
            raise InvalidManifest(f"cannot use the manifest of {manifest.name!r}: {error}") from error
        raise BackendError(f"cannot warm the model up: the backend broke its contract: {error}") from error
    except Exception as error:
        raise _as_backend_error("warm the model up", error) from error


def _pictures(section: "ImageSection", inputs: Sequence[TensorSpec], max_batch_size: int) -> Pictures:
    spec = next((one for one in inputs if one.name == section.tensor), None)
    if spec is None:
        names = ", ".join(one.name for one in inputs)
        raise InvalidManifest(f"cannot make images into {section.tensor!r}: the model's inputs are {names}")
    decoder = Decoder(section)
    is_batched = len(spec.shape) == len(decoder.shape) + 1
    shape = (1, *decoder.shape) if is_batched else decoder.shape
    if spec.datatype != "FP32" or not fits(shape, spec):
        raise InvalidManifest(
            f"cannot make images into {section.tensor!r}: it is {spec.datatype} {list(spec.shape)} and images become "
            f"FP32 {list(decoder.shape)} each"
        )
    edge = TensorSpec(section.input, "BYTES", (-1, 1) if max_batch_size else (1,))
    return Pictures(edge, section.tensor, decoder, is_batched)


def _classifier(section: "ClassificationSection", outputs: Sequence[TensorSpec], directory: Path) -> Classifier:
    logits = next((spec for spec in outputs if spec.name == section.logits), None)
    if logits is None:
        names = ", ".join(spec.name for spec in outputs)
        raise InvalidManifest(f"cannot classify by {section.logits!r}: the model's outputs are {names}")
    return Classifier(section, labels_of(section, directory), logits)


def labels_of(section: "ClassificationSection", directory: Path) -> list[str]:
    """The model's labels, in the order of the classes.

    Raises:
        InvalidManifest, ArtifactCorrupt: Their file is missing, differs from its digest, or is no UTF-8.
    """
    path = resolve_inside(directory, section.labels)
    verify_digest(path, section.labels_sha256, section.labels)
    try:
        return read_labels(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidManifest(f"cannot read {section.labels!r}: it is not a readable UTF-8 file") from error


def _check_edge_names(model: ServedModel) -> None:
    for kind, own, edge in (
        ("input", model.inputs, model.edge_inputs),
        ("output", model.outputs, model.edge_outputs),
    ):
        names = [spec.name for spec in (*own, *edge)]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise InvalidManifest(f"cannot serve the model: two {kind}s have the name {repeated[0]!r}")


def _loaded(model: ServedModel, execution: Execution, load_ns: int, warmup_ns: int, runtime: str) -> worker_pb2.Loaded:
    return worker_pb2.Loaded(
        inputs=_messages(model.inputs),
        edge_inputs=_messages(model.edge_inputs),
        outputs=_messages(model.outputs),
        edge_outputs=_messages(model.edge_outputs),
        max_batch_size=model.max_batch_size,
        execution=worker_pb2.Execution(
            device=execution.device,
            provider=execution.provider,
            precision=execution.precision,
            detail=execution.detail,
            reason=execution.reason,
        ),
        load_ns=load_ns,
        warmup_ns=warmup_ns,
        resident_bytes=_resident_bytes(),
        runtime=runtime,
        streams=model.streams,
    )


def _messages(specs: Sequence[TensorSpec]) -> list[worker_pb2.TensorSpec]:
    return [worker_pb2.TensorSpec(name=spec.name, datatype=spec.datatype, shape=spec.shape) for spec in specs]


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
