"""Huawei Ascend NPUs: device nodes, driver files, and what ``npu-smi info`` prints."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from appliance.inventory import Device, Rung, Step
from appliance.inventory.fork import NoAnswer
from appliance.inventory.ladder import climb, failed, passed
from appliance.inventory.nodes import Kind, openable
from appliance.inventory.pci import ACCELERATOR, PciDevice
from appliance.inventory.system import System, Waiter, names_of, peek

_VENDOR: Final = "19e5"
_NODES: Final = ("/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc")
_DRIVER: Final = "/usr/local/Ascend/driver"
_TOOL_SECONDS: Final = 30.0

_NODE: Final = Kind(
    absent=(
        "in a container: --device /dev/davinci0 --device /dev/davinci_manager --device /dev/devmm_svm "
        "--device /dev/hisi_hdc (or the Ascend Docker runtime); in a systemd unit: PrivateDevices=no"
    ),
    unruled="install the driver with --install-for-all, or run the daemon with the group HwHiAiUser",
    is_opened=False,
)


@dataclass(frozen=True, slots=True)
class Npu:
    """One chip as npu-smi shows it.

    Attributes:
        number: NPU id, by which CANN counts.
        name: Such as ``"910B3"``.
        health: ``"OK"``, ``"Warning"``, ``"Alarm"``, ``"Critical"`` or something else.
        bus: Bus address.
        memory_bytes: Its own memory.
        used_bytes: What of that is in use.
        power: In watts, as text.
        temperature: In °C, as text.
    """

    number: int
    name: str
    health: str
    bus: str
    memory_bytes: int
    used_bytes: int
    power: str
    temperature: str


_HEAD: Final = re.compile(r"^\| +(\d+) +(\S+) +\| +(\S+) +\| +(\S+) +(\S+) .*\|$")
_CHIP: Final = re.compile(r"^\| +\d+ .*\| +([0-9A-Fa-f]{4}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.\d) +\| +\S+ +(.*)\|$")
_PAIR: Final = re.compile(r"(\d+) */ *(\d+)")


def parse_npu_smi(text: str) -> tuple[str, list[Npu]]:
    """Version and chips from what ``npu-smi info`` prints: two lines for each chip, a table of processes after them."""
    version = re.search(r"Version: *(\S+)", text)
    found: list[Npu] = []
    head: re.Match[str] | None = None
    for line in text.splitlines():
        if "Process id" in line:
            break
        if chip := _CHIP.match(line):
            # AICore, then host memory of the chip, then HBM where it has any: the last pair is its own memory.
            pairs = _PAIR.findall(chip[2])
            used, total = max(((int(u), int(t)) for u, t in pairs), key=lambda pair: pair[1], default=(0, 0))
            if head is not None:
                found.append(
                    Npu(len(found), head[2], head[3], chip[1].lower(), total << 20, used << 20, head[4], head[5])
                )
        elif match := _HEAD.match(line):
            head = match
    return (version[1] if version else ""), found


def parse_version(text: str) -> str:
    """The driver's version from the text of its version.info; empty where it says none."""
    found = re.search(r"^Version=(\S+)", text, re.MULTILINE)
    return found[1] if found else ""


def run_npu_smi(_: str) -> str:
    """What ``npu-smi info`` prints; a question for `Live.ask`, which sets the time limit.

    Raises:
        OSError: There is no such program.
        ValueError: It ended with an error.
    """
    import subprocess  # late: few machines need it, and a survey is to be quick

    libraries = ":".join(f"{_DRIVER}/lib64/{name}" for name in ("", "common", "driver"))
    environment = {
        **os.environ,
        "PATH": f"{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/local/bin:/usr/local/sbin:{_DRIVER}/tools",
        "LD_LIBRARY_PATH": f"{os.environ.get('LD_LIBRARY_PATH', '')}:{libraries}".lstrip(":"),
    }
    command = ["/usr/bin/env", "npu-smi", "info"]
    ended = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=_TOOL_SECONDS, check=False, errors="replace"
    )
    if ended.returncode != 0:
        last = (ended.stdout + ended.stderr).strip().splitlines()
        raise ValueError(f"npu-smi ended with status {ended.returncode}: {last[-1] if last else 'no output'}")
    return ended.stdout


@dataclass(frozen=True, slots=True)
class Asked:
    """What is under way.

    Attributes:
        on_bus: Ascend NPUs on the bus.
        numbers: Those of the device nodes.
        waiter: Waits for npu-smi; None where there is no sign of Ascend.
    """

    on_bus: tuple[PciDevice, ...]
    numbers: tuple[int, ...]
    waiter: Waiter | None


def begin(system: System, bus: tuple[PciDevice, ...]) -> Asked:
    """Begin to ask npu-smi, where there is any sign of Ascend."""
    npus = tuple(device for device in bus if device.vendor == _VENDOR and device.base_class == ACCELERATOR)
    matches = (re.fullmatch(r"davinci(\d+)", name) for name in names_of(system, "/dev"))
    numbers = tuple(sorted(int(match[1]) for match in matches if match))
    return Asked(npus, numbers, system.ask("npu-smi") if npus or numbers else None)


def finish(system: System, asked: Asked) -> list[Device]:
    """Every Ascend NPU, numbered as CANN and npu-smi number them."""
    if asked.waiter is None:
        return []
    tool, silence = "", ""
    chips: list[Npu] = []
    try:
        tool, chips = parse_npu_smi(str(asked.waiter()))
    except NoAnswer as error:
        silence = str(error)
    driver = parse_version(peek(system, f"{_DRIVER}/version.info")) or tool
    if not chips:
        numbers = asked.numbers or tuple(range(len(asked.on_bus)))
        return [_unknown(system, number, driver, asked, silence) for number in numbers]
    numbers_of = {device.address: device.number for device in asked.on_bus}
    return [_known(system, chip, driver, numbers_of.get(chip.bus, "")) for chip in chips]


def _known(system: System, chip: Npu, driver: str, number: str) -> Device:
    details: Mapping[str, Any] = {
        "PCI": f"{number} at {chip.bus}".removeprefix(" at "),
        "health": chip.health,
        "temperature": f"{chip.temperature} °C",
        "power": f"{chip.power} W",
        "memory in use": f"{chip.used_bytes / 2**20:.0f} MiB",
    }
    return Device(
        id=f"ascend{chip.number}",
        kind="npu",
        name=f"Ascend {chip.name}",
        memory_bytes=chip.memory_bytes,
        vendor="huawei",
        driver=driver,
        uuid=f"{chip.name} at {chip.bus}",
        details=details,
        ladder=climb(passed(Step.PRESENT, f"PCI {chip.bus}"), _health(chip, driver), _nodes(system, chip.number)),
    )


def _health(chip: Npu, driver: str) -> Rung:
    if chip.health in ("Alarm", "Critical"):
        return failed(
            Step.DRIVER,
            f"the driver reports the NPU's health as {chip.health}",
            f"npu-smi info -t health -i {chip.number} names the fault; a cold start of the machine often clears it",
        )
    return passed(Step.DRIVER, driver)


def _nodes(system: System, number: int) -> Rung:
    return openable(system, _NODE, [f"/dev/davinci{number}", *_NODES])


def _unknown(system: System, number: int, driver: str, asked: Asked, silence: str) -> Device:
    """An NPU that npu-smi does not describe."""
    present = passed(Step.PRESENT, "on the PCI bus" if asked.on_bus else f"/dev/davinci{number}")
    if not asked.numbers and not driver:
        rung = failed(
            Step.DRIVER,
            "no driver is installed: there is neither a /dev/davinci node nor a version file of the driver",
            "install Huawei's driver and firmware packages (Ascend-hdk-*-npu-driver and -npu-firmware) and restart",
        )
    elif not asked.numbers:
        rung = failed(Step.DRIVER, f"the driver {driver} made no /dev/davinci node", _NODE.absent)
    elif "no answer within" in silence:
        rung = failed(
            Step.DRIVER,
            f"the driver does not answer: npu-smi hangs; {silence}",
            "look at sudo dmesg and the logs below /var/log/npu, and restart the machine",
        )
    else:
        # The nodes are what counts: containers are often given them without the tool.
        rung = passed(Step.DRIVER, f"{driver or 'version unknown'}; npu-smi says nothing")
    return Device(
        id=f"ascend{number}",
        kind="npu",
        name="Ascend NPU",
        memory_bytes=0,
        vendor="huawei",
        driver=driver,
        details={"npu-smi": silence} if silence else {},
        ladder=climb(present, rung, _nodes(system, number)) if rung.passed else climb(present, rung),
    )
