"""Small real ONNX models, made where a test needs them."""

import json
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


#: Session inputs of `write_accumulator` by the manifest's word for the control.
CONTROLS = {"start": "START", "end": "END", "ready": "READY", "correlation_id": "CORRID"}


def write_accumulator(
    directory: Path, manifest: str = "", sequence: str = "", batch_dimension: bool = True, controls: bool = True
) -> Path:
    """A model of sequences: ``y = state_out = state_in / 2 + x``; ``seen`` is what the controls hold, as FP32.

    The order of steps shows in the results, and FP32 holds them exactly for a while. `manifest` is top-level TOML,
    `sequence` goes into its section.
    """
    lead = ["batch"] if batch_dimension else [1]
    nodes = [
        helper.make_node("Mul", ["state_in", "half"], ["decayed"]),
        helper.make_node("Add", ["decayed", "x"], ["state_out"]),
        helper.make_node("Identity", ["state_out"], ["y"]),
    ]
    inputs = [("x", TensorProto.FLOAT, [*lead, 4]), ("state_in", TensorProto.FLOAT, [*lead, 4])]
    outputs = [("y", TensorProto.FLOAT, [*lead, 4]), ("state_out", TensorProto.FLOAT, [*lead, 4])]
    lines = ["schema = 1", f'name = "{directory.name}"', manifest]
    lines += ["[[artifacts]]", 'path = "1/model.onnx"', 'format = "onnx"', "[sequence]", sequence]
    if controls:
        types = (TensorProto.FLOAT, TensorProto.INT32, TensorProto.BOOL, TensorProto.INT64)
        inputs += [(name, type_, [*lead, 1]) for name, type_ in zip(CONTROLS.values(), types, strict=True)]
        outputs.append(("seen", TensorProto.FLOAT, [*lead, 4]))
        cast = [f"{name}.float" for name in CONTROLS.values()]
        nodes += [
            helper.make_node("Cast", [name], [float_], to=TensorProto.FLOAT)
            for name, float_ in zip(CONTROLS.values(), cast, strict=True)
        ]
        nodes.append(helper.make_node("Concat", cast, ["seen"], axis=1))
        lines += ["[sequence.controls]", *(f'{word} = "{name}"' for word, name in CONTROLS.items())]
    half = helper.make_tensor("half", TensorProto.FLOAT, [], [0.5])
    save(directory, nodes, inputs, outputs, [half])
    lines += ["[[sequence.state]]", 'input = "state_in"', 'output = "state_out"']
    (directory / "model.toml").write_text("\n".join(lines))
    return directory


def write_fake(directory: Path, manifest: str = "", version: int = 1, batch: dict | None = None, **behaviour) -> Path:
    """A model of the fake backend: `manifest` is top-level TOML, `batch` its section, the rest its behaviour."""
    path = directory / str(version) / "model.fake"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(behaviour))
    lines = ["schema = 1", f'name = "{directory.name}"', manifest]
    lines += ["[[artifacts]]", f'path = "{version}/model.fake"', 'format = "fake"']
    lines += ["[batch]", *(f"{key} = {value}" for key, value in (batch or {}).items())]
    (directory / "model.toml").write_text("\n".join(lines))
    return directory


class Gate:
    """A file that the fake backend waits for (`load_gate`, `run_gate`)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def open(self) -> None:
        """Let everybody through from now on."""
        self.path.touch()

    def shut(self) -> None:
        """Let nobody through from now on."""
        self.path.unlink(missing_ok=True)
