"""A computation with a known answer, on each device of each backend."""

import asyncio

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from appliance import plugins
from appliance.inventory import Device, Inventory
from appliance.plugins import BackendRecord, PluginStatus, smoke
from appliance.worker.smoke import ANSWER, MODEL, QUESTION

CPU = Device("cpu", "cpu", "a processor", 2**30, cores=2)
CARD = Device("nvidia0", "gpu", "a card", 2**30, vendor="nvidia", uuid="GPU-1")
MACHINE = Inventory((CPU, CARD), 2, 2**30)

ODD = """
import os, time
import numpy as np
from appliance.backend import Execution, Support, Variant
class Session:
    inputs = outputs = ()
    def run(self, inputs, outputs):
        {run}
        return {{"y": np.array({answer})}}
    def executed_on(self): return Execution({device!r}, "odd", "FP32", reason="libodd.so.3 is missing")
    def close(self): pass
class Odd:
    name, formats, scope = "odd", frozenset({formats!r}), "model"
    def probe(self, inventory): return Support(("cpu",), "odd 2")
    def candidates(self, artifact, device): return [Variant(self.name, device.id, "FP32")]
    def load(self, artifact, variant): return Session()
"""


def backend(name, *devices):
    return BackendRecord(name, PluginStatus.AVAILABLE, devices=devices or ("cpu",), formats=("onnx",))


@pytest.fixture
def try_odd(tmp_path, monkeypatch):
    """Smoke-tests a backend written to do something odd."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    metadata = tmp_path / "odd-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: odd\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[appliance.backends]\nodd = plugin_odd:Odd\n")

    def write_and_try(run="pass", answer=ANSWER, device="cpu", formats=("onnx",)):
        source = ODD.format(run=run, answer=repr(answer), device=device, formats=set(formats))
        (tmp_path / "plugin_odd.py").write_text(source)
        return asyncio.run(smoke(backend("odd"), MACHINE))["cpu"]

    return write_and_try


def test_the_model_in_the_source_is_what_its_comment_says():
    weights = np.array([[1, 0, -2], [0.5, 1, 0], [0, -1, 4], [2, 0, 1]], np.float32)
    bias = np.array([1, -1, 0.5], np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])],
        "smoke",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(bias, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9, producer_name="")
    assert onnx.load_from_string(MODEL) == model
    np.testing.assert_array_equal(np.array(QUESTION, np.float32) @ weights + bias, ANSWER)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_the_cpu_passes_with_the_backends_that_come_with_the_daemon(name):
    assert asyncio.run(smoke(backend(name), MACHINE)) == {"cpu": ""}


def test_a_device_that_the_runtime_does_not_list_fails_with_the_runtimes_reason():
    results = asyncio.run(smoke(backend("onnxruntime", "cpu", "nvidia0"), MACHINE))
    assert results["cpu"] == ""
    assert "this build of onnxruntime has no CUDA provider" in results["nvidia0"]


def test_a_backend_that_does_not_read_the_model_is_not_tried(try_odd):
    assert try_odd(formats=("gguf",)) is None


def test_a_right_answer_passes(try_odd):
    assert try_odd() == ""


def test_a_wrong_answer_is_shown_beside_the_right_one(try_odd):
    reason = try_odd(answer=((0.0, 0.0, 0.0), (4.25, -0.5, 4.5)))
    assert "it computed [[0.0" in reason
    assert "[[11.0" in reason


def test_an_answer_that_is_no_number_is_wrong(try_odd):
    assert "it computed" in try_odd(run="return {'y': np.full((2, 3), np.nan)}")


def test_a_computation_that_ran_elsewhere_fails_with_the_runtimes_reason(try_odd):
    reason = try_odd(device="nvidia7")
    assert "ran on 'nvidia7' instead" in reason
    assert "libodd.so.3 is missing" in reason


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("raise OSError('driver trouble')", "driver trouble"),
        ("os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
        ("os._exit(3)", "ended with status 3"),
    ],
)
def test_what_goes_wrong_in_the_run_is_the_reason(try_odd, run, words):
    assert words in try_odd(run=run)


def test_a_run_that_hangs_is_ended(try_odd, monkeypatch):
    monkeypatch.setattr(plugins, "SMOKE_SECONDS", 2.0)
    assert "no answer within 2 s" in try_odd(run="time.sleep(600)")


def test_an_unknown_backend_is_a_reason_and_no_exception():
    (reason,) = asyncio.run(smoke(backend("nobody"), MACHINE)).values()
    assert "no distribution" in reason
