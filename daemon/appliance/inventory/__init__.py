"""What hardware the machine has, and how far each device can be used. Values; `appliance.inventory.survey` reads them.

A device climbs a ladder: it is on the bus, has a driver, its node can be opened by the service's user, a runtime lists
it, and a smoke computation passes on it. *Present* is not *usable*, and each rung says why it failed and what helps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Step(StrEnum):
    """Rungs of the ladder, lowest first. The first three are read off the system, the others come from backends."""

    PRESENT = "present"
    DRIVER = "driver"
    OPENABLE = "openable"
    LISTED = "listed"
    SMOKE = "smoke-tested"


@dataclass(frozen=True, slots=True)
class Rung:
    """One step of a device's ladder.

    Attributes:
        step: Which.
        passed: None where it was not tried, since a lower rung failed or no backend has asked yet.
        reason: What was found, such as the driver's version, or why the step failed.
        fix: What a person can do about a failed step; empty for a passed one.
    """

    step: Step
    passed: bool | None
    reason: str = ""
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Device:
    """Something a backend may run on.

    Attributes:
        id: Short and stable while the hardware stays: ``"cpu"``, ``"nvidia0"``, ``"nvidia0-mig1"``, ``"intel-gpu0"``,
            ``"intel-npu0"``, ``"ascend0"``; numbered in order of the bus address.
        kind: ``"cpu"``, ``"gpu"`` or ``"npu"``.
        name: As the vendor spells it.
        memory_bytes: Memory the device can hold models in; of an integrated GPU or NPU the host's.
        features: Capabilities that decide on precision, such as ``"avx512_bf16"``; of NVIDIA GPUs such as ``"sm_89"``.
        vendor: ``"nvidia"``, ``"intel"``, ``"huawei"``; of a CPU what /proc/cpuinfo says, such as ``"AuthenticAMD"``.
        driver: Version of its driver; empty for a CPU, or where there is none.
        uuid: The device's own identity where it has one, such as an NVIDIA UUID or a bus address.
        cores: CPU cores that may be used; 0 for other devices.
        is_integrated: True where it shares the host's memory.
        details: Further facts for people, by name: temperature, power, MIG profile, NUMA nodes.
        ladder: The rungs, lowest first.
    """

    id: str
    kind: str
    name: str
    memory_bytes: int
    features: tuple[str, ...] = ()
    vendor: str = ""
    driver: str = ""
    uuid: str = ""
    cores: int = 0
    is_integrated: bool = False
    details: Mapping[str, str] = field(default_factory=dict)
    ladder: tuple[Rung, ...] = ()

    @property
    def failed(self) -> Rung | None:
        """The lowest rung that failed, or None."""
        return next((rung for rung in self.ladder if rung.passed is False), None)

    @property
    def is_usable(self) -> bool:
        """True where no rung failed."""
        return self.failed is None

    @property
    def identity(self) -> str:
        """What a measurement on this device is good for: its uuid, or its name where it has none."""
        return self.uuid or (f"{self.name}, {self.cores} cores" if self.kind == "cpu" else self.name)

    @property
    def driver_key(self) -> str:
        """What a measurement depends on besides the device itself: its driver, or a CPU's features."""
        return self.driver or " ".join(self.features)


@dataclass(frozen=True, slots=True)
class Memory:
    """The host's memory, in bytes; 0 where unknown.

    Attributes:
        total: What this process may use: the machine's, or its control group's limit where that is lower.
        machine: What the machine has.
        limit: The control group's limit; 0 for none.
        available: What can be had without swapping.
        huge_page_bytes: Size of a huge page.
        huge_pages: How many are reserved.
    """

    total: int = 0
    machine: int = 0
    limit: int = 0
    available: int = 0
    huge_page_bytes: int = 0
    huge_pages: int = 0


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system that holds models or what is made of them.

    Attributes:
        purpose: ``"models"``, ``"cache"`` or ``"state"``.
        path: The directory asked about.
        device: Block device, such as ``"nvme0n1"``, or the file system's name.
        file_system: Such as ``"ext4"``.
        total_bytes: Size.
        free_bytes: What the service's user may still write.
        is_rotational: True for a disk that turns; None where unknown.
    """

    purpose: str
    path: str
    device: str
    file_system: str
    total_bytes: int
    free_bytes: int
    is_rotational: bool | None = None


@dataclass(frozen=True, slots=True)
class Inventory:
    """The machine as the daemon sees it.

    Attributes:
        devices: Every device found, usable or not; the CPU is always first.
        cores: CPU cores this process may use, rounded up: affinity, control group's cpuset and quota taken together.
        memory_bytes: `Memory.total`.
        memory: The host's memory in detail.
        disks: Where models and what is made of them lie.
        host: Further facts for people, by name: kernel, NUMA nodes, quota, the user the service runs as and its groups.
        problems: What could not be read, in sentences.
    """

    devices: tuple[Device, ...]
    cores: int
    memory_bytes: int
    memory: Memory = Memory()
    disks: tuple[Disk, ...] = ()
    host: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def device(self, device_id: str) -> Device | None:
        """The device called `device_id`, or None."""
        return next((device for device in self.devices if device.id == device_id), None)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Inventory":
        """The inverse of `dataclasses.asdict`.

        Raises:
            KeyError, TypeError, ValueError: `document` is something else.
        """
        values = dict(document)
        return cls(
            devices=tuple(map(_device, values.pop("devices"))),
            memory=Memory(**values.pop("memory")),
            disks=tuple(Disk(**disk) for disk in values.pop("disks")),
            problems=tuple(values.pop("problems")),
            **values,
        )


def _device(document: Mapping[str, Any]) -> Device:
    values = dict(document)
    ladder = tuple(Rung(**{**rung, "step": Step(rung["step"])}) for rung in values.pop("ladder"))
    return Device(features=tuple(values.pop("features")), ladder=ladder, **values)
