"""Conversion to FP16 and BF16: rounding alone, no calibration."""

from pathlib import Path
from typing import Any, Final

from appliance.errors import InvalidRequest
from appliance.worker.quantizing.source import Source, read_onnx_model, read_openvino_model
from appliance.worker.quantizing.toolkits import import_onnx, import_openvino, quiet, required
from appliance.worker.tensors import narrow_to_bf16

#: Smaller constants are scales, bounds and biases, which runtimes want as they are, and which make no size.
_MIN_WEIGHT_DIMENSIONS: Final = 2
_MIN_WEIGHT_ELEMENTS: Final = 1024

#: Cast takes BFLOAT16 since this version of ONNX's operators.
_MIN_OPSET: Final = 13


def to_fp16(source: Source, path: Path) -> None:
    """Write the source with FP16 weights to `path`, in its own format.

    An ONNX model computes in FP16 too, but for its inputs and outputs and operators that would overflow (ONNX Runtime's
    converter, ``onnxruntime.transformers.float16``); a runtime without FP16 arithmetic widens again. IR keeps its
    computation in the hands of whoever compiles it.

    Raises:
        InvalidRequest: The source is too large for ONNX.
    """
    if source.format == "openvino-ir":
        import_openvino().save_model(read_openvino_model(source), path, compress_to_fp16=True)
        return
    with required():
        from onnxruntime.transformers.float16 import convert_float_to_float16
    with quiet():
        model = convert_float_to_float16(read_onnx_model(source), keep_io_types=True)
    _name_casts_after_tensors(model.graph)
    import_onnx().save(model, path)


def to_bf16(source: Source, path: Path) -> None:
    """Write the ONNX source with its weights in BF16 to `path`.

    Each weight is followed by a Cast to FP32, so that runtimes without BF16 arithmetic take the model too: they widen
    it when loading. One with BF16 arithmetic, such as OpenVINO's, gives what it would give for the FP32 model, from a
    file of half the size.

    Raises:
        InvalidRequest: It has no weights to convert, is too large for ONNX, or of an older version of ONNX.
    """
    onnx = import_onnx()
    model = read_onnx_model(source)
    opset = next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), 0)
    if opset < _MIN_OPSET:
        raise InvalidRequest(
            f"cannot convert the model to BF16: it uses version {opset} of ONNX's operators, and Cast to BF16 came "
            f"with version {_MIN_OPSET}"
        )
    graph = model.graph
    fed = {one.name for one in graph.input}
    weights = [one for one in graph.initializer if one.name not in fed and _is_weight(one, onnx)]
    if not weights:
        raise InvalidRequest("cannot convert the model to BF16: it has no FP32 weights of two dimensions or more")
    casts = [_halve(weight, onnx) for weight in weights]
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, path)


def _name_casts_after_tensors(graph: Any) -> None:
    """Rename the FP16 side of the model's inputs and outputs from the converter's own names to ``NAME.fp16``.

    OpenVINO merges both sides into one tensor with two names and shows the first in alphabetical order, which must be
    the model's own.
    """
    edges = {one.name for one in (*graph.input, *graph.output)}
    renamed = {}
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in edges:
            renamed[node.output[0]] = f"{node.input[0]}.fp16"
        elif node.op_type == "Cast" and node.output[0] in edges:
            renamed[node.input[0]] = f"{node.output[0]}.fp16"
    renamed = {old: new for old, new in renamed.items() if old.startswith(("graph_input_cast", "graph_output_cast"))}
    for node in graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                names[place] = renamed.get(name, name)
    for value in graph.value_info:
        value.name = renamed.get(value.name, value.name)


def _is_weight(tensor: Any, onnx: Any) -> bool:
    count = 1
    for size in tensor.dims:
        count *= size
    is_large = len(tensor.dims) >= _MIN_WEIGHT_DIMENSIONS and count >= _MIN_WEIGHT_ELEMENTS
    return is_large and tensor.data_type == onnx.TensorProto.FLOAT


def _halve(weight: Any, onnx: Any) -> Any:
    """Make `weight` BF16 under another name; returns the node that gives it back as FP32 under its own."""
    name = weight.name
    content = narrow_to_bf16(onnx.numpy_helper.to_array(weight)).tobytes()
    dims = list(weight.dims)
    weight.CopyFrom(onnx.helper.make_tensor(f"{name}.bf16", onnx.TensorProto.BFLOAT16, dims, content, raw=True))
    return onnx.helper.make_node("Cast", [weight.name], [name], name=f"{name}.widen", to=onnx.TensorProto.FLOAT)
