"""Which of OpenVINO's devices is which of the inventory's, what is offered there, and why one is not listed."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from appliance.backend import Artifact, Variant
from appliance.inventory import Device, Inventory
from appliance_plugins.openvino import OpenVinoBackend, devices
from appliance_plugins.openvino.devices import Listed, id_of, match, why_unlisted
from appliance_plugins.openvino.session import Placing
from appliance_plugins.openvino.settings import Settings

CPU = Device("cpu", "cpu", "AMD EPYC", 1, ("avx2", "avx512_bf16"), "AuthenticAMD", cores=2)
PLAIN = Device("cpu", "cpu", "Intel(R) Celeron(R)", 1, ("sse4_2",), "GenuineIntel", cores=2)
ARM = Device("cpu", "cpu", "Cortex-A76", 1, ("asimd", "asimdhp"), "ARM", cores=4)
IGPU = Device("intel-gpu0", "gpu", "Intel UHD Graphics 770", 1, vendor="intel", uuid="0000:00:02.0", is_integrated=True)
ARC = Device("intel-gpu1", "gpu", "Intel Arc A770 Graphics", 1, vendor="intel", uuid="0000:03:00.0")
NPU = Device("intel-npu0", "npu", "Intel AI Boost (Meteor Lake)", 1, vendor="intel")
NVIDIA = Device("nvidia0", "gpu", "NVIDIA RTX", 1, vendor="nvidia")


def test_devices_are_matched_by_name_before_order():
    listed = [
        Listed("CPU", "AMD EPYC"),
        Listed("GPU.0", "Intel(R) Arc(TM) A770 Graphics (dGPU)"),
        Listed("GPU.1", "Intel(R) UHD Graphics 770 (iGPU)"),
        Listed("NPU", "Intel(R) AI Boost"),
    ]
    assert match([CPU, IGPU, ARC, NPU], listed) == {
        "cpu": "CPU",
        "intel-gpu0": "GPU.1",
        "intel-gpu1": "GPU.0",
        "intel-npu0": "NPU",
    }


def test_devices_without_telling_names_are_matched_in_order():
    listed = [Listed("GPU.0", "Intel(R) Graphics [0x56a0]"), Listed("GPU.1")]
    assert match([IGPU, ARC], listed) == {"intel-gpu0": "GPU.0", "intel-gpu1": "GPU.1"}
    assert match([IGPU, ARC], listed[:1]) == {"intel-gpu0": "GPU.0"}


def test_two_cards_of_one_name_are_told_apart_by_uuid_or_order():
    twins = [Device(f"intel-gpu{n}", "gpu", "Intel Arc A770 Graphics", 1, vendor="intel", uuid=f"u{n}") for n in (0, 1)]
    names = ["Intel(R) Arc(TM) A770 Graphics (dGPU)"] * 2
    assert match(twins, [Listed("GPU.0", names[0], "U1"), Listed("GPU.1", names[1], "U0")]) == {
        "intel-gpu0": "GPU.1",
        "intel-gpu1": "GPU.0",
    }
    assert match(twins, [Listed("GPU.0", names[0]), Listed("GPU.1", names[1])]) == {
        "intel-gpu0": "GPU.0",
        "intel-gpu1": "GPU.1",
    }


@pytest.mark.parametrize(
    ("name", "device"),
    [("CPU", "cpu"), ("(CPU)", "cpu"), ("GPU", "intel-gpu0"), ("GPU.0", "intel-gpu0"), ("NPU", "npu")],
)
def test_what_the_runtime_says_it_executes_on_is_a_device_of_the_inventory(name, device):
    assert id_of(name, {"cpu": "CPU", "intel-gpu0": "GPU.0"}) == device


def test_an_intel_device_that_is_not_listed_has_a_reason_that_names_a_package():
    support = OpenVinoBackend().probe(Inventory((CPU, IGPU, NPU, NVIDIA), 2, 1))
    assert "cpu" in support.devices
    assert "intel-opencl-icd" in support.unlisted["intel-gpu0"]
    assert "intel-level-zero-npu" in support.unlisted["intel-npu0"]
    assert "nvidia0" not in support.unlisted
    assert support.reason == ""


@pytest.mark.parametrize(
    ("device", "present", "words"),
    [
        (IGPU, (), "ocl-icd-libopencl1"),
        (IGPU, ("libOpenCL.so.1",), "no OpenCL driver for Intel GPUs"),
        (IGPU, ("libOpenCL.so.1", "intel.icd"), "too old"),
        (NPU, (), "libze1"),
        (NPU, ("libze_loader.so.1",), "libze_intel_npu.so.1 is missing"),
        (NPU, ("libze_loader.so.1", "libze_intel_npu.so.1"), "too old"),
    ],
)
def test_what_is_missing_is_named(monkeypatch, tmp_path, device, present, words):
    monkeypatch.setattr(devices, "_can_load", lambda library: library in present)
    monkeypatch.setattr(devices, "_OPENCL_VENDORS", tmp_path)
    for name in present:
        if name.endswith(".icd"):
            (tmp_path / name).write_text("libigdrcl.so")
    assert words in why_unlisted(device)


TWO, FOUR, PAIRS = "streams=2 threads=1", "streams=4 threads=1", "streams=2 threads=2"
OFFERED = [
    (CPU, "FP32", ["FP32", "BF16", f"FP32 {TWO}", f"BF16 {TWO}"]),
    (PLAIN, "FP32", ["FP32", f"FP32 {TWO}"]),
    (replace(PLAIN, cores=1), "FP32", ["FP32"]),
    (ARM, "FP32", ["FP32", "FP16", f"FP32 {FOUR}", f"FP32 {PAIRS}", f"FP16 {FOUR}", f"FP16 {PAIRS}"]),
    (CPU, "INT8", ["INT8 float=f32", "INT8 float=bf16", f"INT8 float=f32 {TWO}", f"INT8 float=bf16 {TWO}"]),
    (PLAIN, "INT8-WEIGHTS", ["INT8-WEIGHTS float=f32", f"INT8-WEIGHTS float=f32 {TWO}"]),
    (ARC, "FP32", ["FP32", "FP16"]),
    (ARC, "INT8", ["INT8 float=f32", "INT8 float=f16"]),
    (NPU, "FP32", ["FP16 static=4"]),
    (NPU, "INT8", []),
    (NVIDIA, "FP32", []),
]


@pytest.mark.parametrize(("device", "precision", "expected"), OFFERED)
def test_what_is_offered_follows_from_device_and_precision(device, precision, expected):
    found = OpenVinoBackend().candidates(Artifact(Path("model"), "onnx", precision), device)
    shown = [
        " ".join([one.precision, *(f"{name}={value}" for name, value in one.options.items() if value)]) for one in found
    ]
    assert shown == expected


@pytest.fixture
def model(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(2 * np.eye(4, dtype=np.float32), "w")],
    )
    path = tmp_path / "model.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return Artifact(path, "onnx")


@pytest.mark.parametrize(
    ("cores", "options", "asked"),
    [
        (1, {}, 1),
        (1, {"threads": "2"}, 2),
        (2, {}, None),
        (3, {}, None),
        (0, {}, None),
        (None, {}, None),
        (1, {"streams": "2"}, 1),
        (2, {"streams": "2", "threads": "1"}, 2),
        (2, {"streams": "2", "threads": "2"}, 4),
    ],
)
def test_threads_are_set_where_the_inventory_counts_fewer_cores_than_the_affinity(
    model, monkeypatch, cores, options, asked
):
    """A container with a quota of one core still may run on all of them; None: no inventory was probed."""
    found = []
    properties = Settings.properties

    def seen(self, is_cached=True):
        found.append(properties(self, is_cached))
        return found[-1]

    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    monkeypatch.setattr(Settings, "properties", seen)
    backend = OpenVinoBackend()
    if cores is not None:
        backend.probe(Inventory((replace(CPU, cores=cores),), 2, 1))
    session = backend.load(model, Variant("openvino", "cpu", "FP32", options))
    assert [one.get("INFERENCE_NUM_THREADS") for one in found] == [asked]
    if asked == 1:
        assert session.streams == 1, "the runtime has no more streams than threads"
        assert "threads=1" in session.executed_on().detail
    session.close()


@pytest.mark.parametrize(
    ("device", "options"),
    [("cpu", {"streams": "2", "static": "1"}), ("intel-npu0", {"streams": "2"}), ("cpu", {"streams": "65"})],
)
def test_streams_that_cannot_be_are_refused(device, options):
    with pytest.raises(ValueError, match="option 'streams' is"):
        Settings.of(Variant("openvino", device, "FP16" if device != "cpu" else "FP32", options), "FP32")


def test_a_device_that_compiles_single_shapes_only_gets_one_for_each_shape(model, monkeypatch):
    """An NPU, played by the CPU."""
    backend = OpenVinoBackend()
    monkeypatch.setattr(backend, "_names", {"cpu": "NPU", "intel-npu0": "CPU"})
    session = backend.load(model, Variant("openvino", "intel-npu0", "FP16", {"static": "2"}))
    assert [spec.shape for spec in session.inputs] == [(-1, 4)]
    with pytest.raises(ValueError, match="has not run yet"):
        session.executed_on()
    for rows in (1, 2, 3, 1):
        array = np.full((rows, 4), rows, np.float32)
        np.testing.assert_allclose(session.run({"x": array}, ["y"])["y"], 2 * array)
        assert session.is_settled
    execution = session.executed_on()
    assert (execution.device, execution.provider, execution.reason) == ("intel-npu0", "CPU", "")
    session.close()


def test_execution_elsewhere_is_told_with_the_runtimes_words(model, monkeypatch):
    """A GPU that falls back, played by a CPU that another device is asked of."""
    backend = OpenVinoBackend()
    session = backend.load(model, Variant("openvino", "cpu", "FP32"))
    session.run({"x": np.ones((1, 4), np.float32)}, ["y"])
    wished = Variant("openvino", "intel-gpu0", "FP32")
    monkeypatch.setattr(session, "_placing", Placing("GPU.0", {"cpu": "CPU", "intel-gpu0": "GPU.0"}, wished))
    execution = session.executed_on()
    assert execution.device == "cpu"
    assert execution.reason == "openvino was asked for GPU.0 and executes on CPU"


def test_a_quantised_variant_of_a_plain_model_does_not_pass_for_int8(model):
    backend = OpenVinoBackend()
    lying = Artifact(model.path, "onnx", "INT8")
    session = backend.load(lying, Variant("openvino", "cpu", "INT8", {"float": "f32"}))
    session.run({"x": np.ones((1, 4), np.float32)}, ["y"])
    assert session.executed_on().precision == "FP32"


@pytest.mark.parametrize(
    ("precision", "variant", "words"),
    [
        ("FP32", Variant("openvino", "cpu", "INT8"), "precision INT8 is not on offer"),
        ("INT8", Variant("openvino", "cpu", "BF16"), "precision BF16 is not on offer"),
        ("FP32", Variant("openvino", "cpu", "FP32", {"float": "bf16"}), "option 'float' is for quantised"),
        ("INT8", Variant("openvino", "cpu", "INT8", {"float": "f8"}), "option 'float' is 'f8'"),
        ("FP32", Variant("openvino", "cpu", "FP32", {"static": "many"}), "option 'static' is 'many'"),
        ("FP32", Variant("openvino", "cpu", "FP32", {"static": "65"}), "from 1 to 64"),
        ("FP32", Variant("openvino", "intel-gpu3", "FP32"), "none that openvino lists"),
    ],
)
def test_variants_that_cannot_be_are_refused_with_the_rule(model, precision, variant, words):
    with pytest.raises(ValueError, match=words):
        OpenVinoBackend().load(Artifact(model.path, "onnx", precision), variant)
