"""Models that only benchmarks need."""

import json
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


def write_convolutions(models: Path, backend: str) -> str:
    """Nine 3 x 3 convolutions of 64 channels on 32 x 32: some 5 ms a row on one core, in 256 bytes; returns its name.

    Input ``x`` is FP32 [batch, 64] (a picture of 8 x 8, so that what is measured is not the transport).
    """
    generator = np.random.default_rng(0)
    scales = numpy_helper.from_array(np.array([1, 1, 4, 4], np.float32), "scales")
    shape = numpy_helper.from_array(np.array([-1, 1, 8, 8], np.int64), "shape")
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["small"]),
        helper.make_node("Resize", ["small", "", "scales"], ["r0"], mode="nearest"),
    ]
    weights = [scales, shape]
    for layer in range(1, 10):
        inputs = 1 if layer == 1 else 64
        kernel = generator.standard_normal((64, inputs, 3, 3)) * (2 / (9 * inputs)) ** 0.5
        weights.append(numpy_helper.from_array(kernel.astype(np.float32), f"w{layer}"))
        nodes.append(helper.make_node("Conv", [f"r{layer - 1}", f"w{layer}"], [f"c{layer}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{layer}"], [f"r{layer}"]))
    nodes.append(helper.make_node("ReduceMean", ["r9"], ["y"], axes=[2, 3], keepdims=0))
    directory = models / f"convolutions-{backend}"
    tensors = [("x", TensorProto.FLOAT, ["batch", 64])], [("y", TensorProto.FLOAT, ["batch", 64])]
    save(directory, nodes, *tensors, weights)
    (directory / "model.toml").write_text(
        f'name = "{directory.name}"\nobjective = "throughput"\nmax_batch_size = 16\n'
        '[[artifacts]]\npath = "1/model.onnx"\nformat = "onnx"\n'
        f'[placement]\nbackend = "{backend}"\nprecision = "FP32"\n'
    )
    return directory.name


def write_synthetic(models: Path, a_us: float, c_us: float, max_batch_size: int = 32) -> str:
    """A model of the backend in ``plugins_synthetic``, whose batches of n take a·n + c; returns its name."""
    directory = models / f"synthetic-{round(100 * c_us / (a_us + c_us))}"
    path = directory / "1" / "model.synthetic"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"a_us": a_us, "c_us": c_us}))
    (directory / "model.toml").write_text(
        f'name = "{directory.name}"\nmax_batch_size = {max_batch_size}\n'
        '[[artifacts]]\npath = "1/model.synthetic"\nformat = "synthetic"\n'
    )
    return directory.name
