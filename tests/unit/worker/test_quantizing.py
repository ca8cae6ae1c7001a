"""Task ``quantize``, in a process of its own: what it makes, what it refuses, what it leaves behind."""

import functools
import hashlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import onnx
import pytest
import worker_harness as harness
from onnx import TensorProto, helper, numpy_helper

from appliance.backend import Artifact
from appliance.inventory.cpu import read_inventory
from appliance.manifest import Manifest
from appliance.worker.quantizing.outliers import split_outliers
from appliance.worker.quantizing.sensitivity import sensitive_layers
from appliance_plugins.onnxruntime import OnnxRuntimeBackend
from appliance_plugins.openvino import OpenVinoBackend
from support import models

WIDTH = 64
ROWS = 32
#: The most that a method may change the outputs, relative to their length.
TOLERANCE = {"int8": 0.1, "int8-qdq": 0.1, "fp16": 0.002, "bf16": 0.02, "int8-weights": 0.02, "int4-weights": 0.15}
PRECISION = {
    "int8": "INT8", "int8-qdq": "INT8", "fp16": "FP16", "bf16": "BF16", "int8-weights": "INT8-WEIGHTS",
    "int4-weights": "INT4-WEIGHTS",
}  # fmt: skip
METHODS = list(TOLERANCE)
LEARNING = ["int8", "int8-qdq"]
#: Ends the process that opens a connection; in PYTHONPATH it is imported when Python starts.
NO_NETWORK = """
import os, socket
def refuse(*_):
    os.write(2, b"it calls somebody\\n")
    os._exit(99)
socket.socket.connect = socket.socket.connect_ex = refuse
socket.create_connection = socket.getaddrinfo = refuse
"""


def weights(name, *shape):
    # Half of the weights' usual size keeps activations within reach of each other.
    values = np.random.default_rng(len(name) + shape[0]).standard_normal(shape) / np.sqrt(shape[0])
    return numpy_helper.from_array(values.astype(np.float32), name)


def write_dense(directory):
    """Two layers and what is between them, on FP32 [batch, 64]."""
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["a"], name="one"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "second"], ["c"], name="two"),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("MatMul", ["d", "third"], ["y"], name="three"),
    ]
    tensors = [weights("first", WIDTH, 256), weights("second", 256, 256), weights("third", 256, WIDTH)]
    tensor = (TensorProto.FLOAT, ["batch", WIDTH])
    return models.save(directory, nodes, [("x", *tensor)], [("y", *tensor)], tensors)


def write_attention(directory):
    """Self-attention and a feed-forward layer, one channel of which is far larger than the others."""
    up, down = (np.array(numpy_helper.to_array(weights(*one))) for one in (("up", WIDTH, 256), ("down", 256, WIDTH)))
    up[:, 7] *= 60
    down[7] /= 60
    nodes = [
        helper.make_node("MatMul", ["x", "query"], ["q"], name="query"),
        helper.make_node("MatMul", ["x", "key"], ["k"], name="key"),
        helper.make_node("MatMul", ["x", "value"], ["v"], name="value"),
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["scores"], name="scores"),
        helper.make_node("Softmax", ["scores"], ["shares"], axis=-1),
        helper.make_node("MatMul", ["shares", "v"], ["mixed"], name="mixed"),
        helper.make_node("MatMul", ["mixed", "up"], ["wide"], name="up"),
        helper.make_node("Relu", ["wide"], ["positive"]),
        helper.make_node("MatMul", ["positive", "down"], ["y"], name="down"),
    ]
    square = [weights(name, WIDTH, WIDTH) for name in ("query", "key", "value")]
    tensors = [*square, numpy_helper.from_array(up, "up"), numpy_helper.from_array(down, "down")]
    tensor = (TensorProto.FLOAT, ["batch", "tokens", WIDTH])
    return models.save(directory, nodes, [("x", *tensor)], [("y", *tensor)], tensors)


def inputs(count=ROWS, seed=1, shape=(WIDTH,)):
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


def question_of(directory, method, output, calibration=None, **fields):
    manifest = Manifest(name="m", max_batch_size=8, artifacts=[{"path": "1/model.onnx", "format": "onnx"}])
    return {
        "task": "quantize",
        "load": harness.load_of(directory, "onnxruntime", manifest),
        "method": method,
        "calibration": str(calibration) if calibration else None,
        "limit": 300,
        "output": str(output),
        **fields,
    }


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A model, and a calibration sample for it."""
    directory = write_dense(tmp_path_factory.mktemp("dense"))
    np.savez(directory / "calibration.npz", x=inputs())
    return directory


@pytest.fixture(scope="module")
def make(dense, tmp_path_factory):
    """The answers of one run of a method, and the directory with what it made."""
    source = digest(dense / "1/model.onnx")

    @functools.cache
    def made(method):
        output = tmp_path_factory.mktemp(method)
        answers = harness.run_task(question_of(dense, method, output, dense / "calibration.npz"))
        assert digest(dense / "1/model.onnx") == source, "the original was touched"
        return answers, output

    return made


def result_of(answers):
    assert not harness.said(answers, "failed")
    (result,) = harness.said(answers, "result")
    return result


def sessions(path, format_, precision):
    """The made artifact in every backend that offers to run it."""
    cpu = read_inventory().devices[0]
    artifact = Artifact(path, format_, precision)
    for backend in (OnnxRuntimeBackend(), OpenVinoBackend()):
        offers = backend.candidates(artifact, cpu) if format_ in backend.formats else ()
        if offers:
            yield backend.name, backend.load(artifact, offers[0])


def outputs_of(session, x):
    return np.array(session.run({"x": x}, ["y"])["y"])


def reference_outputs(directory, x):
    (_, session), *_ = sessions(directory / "1/model.onnx", "onnx", "FP32")
    return outputs_of(session, x)


def change(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# ---------------------------------------------------------------- what is made


@pytest.mark.parametrize("method", METHODS)
def test_the_result_runs_where_it_is_offered_and_stays_close_to_the_original(make, dense, method):
    answers, output = make(method)
    result = result_of(answers)
    assert result["precision"] == PRECISION[method]
    x = inputs(8, seed=2)
    expected = reference_outputs(dense, x)
    changes = {
        name: change(outputs_of(session, x), expected)
        for name, session in sessions(output / result["file"], result["format"], result["precision"])
    }
    assert changes
    assert max(changes.values()) < TOLERANCE[method], changes


@pytest.mark.parametrize("method", METHODS)
def test_the_weights_shrink_as_the_precision_says(make, method):
    answers, output = make(method)
    result = result_of(answers)
    weights = (output / result["file"]).with_suffix(".bin" if result["format"] == "openvino-ir" else ".onnx")
    floats = 4 * (WIDTH * 256 * 2 + 256 * 256)
    share = {"FP16": 0.5, "BF16": 0.5, "INT4-WEIGHTS": 0.22}.get(result["precision"], 0.25)
    assert weights.stat().st_size < floats * share + 16_384
    assert result["bytes"] == sum(path.stat().st_size for path in output.iterdir())


@pytest.mark.parametrize("method", METHODS)
def test_nothing_but_the_result_is_left(make, method):
    answers, output = make(method)
    name = result_of(answers)["file"]
    companions = {name, name.replace(".xml", ".bin")}
    assert {path.name for path in output.iterdir()} == companions


@pytest.mark.parametrize("method", LEARNING)
def test_progress_counts_the_rows_and_never_goes_back(make, method):
    answers, _ = make(method)
    steps = harness.said(answers, "progress")
    calibrating = [step["done"] for step in steps if step["step"] == "calibrating"]
    assert calibrating == list(range(1, len(calibrating) + 1))
    assert len(calibrating) >= ROWS
    assert steps[-1] == {"step": "writing", "done": 1, "total": 1}
    assert result_of(answers)["rows"] == ROWS


@pytest.mark.parametrize("method", [*LEARNING, "bf16"])
def test_equal_questions_give_equal_files(make, dense, tmp_path, method):
    answers, output = make(method)
    again = result_of(harness.run_task(question_of(dense, method, tmp_path, dense / "calibration.npz")))
    for path in tmp_path.iterdir():
        assert digest(path) == digest(output / path.name)
    assert again == result_of(answers)


@pytest.fixture(scope="module")
def attention(tmp_path_factory):
    directory = write_attention(tmp_path_factory.mktemp("attention"))
    np.savez(directory / "calibration.npz", x=inputs(shape=(6, WIDTH)))
    return directory


@pytest.mark.parametrize("method", LEARNING)
def test_a_channel_of_outliers_in_a_transformer_does_not_spoil_the_others(attention, tmp_path, method):
    result = result_of(harness.run_task(question_of(attention, method, tmp_path, attention / "calibration.npz")))
    x = inputs(8, seed=2, shape=(6, WIDTH))
    expected = reference_outputs(attention, x)
    for _, session in sessions(tmp_path / result["file"], result["format"], result["precision"]):
        assert change(outputs_of(session, x), expected) < 0.2


def product(reach=None):
    """An OpenVINO model of one matrix product called "product"; with `reach` its input is rounded to 256 steps."""
    openvino = pytest.importorskip("openvino")
    operators = openvino.opset13
    given = operators.parameter([-1, WIDTH], np.float32, name="x")
    given.output(0).set_names({"x"})
    rounded = operators.fake_quantize(given, -reach, reach, -reach, reach, 256) if reach else given
    result = operators.matmul(rounded, numpy_helper.to_array(weights("product", WIDTH, 8)), False, False)
    result.set_friendly_name("product")
    result.output(0).set_names({"y"})
    return openvino.Model([result], [given])


def run_product(model, x):
    import openvino

    return openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})({"x": x})["y"]


def test_a_layer_whose_range_is_that_of_a_few_outliers_is_found():
    x = inputs()
    x[0, 5] = 300.0
    rows = [{"x": x[row : row + 1]} for row in range(ROWS)]
    assert sensitive_layers(product(reach=300.0), rows) == ["product"]
    assert sensitive_layers(product(reach=4.0), rows[1:]) == []
    assert sensitive_layers(product(), rows) == []


def test_a_product_without_its_outliers_and_one_with_them_alone_add_up_to_the_product():
    x = inputs()
    x[0, 5] = 300.0
    model = product()
    expected = run_product(model, x)
    rows = [{"x": x[row : row + 1]} for row in range(ROWS)]
    assert split_outliers(model, ["product", "absent"], rows) == ["absent", "product.outliers"]
    np.testing.assert_allclose(run_product(model, x), expected, rtol=1e-4, atol=1e-4)
    thin = next(node for node in model.get_ops() if node.get_friendly_name() == "product.outliers")
    assert list(thin.input_value(1).get_shape()) == [4, 8]
    thick = next(node for node in model.get_ops() if node.get_friendly_name() == "product.others")
    assert not thick.input_value(1).get_node().data[5].any()


def test_openvino_ir_can_be_quantised_too(dense, make, tmp_path):
    """The source may be IR, as FP32 IR of a model of ours shows."""
    openvino = pytest.importorskip("openvino")
    (tmp_path / "1").mkdir()
    openvino.save_model(openvino.Core().read_model(dense / "1/model.onnx"), tmp_path / "1/model.xml", False)
    manifest = Manifest(name="m", max_batch_size=8, artifacts=[{"path": "1/model.xml", "format": "openvino-ir"}])
    question = question_of(dense, "int8", tmp_path / "made", dense / "calibration.npz")
    question["load"] = harness.load_of(tmp_path, "openvino", manifest)
    result = result_of(harness.run_task(question))
    x = inputs(8, seed=2)
    ((_, session),) = sessions(tmp_path / "made" / result["file"], "openvino-ir", "INT8")
    assert change(outputs_of(session, x), reference_outputs(dense, x)) < TOLERANCE["int8"]


# ---------------------------------------------------------------- what is refused


def refusal(directory, output, method="int8-qdq", calibration=None, **fields):
    answers = harness.run_task(question_of(directory, method, output, calibration, **fields))
    (failed,) = harness.said(answers, "failed")
    assert not harness.said(answers, "result")
    assert not output.exists() or not list(output.iterdir())
    return failed["kind"], failed["message"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (inputs(1), "cannot calibrate with 1 row: the rule is at least 8"),
        (inputs(7), "cannot calibrate with 7 rows: the rule is at least 8"),
        (inputs(0), "it has no rows"),
        (inputs(16, shape=(WIDTH - 1,)), "must have [64]"),
        (np.where(np.arange(16)[:, np.newaxis] == 9, np.nan, inputs(16)), "input 'x' of row 9 holds a NaN"),
        (np.full((16, WIDTH), np.inf, dtype=np.float32), "input 'x' of row 0 holds a NaN or an infinity"),
        (np.full((16, WIDTH), "a"), "input 'x' is"),
    ],
    ids=["one row", "too few", "none", "wrong shape", "nan", "infinity", "texts"],
)
def test_calibration_inputs_that_would_teach_nonsense_are_refused(dense, tmp_path, rows, message):
    np.savez(tmp_path / "rows.npz", x=rows)
    kind, text = refusal(dense, tmp_path / "made", calibration=tmp_path / "rows.npz")
    assert kind == "invalid-request"
    assert message in text


def test_a_limit_below_the_least_is_refused_whatever_the_sample_holds(dense, tmp_path):
    kind, text = refusal(dense, tmp_path / "made", calibration=dense / "calibration.npz", limit=3)
    assert kind == "invalid-request"
    assert "3 rows" in text


def test_a_missing_or_broken_sample_is_refused(dense, tmp_path):
    (tmp_path / "rows.npz").write_bytes(b"no archive")
    for path in (tmp_path / "rows.npz", tmp_path / "absent.npz", None):
        kind, text = refusal(dense, tmp_path / "made", calibration=path)
        assert kind == "invalid-request"
        assert str(tmp_path) not in text


def test_a_method_that_does_not_exist_is_refused(dense, tmp_path):
    kind, text = refusal(dense, tmp_path / "made", method="int2")
    assert kind == "invalid-request"
    assert "int8, int8-qdq, fp16" in text


def test_a_model_without_weights_is_not_called_bf16(tmp_path):
    directory = models.write_identity(tmp_path / "m", shape=("batch", WIDTH))
    kind, text = refusal(directory, tmp_path / "made", method="bf16")
    assert kind == "invalid-request"
    assert "no FP32 weights" in text


def test_a_model_whose_layers_take_no_int4_is_not_called_int4(tmp_path):
    tensor = (TensorProto.FLOAT, ["batch", WIDTH])
    nodes = [helper.make_node("MatMul", ["x", "only"], ["y"])]
    models.save(tmp_path / "m", nodes, [("x", *tensor)], [("y", *tensor)], [weights("only", WIDTH, WIDTH)])
    kind, text = refusal(tmp_path / "m", tmp_path / "made", method="int4-weights")
    assert kind == "invalid-request"
    assert "int8-weights" in text


@pytest.mark.parametrize("method", ["int8", "int8-qdq", "bf16", "int8-weights"])
def test_missing_packages_are_named_with_the_way_to_install_them(dense, tmp_path, monkeypatch, method):
    (tmp_path / "block").mkdir()
    (tmp_path / "block/sitecustomize.py").write_text("import sys\nsys.modules['nncf'] = sys.modules['onnx'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "block"))
    kind, text = refusal(dense, tmp_path / "made", method=method, calibration=dense / "calibration.npz")
    assert kind == "unimplemented"
    assert "pip install 'inference-appliance[quantize]'" in text


# ---------------------------------------------------------------- faults and the outside world


@pytest.mark.parametrize("method", ["int8", "int8-weights"])
def test_no_connection_is_opened(dense, tmp_path, monkeypatch, method):
    """NNCF would report to its maker where no file in the home directory says no; here none does."""
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("CI", "NNCF_CI", "NNCF_DEV", "TF_BUILD", "JENKINS_URL"):
        monkeypatch.delenv(name, raising=False)
    result_of(harness.run_task(question_of(dense, method, tmp_path / "made", dense / "calibration.npz")))
    assert not (tmp_path / "intel").exists()


def test_the_guard_against_connections_works(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    program = "import socket; socket.create_connection(('127.0.0.1', 9))"
    assert subprocess.run([sys.executable, "-P", "-c", program], stderr=subprocess.DEVNULL).returncode == 99


@pytest.mark.parametrize("step", ["calibrating", "writing"])
def test_a_killed_task_leaves_no_artifact_and_the_next_one_cleans_up(dense, tmp_path, step):
    """SIGKILL when the task says `step` for the first time; writing is said before the file is in place."""
    question = question_of(dense, "int8-qdq", tmp_path, dense / "calibration.npz")
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "appliance.worker.task"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
    )
    with process:
        process.stdin.write(json.dumps(question).encode())
        process.stdin.close()
        while line := process.stdout.readline():
            if json.loads(line)["progress"]["step"] == step:
                os.kill(process.pid, signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    left = list(tmp_path.glob("model*"))
    for path in left:  # the kill may have come a moment late: then the file is whole
        onnx.checker.check_model(onnx.load(path))
    result_of(harness.run_task(question))
    assert [path.name for path in tmp_path.iterdir()] == ["model.int8-qdq.onnx"]
