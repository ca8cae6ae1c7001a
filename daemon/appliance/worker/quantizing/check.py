"""Proves that what was made loads and runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appliance.errors import BackendError
from appliance.worker.messages import presentable
from appliance.worker.quantizing.toolkits import import_onnxruntime, import_openvino

if TYPE_CHECKING:
    from numpy.typing import NDArray


def check(
    made: Path, format_: str, feeds: "Mapping[str, NDArray[Any]]", expected: "Mapping[str, NDArray[Any]]"
) -> None:
    """Load `made` in the runtime of its format, on the CPU, and run `feeds`.

    Raises:
        BackendError: It cannot be loaded or run, or gives other outputs than `expected`, by name, datatype or shape.
    """
    try:
        found = _run_openvino(made, feeds) if format_ == "openvino-ir" else _run_onnx(made, feeds)
    except Exception as error:
        raise BackendError(f"cannot use what was made of the model: {presentable(error)}") from error
    for name, array in expected.items():
        other = found.get(name)
        if other is None or other.dtype != array.dtype or other.shape != array.shape:
            shown = "missing" if other is None else f"{other.dtype} {list(other.shape)}"
            raise BackendError(
                f"cannot use what was made of the model: its output {name!r} is {shown} and was {array.dtype} "
                f"{list(array.shape)}"
            )


def _run_onnx(made: Path, feeds: "Mapping[str, NDArray[Any]]") -> "dict[str, NDArray[Any]]":
    session = import_onnxruntime().InferenceSession(str(made), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def _run_openvino(made: Path, feeds: "Mapping[str, NDArray[Any]]") -> "dict[str, NDArray[Any]]":
    results = import_openvino().Core().compile_model(made, "CPU")(dict(feeds))
    return {port.any_name: array for port, array in results.items() if port.names}
