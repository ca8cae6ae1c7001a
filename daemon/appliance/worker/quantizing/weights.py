"""Weights in 8 or 4 bits, computation in floating point (NNCF's ``compress_weights``); needs no calibration."""

from pathlib import Path
from typing import Any, Final

from appliance.errors import InvalidRequest
from appliance.worker.quantizing.source import Source, read_openvino_model
from appliance.worker.quantizing.toolkits import import_nncf, import_openvino, quiet

_BITS_4: Final = frozenset({"i4", "u4"})


def to_int8_weights(source: Source, path: Path) -> None:
    """Write the source as OpenVINO IR whose weights are INT8, with a scale and a zero point for each channel."""
    nncf = import_nncf()
    _write(_compressed(source, nncf, nncf.CompressWeightsMode.INT8_ASYM), path)


def to_int4_weights(source: Source, path: Path) -> None:
    """Write the source as OpenVINO IR whose weights are INT4 in groups of 128, or of fewer where a layer is narrower.

    Embeddings and the last layer stay INT8, where four bits cost most (NNCF's default).

    Raises:
        InvalidRequest: No layer of the model can have INT4 weights.
    """
    nncf = import_nncf()
    model = _compressed(source, nncf, nncf.CompressWeightsMode.INT4_ASYM)
    kinds = {node.get_element_type().get_type_name() for node in model.get_ops() if node.get_type_name() == "Constant"}
    if kinds.isdisjoint(_BITS_4):
        raise InvalidRequest(
            "cannot compress the weights to INT4: no layer but embeddings, convolutions and the last has weights that "
            "can be cut into groups; int8-weights has no such condition"
        )
    _write(model, path)


def _compressed(source: Source, nncf: Any, mode: Any) -> Any:
    narrower = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
    with quiet():
        return nncf.compress_weights(read_openvino_model(source), mode=mode, advanced_parameters=narrower)


def _write(model: Any, path: Path) -> None:
    import_openvino().save_model(model, path, compress_to_fp16=False)
