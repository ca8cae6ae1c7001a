"""ONNX Runtime's offers, its threads, and what becomes of a session that was to run on CUDA and cannot."""

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from appliance.backend import Artifact, Variant
from appliance.inventory import Device, Inventory
from appliance_plugins import cuda_provider
from appliance_plugins.onnxruntime import OnnxRuntimeBackend

CPU = Device("cpu", "cpu", "a processor", 1, cores=2)
CARD = Device("nvidia0", "gpu", "a card", 1, vendor="nvidia", uuid="GPU-1")
MIG = Device("nvidia0-mig0", "gpu", "a part of a card", 1, vendor="nvidia", uuid="MIG-1")
MACHINE = Inventory((CPU, CARD, MIG), 2, 1)


@pytest.fixture
def model(tmp_path):
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    return Artifact(tmp_path / "model.onnx", "onnx")


def cpu_build():
    if cuda_provider.PROVIDER in onnxruntime.get_available_providers():
        pytest.skip("this build has CUDA")


def test_a_cpu_build_lists_no_card_and_says_what_to_install():
    cpu_build()
    support = OnnxRuntimeBackend().probe(MACHINE)
    assert support.devices == ("cpu",)
    assert set(support.unlisted) == {"nvidia0", "nvidia0-mig0"}
    assert "install onnxruntime-gpu in an environment of its own" in support.unlisted["nvidia0"]


def test_a_session_for_a_card_lands_on_the_cpu_and_says_so(model):
    """No fake: this is what the runtime does where it has no CUDA."""
    cpu_build()
    session = OnnxRuntimeBackend().load(model, Variant("onnxruntime", "nvidia0", "FP32"))
    np.testing.assert_array_equal(session.run({"x": -np.ones((1, 4), np.float32)}, ["y"])["y"], np.zeros((1, 4)))
    execution = session.executed_on()
    assert (execution.device, execution.provider, execution.precision) == ("cpu", "CPUExecutionProvider", "FP32")
    assert "no CUDA provider" in execution.reason


def runtime(tmp_path, *providers):
    """A build with these providers, whose libraries are to be put into the returned directory."""
    directory = tmp_path / "onnxruntime" / "capi"
    directory.mkdir(parents=True)
    module = SimpleNamespace(
        __file__=str(directory.parent / "__init__.py"), get_available_providers=lambda: list(providers)
    )
    return module, directory


def compiled(path: Path, *needed: Path) -> None:
    """An empty shared library that needs others."""
    subprocess.run(
        [
            "cc",
            "-shared",
            "-x",
            "c",
            "/dev/null",
            "-x",
            "none",
            "-Wl,--no-as-needed",
            *map(str, needed),
            "-o",
            str(path),
        ],
        check=True,
        capture_output=True,
    )


def test_a_missing_library_of_the_cuda_provider_is_named_without_its_path(tmp_path):
    module, directory = runtime(tmp_path, cuda_provider.PROVIDER)
    needed = directory / "libcublasTwelve.so"
    compiled(needed)
    compiled(directory / "libonnxruntime_providers_shared.so")
    compiled(directory / "libonnxruntime_providers_cuda.so", needed)
    needed.unlink()
    for reason in (cuda_provider.why_absent(module), cuda_provider.why_unused(module)):
        assert "libcublasTwelve.so: cannot open shared object file" in reason
        assert "install onnxruntime-gpu[cuda,cudnn]" in reason
        assert str(directory) not in reason
    compiled(needed)
    assert cuda_provider.why_absent(module) == ""


def test_a_provider_that_loads_and_does_not_serve_is_told_apart(tmp_path):
    module, directory = runtime(tmp_path, cuda_provider.PROVIDER)
    for name in ("shared", "cuda"):
        compiled(directory / f"libonnxruntime_providers_{name}.so")
    assert "refused the device" in cuda_provider.why_unused(module)


def test_a_card_is_chosen_by_its_uuid_and_else_by_its_place_on_the_bus(monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.setenv(name, "before")
    assert cuda_provider.options("nvidia0-mig0", "MIG-1")["device_id"] == "0"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "MIG-1"
    assert cuda_provider.options("nvidia3", "")["device_id"] == "3"
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    with pytest.raises(ValueError, match="'nvidia0-mig0'"):
        cuda_provider.options("nvidia0-mig0", "")


def part(provider, *names):
    return SimpleNamespace(ep_name=provider, get_nodes=lambda: list(names))


def test_operators_are_counted_by_provider():
    parts = [
        part("CUDAExecutionProvider", "a", "b"),
        part("CPUExecutionProvider", "c"),
        part("CUDAExecutionProvider", "d"),
    ]
    session = SimpleNamespace(get_provider_graph_assignment_info=lambda: parts)
    assert cuda_provider.nodes_by_provider(session) == {"CUDAExecutionProvider": 3, "CPUExecutionProvider": 1}
    assert cuda_provider.nodes_by_provider(SimpleNamespace()) == {}


def offered(device, precision):
    return [
        (one.precision, dict(one.options))
        for one in OnnxRuntimeBackend().candidates(Artifact(Path("model"), "onnx", precision), device)
    ]


@pytest.mark.parametrize(
    ("precision", "computes"),
    [("FP32", "FP32"), ("FP16", "FP32"), ("INT8", "INT8"), ("INT8-WEIGHTS", "INT8-WEIGHTS"), ("BF16", None)],
)
def test_the_cpu_computes_what_the_graph_says(precision, computes):
    options = [{}, {"spin_us": "200"}, {"threads": "1"}, {"streams": "2", "threads": "1"}]
    assert offered(CPU, precision) == ([(computes, one) for one in options] if computes else [])


def test_one_core_has_no_threads_to_wake():
    assert offered(Device("cpu", "cpu", "a processor", 1, cores=1), "FP32") == [("FP32", {})]


def test_cards_are_offered_full_and_half_precision():
    assert [offered(CARD, precision) for precision in ("FP32", "FP16", "INT8")] == [
        [("FP32", {})],
        [("FP16", {})],
        [],
    ]


@pytest.mark.parametrize(
    ("cores", "options", "detail"),
    [
        (1, {}, "threads=1"),
        (1, {"threads": "2"}, "threads=2"),
        (2, {}, "threads=2"),
        (9, {}, "threads=3"),
        (0, {}, "threads=3"),
        (None, {}, "threads=3"),
        (9, {"streams": "1"}, "threads=3"),
        (9, {"streams": "2"}, "streams=2, threads=1"),
        (9, {"streams": "2", "threads": "2"}, "streams=2, threads=2"),
        (9, {"streams": "8"}, "streams=8, threads=1"),
    ],
)
def test_one_thread_for_each_core_that_the_inventory_and_the_affinity_allow(model, monkeypatch, cores, options, detail):
    """A container with a quota of one core still may run on all of them; None: no inventory was probed."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1, 2})
    backend = OnnxRuntimeBackend()
    if cores is not None:
        backend.probe(Inventory((Device("cpu", "cpu", "a processor", 1, cores=cores),), 2, 1))
    session = backend.load(model, Variant("onnxruntime", "cpu", "FP32", options))
    assert session.executed_on().detail == detail
    assert session.streams == int(options.get("streams", 1))
    session.close()


@pytest.mark.parametrize(
    "options",
    [{"spin_us": "-1"}, {"spin_us": "2000000"}, {"threads": "0"}, {"spin": "1"}, {"streams": "0"}, {"streams": "65"}],
)
def test_options_out_of_range_are_refused(model, options):
    with pytest.raises(ValueError, match="option"):
        OnnxRuntimeBackend().load(model, Variant("onnxruntime", "cpu", "FP32", options))


def test_foreign_devices_are_refused(model):
    with pytest.raises(ValueError, match="neither the CPU nor an NVIDIA device"):
        OnnxRuntimeBackend().load(model, Variant("onnxruntime", "intel-gpu0", "FP32"))


def test_threads_that_spin_stop_soon_after_a_run(model):
    """Processor time is counted, not wall time: threads of an idle session use next to none."""
    session = OnnxRuntimeBackend().load(
        model, Variant("onnxruntime", "cpu", "FP32", {"threads": "2", "spin_us": "200"})
    )
    session.run({"x": np.ones((4096, 4), np.float32)}, ["y"])
    assert "spin_us=200" in session.executed_on().detail
    # poll(2) sleeps in the kernel with the interpreter lock held, so nothing else runs in this process
    used = time.process_time()
    ctypes.CDLL(None).poll(None, 0, 500)
    assert time.process_time() - used < 0.05


def test_importing_the_plugin_imports_no_runtime():
    program = "import sys, appliance_plugins.onnxruntime; sys.exit('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
