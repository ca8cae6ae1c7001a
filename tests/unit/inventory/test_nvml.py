"""NVML through its real Python binding, against a library compiled here: what it says, and what its troubles become."""

import asyncio
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from appliance import child
from appliance.inventory import Inventory, Step

SUPPORT = Path(__file__).parents[2] / "support"
GIB = 1 << 30

#: NVML gets as long where it hangs, and the child as long to get going on a busy machine.
HANG_SECONDS, CHILD_SECONDS = 0.3, 30.0


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    directory = tmp_path_factory.mktemp("nvml")
    source, made = SUPPORT / "nvml_stub.c", directory / "libnvidia-ml.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", made, source], check=True, timeout=60)
    return directory


@pytest.fixture
def take(library, monkeypatch):
    """The inventory of the recorded RTX workstation, with NVML behaving as told."""

    def run(behaviour, seconds=CHILD_SECONDS, machine="rtx-workstation", pids=""):
        monkeypatch.setenv("LD_LIBRARY_PATH", str(library))
        monkeypatch.setenv("NVML_STUB", behaviour)
        monkeypatch.setenv("NVML_STUB_PIDS", pids)
        command = [sys.executable, str(SUPPORT / "nvml_survey.py"), machine]
        question = {"directories": {}, "seconds": seconds}
        answer = asyncio.run(child.ask(command, question, CHILD_SECONDS + 10))
        assert not answer["has_loaded_nvml"], "the survey itself must not load what may crash it"
        inventory = Inventory.from_json(answer["inventory"])
        assert inventory.devices[0].name == "AMD Ryzen 9 7950X 16-Core Processor"
        assert inventory.problems == ()
        return inventory

    return run


def test_fields_come_through_the_real_binding(take):
    inventory = take("ok")
    gpu, *parts = inventory.devices[1:]
    assert gpu.is_usable
    assert (gpu.id, gpu.name, gpu.kind, gpu.vendor) == ("nvidia0", "NVIDIA GeForce RTX 4090", "gpu", "nvidia")
    assert (gpu.memory_bytes, gpu.features, gpu.driver) == (24 * GIB, ("sm_89",), "555.42.06")
    assert gpu.uuid == "GPU-00000000-0000-4000-8000-000000000000"
    assert gpu.details == {
        "PCI": "10de:2684 at 0000:01:00.0",
        "CUDA": "up to 12.5",
        "temperature": "40 °C",
        "power": "31 W of 450 W",
        "memory in use": "256 MiB",
    }
    assert [(part.id, part.name, part.memory_bytes, part.features) for part in parts] == [
        ("nvidia1-mig0", "NVIDIA H100 PCIe MIG 1g.10gb", 10 * GIB, ("sm_90",)),
        ("nvidia1-mig2", "NVIDIA H100 PCIe MIG 1g.10gb", 10 * GIB, ("sm_90",)),
    ]
    assert [part.uuid[:4] for part in parts] == ["MIG-", "MIG-"]
    assert parts[0].details["part of"] == "NVIDIA H100 PCIe, GPU-00000000-0000-4000-8000-000001000000"


def test_processes_of_others_are_named_and_the_daemon_s_own_are_not(take):
    """The daemon is whoever asks, so here it is this process."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as ours:
        gpu = take("ok", pids=f"{ours.pid},1").device("nvidia0")
        ours.communicate(b"\n")
    shown = gpu.details["other processes"]
    assert "(1)" in shown
    assert str(ours.pid) not in shown


def test_what_nvml_does_not_tell_is_left_out(take):
    gpu = take("mute-power").device("nvidia0")
    assert gpu.is_usable
    assert "power" not in gpu.details
    assert gpu.details["temperature"] == "40 °C"


def test_what_the_library_prints_spoils_nothing(take):
    assert take("chatty").device("nvidia0").is_usable


def test_mig_mode_without_instances_is_said_of_the_whole(take):
    gpu = take("bare").device("nvidia1")
    assert gpu.memory_bytes == 80 * GIB
    assert any(rung.step is Step.OPENABLE for rung in gpu.ladder)


@pytest.mark.parametrize(
    ("behaviour", "step", "reason", "fix"),
    [
        ("crash", Step.DRIVER, "crashes: its process was killed by SIGABRT", "install the driver again"),
        ("mismatch", Step.DRIVER, "restart required: the driver was upgraded", "restart the machine"),
        ("unloaded", Step.DRIVER, "not loaded", "sudo modprobe nvidia"),
        ("denied", Step.OPENABLE, "may not open", "DeviceAllow=char-nvidia rw"),
        ("lost", Step.DRIVER, "lost the GPU: GPU is lost", "nvidia-smi --gpu-reset"),
        ("reset", Step.DRIVER, "lost the GPU: GPU requires re", "nvidia-smi --gpu-reset"),
    ],
)
def test_trouble_is_a_rung_with_reason_and_fix(take, behaviour, step, reason, fix):
    gpu = take(behaviour).device("nvidia0")
    assert gpu.name == "NVIDIA GeForce RTX 4090"
    assert gpu.failed.step is step
    assert reason in gpu.failed.reason
    assert fix in gpu.failed.fix


def test_a_lost_gpu_costs_the_others_nothing(take):
    assert [device.id for device in take("lost").devices] == ["cpu", "nvidia0", "nvidia1-mig0", "nvidia1-mig2"]


def test_a_hang_costs_the_gpu_alone_and_no_more_than_its_time(take):
    """The child answers although NVML never does."""
    inventory = take("hang", seconds=HANG_SECONDS)
    gpu = inventory.device("nvidia0")
    assert gpu.failed.step is Step.DRIVER
    assert gpu.failed.reason.startswith("the driver does not answer")
    assert "appliancectl hardware --refresh" in gpu.failed.fix
    assert len(inventory.devices) == 2


def test_without_the_library_the_driver_s_rung_says_what_to_install(take, library, monkeypatch, tmp_path):
    (tmp_path / "libnvidia-ml.so.1").write_text("not a library")
    (library / "libnvidia-ml.so.1").rename(library / "away")
    try:
        gpu = take("ok").device("nvidia0")
    finally:
        (library / "away").rename(library / "libnvidia-ml.so.1")
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has the real library")
    assert "libnvidia-ml.so.1 is not installed" in gpu.failed.reason
    assert "libnvidia-compute" in gpu.failed.fix


def test_the_asking_process_never_loads_nvml(library, monkeypatch):
    """The daemon's side of the whole way, in a process of its own."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(library))
    program = (
        "import asyncio, sys\n"
        "from appliance.inventory.asking import take_inventory\n"
        f"command = [sys.executable, {str(SUPPORT / 'nvml_survey.py')!r}, 'rtx-workstation']\n"
        "inventory = asyncio.run(take_inventory({}, 30.0, command))\n"
        "assert inventory.device('nvidia0').is_usable, inventory\n"
        "assert 'pynvml' not in sys.modules and 'appliance.inventory.survey' not in sys.modules\n"
        "assert 'libnvidia-ml' not in open('/proc/self/maps').read()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=50)


def test_a_new_driver_changes_what_measurements_are_good_for(take):
    gpu = take("ok").device("nvidia0")
    assert gpu.driver_key == "555.42.06"
    assert replace(gpu, driver="560.0").driver_key != gpu.driver_key
