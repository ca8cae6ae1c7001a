"""Models that only benchmarks need."""

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from support.models import save


def write_picture(directory: Path) -> Path:
    """Input ``x`` FP32 [batch, 3, 224, 224] to its mean ``y`` FP32 [batch]."""
    node = helper.make_node("ReduceMean", ["x"], ["y"], axes=[1, 2, 3], keepdims=0)
    shape = ["batch", 3, 224, 224]
    return save(directory, [node], [("x", TensorProto.FLOAT, shape)], [("y", TensorProto.FLOAT, ["batch"])])


def write_large(models: Path) -> Path:
    """A chain of linear layers with 22.4 million weights (90 MB), once for each backend; returns the ONNX file."""
    generator = np.random.default_rng(0)
    nodes, weights = [], []
    previous = "x"
    for layer in range(38):
        matrix = generator.standard_normal((768, 768), np.float32) / 27.7
        weights.append(numpy_helper.from_array(matrix.astype(np.float32), f"w{layer}"))
        output = "y" if layer == 37 else f"h{layer}"
        nodes.append(helper.make_node("MatMul", [previous, f"w{layer}"], [f"m{layer}"]))
        nodes.append(helper.make_node("Tanh", [f"m{layer}"], [output]))
        previous = output
    shape = ["batch", 768]
    for backend in ("onnxruntime", "openvino"):
        directory = models / f"large-{backend}"
        save(directory, nodes, [("x", TensorProto.FLOAT, shape)], [("y", TensorProto.FLOAT, shape)], weights)
        manifest = (
            f'name = "{directory.name}"\n[[artifacts]]\npath = "1/model.onnx"\nformat = "onnx"\n'
            f'[placement]\nbackend = "{backend}"\n'
        )
        (directory / "model.toml").write_text(manifest)
    return models / "large-onnxruntime" / "1" / "model.onnx"
