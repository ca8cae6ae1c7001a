"""Small real ONNX models, made where a test needs them."""

from pathlib import Path

import onnx
from onnx import TensorProto, helper


def save(directory: Path, nodes, inputs, outputs, initializers=(), version: int = 1) -> Path:
    """Write ``<directory>/<version>/model.onnx``; inputs and outputs are (name, element type, shape)."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info(*each) for each in outputs],
        list(initializers),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    path = directory / str(version) / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return directory


def write_identity(
    directory: Path, shape=("batch", 16), element_type: int = TensorProto.FLOAT, version: int = 1
) -> Path:
    """Input ``x`` to output ``y``, unchanged."""
    tensor = [element_type, list(shape)]
    return save(
        directory, [helper.make_node("Identity", ["x"], ["y"])], [("x", *tensor)], [("y", *tensor)], (), version
    )
