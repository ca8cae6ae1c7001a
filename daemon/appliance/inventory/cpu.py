"""The CPU. Parsers take text; `read_inventory` is what the daemon can read of a machine without any driver's help."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from appliance.inventory import Device, Inventory, Memory, Step
from appliance.inventory.cgroup import Limits, parse_cpu_list, read_limits
from appliance.inventory.ladder import climb, passed
from appliance.inventory.memory import read_memory
from appliance.inventory.system import Live, System, names_of, peek

#: CPU features worth telling apart, as Linux spells them in /proc/cpuinfo: x86 first, then arm64.
CPU_FEATURES: Final = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimdhp",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)

_IMPLEMENTERS: Final = {0x41: "ARM", 0x48: "HiSilicon", 0x4E: "NVIDIA", 0x51: "Qualcomm", 0x61: "Apple", 0xC0: "Ampere"}

#: arm64 cores by implementer and part (MIDR_EL1), as the vendors' reference manuals number them.
_PARTS: Final = {
    (0x41, 0xD03): "Cortex-A53",
    (0x41, 0xD05): "Cortex-A55",
    (0x41, 0xD07): "Cortex-A57",
    (0x41, 0xD08): "Cortex-A72",
    (0x41, 0xD09): "Cortex-A73",
    (0x41, 0xD0A): "Cortex-A75",
    (0x41, 0xD0B): "Cortex-A76",
    (0x41, 0xD0C): "Neoverse-N1",
    (0x41, 0xD0D): "Cortex-A77",
    (0x41, 0xD40): "Neoverse-V1",
    (0x41, 0xD41): "Cortex-A78",
    (0x41, 0xD42): "Cortex-A78AE",
    (0x41, 0xD44): "Cortex-X1",
    (0x41, 0xD46): "Cortex-A510",
    (0x41, 0xD47): "Cortex-A710",
    (0x41, 0xD48): "Cortex-X2",
    (0x41, 0xD49): "Neoverse-N2",
    (0x41, 0xD4D): "Cortex-A715",
    (0x41, 0xD4E): "Cortex-X3",
    (0x41, 0xD4F): "Neoverse-V2",
    (0x41, 0xD80): "Cortex-A520",
    (0x41, 0xD81): "Cortex-A720",
    (0x41, 0xD82): "Cortex-X4",
    (0x48, 0xD01): "Kunpeng-920",
    (0x4E, 0x004): "Carmel",
    (0x51, 0x001): "Oryon",
    (0xC0, 0xAC3): "Ampere-1",
    (0xC0, 0xAC4): "Ampere-1a",
}


@dataclass(frozen=True, slots=True)
class Processor:
    """What /proc/cpuinfo says.

    Attributes:
        name: As the vendor spells it; of arm64 the cores' names.
        vendor: x86: what CPUID says; arm64: who designed the cores.
        features: Those of `CPU_FEATURES` it has.
        sockets: Packages; 0 where unknown.
        cores: Physical cores of all packages; 0 where unknown.
        threads: Hardware threads of all packages.
    """

    name: str
    vendor: str
    features: tuple[str, ...]
    sockets: int
    cores: int
    threads: int


def parse_cpuinfo(text: str) -> Processor:
    """The processor from the text of /proc/cpuinfo.

    Cores and threads are counted by packages, so that one block for each package is enough.
    """
    blocks = [_values(block) for block in re.split(r"\n\s*\n", text)]
    blocks = [block for block in blocks if "processor" in block]
    flags = next((block[key] for block in blocks for key in ("flags", "Features") if key in block), "")
    features = tuple(name for name in CPU_FEATURES if name in flags.split())
    packages = {block["physical id"]: block for block in blocks if "physical id" in block}
    cores = sum(_number(block.get("cpu cores", "")) for block in packages.values())
    threads = sum(_number(block.get("siblings", "")) for block in packages.values()) or len(blocks)
    first = blocks[0] if blocks else {}
    if "CPU implementer" in first:
        name, vendor = _arm_name(blocks)
    else:
        name, vendor = first.get("model name") or "unknown CPU", first.get("vendor_id", "")
    return Processor(" ".join(name.split()), vendor, features, len(packages), cores, threads)


def _values(block: str) -> dict[str, str]:
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0


def _arm_name(blocks: list[dict[str, str]]) -> tuple[str, str]:
    """Names of the kinds of cores, and of who designed the first."""
    names: list[str] = []
    vendors: list[str] = []
    for block in blocks:
        try:
            implementer, part = int(block["CPU implementer"], 16), int(block["CPU part"], 16)
        except (KeyError, ValueError):
            continue
        vendor = _IMPLEMENTERS.get(implementer, f"implementer {implementer:#x}")
        name = _PARTS.get((implementer, part), f"{vendor} part {part:#x}")
        if name not in names:
            names.append(name)
            vendors.append(vendor)
    return " + ".join(names) or "unknown CPU", vendors[0] if vendors else ""


def thin_cpuinfo(text: str) -> str:
    """The same with one block for each package and kind of core, and without serial numbers: what a recording needs."""
    kept: dict[tuple[str, ...], str] = {}
    for block in re.split(r"\n\s*\n", text.strip()):
        values = _values(block)
        key = (values.get("physical id", ""), values.get("CPU part", ""), str("processor" in values))
        kept.setdefault(key, re.sub(r"^Serial\s*:.*\n?", "", block, flags=re.MULTILINE))
    return "\n\n".join(kept.values()) + "\n"


def usable_cores(affinity: int, limits: Limits) -> int:
    """Cores this process may use: the tightest of its affinity, the cpuset and the quota, rounded up, at least 1."""
    bounds: list[float] = [affinity]
    if limits.cpus is not None:
        bounds.append(len(limits.cpus))
    if limits.quota is not None:
        bounds.append(limits.quota)
    return max(math.ceil(min(bounds)), 1)


def read_cpu(system: System, limits: Limits, memory: Memory) -> Device:
    """The CPU as a device.

    Raises:
        OSError: /proc/cpuinfo cannot be read.
    """
    processor = parse_cpuinfo(system.read("/proc/cpuinfo"))
    online = len(parse_cpu_list(peek(system, "/sys/devices/system/cpu/online")))
    affinity = system.affinity()
    return Device(
        id="cpu",
        kind="cpu",
        name=processor.name,
        memory_bytes=memory.total,
        features=processor.features,
        vendor=processor.vendor,
        cores=usable_cores(len(affinity), limits),
        details=_details(system, processor, online or processor.threads, len(affinity), limits),
        ladder=climb(passed(Step.PRESENT)),
    )


def _details(system: System, processor: Processor, threads: int, affinity: int, limits: Limits) -> Mapping[str, str]:
    details = {"cores": str(processor.cores or threads), "threads": str(threads)}
    if processor.sockets:
        details["sockets"] = str(processor.sockets)
    nodes = [name for name in names_of(system, "/sys/devices/system/node") if re.fullmatch(r"node\d+", name)]
    if len(nodes) > 1:
        nodes.sort(key=lambda name: int(name[4:]))
        lists = ((name, peek(system, f"/sys/devices/system/node/{name}/cpulist")) for name in nodes)
        details["NUMA nodes"] = "; ".join(f"{name[4:]}: {ids}" for name, ids in lists)
    for name, directory in (("performance cores", "cpu_core"), ("efficiency cores", "cpu_atom")):
        if ids := peek(system, f"/sys/devices/{directory}/cpus"):
            details[name] = f"threads {ids}"
    if limits.quota is not None:
        details["quota"] = f"{limits.quota:g} cores"
    if limits.cpus is not None and len(limits.cpus) < threads:
        details["cpuset"] = f"{len(limits.cpus)} of {threads} threads"
    if affinity < threads:
        details["affinity"] = f"{affinity} of {threads} threads"
    return details


def bare_inventory(system: System) -> Inventory:
    """CPU and memory alone.

    Raises:
        OSError, ValueError: /proc cannot be read.
    """
    limits = read_limits(system)
    memory = read_memory(system, limits)
    cpu = read_cpu(system, limits, memory)
    return Inventory(devices=(cpu,), cores=cpu.cores, memory_bytes=memory.total, memory=memory)


def read_inventory() -> Inventory:
    """CPU and memory of this machine, read here and now: kernel files only, which neither hang nor crash.

    Raises:
        OSError, ValueError: /proc cannot be read.
    """
    return bare_inventory(Live())
