"""INT8 weights and activations, ranges learnt from calibration inputs (post-training quantisation)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from appliance.worker.quantizing.calibration import Calibration
from appliance.worker.quantizing.outliers import split_outliers
from appliance.worker.quantizing.sensitivity import sensitive_layers
from appliance.worker.quantizing.source import Source, has_attention, read_onnx_model, read_openvino_model
from appliance.worker.quantizing.toolkits import (
    import_nncf,
    import_onnx,
    import_onnxruntime_quantization,
    import_openvino,
    quiet,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray


#: Rows that sensitive layers are looked for with.
_ROWS_TO_WATCH: Final = 16

#: How much of an outlier smoothing moves into the weights, where NNCF's default is 0.95. A real MiniLM came to much the
#: same cosine with both (0.997), and with this one to 0.9990 once its sensitive layers were split; with 0.95 splitting
#: gained nothing.
_SMOOTHING: Final = 0.75


def to_openvino(source: Source, calibration: Calibration, path: Path) -> None:
    """Quantise to OpenVINO IR through NNCF, with its treatment of transformers for models of text or with attention."""
    is_transformer = source.is_text or has_attention(source)
    calibration.expect(_passes(is_transformer))
    model = _quantized(read_openvino_model(source), calibration, is_transformer)
    if is_transformer and (sensitive := sensitive_layers(model, calibration.peek(_ROWS_TO_WATCH))):
        original = read_openvino_model(source)
        whole = split_outliers(original, sensitive, calibration.peek(_ROWS_TO_WATCH))
        model = _quantized(original, calibration, is_transformer, whole)
    import_openvino().save_model(model, path, compress_to_fp16=False)


def to_onnx(source: Source, calibration: Calibration, path: Path) -> None:
    """Quantise to ONNX with QuantizeLinear and DequantizeLinear around what computes in INT8, for any runtime of ONNX.

    Models with attention go through NNCF, all others through ONNX Runtime: measured on the same held-out inputs, NNCF's
    smoothing kept the embeddings of a real MiniLM at a cosine of 0.999 where ONNX Runtime's gave 0.924 at best; on
    both sample models, which have no attention, ONNX Runtime's outputs were nearer to the original's (relative L2 0.008
    against 0.021, and 0.011 against 0.019) and ran faster. Sensitive layers of transformers stay in floating point.
    """
    if has_attention(source):
        calibration.expect(_passes(is_transformer=True))
        model = _quantized(read_openvino_model(source), calibration, is_transformer=True)
        sensitive = sensitive_layers(model, calibration.peek(_ROWS_TO_WATCH))
        model = _quantized(read_onnx_model(source), calibration, is_transformer=True, in_floating_point=sensitive)
        import_onnx().save(model, path)
    else:
        _quantize_by_onnxruntime(source, calibration, path)


def _passes(is_transformer: bool) -> int:
    """Smoothing takes a pass of its own, and a transformer is quantised again once its sensitive layers are known."""
    return 4 if is_transformer else 1


def _quantized(
    model: Any, calibration: Calibration, is_transformer: bool, in_floating_point: Sequence[str] = ()
) -> Any:
    nncf = import_nncf()
    from nncf.quantization.advanced_parameters import AdvancedSmoothQuantParameters

    with quiet():
        return nncf.quantize(
            model,
            nncf.Dataset(calibration),
            subset_size=len(calibration),
            model_type=nncf.ModelType.TRANSFORMER if is_transformer else None,
            # The names are OpenVINO's, which calls nameless nodes of ONNX otherwise than NNCF does: no error then.
            ignored_scope=nncf.IgnoredScope(names=list(in_floating_point), validate=False),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                smooth_quant_alphas=AdvancedSmoothQuantParameters(matmul=_SMOOTHING)
            ),
        )


def _quantize_by_onnxruntime(source: Source, calibration: Calibration, path: Path) -> None:
    """Per channel, activations unsigned and weights signed.

    That is the pairing which x86 and ARM multiply natively (VNNI, dot product); without VNNI, x86 may saturate, which
    the comparison with the reference finds out (ONNX Runtime's documentation, "Quantize ONNX Models").
    """
    quantization = import_onnxruntime_quantization()
    read_onnx_model(source)  # refuses what is too large
    calibration.expect(1)
    prepared = path.with_name(f"{path.stem}-prepared.onnx")
    with quiet():
        # Symbolic shapes would need sympy, and only transformers gain from them.
        quantization.shape_inference.quant_pre_process(str(source.path), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared),
            str(path),
            _Reader(calibration),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
    prepared.unlink()


class _Reader:
    """Calibration inputs as ONNX Runtime asks for them (the interface of its `CalibrationDataReader`)."""

    def __init__(self, calibration: Calibration) -> None:
        self._rows = iter(calibration)

    def get_next(self) -> "dict[str, NDArray[Any]] | None":
        """The next row's feeds, None after the last."""
        return next(self._rows, None)
