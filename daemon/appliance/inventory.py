"""What hardware the machine has. Parsers take text; only `read_inventory` touches the system."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: CPU feature flags worth telling apart, as Linux spells them in /proc/cpuinfo.
CPU_FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
)


@dataclass(frozen=True, slots=True)
class Device:
    """Something a backend can run on.

    Attributes:
        id: Stable id on this machine, such as ``"cpu"``.
        kind: ``"cpu"``, ``"gpu"`` or ``"npu"``.
        name: As the vendor spells it.
        memory_bytes: Memory the device can hold models in.
        features: Capabilities that decide on precision, such as ``"avx512_bf16"``.
    """

    id: str
    kind: str
    name: str
    memory_bytes: int
    features: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Inventory:
    """The machine as the daemon sees it.

    Attributes:
        devices: Usable devices; the CPU is always first.
        cores: CPU cores this process may run on.
        memory_bytes: Host memory, in bytes.
    """

    devices: tuple[Device, ...]
    cores: int
    memory_bytes: int

    def device(self, device_id: str) -> Device | None:
        """The device called `device_id`, or None."""
        return next((device for device in self.devices if device.id == device_id), None)


def parse_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """Model name and known features from the text of /proc/cpuinfo (x86: "flags", arm64: "Features")."""
    name = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(flags.group(1).split()) if flags else set()
    return (name.group(1).strip() if name else "unknown CPU"), tuple(f for f in CPU_FEATURES if f in present)


def parse_meminfo(text: str) -> int:
    """Total memory in bytes from the text of /proc/meminfo; 0 where the line is missing."""
    total = re.search(r"^MemTotal:\s*(\d+) kB$", text, re.MULTILINE)
    return int(total.group(1)) * 1024 if total else 0


def read_inventory(proc: Path = Path("/proc"), cores: Sequence[int] | None = None) -> Inventory:
    """Read the machine.

    Args:
        proc: The proc file system, or a recorded one.
        cores: Ids of the cores this process may use; by default what the scheduler allows.
    """
    name, features = parse_cpuinfo((proc / "cpuinfo").read_text(errors="replace"))
    memory = parse_meminfo((proc / "meminfo").read_text(errors="replace"))
    usable = len(cores) if cores is not None else len(os.sched_getaffinity(0))
    cpu = Device(id="cpu", kind="cpu", name=name, memory_bytes=memory, features=features)
    return Inventory(devices=(cpu,), cores=usable, memory_bytes=memory)
