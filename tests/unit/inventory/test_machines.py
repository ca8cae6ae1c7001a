"""Every recorded machine gives the inventory it should."""

import json
from dataclasses import asdict

import pytest

from appliance.inventory import Inventory, Step
from appliance.inventory.cpu import bare_inventory
from appliance.inventory.recording import Recorder
from appliance.inventory.survey import survey
from support.machine import DIRECTORIES, MACHINES, Replay, recording

KIB, GIB = 1 << 10, 1 << 30

VNNI = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16")

#: CPU's name, features, usable cores, memory; the other devices' names, kinds, memory, features, failed steps or None.
EXPECTED = {
    "plain-laptop": (
        "12th Gen Intel(R) Core(TM) i5-1240P",
        ("avx2", "avx_vnni"),
        16,
        16117232 * KIB,
        {"intel-gpu0": ("Intel Iris Xe Graphics", "gpu", 16117232 * KIB, (), None)},
    ),
    "amx-server": (
        "Intel(R) Xeon(R) Platinum 8480+",
        ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"),
        224,
        1056489236 * KIB,
        {},
    ),
    "rtx-workstation": (
        "AMD Ryzen 9 7950X 16-Core Processor",
        VNNI,
        32,
        65452012 * KIB,
        {"nvidia0": ("NVIDIA GeForce RTX 4090", "gpu", 25757220864, ("sm_89",), None)},
    ),
    "mig-server": (
        "AMD EPYC 7742 64-Core Processor",
        ("avx2",),
        256,
        1056400000 * KIB,
        {
            "nvidia0-mig0": ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "gpu", 20937965568, ("sm_80",), None),
            "nvidia0-mig1": ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "gpu", 20937965568, ("sm_80",), None),
            "nvidia1": ("NVIDIA A100-SXM4-40GB", "gpu", 40 * GIB, ("sm_80",), None),
        },
    ),
    "core-ultra-npu-no-driver": (
        "Intel(R) Core(TM) Ultra 7 155H",
        ("avx2", "avx_vnni"),
        22,
        32476200 * KIB,
        {
            "intel-gpu0": ("Intel Arc Graphics (Core Ultra)", "gpu", 32476200 * KIB, (), None),
            "intel-npu0": ("Intel AI Boost (Meteor Lake)", "npu", 32476200 * KIB, (), Step.DRIVER),
        },
    ),
    "igpu-no-render-group": (
        "11th Gen Intel(R) Core(TM) i7-1165G7 @ 2.80GHz",
        ("avx2", "avx512f", "avx512_vnni"),
        8,
        32619540 * KIB,
        {"intel-gpu0": ("Intel Iris Xe Graphics", "gpu", 32619540 * KIB, (), Step.OPENABLE)},
    ),
    "ascend-910b": (
        "Kunpeng-920",
        ("asimd", "asimdhp", "asimddp"),
        192,
        1583000000 * KIB,
        {f"ascend{number}": ("Ascend 910B3", "npu", 64 * GIB, (), None) for number in range(8)},
    ),
    "container-limited": ("AMD EPYC 7543 32-Core Processor", ("avx2",), 2, 4 * GIB, {}),
    "raspberry-pi": ("Cortex-A76", ("asimd", "asimdhp", "asimddp"), 4, 8245824 * KIB, {}),
    "epyc-vm": ("AMD EPYC", VNNI, 2, 24684096 * KIB, {}),
}


def take(name):
    return survey(Replay.of(name), DIRECTORIES)


def test_every_machine_is_in_the_table():
    assert {path.stem for path in MACHINES.glob("*.json")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_machine_gives_its_inventory(name):
    cpu, features, cores, memory, others = EXPECTED[name]
    inventory = take(name)
    assert inventory.problems == ()
    first, *rest = inventory.devices
    assert (first.id, first.name, first.features, first.cores) == ("cpu", cpu, features, cores)
    assert (inventory.cores, inventory.memory_bytes, first.memory_bytes) == (cores, memory, memory)
    found = {
        one.id: (one.name, one.kind, one.memory_bytes, one.features, one.failed and one.failed.step) for one in rest
    }
    assert found == others
    assert all(first.identity and device.identity for device in rest)
    assert len({device.identity for device in inventory.devices}) == len(inventory.devices)


@pytest.mark.parametrize("name", EXPECTED)
def test_every_ladder_is_whole_and_says_why(name):
    for device in take(name).devices:
        steps = [rung.step for rung in device.ladder]
        assert steps == sorted(set(steps), key=list(Step).index)
        assert steps[0] is Step.PRESENT
        assert steps[-2:] == [Step.LISTED, Step.SMOKE]
        if device.failed is None:
            assert {rung.reason for rung in device.ladder[-2:]} == {"no backend has tried yet"}
            assert device.kind == "cpu" or device.driver
        else:
            assert device.failed.reason
            assert device.failed.fix
            assert {rung.passed for rung in device.ladder[-2:]} == {None}


@pytest.mark.parametrize("name", EXPECTED)
def test_an_inventory_survives_json(name):
    inventory = take(name)
    assert Inventory.from_json(json.loads(json.dumps(asdict(inventory)))) == inventory


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recording_of_a_replay_replays_the_same(name):
    recorder = Recorder(Replay.of(name))
    inventory = survey(recorder, DIRECTORIES)
    again = survey(Replay(json.loads(json.dumps(recorder.document))), DIRECTORIES)
    assert again == inventory


@pytest.mark.parametrize("name", EXPECTED)
def test_the_bare_reading_agrees_on_cpu_and_memory(name):
    bare, whole = bare_inventory(Replay.of(name)), take(name)
    assert (bare.devices[0], bare.cores, bare.memory) == (whole.devices[0], whole.cores, whole.memory)


def test_an_npu_without_driver_says_which_and_how_to_get_it():
    rung = take("core-ultra-npu-no-driver").device("intel-npu0").failed
    assert rung.reason == "no driver is bound; intel_vpu is needed"
    assert "sudo modprobe intel_vpu" in rung.fix
    assert "intel-level-zero-npu" in rung.fix


def test_a_missing_group_is_named_with_the_command_that_adds_it():
    rung = take("igpu-no-render-group").device("intel-gpu0").failed
    assert rung.reason == (
        "user appliance may not open /dev/dri/renderD128: it has owner root, group render, mode 0660"
    )
    assert rung.fix.startswith("sudo usermod -aG render appliance, then restart the daemon")


def test_numa_and_huge_pages_of_a_server():
    inventory = take("amx-server")
    details = inventory.devices[0].details
    assert details["NUMA nodes"] == "0: 0-55,112-167; 1: 56-111,168-223"
    assert (details["sockets"], details["cores"], details["threads"]) == ("2", "112", "224")
    assert (inventory.memory.huge_pages, inventory.memory.huge_page_bytes) == (512, 2048 * KIB)


def test_kinds_of_cores_of_a_hybrid_cpu():
    details = take("plain-laptop").devices[0].details
    assert (details["performance cores"], details["efficiency cores"]) == ("threads 0-7", "threads 8-15")


def test_a_container_counts_what_it_may_use():
    inventory = take("container-limited")
    details = inventory.devices[0].details
    assert (details["quota"], details["cpuset"]) == ("1.5 cores", "4 of 64 threads")
    memory = inventory.memory
    assert (memory.total, memory.limit, memory.machine) == (4 * GIB, 4 * GIB, 263856720 * KIB)
    # 4 GiB less 1.5 GiB in use, of which 1 GiB are pages of files nobody uses
    assert memory.available == 3758096384
    assert "user" in inventory.host


def test_disks_and_whether_they_turn():
    disks = {disk.purpose: disk for disk in take("amx-server").disks}
    assert (disks["models"].device, disks["models"].file_system, disks["models"].is_rotational) == ("sdb1", "xfs", True)
    assert (disks["state"].device, disks["state"].is_rotational) == ("dm-0", False)
    inside = {disk.purpose: disk for disk in take("container-limited").disks}
    assert (inside["cache"].device, inside["cache"].is_rotational) == ("overlay", None)
    assert inside["models"].device == "nvme1n1p1"
    assert {disk.is_rotational for disk in take("epyc-vm").disks} == {None}


def test_what_people_want_to_know_of_a_gpu():
    gpu = take("rtx-workstation").device("nvidia0")
    assert (gpu.driver, gpu.uuid) == ("550.90.07", "GPU-5c1e0c39-6c1b-4d1e-8f59-0f4a5e2d7b11")
    assert gpu.details == {
        "PCI": "10de:2684 at 0000:01:00.0",
        "CUDA": "up to 12.4",
        "temperature": "41 °C",
        "power": "28 W of 450 W",
        "memory in use": "775 MiB",
        "other processes": "Xorg (2214) 298 MiB, gnome-shell (2391) 94 MiB",
    }
    part = take("mig-server").device("nvidia0-mig1")
    assert part.uuid.startswith("MIG-91c7d8b2")
    assert part.details["part of"].startswith("NVIDIA A100-SXM4-40GB, GPU-3b1f8f0e")
    assert part.details["memory in use"] == "44 MiB"
    assert "/dev/nvidia-caps/nvidia-cap22" in part.ladder[2].reason


def test_npus_are_numbered_as_their_runtime_numbers_them():
    npu = take("ascend-910b").device("ascend4")
    assert npu.details["PCI"] == "19e5:d802 at 0000:01:00.0"
    assert (npu.driver, npu.details["health"]) == ("24.1.rc2", "OK")


def test_a_board_is_named():
    inventory = take("raspberry-pi")
    assert inventory.host["machine"] == "Raspberry Pi 5 Model B Rev 1.0"
    assert inventory.devices[0].vendor == "ARM"


# ---------------------------------------------------------------- the same machines with something amiss


def amiss(name, change):
    document = recording(name)
    change(document)
    return survey(Replay(document), DIRECTORIES)


def without_cards(text):
    def change(document):
        document["files"]["/sys/bus/pci/devices/0000:01:00.0/uevent"] = document["files"][
            "/sys/bus/pci/devices/0000:01:00.0/uevent"
        ].replace("DRIVER=nvidia\n", text)
        document["answers"].pop("nvml")
        for path in [path for path in document["files"] if path.startswith("/proc/driver/nvidia")]:
            del document["files"][path]
        document["nodes"].clear()

    return change


@pytest.mark.parametrize(
    ("driver", "reason", "fix"),
    [
        ("DRIVER=nouveau\n", "nouveau is bound, which cannot compute", "nvidia-driver"),
        ("", "no driver is bound", "modprobe nvidia"),
        ("DRIVER=vfio-pci\n", "set aside for a virtual machine", "vfio-pci ids"),
    ],
)
def test_a_gpu_with_another_driver(driver, reason, fix):
    rung = amiss("rtx-workstation", without_cards(driver)).device("nvidia0").failed
    assert rung.step is Step.DRIVER
    assert reason in rung.reason
    assert fix in rung.fix


@pytest.mark.parametrize(
    ("answer", "step", "reason", "fix"),
    [
        ({"answer": {"refused": {"code": 18, "message": "m"}}}, Step.DRIVER, "restart required", "restart the machine"),
        ({"answer": {"refused": {"code": 9, "message": "m"}}}, Step.DRIVER, "not loaded", "modprobe nvidia"),
        ({"answer": {"refused": {"code": 12, "message": "m"}}}, Step.DRIVER, "libnvidia-ml.so.1", "libnvidia-compute"),
        ({"answer": {"refused": {"code": 999, "message": "Odd"}}}, Step.DRIVER, "Odd (code 999)", "nvidia-smi"),
        ({"answer": {"refused": {"code": 4, "message": "m"}}}, Step.OPENABLE, "may not open", "/dev/nvidia"),
        ({"answer": {"driver": "1", "devices": []}}, Step.DRIVER, "does not list this GPU", "--gpus all"),
        ({"failed": "it gave no answer within 1.3 s"}, Step.DRIVER, "the driver does not answer", "persistenced"),
        ({"failed": "its process was killed by SIGSEGV"}, Step.DRIVER, "SIGSEGV", "install the driver again"),
        (
            {"failed": "it failed with ModuleNotFoundError: No module named 'pynvml'"},
            Step.DRIVER,
            "nvidia-ml-py is missing",
            "pip install nvidia-ml-py",
        ),
    ],
)
def test_nvml_in_trouble(answer, step, reason, fix):
    inventory = amiss("rtx-workstation", lambda document: document["answers"].update(nvml=answer))
    gpu = inventory.device("nvidia0")
    assert gpu.name == "NVIDIA GeForce RTX 4090"
    assert gpu.failed.step is step
    assert reason in gpu.failed.reason
    assert fix in gpu.failed.fix
    assert inventory.problems == ()


def test_a_gpu_s_node_that_may_not_be_opened():
    def change(document):
        document["nodes"]["/dev/nvidia0"] |= {"mode": 0o660, "group": "video", "refusal": "EACCES"}

    rung = amiss("rtx-workstation", change).device("nvidia0").failed
    assert rung.step is Step.OPENABLE
    assert "sudo usermod -aG video appliance" in rung.fix


def test_cuda_s_node_is_made_on_first_use_unless_the_service_may_not():
    def change(document):
        del document["nodes"]["/dev/nvidia-uvm"]

    def change_and_allow(document):
        change(document)
        document["files"]["/proc/self/status"] = "NoNewPrivs:\t0\n"

    assert amiss("rtx-workstation", change).device("nvidia0").failed.reason == "there is no /dev/nvidia-uvm"
    assert amiss("rtx-workstation", change_and_allow).device("nvidia0").is_usable


def test_mig_mode_without_instances():
    def change(document):
        document["answers"]["nvml"]["answer"]["devices"][0]["instances"] = []

    inventory = amiss("mig-server", change)
    assert [device.id for device in inventory.devices] == ["cpu", "nvidia0", "nvidia1"]
    rung = inventory.device("nvidia0").failed
    assert rung.step is Step.LISTED
    assert "nvidia-smi mig -cgi" in rung.fix


def test_an_instance_whose_node_is_missing():
    rung = (
        amiss("mig-server", lambda document: document["nodes"].pop("/dev/nvidia-caps/nvidia-cap21"))
        .device("nvidia0-mig1")
        .failed
    )
    assert rung.reason == "there is no /dev/nvidia-caps/nvidia-cap21"


def test_a_group_joined_since_the_daemon_started():
    rung = (
        amiss("igpu-no-render-group", lambda document: document["identity"]["member_of"].append("render"))
        .device("intel-gpu0")
        .failed
    )
    assert rung.fix.startswith("restart the daemon")


def test_a_node_that_belongs_to_root_alone_needs_a_udev_rule():
    def change(document):
        document["nodes"]["/dev/dri/renderD128"] |= {"mode": 0o600, "group": "root"}

    rung = amiss("igpu-no-render-group", change).device("intel-gpu0").failed
    assert 'KERNEL=="renderD*", GROUP="render", MODE="0660"' in rung.fix


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"answer": "EPERM"}, "the control group forbids opening /dev/dri/renderD128"),
        ({"answer": "EIO"}, "the driver answers EIO"),
        ({"failed": "it gave no answer within 1.0 s"}, "it gave no answer within"),
    ],
)
def test_a_node_that_its_mode_allows_and_the_kernel_does_not(answer, reason):
    change = {"open /dev/dri/renderD128": answer}
    rung = amiss("plain-laptop", lambda document: document["answers"].update(change)).device("intel-gpu0").failed
    assert (rung.step, reason in rung.reason) == (Step.OPENABLE, True)


def test_a_driver_without_firmware_makes_no_node():
    def change(document):
        uevent = "/sys/bus/pci/devices/0000:00:0b.0/uevent"
        document["files"][uevent] = "DRIVER=intel_vpu\n" + document["files"][uevent]

    rung = amiss("core-ultra-npu-no-driver", change).device("intel-npu0").failed
    assert rung.step is Step.DRIVER
    assert "firmware" in rung.reason

    def change_more(document):
        change(document)
        document["directories"]["/sys/bus/pci/devices/0000:00:0b.0/accel"] = ["accel0"]
        document["nodes"]["/dev/accel/accel0"] = {"mode": 0o660, "user": "root", "group": "render", "refusal": ""}

    assert amiss("core-ultra-npu-no-driver", change_more).device("intel-npu0").is_usable


def test_ascend_without_driver_tool_or_health():
    def no_driver(document):
        document["directories"]["/dev"] = ["null"]
        document["answers"]["npu-smi"] = {"failed": "it failed with FileNotFoundError: No such file or directory"}
        del document["files"]["/usr/local/Ascend/driver/version.info"]
        document["nodes"].clear()

    inventory = amiss("ascend-910b", no_driver)
    assert len(inventory.devices) == 9
    assert inventory.device("ascend7").failed.reason.startswith("no driver is installed")

    def no_tool(document):
        document["answers"]["npu-smi"] = {"failed": "it failed with FileNotFoundError: No such file or directory"}

    assert all(device.is_usable for device in amiss("ascend-910b", no_tool).devices)

    def hangs(document):
        document["answers"]["npu-smi"] = {"failed": "it gave no answer within 1.3 s"}

    assert "npu-smi hangs" in amiss("ascend-910b", hangs).device("ascend0").failed.reason

    def ill(document):
        text = document["answers"]["npu-smi"]["answer"]
        document["answers"]["npu-smi"]["answer"] = text.replace("| OK            |", "| Alarm         |", 1)

    inventory = amiss("ascend-910b", ill)
    assert "health as Alarm" in inventory.device("ascend0").failed.reason
    assert inventory.device("ascend1").is_usable

    def no_group(document):
        document["nodes"]["/dev/davinci_manager"]["refusal"] = "EACCES"
        document["identity"] |= {"groups": ["appliance"], "member_of": ["appliance"]}

    rung = amiss("ascend-910b", no_group).device("ascend3").failed
    assert "sudo usermod -aG HwHiAiUser appliance" in rung.fix


@pytest.mark.parametrize(
    ("path", "text", "problem"),
    [
        ("/proc/meminfo", "nothing", "cannot read the memory"),
        ("/proc/cpuinfo", None, "cannot read the CPU"),
        ("/proc/cpuinfo", "", None),
    ],
)
def test_a_part_that_cannot_be_read_is_a_problem_and_the_rest_is_there(path, text, problem):
    def change(document):
        if text is None:
            del document["files"][path]
        else:
            document["files"][path] = text

    inventory = amiss("rtx-workstation", change)
    assert inventory.device("nvidia0").is_usable
    assert inventory.cores == 32
    assert [one.partition(":")[0] for one in inventory.problems] == ([problem] if problem else [])


def test_a_disk_that_does_not_answer_is_a_problem():
    change = {"space /srv/appliance/models": {"failed": "it gave no answer within 1.0 s"}}
    inventory = amiss("plain-laptop", lambda document: document["answers"].update(change))
    assert [disk.purpose for disk in inventory.disks] == ["cache", "state"]
    assert inventory.problems == ("cannot read the file system of the models: it gave no answer within 1.0 s",)


@pytest.mark.parametrize("answer", [{"devices": 7}, [], {"devices": [{}]}, "text", None])
def test_garbage_from_nvml_costs_its_gpus_alone(answer):
    inventory = amiss("rtx-workstation", lambda document: document["answers"].update(nvml={"answer": answer}))
    assert inventory.devices[0].name.startswith("AMD")
    assert len(inventory.problems) == 1
    assert inventory.problems[0].startswith("cannot read the NVIDIA GPUs:")
