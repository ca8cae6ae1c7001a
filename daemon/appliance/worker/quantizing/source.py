"""The artifact that a quantisation starts from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from appliance.errors import InvalidRequest
from appliance.worker.quantizing.toolkits import import_onnx, import_openvino

#: protobuf's bound: one ONNX file cannot be larger, nor can the toolkits handle it in memory.
MAX_ONNX_BYTES: Final = (1 << 31) - 1

_ATTENTION: Final = "ScaledDotProductAttention"


@dataclass(frozen=True, slots=True)
class Source:
    """The FP32 artifact to make a variant of.

    Attributes:
        path: Where it lies; it is only read.
        format: ``"onnx"`` or ``"openvino-ir"``.
        is_text: True where the manifest says that the model takes texts.
    """

    path: Path
    format: str
    is_text: bool = False


def read_openvino_model(source: Source) -> Any:
    """The source as an OpenVINO model, not compiled."""
    return import_openvino().Core().read_model(source.path)


def read_onnx_model(source: Source) -> Any:
    """The source as an ONNX model in memory, its weights included.

    Raises:
        InvalidRequest: Its weights are more than ONNX can hold in one file.
    """
    onnx = import_onnx()
    whole = sum(one.stat().st_size for one in (source.path, *_weights_beside(source.path)))
    if whole > MAX_ONNX_BYTES:
        raise InvalidRequest(
            f"cannot quantise the model: it has {whole} bytes, and an ONNX file made of it at most {MAX_ONNX_BYTES}; "
            "methods that make OpenVINO IR have no such bound"
        )
    return onnx.load(source.path)


def _weights_beside(path: Path) -> list[Path]:
    return [one for end in (".data", "_data") if (one := path.with_name(path.name + end)).is_file()]


def has_attention(source: Source) -> bool:
    """True where a softmax is multiplied with something: such models need the treatment of transformers.

    Their activations have outliers in few channels, which spoil the ranges of all others unless smoothed into the
    weights (G. Xiao and others, SmoothQuant, 2023).
    """
    model = read_openvino_model(source)
    for node in model.get_ops():
        if node.get_type_name() == _ATTENTION:
            return True
        if node.get_type_name() == "Softmax":
            readers = {reader.get_node().get_type_name() for reader in node.output(0).get_target_inputs()}
            if "MatMul" in readers:
                return True
    return False
