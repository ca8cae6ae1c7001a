"""NVIDIA GPUs: what the bus and the kernel module show, and what NVML adds.

NVML's answer (`appliance.inventory.nvml.ask`) of a device: ``index``, ``bus``, ``minor``, ``name``, ``uuid``,
``memory_bytes``, ``used_bytes``, ``capability``, ``temperature_c``, ``power_mw``, ``power_limit_mw``, ``processes``
(``pid``, ``name``, ``used_bytes``), ``is_mig``, ``instances`` (``index``, ``name``, ``uuid``, ``memory_bytes``,
``gpu_instance``, ``compute_instance``).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from appliance.inventory import Device, Rung, Step
from appliance.inventory.fork import NoAnswer
from appliance.inventory.ladder import climb, failed, passed
from appliance.inventory.nodes import Kind, openable
from appliance.inventory.nvidia_trouble import UNLISTED, library_trouble, refusal_trouble, unbound
from appliance.inventory.pci import DISPLAY, PciDevice, numa_node
from appliance.inventory.system import System, Waiter, peek

_VENDOR: Final = "10de"
_MODULE_VERSION: Final = "/proc/driver/nvidia/version"

#: Signs of a driver where the bus cannot be seen: the module's own file, its node, and that of WSL.
_SIGNS: Final = (_MODULE_VERSION, "/dev/nvidiactl", "/dev/dxg")

_GPU_NODE: Final = Kind(
    absent=(
        "in a container: --gpus all (NVIDIA Container Toolkit); in a systemd unit: PrivateDevices=no; on the host: "
        "sudo nvidia-modprobe -c 0 -u"
    ),
    unruled=(
        "NVIDIA's module makes its nodes itself: set options nvidia NVreg_DeviceFileMode=0666 in "
        "/etc/modprobe.d/nvidia.conf and restart"
    ),
    is_opened=False,
)
_CONTROL_NODE: Final = Kind(absent=_GPU_NODE.absent, unruled=_GPU_NODE.unruled)
_PART_NODE: Final = Kind(
    absent="let the container or unit have the instance's nodes below /dev/nvidia-caps",
    unruled="let everybody read the instance's nodes: sudo chmod a+r /dev/nvidia-caps/*",
    is_opened=False,
    is_read_only=True,
)


@dataclass(frozen=True, slots=True)
class Asked:
    """What is under way.

    Attributes:
        on_bus: NVIDIA's GPUs on the bus.
        waiter: Waits for NVML; None where nothing of NVIDIA's is to be seen.
    """

    on_bus: tuple[PciDevice, ...]
    waiter: Waiter | None


def begin(system: System, bus: tuple[PciDevice, ...], daemon: int) -> Asked:
    """Begin to ask NVML, where there is any sign of NVIDIA.

    Args:
        system: The machine.
        bus: What is on the bus.
        daemon: Process id whose children are ours.
    """
    gpus = tuple(device for device in bus if device.vendor == _VENDOR and device.base_class == DISPLAY)
    has_driver = any(device.driver == "nvidia" for device in gpus) or any(_exists(system, path) for path in _SIGNS)
    return Asked(gpus, system.ask("nvml", str(daemon)) if has_driver else None)


def _exists(system: System, path: str) -> bool:
    try:
        system.node(path)
    except OSError:
        return False
    return True


def finish(system: System, asked: Asked) -> list[Device]:
    """Every NVIDIA GPU and MIG instance, in order of bus addresses."""
    trouble: Rung | None = None
    answer: Mapping[str, Any] = {}
    if asked.waiter is not None:
        try:
            answer = asked.waiter()
        except NoAnswer as silence:
            trouble = library_trouble(str(silence))
    if refused := answer.get("refused"):
        trouble = refusal_trouble(refused, parse_module_version(peek(system, _MODULE_VERSION)))
    on_bus = {device.address: device for device in asked.on_bus}
    known = _placed(answer.get("devices", ()), on_bus)
    devices: list[Device] = []
    for index, address in enumerate(sorted(on_bus.keys() | known.keys())):
        gpu = _Gpu(system, f"nvidia{index}", address, on_bus.get(address), answer)
        devices += gpu.devices(known.get(address), trouble)
    return devices


def _placed(described: Sequence[Mapping[str, Any]], on_bus: Mapping[str, PciDevice]) -> dict[str, Mapping[str, Any]]:
    """What NVML describes, by bus address. Of a GPU that the driver lost it tells none: such are the ones left over."""
    known = {bus_address(each["bus"]): each for each in described if "bus" in each}
    left = [address for address, device in on_bus.items() if device.driver == "nvidia" and address not in known]
    lost = [each for each in described if "bus" not in each]
    known.update(zip(left, lost, strict=False))
    return known | {f"nvml {each['index']}": each for each in lost[len(left) :]}


def bus_address(text: str) -> str:
    """NVML's ``"00000000:01:00.0"`` as sysfs writes it."""
    return text.lower()[-12:]


def parse_module_version(text: str) -> str:
    """Version of the loaded kernel module, from the text of /proc/driver/nvidia/version; empty where it says none."""
    found = re.search(r"Kernel Module(?: for \S+)?\s+(\d+(?:\.\d+)+)", text)
    return found[1] if found else ""


@dataclass(frozen=True, slots=True)
class _Gpu:
    """One GPU in the making."""

    system: System
    id: str
    address: str
    on_bus: PciDevice | None
    answer: Mapping[str, Any]

    def devices(self, values: Mapping[str, Any] | None, trouble: Rung | None) -> list[Device]:
        present = passed(Step.PRESENT, f"PCI {self.address}" if self.on_bus else "known to the driver")
        if values is None:
            return [self._bare(climb(present, *self._why_unknown(trouble)))]
        if refused := values.get("refused"):
            return [self._bare(climb(present, *self._refused(refused)))]
        driver = passed(Step.DRIVER, f"nvidia {self.answer.get('driver', '')}".strip())
        nodes = openable(self.system, _GPU_NODE, self._nodes(values))
        if nodes.passed:
            nodes = self._with_control(nodes)
        if not values.get("is_mig"):
            return [self._device(values, climb(present, driver, nodes))]
        instances = [self._instance(values, part, (present, driver, nodes)) for part in values.get("instances", ())]
        return instances or [self._device(values, climb(present, driver, nodes, _no_instances(values)))]

    def _why_unknown(self, trouble: Rung | None) -> tuple[Rung, ...]:
        """Why NVML does not know a GPU that is on the bus."""
        driver = self.on_bus.driver if self.on_bus else ""
        if driver != "nvidia":
            return (unbound(driver),)
        if trouble is None:
            return (failed(Step.DRIVER, *UNLISTED),)
        return self._with_driver(trouble)

    def _refused(self, refused: Mapping[str, Any]) -> tuple[Rung, ...]:
        return self._with_driver(refusal_trouble(refused, self._module_version()))

    def _with_driver(self, trouble: Rung) -> tuple[Rung, ...]:
        """The rungs from DRIVER up to `trouble`; of a node that may not be opened the mode says more than NVML does."""
        if trouble.step is not Step.OPENABLE:
            return (trouble,)
        nodes = openable(self.system, _CONTROL_NODE, ["/dev/nvidiactl"])
        return passed(Step.DRIVER, f"nvidia {self._module_version()}".strip()), trouble if nodes.passed else nodes

    def _nodes(self, values: Mapping[str, Any]) -> list[str]:
        minor = values.get("minor")
        return [] if minor is None or _exists(self.system, "/dev/dxg") else [f"/dev/nvidia{minor}"]

    def _with_control(self, nodes: Rung) -> Rung:
        """NVML is content with the GPU's node; CUDA needs two more, which a set-user-id tool makes on first use."""
        if _exists(self.system, "/dev/dxg"):
            return passed(Step.OPENABLE, "/dev/dxg")
        rung = openable(self.system, _CONTROL_NODE, ["/dev/nvidiactl"])
        if not rung.passed:
            return rung
        can_be_made = _exists(self.system, "/usr/bin/nvidia-modprobe") and not re.search(
            r"^NoNewPrivs:\s*1$", peek(self.system, "/proc/self/status"), re.MULTILINE
        )
        if not _exists(self.system, "/dev/nvidia-uvm") and can_be_made:
            return passed(Step.OPENABLE, f"{nodes.reason}; CUDA makes /dev/nvidia-uvm on first use")
        uvm = openable(self.system, _GPU_NODE, ["/dev/nvidia-uvm"])
        return nodes if uvm.passed else uvm

    def _bare(self, ladder: tuple[Rung, ...]) -> Device:
        """A GPU that NVML does not describe."""
        told = peek(self.system, f"/proc/driver/nvidia/gpus/{self.address}/information")
        model = re.search(r"^Model:\s*(.+)$", told, re.MULTILINE)
        number = f" {self.on_bus.number}" if self.on_bus else ""
        driver = "" if self.on_bus is None or self.on_bus.driver != "nvidia" else self._module_version()
        return Device(
            id=self.id,
            kind="gpu",
            name=model[1].strip() if model else f"NVIDIA GPU{number}",
            memory_bytes=0,
            vendor="nvidia",
            driver=driver,
            uuid=f"{self.on_bus.number} at {self.address}" if self.on_bus else "",
            details=self._place(),
            ladder=ladder,
        )

    def _module_version(self) -> str:
        return parse_module_version(peek(self.system, _MODULE_VERSION))

    def _place(self) -> dict[str, str]:
        details = {}
        if self.on_bus is not None:
            details["PCI"] = f"{self.on_bus.number} at {self.address}"
            if node := numa_node(self.system, self.on_bus):
                details["NUMA node"] = node
        return details

    def _device(self, values: Mapping[str, Any], ladder: tuple[Rung, ...]) -> Device:
        return Device(
            id=self.id,
            kind="gpu",
            name=values["name"],
            memory_bytes=values["memory_bytes"],
            features=_features(values),
            vendor="nvidia",
            driver=str(self.answer.get("driver", "")),
            uuid=values["uuid"],
            details=self._details(values),
            ladder=ladder,
        )

    def _instance(self, gpu: Mapping[str, Any], part: Mapping[str, Any], rungs: tuple[Rung, ...]) -> Device:
        """A part of a GPU that CUDA sees as a device of its own; the whole it cannot see."""
        if refused := part.get("refused"):
            ladder = climb(rungs[0], *self._refused(refused))
        else:
            ladder = climb(*rungs[:-1], self._part_nodes(gpu, part, rungs[-1]))
        return Device(
            id=f"{self.id}-mig{part['index']}",
            kind="gpu",
            name=part.get("name", f"MIG instance of {gpu['name']}"),
            memory_bytes=part.get("memory_bytes", 0),
            features=_features(gpu),
            vendor="nvidia",
            driver=str(self.answer.get("driver", "")),
            uuid=part.get("uuid", ""),
            details={
                "part of": f"{gpu['name']}, {gpu['uuid']}",
                **self._details({**gpu, "used_bytes": part.get("used_bytes")}),
            },
            ladder=ladder,
        )

    def _part_nodes(self, gpu: Mapping[str, Any], part: Mapping[str, Any], nodes: Rung) -> Rung:
        """The rung OPENABLE of an instance, which has nodes of its own, named by files of the kernel module."""
        base = f"/proc/driver/nvidia/capabilities/gpu{gpu.get('minor')}/mig/gi{part.get('gpu_instance')}"
        paths = []
        for path in (f"{base}/access", f"{base}/ci{part.get('compute_instance')}/access"):
            if minor := re.search(r"^DeviceFileMinor:\s*(\d+)$", peek(self.system, path), re.MULTILINE):
                paths.append(f"/dev/nvidia-caps/nvidia-cap{minor[1]}")
        if not nodes.passed or not paths:
            return nodes
        parts = openable(self.system, _PART_NODE, paths)
        return passed(Step.OPENABLE, f"{nodes.reason}, {parts.reason}") if parts.passed else parts

    def _details(self, values: Mapping[str, Any]) -> dict[str, str]:
        details = self._place()
        if cuda := self.answer.get("cuda"):
            details["CUDA"] = f"up to {cuda}"
        if "temperature_c" in values:
            details["temperature"] = f"{values['temperature_c']} °C"
        if "power_mw" in values:
            limit = f" of {values['power_limit_mw'] / 1000:.0f} W" if "power_limit_mw" in values else ""
            details["power"] = f"{values['power_mw'] / 1000:.0f} W{limit}"
        if values.get("used_bytes"):
            details["memory in use"] = f"{values['used_bytes'] / 2**20:.0f} MiB"
        if others := values.get("processes"):
            details["other processes"] = ", ".join(map(_process, others[:4])) + (" …" if len(others) > 4 else "")
        return details


def _features(values: Mapping[str, Any]) -> tuple[str, ...]:
    capability = values.get("capability")
    return (f"sm_{capability[0]}{capability[1]}",) if capability else ()


def _process(process: Mapping[str, Any]) -> str:
    used = f" {process['used_bytes'] / 2**20:.0f} MiB" if process["used_bytes"] else ""
    return f"{process['name'] or 'unknown'} ({process['pid']}){used}"


def _no_instances(values: Mapping[str, Any]) -> Rung:
    return failed(
        Step.LISTED,
        "MIG mode is on and no instance was made, so CUDA lists nothing",
        "make one, as in sudo nvidia-smi mig -cgi 0 -C, or turn the mode off: sudo nvidia-smi -i "
        f"{values['index']} -mig 0",
    )
