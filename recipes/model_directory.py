"""Write a served model directory: samples as JSON lines, labels, and the manifest with its digests.

Both recipes end here, so that a manifest and the files it names cannot disagree.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx

MAX_BATCH_SIZE = 64
OPSET = 17
"""Old enough for every runtime the appliance knows, new enough for `ReduceSum` with axes as an input."""
IR_VERSION = 8


@dataclass(frozen=True, slots=True)
class Sample:
    """One labelled request: input name to its JSON value, and the expected label."""

    inputs: Mapping[str, Any]
    label: str


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the manifest; the shape leaves out the batch dimension, -1 is any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a recipe states about its model; digests and file names are added on writing.

    `adapter` is the `[image]` or `[text]` table, under its name in `adapter_kind`.
    """

    name: str
    task: str
    description: str
    license: str
    source: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    adapter_kind: Literal["image", "text"]
    adapter: Mapping[str, Any]
    accuracy: float
    count: int


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Write one JSON object per line, as UTF-8 with no escapes for letters."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"inputs": dict(s.inputs), "label": s.label}, ensure_ascii=False) + "\n" for s in samples)
    path.write_text("".join(lines), encoding="utf-8")


def write_labels(path: Path, labels: Iterable[str]) -> None:
    """Write one label per line, in the order of the logits."""
    path.write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")


def write_onnx(path: Path, graph: onnx.GraphProto) -> None:
    """Check the graph and write it as one file with its weights inside."""
    model = onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="inference-appliance-recipes",
    )
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `model.toml` for the files that already lie in the directory."""
    artifact = "1/model.onnx"
    samples = {name: f"samples/{name}.jsonl" for name in ("evaluation", "calibration")}
    tables: list[tuple[str, Mapping[str, Any]]] = [
        (
            "",
            {
                "schema": 1,
                "name": manifest.name,
                "task": manifest.task,
                "description": manifest.description,
                "license": manifest.license,
                "source": manifest.source,
                "max_batch_size": MAX_BATCH_SIZE,
            },
        ),
        (
            "[[artifacts]]",
            {"path": artifact, "format": "onnx", "precision": "FP32", "sha256": sha256(directory / artifact)},
        ),
        *(("[[inputs]]", _tensor_table(tensor)) for tensor in manifest.inputs),
        *(("[[outputs]]", _tensor_table(tensor)) for tensor in manifest.outputs),
        (f"[{manifest.adapter_kind}]", manifest.adapter),
        (
            "[classification]",
            {
                "logits": manifest.outputs[0].name,
                "labels": "labels.txt",
                "labels_sha256": sha256(directory / "labels.txt"),
                "top_k": 1,
            },
        ),
        (
            "[samples]",
            {
                key: value
                for name, path in samples.items()
                for key, value in ((name, path), (f"{name}_sha256", sha256(directory / path)))
            },
        ),
        ("[samples.reference]", {"accuracy": manifest.accuracy, "count": manifest.count}),
    ]
    text = "\n".join(_toml_table(header, table) for header, table in tables)
    (directory / "model.toml").write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """Digest of a file's bytes, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _tensor_table(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}


def _toml_table(header: str, table: Mapping[str, Any]) -> str:
    # Strings, numbers and arrays of numbers are all a manifest holds; JSON writes those as TOML does.
    lines = [header] if header else []
    lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"
