"""Puts the inventory together. Whatever cannot be read becomes a sentence among its problems, never an exception."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from appliance.inventory import Device, Inventory, Memory, Step, ascend, disk, nvidia
from appliance.inventory.cgroup import Limits, read_limits
from appliance.inventory.cpu import read_cpu
from appliance.inventory.intel import read_intel
from appliance.inventory.ladder import climb, failed
from appliance.inventory.memory import read_memory, transparent_huge_pages
from appliance.inventory.pci import scan
from appliance.inventory.system import Live, System, open_error, peek

_Part = TypeVar("_Part")


def live(seconds: float, at_start: Callable[[], None]) -> Live:
    """This machine, with every question a survey asks.

    Args:
        seconds: What may hang gets as long.
        at_start: Runs first in each process that asks.
    """
    questions = {"nvml": _ask_nvml, "npu-smi": ascend.run_npu_smi, "space": disk.measure_space, "open": open_error}
    return Live(questions, seconds, at_start)


def _ask_nvml(daemon: str) -> Any:
    # Late: only a process made for it loads the library, and only where there is a sign of NVIDIA.
    from appliance.inventory import nvml

    return nvml.ask(daemon)


def survey(system: System, directories: Mapping[str, str], daemon: int = 0) -> Inventory:
    """The machine.

    Args:
        system: Through which it is read.
        directories: Directories to find the disks of, by purpose.
        daemon: The daemon's process id: what its children use is not used by others.
    """
    return _Survey(system).take(directories, daemon)


class _Survey:
    """One survey and what went wrong with it."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._problems: list[str] = []

    def _part(self, what: str, read: Callable[[], _Part]) -> _Part | None:
        """What `read` gives; where it fails, None and a problem."""
        try:
            return read()
        except Exception as error:  # what drivers and kernels write is not ours to foresee
            reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            self._problems.append(f"cannot read {what}: {reason}")
            return None

    def take(self, directories: Mapping[str, str], daemon: int) -> Inventory:
        system = self._system
        bus = self._part("the PCI bus", lambda: scan(system)) or ()
        # What may take its time is asked first and heard last.
        of_nvidia = self._part("the NVIDIA GPUs", lambda: nvidia.begin(system, bus, daemon))
        of_ascend = self._part("the Ascend NPUs", lambda: ascend.begin(system, bus))
        of_disks = self._part("the disks", lambda: disk.begin(system, directories)) or {}
        limits = self._part("the control groups", lambda: read_limits(system)) or Limits()
        memory = self._part("the memory", lambda: read_memory(system, limits)) or Memory()
        cpu = self._part("the CPU", lambda: read_cpu(system, limits, memory)) or _unknown_cpu(system)
        intel = self._part("the Intel GPUs and NPUs", lambda: read_intel(system, bus, memory)) or []
        disks, troubles = self._part("the disks", lambda: disk.finish(system, directories, of_disks)) or ([], [])
        self._problems += troubles
        npus = (of_ascend and self._part("the Ascend NPUs", lambda: ascend.finish(system, of_ascend))) or []
        gpus = (of_nvidia and self._part("the NVIDIA GPUs", lambda: nvidia.finish(system, of_nvidia))) or []
        host = self._part("the host", lambda: _host(system)) or {}
        return Inventory(
            devices=(cpu, *gpus, *intel, *npus),
            cores=cpu.cores,
            memory_bytes=memory.total,
            memory=memory,
            disks=tuple(disks),
            host=host,
            problems=tuple(self._problems),
        )


def _unknown_cpu(system: System) -> Device:
    """There always is one."""
    rung = failed(Step.PRESENT, "/proc/cpuinfo cannot be read", "mount /proc where the daemon runs")
    return Device("cpu", "cpu", "unknown CPU", 0, cores=len(system.affinity()), ladder=climb(rung))


def _host(system: System) -> dict[str, str]:
    """Facts for people."""
    release, architecture = system.kernel()
    identity = system.identity()
    dmi = (peek(system, f"/sys/class/dmi/id/{name}") for name in ("sys_vendor", "product_name"))
    facts = {
        "machine": " ".join(filter(None, dmi)) or peek(system, "/proc/device-tree/model"),
        "architecture": architecture,
        "kernel": release,
        "distribution": _pretty_name(peek(system, "/etc/os-release")),
        "user": identity.user,
        "groups": " ".join(identity.groups),
        "transparent huge pages": transparent_huge_pages(system),
    }
    return {name: value for name, value in facts.items() if value}


def _pretty_name(text: str) -> str:
    """The distribution as os-release(5) calls it."""
    lines = (line.partition("=") for line in text.splitlines())
    return next((value.strip("\"'") for name, _, value in lines if name == "PRETTY_NAME"), "")
