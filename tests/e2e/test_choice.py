"""The real daemon with the real runtimes measures, judges, quantises, chooses and proves it, by the command line."""

import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

sys.path.insert(0, str(Path(__file__).parents[1]))

from appliance.backend import Artifact, Variant
from appliance_client import Client
from appliance_plugins.onnxruntime import OnnxRuntimeBackend
from support.daemon import wait_until
from support.models import write_identity

REPOSITORY = Path(__file__).parents[2]
QUICK = {"point_seconds": 0.02, "budget_seconds": 100.0, "resume_seconds": 0.2, "enabled": False}

pytestmark = pytest.mark.timeout(180)


def ctl(daemon, *words: str, code: int = 0):
    """The JSON that a command prints."""
    program = "from appliancectl.cli import main; main()"
    command = [sys.executable, "-c", program, *words, "--json", "--socket-dir", str(daemon.socket_dir)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert ended.returncode == code, (ended.stdout, ended.stderr)
    return json.loads(ended.stdout)


def sample_model(models: Path, name: str = "digits") -> Path:
    """A copy of a sample model, to be changed."""
    shutil.copytree(REPOSITORY / "models" / name, models / name)
    return models / name


def picture(model: str = "digits") -> bytes:
    line = (REPOSITORY / "models" / model / "samples" / "evaluation.jsonl").read_text().splitlines()[0]
    return base64.b64decode(json.loads(line)["inputs"]["image"]["base64"])


def by_name(explanation: dict) -> dict[str, dict]:
    return {one["name"]: one for one in explanation["candidates"]}


def test_a_sample_model_is_measured_its_int8_variant_judged_and_the_proof_shown_everywhere(own_daemon, tmp_path):
    models = tmp_path / "models"
    sample_model(models)
    running = own_daemon(models, tuning=QUICK)
    before = ctl(running, "explain", "digits")
    assert before["serving"]["variant"] == "onnxruntime/cpu/FP32"
    assert {one["verdict"] for one in before["candidates"]} == {"unmeasured"}
    answer = ctl(running, "tune", "digits")
    assert answer["job"]["result"]["complete"]
    after = answer["explanation"]
    assert not [one for one in after["candidates"] if one["verdict"] in ("unmeasured", "unchecked", "failed")]
    serving = after["serving"]
    assert serving["variant"] == after["winner"]
    int8 = [one for one in after["candidates"] if one["precision"] == "INT8"]
    assert {one["verdict"] for one in int8} <= {"chosen", "slower"}, "the shipped artifact keeps its accuracy"
    (cost,) = serving["costs"]
    assert cost["units"] == 1
    assert cost["slope_us"] + cost["intercept_us"] > 0
    assert cost["scale"] is not None, "what serves starts from what was measured"
    checked = [one["evidence"] for one in after["candidates"] if one["evidence"]]
    assert all(proof["count"] == 360 and abs(proof["reference"] - 0.9917) < 1e-4 for proof in checked)

    metadata = running.get("/v2/models/digits")["parameters"]
    statistics = running.get("/v2/models/digits/stats")["model_stats"][0]["placement"]
    for shown in (metadata, statistics):
        assert (shown["variant"], shown["requested_device"], shown["device"]) == (after["winner"], "cpu", "cpu")
    metrics = running.http("GET", "/metrics")[2].decode()
    assert f'variant="{after["winner"]}"' in metrics
    assert 'appliance_fallbacks_total{model="digits",version="1"} 0' in metrics
    assert 'appliance_cost_scale_ratio{model="digits",version="1",units="1"}' in metrics
    with Client(running.infer_socket) as client:
        assert client.infer("digits", {"image": [picture()]}).text("label")[0][0].isdigit()

    again = ctl(running, "tune", "digits")["job"]["result"]
    known = [one for one in after["candidates"] if not one["measurement"]["disturbed"]]
    assert again["reused"] == len(known)


@pytest.mark.parametrize(("name", "count"), [("digits", 360), ("language-id", 588)])
def test_every_int8_variant_of_a_sample_model_passes_its_gate(own_daemon, tmp_path, name, count):
    """Whether it serves or not: what is lower than FP32 is compared."""
    models = tmp_path / "models"
    directory = sample_model(models, name)
    manifest = directory / "model.toml"
    manifest.write_text(manifest.read_text() + '\n[placement]\nbackend = "onnxruntime"\n')
    running = own_daemon(models, tuning=QUICK)
    explanation = ctl(running, "tune", name)["explanation"]
    int8 = [one for one in explanation["candidates"] if one["precision"] == "INT8"]
    assert int8
    for one in int8:
        assert (one["evidence"]["refusal"], one["evidence"]["count"]) == ("", count)
        assert one["evidence"]["loss"] <= 0.01


def spoil(path: Path, source: Path) -> None:
    """An INT8 artifact made bad on purpose: every other scale of its weights is wrong by a factor."""
    model = onnx.load(source)
    spoilt = 0
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor).copy()
        if tensor.name.endswith("_scale") and values.size > 1:
            values[::2] *= 8.0
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
            spoilt += 1
    assert spoilt, "nothing to spoil"
    onnx.save(model, path)


def test_a_bad_int8_artifact_is_refused_with_its_evidence(own_daemon, tmp_path):
    models = tmp_path / "models"
    directory = sample_model(models)
    spoil(directory / "1" / "model.int8.onnx", REPOSITORY / "models" / "digits" / "1" / "model.int8.onnx")
    manifest = directory / "model.toml"
    lines = manifest.read_text().splitlines()
    digest = next(i for i, line in enumerate(lines) if "int8" in line) + 3
    assert lines[digest].startswith("sha256")
    del lines[digest]
    manifest.write_text("\n".join([*lines, "[placement]", 'backend = "onnxruntime"']))
    running = own_daemon(models, tuning=QUICK)
    explanation = ctl(running, "tune", "digits")["explanation"]
    assert explanation["serving"]["precision"] == "FP32"
    int8 = [one for one in explanation["candidates"] if one["precision"] == "INT8"]
    assert int8
    for one in int8:
        assert one["verdict"] == "refused"
        assert one["evidence"]["count"] == 360
        assert "worse, and the bound is 1.00%" in one["reason"]


def test_quantising_makes_a_variant_beside_the_original_that_can_be_removed_again(own_daemon, tmp_path):
    models = tmp_path / "models"
    directory = sample_model(models)
    original = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    running = own_daemon(models, tuning=QUICK)
    answer = ctl(running, "quantize", "digits", "--method", "int8-qdq", "--rows", "100")
    made = answer["job"]["result"]
    assert made["bytes"] < made["bytes_before"] / 2
    assert made["rows"] == 100
    names = by_name(answer["explanation"])
    variants = [name for name in names if name.endswith(f"@{made['variant']}")]
    assert variants
    assert all(names[name]["measurement"] for name in variants)
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == original
    ctl(running, "pin", "digits", variants[0])
    with Client(running.infer_socket) as client:
        assert client.infer("digits", {"image": [picture()]}).text("label")[0][0].isdigit()
    assert "it serves" in ctl(running, "quantize", "digits", "--remove", made["variant"], code=1)["error"]
    ctl(running, "pin", "digits", "onnxruntime/cpu/FP32")
    left = ctl(running, "quantize", "digits", "--remove", made["variant"])
    assert not [name for name in by_name(left) if made["variant"] in name]
    assert not list((running.socket_dir.parent / "state" / "variants").rglob("*.onnx"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "fp16", "--calibration", "manifest"), "needs none"),
        (("--calibration", "recorded"), "nothing was recorded"),
        (("--calibration", "/nowhere/at/all"), "absolute path"),
    ],
)
def test_calibration_that_cannot_be_used_is_refused(own_daemon, tmp_path, arguments, message):
    models = tmp_path / "models"
    sample_model(models)
    running = own_daemon(models, tuning=QUICK)
    assert message in ctl(running, "quantize", "digits", *arguments, code=1)["error"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "it has no rows"),
        (
            '{"inputs": {"pixels": [[[0,0,0,0,0,0,0,0]]]}}\n'.replace("[[[0,0,0,0,0,0,0,0]]]", str([[[0.5] * 8] * 8])),
            "8",
        ),
        ('{"inputs": {"image": {"base64": "AAAA"}}}\n' * 10, "picture|image"),
        ('{"inputs": {"pixels": [1.0, 2.0]}}\n' * 10, "shape|values|pixels"),
    ],
)
def test_calibration_inputs_of_no_use_end_the_job_with_the_reason(own_daemon, tmp_path, content, message):
    models = tmp_path / "models"
    sample_model(models)
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    (inputs / "rows.jsonl").write_text(content)
    running = own_daemon(models, tuning=QUICK)
    error = ctl(running, "quantize", "digits", "--calibration", str(inputs), code=1)["error"]
    assert re.search(message, error), error
    assert running.model("digits")["state"] == "ready"


def test_live_inputs_are_recorded_where_the_manifest_asks_and_calibrate(own_daemon, tmp_path):
    models = tmp_path / "models"
    directory = sample_model(models)
    manifest = directory / "model.toml"
    manifest.write_text(
        "\n".join(
            "record = 40" if line.startswith("calibration =") else line
            for line in manifest.read_text().splitlines()
            if not line.startswith("calibration_sha256")
        )
    )
    running = own_daemon(models, tuning=QUICK)
    recorded = running.socket_dir.parent / "state" / "recordings"
    with Client(running.infer_socket) as client:
        for _ in range(12):
            client.infer("digits", {"image": [picture()] * 4})
    ctl(running, "unload", "digits")  # what is not written yet is written now
    wait_until(lambda: list(recorded.rglob("*.npz")), "the recording is written")
    assert all(path.stat().st_mode & 0o077 == 0 for path in recorded.rglob("*"))
    made = ctl(running, "quantize", "digits", "--method", "int8-qdq", "--calibration", "recorded")["job"]["result"]
    assert made["rows"] == 40


def test_a_damaged_registry_costs_measurements_and_nothing_else(own_daemon, tmp_path):
    models = tmp_path / "models"
    write_identity(models / "identity")
    running = own_daemon(models, tuning=QUICK)
    state = running.socket_dir.parent / "state"
    ctl(running, "pin", "identity", "onnxruntime/cpu/FP32/threads=1")
    assert running.stop() == 0
    (state / "registry.db").write_bytes(b"no database" * 1000)
    again = own_daemon(models, tuning=QUICK, repository={"state": str(state)})
    explanation = ctl(again, "explain", "identity")
    assert explanation["serving"]["variant"] == "onnxruntime/cpu/FP32"
    assert list(state.glob("registry.db.corrupt-*"))


def test_a_runtime_that_silently_lands_on_the_cpu_is_caught(own_daemon, tmp_path):
    """The real ONNX Runtime, asked for a CUDA device that its build knows nothing of, takes the CPU without a word."""
    model = write_identity(tmp_path / "identity") / "1" / "model.onnx"
    session = OnnxRuntimeBackend().load(Artifact(model, "onnx"), Variant("onnxruntime", "nvidia0", "FP32"))
    session.run({"x": np.zeros((1, 16), np.float32)}, ["y"])
    execution = session.executed_on()
    assert execution.device == "cpu"
    assert "onnxruntime-gpu" in execution.reason or "libonnxruntime_providers_cuda" in execution.reason


def test_tuning_yields_to_requests_and_none_fails_while_the_variant_changes(own_daemon, tmp_path):
    models = tmp_path / "models"
    sample_model(models)
    running = own_daemon(models, tuning=QUICK)
    answered = 0
    with Client(running.infer_socket) as client:
        job = running.http("POST", "/admin/models/digits/tune", b"{}")
        number = json.loads(job[2])["id"]
        states = set()
        while (now := running.get(f"/admin/jobs/{number}"))["state"] not in ("done", "failed", "cancelled"):
            states.add(now["state"])
            # The first requests may all come while the task still starts, when it is not suspended yet.
            if now["done"] % 2 == 0 and (answered < 200 or "paused" not in states):
                client.infer("digits", {"image": [picture()]})
                answered += 1
        assert now["state"] == "done", now
    assert "paused" in states
    assert answered > 3
