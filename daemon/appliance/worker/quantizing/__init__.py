"""Task ``quantize``: makes an artifact of lower precision from an FP32 one, beside it and never in its place."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from appliance.errors import ApplianceError, BackendError, InvalidRequest
from appliance.wire import worker_pb2
from appliance.worker.loading import load, manifest_of
from appliance.worker.messages import presentable
from appliance.worker.model import ServedModel
from appliance.worker.quantizing import floats, int8, weights
from appliance.worker.quantizing.calibration import Calibration
from appliance.worker.quantizing.check import check
from appliance.worker.quantizing.publishing import publish, staging
from appliance.worker.quantizing.source import Source
from appliance.worker.quantizing.toolkits import be_repeatable, stay_offline
from appliance.worker.question import Say, count_of, load_of, path_of
from appliance.worker.samples import SampleReader
from appliance.worker.synthetic import plain_inputs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from appliance.manifest import Manifest

_IR: Final = {"onnx": "openvino-ir", "openvino-ir": "openvino-ir"}
_ONNX: Final = {"onnx": "onnx"}
_SUFFIXES: Final = {"onnx": ".onnx", "openvino-ir": ".xml"}


@dataclass(frozen=True, slots=True)
class Method:
    """One way to lower the precision.

    Attributes:
        precision: Of the result, one of `appliance.backend.PRECISIONS`.
        formats: Format of the result by format of the source.
        convert: Writes the result where no calibration is needed.
        calibrate: Writes it where one is.
    """

    precision: str
    formats: Mapping[str, str]
    convert: Callable[[Source, Path], None] | None = None
    calibrate: Callable[[Source, Calibration, Path], None] | None = None


METHODS: Final = {
    "int8": Method("INT8", _IR, calibrate=int8.to_openvino),
    "int8-qdq": Method("INT8", _ONNX, calibrate=int8.to_onnx),
    "fp16": Method("FP16", {**_ONNX, "openvino-ir": "openvino-ir"}, convert=floats.to_fp16),
    "bf16": Method("BF16", _ONNX, convert=floats.to_bf16),
    "int8-weights": Method("INT8-WEIGHTS", _IR, convert=weights.to_int8_weights),
    "int4-weights": Method("INT4-WEIGHTS", _IR, convert=weights.to_int4_weights),
}


def quantize(question: Mapping[str, Any], say: Say) -> None:
    """Make what `question` asks for, run a row through it, and say what it is.

    The result is ``model.METHOD.onnx``, or ``model.METHOD.xml`` with its ``.bin``, in the directory ``output``; equal
    questions give equal files. A task that fails or is killed leaves none of that name.

    Raises:
        ApplianceError: The source cannot be loaded, the method does not suit it or is not installed, or the calibration
            inputs are of no use.
    """
    stay_offline()
    message = load_of(question)
    name, method = _method_of(question, message)
    output = path_of(question, "output")
    if output is None:
        raise InvalidRequest("cannot do the task: 'output' is missing")

    model, _ = load(message)
    try:
        manifest = manifest_of(message)
        calibration = _calibration(question, message, model, manifest, say) if method.calibrate else None
        feeds = calibration.first if calibration else _plain(model, manifest)
        expected = model.session.run(feeds, [spec.name for spec in model.outputs])
        expected = {name: np.array(array) for name, array in expected.items()}  # the session's own arrays go with it
    finally:
        model.session.close()

    source = Source(Path(message.artifact_path), message.artifact_format, manifest.text is not None)
    format_ = method.formats[source.format]
    try:
        with staging(output) as directory:
            made = directory / f"model.{name}{_SUFFIXES[format_]}"
            if calibration is None:
                say({"progress": {"step": "quantising", "done": 0, "total": 1}})
            be_repeatable()
            _make(method, source, calibration, made)
            say({"progress": {"step": "writing", "done": 0, "total": 1}})
            check(made, format_, feeds, expected)
            total = publish(made, output)
    except ApplianceError:
        raise
    except Exception as error:
        raise BackendError(f"cannot quantise the model by {name!r}: {presentable(error)}") from error
    say({"progress": {"step": "writing", "done": 1, "total": 1}})
    say(
        {
            "result": {
                "file": made.name,
                "format": format_,
                "precision": method.precision,
                "bytes": total,
                "rows": len(calibration) if calibration else 0,
            }
        }
    )


def _method_of(question: Mapping[str, Any], message: worker_pb2.Load) -> tuple[str, Method]:
    name = question.get("method")
    method = METHODS.get(name) if isinstance(name, str) else None
    if not isinstance(name, str) or method is None:
        raise InvalidRequest(f"cannot quantise by {name!r}: the methods are {', '.join(METHODS)}")
    if message.artifact_precision != "FP32":
        raise InvalidRequest(
            f"cannot quantise an artifact of precision {message.artifact_precision!r}: it must be 'FP32'"
        )
    if message.artifact_format not in method.formats:
        raise InvalidRequest(
            f"cannot quantise an artifact of format {message.artifact_format!r} by {name!r}: the method takes "
            f"{' and '.join(method.formats)}"
        )
    return name, method


def _calibration(
    question: Mapping[str, Any], message: worker_pb2.Load, model: ServedModel, manifest: "Manifest", say: Say
) -> Calibration:
    path = path_of(question, "calibration")
    if path is None:
        raise InvalidRequest(f"cannot quantise by {question['method']!r}: it learns ranges, and no inputs are given")
    reader = SampleReader(model.inputs, manifest, Path(message.directory), is_batched=model.max_batch_size > 0)
    return Calibration(reader, path, count_of(question, "limit"), say)


def _plain(model: ServedModel, manifest: "Manifest") -> "dict[str, NDArray[Any]]":
    return plain_inputs(model.inputs, manifest.text, 1 if model.max_batch_size else 0, model.length)


def _make(method: Method, source: Source, calibration: Calibration | None, made: Path) -> None:
    if method.calibrate and calibration:
        method.calibrate(source, calibration, made)
    elif method.convert:
        method.convert(source, made)
