"""Make the INT8 artifacts of the sample models, by the task that `appliancectl quantize` runs.

Each is calibrated with the model's own calibration sample, which shares no input with the evaluation sample, and enters
the manifest beside the FP32 artifact. Run in an environment with the project's extra `quantize`:

    python recipes/quantize_samples.py
"""

import base64
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from model_directory import sha256

from appliance.manifest import read_manifest
from appliance.wire import worker_pb2

MODELS = Path(__file__).resolve().parents[1] / "models"
SAMPLE_MODELS = ("digits", "language-id")
METHOD = "int8-qdq"
"""One file that every backend for ONNX runs, and the nearest to the originals of all INT8 methods on both models."""
SOURCE = "1/model.onnx"
ARTIFACT = "1/model.int8.onnx"


def quantize(directory: Path, output: Path) -> Path:
    """Run the task; returns the file it made."""
    manifest = read_manifest(directory)
    source = next(one for one in manifest.artifacts if one.path == SOURCE)
    if manifest.samples is None or manifest.samples.calibration is None:
        raise SystemExit(f"cannot quantise {manifest.name}: it has no calibration sample")
    load = worker_pb2.Load(
        backend="onnxruntime",
        model=manifest.name,
        version="1",
        directory=str(directory),
        artifact_path=str(directory / source.path),
        artifact_format=source.format,
        artifact_precision=source.precision,
        artifact_sha256=source.sha256 or "",
        device="cpu",
        precision="FP32",
        manifest=manifest.model_dump_json(by_alias=True),
    )
    question = {
        "task": "quantize",
        "load": base64.b64encode(load.SerializeToString()).decode(),
        "method": METHOD,
        "calibration": str(directory / manifest.samples.calibration),
        "limit": 300,
        "output": str(output),
    }
    command = [sys.executable, "-P", "-m", "appliance.worker.task"]
    ended = subprocess.run(command, input=json.dumps(question), capture_output=True, text=True, check=True)
    answer = json.loads(ended.stdout.splitlines()[-1])
    if "failed" in answer:
        raise SystemExit(answer["failed"]["message"])
    return output / answer["result"]["file"]


def enter(directory: Path) -> None:
    """Write the artifact into the manifest, behind the one it was made of."""
    path = directory / "model.toml"
    text = path.read_text(encoding="utf-8")
    blocks = re.split(r"(?m)^(?=\[)", text)
    blocks = [block for block in blocks if ARTIFACT not in block]
    entry = "\n".join(
        (
            "[[artifacts]]",
            f'path = "{ARTIFACT}"',
            'format = "onnx"',
            'precision = "INT8"',
            f'sha256 = "{sha256(directory / ARTIFACT)}"',
        )
    )
    place = max(index for index, block in enumerate(blocks) if block.startswith("[[artifacts]]")) + 1
    path.write_text("".join([*blocks[:place], f"{entry}\n\n", *blocks[place:]]), encoding="utf-8")


def main() -> None:
    """Quantise each sample model and say how large it was and is."""
    for name in SAMPLE_MODELS:
        directory = MODELS / name
        with tempfile.TemporaryDirectory() as output:
            made = quantize(directory, Path(output)).read_bytes()
        (directory / ARTIFACT).write_bytes(made)
        enter(directory)
        print(f"{name}: {(directory / SOURCE).stat().st_size} bytes in FP32, {len(made)} in INT8")


if __name__ == "__main__":
    main()
