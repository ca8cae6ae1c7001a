"""Intel GPUs and NPUs, from sysfs, /dev/dri and /dev/accel."""

import re
from typing import Final

from appliance.inventory import Device, Memory, Rung, Step
from appliance.inventory.ladder import climb, failed, passed
from appliance.inventory.nodes import Kind, openable
from appliance.inventory.pci import ACCELERATOR, DISPLAY, PciDevice, numa_node
from appliance.inventory.system import System, names_of, peek

_VENDOR: Final = "8086"

#: Names by PCI device number, as Intel's product pages pair them; others are shown by their number.
_GPUS: Final = {
    "3e92": "Intel UHD Graphics 630",
    "3e9b": "Intel UHD Graphics 630",
    "4680": "Intel UHD Graphics 770",
    "46a6": "Intel Iris Xe Graphics",
    "4c8a": "Intel UHD Graphics 750",
    "5917": "Intel UHD Graphics 620",
    "56a0": "Intel Arc A770 Graphics",
    "56a1": "Intel Arc A750 Graphics",
    "56a5": "Intel Arc A380 Graphics",
    "56c0": "Intel Data Center GPU Flex 170",
    "64a0": "Intel Arc Graphics 140V",
    "7d45": "Intel Graphics (Core Ultra)",
    "7d51": "Intel Arc Graphics 140T",
    "7d55": "Intel Arc Graphics (Core Ultra)",
    "9a49": "Intel Iris Xe Graphics",
    "9bc4": "Intel UHD Graphics",
    "a780": "Intel UHD Graphics 770",
    "a7a0": "Intel Iris Xe Graphics",
    "e20b": "Intel Arc B580 Graphics",
}
_NPUS: Final = {
    "7d1d": "Intel AI Boost (Meteor Lake)",
    "ad1d": "Intel AI Boost (Arrow Lake)",
    "643e": "Intel AI Boost (Lunar Lake)",
    "b03e": "Intel AI Boost (Panther Lake)",
}

_NPU_DRIVER: Final = "intel_vpu"

#: Where an integrated GPU has always been.
_INTEGRATED_AT: Final = "0000:00:02.0"
#: Address space of a prefetchable memory window, in the flags of sysfs' "resource" (linux/ioport.h: IORESOURCE_MEM and
#: IORESOURCE_PREFETCH).
_WINDOW_FLAGS: Final = 0x2200

_RENDER_NODE: Final = Kind(
    absent="give the container the device: --device /dev/dri; in a systemd unit: PrivateDevices=no",
    rule='SUBSYSTEM=="drm", KERNEL=="renderD*"',
    group="render",
)
_ACCEL_NODE: Final = Kind(
    absent="give the container the device: --device /dev/accel; in a systemd unit: PrivateDevices=no",
    rule='SUBSYSTEM=="accel", KERNEL=="accel*"',
    group="render",
)


def read_intel(system: System, bus: tuple[PciDevice, ...], memory: Memory) -> list[Device]:
    """Every Intel GPU and NPU on the bus."""
    ours = [device for device in bus if device.vendor == _VENDOR]
    gpus = [device for device in ours if device.base_class == DISPLAY]
    npus = [device for device in ours if device.base_class == ACCELERATOR and _is_npu(device)]
    found = [_gpu(system, device, f"intel-gpu{index}", memory) for index, device in enumerate(gpus)]
    return found + [_npu(system, device, f"intel-npu{index}", memory) for index, device in enumerate(npus)]


def _is_npu(device: PciDevice) -> bool:
    """Intel has other accelerators too; of an NPU newer than the table its driver tells."""
    return device.model in _NPUS or device.driver == _NPU_DRIVER


def _gpu(system: System, device: PciDevice, device_id: str, memory: Memory) -> Device:
    is_integrated = device.address == _INTEGRATED_AT
    local = 0 if is_integrated else parse_local_memory(peek(system, f"{device.path}/resource"))
    return _device(
        system,
        device,
        id=device_id,
        kind="gpu",
        name=_GPUS.get(device.model, f"Intel GPU {device.number}"),
        memory_bytes=local or memory.total,
        is_integrated=is_integrated,
        ladder=_gpu_ladder(system, device),
    )


def _npu(system: System, device: PciDevice, device_id: str, memory: Memory) -> Device:
    return _device(
        system,
        device,
        id=device_id,
        kind="npu",
        name=_NPUS.get(device.model, f"Intel NPU {device.number}"),
        memory_bytes=memory.total,
        is_integrated=True,
        ladder=_npu_ladder(system, device),
    )


def _device(
    system: System,
    device: PciDevice,
    *,
    id: str,
    kind: str,
    name: str,
    memory_bytes: int,
    is_integrated: bool,
    ladder: tuple[Rung, ...],
) -> Device:
    details = {"PCI": f"{device.number} at {device.address}"}
    if node := numa_node(system, device):
        details["NUMA node"] = node
    return Device(
        id=id,
        kind=kind,
        name=name,
        memory_bytes=memory_bytes,
        vendor="intel",
        driver=_driver(system, device),
        uuid=f"{device.number} at {device.address}",
        is_integrated=is_integrated,
        details=details,
        ladder=ladder,
    )


def _driver(system: System, device: PciDevice) -> str:
    """The driver with its version: of one that comes with the kernel, the kernel's."""
    if not device.driver:
        return ""
    own = peek(system, f"/sys/module/{device.driver}/version")
    return f"{device.driver} {own}" if own else f"{device.driver}, Linux {system.kernel()[0]}"


def _gpu_ladder(system: System, device: PciDevice) -> tuple[Rung, ...]:
    present = passed(Step.PRESENT, f"PCI {device.address}")
    if device.driver not in ("i915", "xe"):
        what = f"the driver {device.driver} is bound" if device.driver else "no driver is bound"
        return climb(
            present,
            failed(
                Step.DRIVER,
                f"{what}; i915 or xe is needed",
                "sudo modprobe i915 (xe for the newest GPUs); a kernel older than the GPU lacks both: update it",
            ),
        )
    nodes = [name for name in names_of(system, f"{device.path}/drm") if name.startswith("renderD")]
    if not nodes:
        return climb(present, _no_node(device, "drm", "linux-firmware"))
    return climb(
        present,
        passed(Step.DRIVER, _driver(system, device)),
        openable(system, _RENDER_NODE, [f"/dev/dri/{name}" for name in nodes[:1]]),
    )


def _npu_ladder(system: System, device: PciDevice) -> tuple[Rung, ...]:
    present = passed(Step.PRESENT, f"PCI {device.address}")
    if device.driver != _NPU_DRIVER:
        what = f"the driver {device.driver} is bound" if device.driver else "no driver is bound"
        return climb(
            present,
            failed(
                Step.DRIVER,
                f"{what}; intel_vpu is needed",
                "sudo modprobe intel_vpu (Linux 6.3 or newer; Ubuntu has it in linux-modules-extra), then install "
                "Intel's NPU driver packages intel-fw-npu, intel-driver-compiler-npu and intel-level-zero-npu",
            ),
        )
    nodes = [name for name in names_of(system, f"{device.path}/accel") if re.fullmatch(r"accel\d+", name)]
    if not nodes:
        return climb(present, _no_node(device, "accel", "intel-fw-npu (or linux-firmware)"))
    return climb(
        present,
        passed(Step.DRIVER, _driver(system, device)),
        openable(system, _ACCEL_NODE, [f"/dev/accel/{nodes[0]}"]),
    )


def _no_node(device: PciDevice, subsystem: str, firmware: str) -> Rung:
    return failed(
        Step.DRIVER,
        f"the driver {device.driver} is bound and made no {subsystem} node: mostly it lacks its firmware",
        f"install {firmware} and restart; the kernel's log says more: sudo dmesg | grep {device.driver}",
    )


def parse_local_memory(text: str) -> int:
    """Bytes of the largest prefetchable window of sysfs' "resource": a discrete GPU's own memory."""
    sizes = [0]
    for line in text.splitlines():
        words = line.split()
        if len(words) == 3:
            first, last, flags = (int(word, 16) for word in words)
            if flags & _WINDOW_FLAGS == _WINDOW_FLAGS:
                sizes.append(last - first + 1)
    return max(sizes)
