"""Texts of the kernel and of vendors' tools, and what is read off them."""

import pytest

from appliance.inventory.ascend import parse_npu_smi
from appliance.inventory.cgroup import Limits, parse_bytes, parse_cpu_list, parse_cpu_max, read_limits
from appliance.inventory.cpu import parse_cpuinfo, thin_cpuinfo, usable_cores
from appliance.inventory.intel import parse_local_memory
from appliance.inventory.mounts import mount_of, parse_mountinfo, thin_mountinfo
from appliance.inventory.nvidia import bus_address, parse_module_version
from appliance.inventory.pci import parse_uevent
from support.machine import Replay, recording


@pytest.mark.parametrize(
    ("text", "ids"), [("0-3,8", {0, 1, 2, 3, 8}), ("", set()), ("5\n", {5}), ("a,2-,-3", {2}), ("3-1", set())]
)
def test_lists_of_cores(text, ids):
    assert parse_cpu_list(text) == ids


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("150000 100000", 1.5),
        ("max 100000", None),
        ("-1 100000", None),
        ("", None),
        ("1 0", None),
        ("50000 100000\n", 0.5),
    ],
)
def test_quotas(text, cores):
    assert parse_cpu_max(text) == cores


@pytest.mark.parametrize(
    ("text", "limit"), [("max", 0), ("4294967296", 4294967296), ("9223372036854771712", 0), ("", 0), ("-1", 0)]
)
def test_memory_limits(text, limit):
    assert parse_bytes(text) == limit


@pytest.mark.parametrize(
    ("affinity", "limits", "cores"),
    [
        (64, Limits(), 64),
        (64, Limits(quota=1.5), 2),
        (64, Limits(quota=0.2), 1),
        (64, Limits(quota=8.0, cpus=frozenset({0, 1, 2})), 3),
        (2, Limits(quota=8.0), 2),
        (4, Limits(quota=4.0), 4),
    ],
)
def test_usable_cores_are_the_tightest_bound_rounded_up(affinity, limits, cores):
    assert usable_cores(affinity, limits) == cores


V1_MOUNTS = """\
30 23 0:25 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755
31 30 0:26 {root} /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct
32 30 0:27 {root} /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory
33 30 0:28 {root} /sys/fs/cgroup/cpuset ro - cgroup cgroup rw,cpuset
"""


def limits_of(files):
    document = recording("epyc-vm")
    document["files"] = files
    return read_limits(Replay(document))


def test_version_1_of_control_groups_as_docker_shows_them():
    """The group is named as the host sees it; its directory is what is mounted."""
    limits = limits_of(
        {
            "/proc/self/mountinfo": V1_MOUNTS.format(root="/docker/0123"),
            "/proc/self/cgroup": "5:cpu,cpuacct:/docker/0123\n4:memory:/docker/0123\n3:cpuset:/docker/0123\n",
            "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000\n",
            "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "/sys/fs/cgroup/cpuset/cpuset.cpus": "0-7\n",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes": "2147483648\n",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes": "1073741824\n",
            "/sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 536870912\n",
        }
    )
    assert limits == Limits(2.5, frozenset(range(8)), 2147483648, 1610612736)


def test_a_limit_above_our_own_group_binds_too():
    mounts = "29 23 0:26 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw\n"
    limits = limits_of(
        {
            "/proc/self/mountinfo": mounts,
            "/proc/self/cgroup": "0::/a.slice/b.service\n",
            "/sys/fs/cgroup/a.slice/b.service/cpu.max": "400000 100000\n",
            "/sys/fs/cgroup/a.slice/cpu.max": "200000 100000\n",
            "/sys/fs/cgroup/a.slice/memory.max": "max\n",
            "/sys/fs/cgroup/a.slice/b.service/memory.high": "1000\n",
            "/sys/fs/cgroup/a.slice/b.service/memory.max": "2000\n",
        }
    )
    assert limits == Limits(2.0, None, 1000, 1000)


def test_no_control_groups_at_all():
    assert limits_of({}) == Limits()


def test_blanks_in_names_of_mounts():
    text = "36 28 8:1 / /mnt/my\\040disk rw - ext4 /dev/sda1 rw\nnonsense\n28 1 8:2 / / rw - ext4 /dev/sda2 rw\n"
    mounts = parse_mountinfo(text)
    assert mount_of(mounts, "/mnt/my disk/models").source == "/dev/sda1"
    assert mount_of(mounts, "/mnt/my disks").source == "/dev/sda2"
    assert mount_of([], "/") is None


def test_a_recording_keeps_no_option_lists_and_no_serial_numbers():
    mounts = "1 0 0:1 / / rw - overlay overlay rw,lowerdir=/a:/b\n2 1 0:2 / /c rw - cgroup cgroup rw,cpu\n"
    assert thin_mountinfo(mounts) == "1 0 0:1 / / rw - overlay overlay\n2 1 0:2 / /c rw - cgroup cgroup rw,cpu\n"
    one = "processor\t: {}\nCPU implementer\t: 0x41\nCPU part\t: {}\nFeatures\t: asimd\n"
    text = "\n".join(one.format(n, "0xd05" if n < 4 else "0xd0b") for n in range(8))
    text += "\nHardware\t: Board\nSerial\t\t: 1000000012345678\nModel\t\t: Board 5\n"
    thin = thin_cpuinfo(text)
    assert "1000000012345678" not in thin
    assert "Board 5" in thin
    assert thin.count("processor") == 2
    assert parse_cpuinfo(thin).name == parse_cpuinfo(text).name == "Cortex-A55 + Cortex-A76"


def test_an_unknown_arm_core_is_named_by_its_numbers():
    text = "processor : 0\nCPU implementer : 0x41\nCPU part : 0xfff\nFeatures : asimd i8mm bf16 sve\n"
    processor = parse_cpuinfo(text)
    assert (processor.name, processor.vendor) == ("ARM part 0xfff", "ARM")
    assert processor.features == ("asimd", "i8mm", "bf16", "sve")
    assert parse_cpuinfo("").name == "unknown CPU"


def test_threads_are_counted_by_packages():
    document = recording("amx-server")
    processor = parse_cpuinfo(document["files"]["/proc/cpuinfo"])
    assert (processor.sockets, processor.cores, processor.threads) == (2, 112, 224)


def test_pci_functions():
    device = parse_uevent("0000:01:00.0", "DRIVER=nvidia\nPCI_CLASS=30000\nPCI_ID=10DE:2684\n")
    assert (device.vendor, device.model, device.base_class, device.driver) == ("10de", "2684", "03", "nvidia")
    assert parse_uevent("0000:00:0b.0", "PCI_CLASS=120000\nPCI_ID=8086:7D1D\n").base_class == "12"
    assert parse_uevent("x", "garbage") is None


def test_a_discrete_gpu_s_memory_is_its_largest_prefetchable_window():
    text = (
        "0x00000000a1000000 0x00000000a1ffffff 0x0000000000140204\n"
        "0x0000000000000000 0x0000000000000000 0x0000000000000000\n"
        "0x0000006000000000 0x00000063ffffffff 0x000000000014220c\n"
    )
    assert parse_local_memory(text) == 16 << 30
    assert parse_local_memory("") == 0


def test_nvidia_s_module_version_and_addresses():
    closed = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.90.07  Fri May 31 09:35:42 UTC 2024\n"
    opened = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder)\n"
    assert parse_module_version(closed) == "550.90.07"
    assert parse_module_version(opened) == "570.86.15"
    assert parse_module_version("") == ""
    assert bus_address("00000000:4A:00.0") == "0000:4a:00.0"


SMI_310P = """\
+--------------------------------------------------------------------------------------------------------+
| npu-smi 23.0.0                                   Version: 23.0.0                                       |
+-------------------------------+-----------------+------------------------------------------------------+
| NPU     Name                  | Health          | Power(W)     Temp(C)           Hugepages-Usage(page) |
| Chip    Device                | Bus-Id          | AICore(%)    Memory-Usage(MB)                        |
+===============================+=================+======================================================+
| 1       310P3                 | OK              | NA           44                0     / 0             |
| 0       0                     | 0000:01:00.0    | 0            1629 / 21534                            |
+===============================+=================+======================================================+
"""


def test_npu_smi_of_a_card_without_hbm():
    version, (npu,) = parse_npu_smi(SMI_310P)
    assert (version, npu.name, npu.health, npu.bus) == ("23.0.0", "310P3", "OK", "0000:01:00.0")
    assert (npu.memory_bytes, npu.used_bytes, npu.power) == (21534 << 20, 1629 << 20, "NA")


@pytest.mark.parametrize("text", ["", "garbage\n| | |\n", "dcmi module initialize failed. ret is -8005"])
def test_npu_smi_that_says_nothing(text):
    assert parse_npu_smi(text) == ("", [])
