"""What each recorded machine is offered, what it serves at first, and how the reasons read.

Offers are the in-tree plugins' own; which devices a runtime lists is written down here, since no such device is here.
"""

import pytest

from appliance.backend import PRECISIONS, Artifact
from appliance.candidates import list_candidates
from appliance.choice import choose
from appliance.chooser import Options
from appliance.explanation import explain
from appliance.inventory.survey import survey
from appliance.manifest import Manifest
from appliance.measurement import Measurement, Point, key_of
from appliance.plugins import BackendRecord, PluginStatus
from appliance.quality import Comparison, Evidence
from appliance.types import ModelState, ModelStatus
from appliance_plugins.onnxruntime import OnnxRuntimeBackend
from appliance_plugins.openvino import OpenVinoBackend
from appliancectl.tuning import print_explanation
from support.machine import DIRECTORIES, Replay

NO_CUDA = "this build of onnxruntime has no CUDA provider: install onnxruntime-gpu in an environment of its own"


def record(backend, inventory, devices, unlisted=()) -> BackendRecord:
    """A backend whose runtime lists `devices` of a machine."""
    variants = {
        (format_, precision, device): tuple(
            backend.candidates(Artifact("model", format_, precision), inventory.device(device))
        )
        for format_ in backend.formats
        for precision in PRECISIONS
        for device in devices
    }
    return BackendRecord(
        backend.name,
        PluginStatus.AVAILABLE,
        runtime=f"{backend.name} 1.0",
        devices=tuple(devices),
        formats=tuple(sorted(backend.formats)),
        variants=variants,
        unlisted=dict(unlisted),
    )


def machine(name: str, has_cuda: bool = False):
    """A recorded machine and what the in-tree backends offer on it."""
    inventory = survey(Replay.of(name), DIRECTORIES)
    usable = [device for device in inventory.devices if device.is_usable]
    cards = [device.id for device in usable if device.vendor == "nvidia"]
    intel = [device.id for device in usable if device.id.startswith("intel-")]
    ort = record(
        OnnxRuntimeBackend(),
        inventory,
        ["cpu", *(cards if has_cuda else ())],
        () if has_cuda else [(card, NO_CUDA) for card in cards],
    )
    return inventory, {"onnxruntime": ort, "openvino": record(OpenVinoBackend(), inventory, ["cpu", *intel])}


@pytest.fixture
def model(tmp_path):
    """A model with an INT8 artifact beside its own."""
    (tmp_path / "1").mkdir()
    for name in ("model.onnx", "model.int8.onnx"):
        (tmp_path / "1" / name).write_bytes(b"weights")
    (tmp_path / "samples.jsonl").write_text("")
    artifacts = [
        {"path": "1/model.onnx", "format": "onnx"},
        {"path": "1/model.int8.onnx", "format": "onnx", "precision": "INT8"},
    ]
    document = {"name": tmp_path.name.replace("_", "-"), "artifacts": artifacts}
    return Manifest.model_validate({**document, "samples": {"evaluation": "samples.jsonl"}}), tmp_path


#: Machine: first choice; precisions offered on the CPU; barred devices with a part of what is said of each.
EXPECTED = {
    "plain-laptop": ("onnxruntime/cpu/FP32", {"FP32", "INT8"}, {}),
    "amx-server": ("onnxruntime/cpu/FP32", {"FP32", "BF16", "INT8"}, {}),
    "rtx-workstation": ("onnxruntime/cpu/FP32", {"FP32", "BF16", "INT8"}, {"nvidia0": NO_CUDA}),
    "mig-server": (
        "onnxruntime/cpu/FP32",
        {"FP32", "INT8"},
        {"nvidia0-mig0": NO_CUDA, "nvidia0-mig1": NO_CUDA, "nvidia1": NO_CUDA},
    ),
    "core-ultra-npu-no-driver": ("onnxruntime/cpu/FP32", {"FP32", "INT8"}, {"intel-npu0": "driver failed"}),
    "igpu-no-render-group": ("onnxruntime/cpu/FP32", {"FP32", "INT8"}, {"intel-gpu0": "usermod -aG render"}),
    "ascend-910b": (
        "onnxruntime/cpu/FP32",
        {"FP32", "FP16", "INT8"},
        {f"ascend{number}": "no installed backend runs on it" for number in range(8)},
    ),
    "container-limited": ("onnxruntime/cpu/FP32", {"FP32", "INT8"}, {}),
    "raspberry-pi": ("onnxruntime/cpu/FP32", {"FP32", "FP16", "INT8"}, {}),
    "epyc-vm": ("onnxruntime/cpu/FP32", {"FP32", "BF16", "INT8"}, {}),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_machine_gets_its_first_choice_its_precisions_and_reasons(name, model):
    first, precisions, barred = EXPECTED[name]
    inventory, records = machine(name)
    found = list_candidates(*model, "1", records, inventory)
    assert found.found[0].name == first
    assert found.reference.name == first
    assert {one.variant.precision for one in found.found if one.device.kind == "cpu"} == precisions
    told = {each.name: each.reason for each in found.barred}
    assert set(told) == set(barred)
    for device, part in barred.items():
        assert part in told[device]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("rtx-workstation", "onnxruntime/nvidia0/FP32"), ("mig-server", "onnxruntime/nvidia0-mig0/FP32")],
)
def test_a_gpu_that_a_runtime_lists_serves_first_and_is_compared_with_the_cpu(name, expected, model):
    inventory, records = machine(name, has_cuda=True)
    found = list_candidates(*model, "1", records, inventory)
    assert found.found[0].name == expected
    assert found.reference.name == "onnxruntime/cpu/FP32"
    assert not found.barred


@pytest.mark.parametrize("name", ["plain-laptop", "core-ultra-npu-no-driver"])
def test_an_integrated_gpu_is_a_candidate_but_not_the_first_choice(name, model):
    inventory, records = machine(name)
    found = list_candidates(*model, "1", records, inventory)
    tries = [one.name for one in found.first_tries() if not one.source.name]
    assert tries == ["onnxruntime/cpu/FP32", "openvino/cpu/FP32", "openvino/intel-gpu0/FP32"]


def measured(one, one_row_us: float, eight_rows_us: float) -> Measurement:
    key = key_of("digest", one.variant, one.runtime, one.device.identity, one.device.driver_key)
    return Measurement(key, (Point(1, one_row_us, 1.0, 50), Point(8, eight_rows_us, 1.0, 50)), device="cpu")


#: Microseconds for 1 and 8 rows of the encoder all-MiniLM-L6-v2, by backend and precision, as the task `measure` found
#: them on `epyc-vm`; NARROW with ONEDNN_MAX_CPU_ISA=AVX2 set, which keeps oneDNN from using BF16 and VNNI.
WIDE = {
    ("onnxruntime", "FP32"): (5642, 32102),
    ("openvino", "FP32"): (4193, 27919),
    ("openvino", "BF16"): (2513, 15895),
    ("openvino", "INT8"): (1634, 9709),
}
NARROW = {
    ("onnxruntime", "FP32"): (5642, 32102),
    ("openvino", "FP32"): (4896, 29791),
    ("openvino", "INT8"): (6014, 37990),
}


@pytest.mark.parametrize(
    ("name", "speeds", "expected"), [("container-limited", NARROW, "FP32"), ("epyc-vm", WIDE, "INT8")]
)
def test_fp32_stays_on_a_cpu_without_bf16_and_vnni_and_int8_serves_on_one_with_them(name, speeds, expected, model):
    inventory, records = machine(name)
    found = list_candidates(*model, "1", records, inventory)

    def measurement(one):
        numbers = speeds.get((one.variant.backend, one.variant.precision))
        return measured(one, *numbers) if numbers else None

    def evidence(one):
        compared = Comparison("cosine", 0.999, 1.0, 0.997, 278)
        return Evidence(measured(one, 1, 1).key, "reference", "sample", 0.01, compared)

    for objective in ("latency", "throughput", "balanced"):
        choice = choose(objective, found.found, measurement, evidence, found.reference, found.reference)
        assert choice.winner.variant.precision == expected, objective
    if expected == "FP32":
        assert not [one for one in found.found if one.variant.precision == "BF16"], "not even offered"


def shown(name: str, model, capsys) -> str:
    """What ``appliancectl explain`` prints on a machine before anything is measured."""
    inventory, records = machine(name)
    manifest, directory = model
    found = list_candidates(manifest, directory, "1", records, inventory)
    keys = {one.name: measured(one, 1, 1).key for one in found.found}
    options = Options(manifest, directory, "1", found, keys, "trial")
    choice = choose("balanced", found.found, lambda _: None, lambda _: None, found.reference)
    first = found.found[0]
    status = ModelStatus(
        name=manifest.name,
        version="1",
        state=ModelState.READY,
        variant=first.name,
        chosen_by="rule",
        requested_device=first.device.id,
        device=first.device.id,
        provider="CPUExecutionProvider",
        runtime=first.runtime,
    )
    print_explanation(explain(options, choice, status))
    return capsys.readouterr().out


@pytest.mark.parametrize("name", EXPECTED)
def test_explain_says_what_serves_why_and_what_to_do(name, model, capsys):
    text = shown(name, model, capsys)
    first, _, barred = EXPECTED[name]
    assert f"runs as {first}, by the written rule: nothing better is measured" in text
    assert "appliancectl tune" in text
    for device, part in barred.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"{device} ")]
        assert part in line
