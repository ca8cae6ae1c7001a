"""Energy counters: of processor packages through the kernel's powercap tree (RAPL), of NVIDIA GPUs through NVML.

Many machines have none, or let root alone read them; there is then no figure, and no error. A package's counter holds
everything that runs on it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from appliance.inventory import Device

#: Where the kernel lists its energy counters (Documentation/power/powercap/powercap.rst).
POWERCAP: Final = Path("/sys/class/powercap")


class Counter(Protocol):
    """Counts energy."""

    def microjoules(self) -> int | None:
        """Energy used since the last call, None where it cannot be told."""
        ...


class PackageCounter:
    """All processor packages together, by RAPL."""

    def __init__(self, root: Path = POWERCAP) -> None:
        self._zones = _packages(root)
        self._last = self._read()

    def microjoules(self) -> int | None:
        """Energy used since the last call; None where a zone cannot be read, or there is none."""
        before, self._last = self._last, self._read()
        if before is None or self._last is None:
            return None
        return sum(difference(before[zone], self._last[zone], highest) for zone, highest in self._zones.items())

    def _read(self) -> dict[Path, int] | None:
        values = {zone: _number(zone / "energy_uj") for zone in self._zones}
        known = {zone: value for zone, value in values.items() if value is not None}
        return known if known and len(known) == len(values) else None


def difference(before: int, after: int, highest: int) -> int:
    """Microjoules between two readings of a counter that starts again from 0 after `highest`."""
    return after - before if after >= before else after + highest - before


def _packages(root: Path) -> Mapping[Path, int]:
    """The zone of each package and the highest value of its counter.

    A package may be listed twice, by its registers and by memory-mapped ones (``intel-rapl-mmio``); the former count.
    """
    found: dict[str, tuple[Path, int]] = {}
    try:
        zones = sorted(root.iterdir(), key=lambda zone: ("mmio" in zone.name, zone.name))
    except OSError:
        return {}
    for zone in zones:
        try:
            name = (zone / "name").read_text().strip()
        except (OSError, UnicodeDecodeError):
            continue
        if name.startswith("package-"):
            found.setdefault(name, (zone, _number(zone / "max_energy_range_uj") or 0))
    return dict(found.values())


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdecimal() else None


class NvidiaCounter:
    """One NVIDIA GPU."""

    def __init__(self, millijoules: Callable[[], int]) -> None:
        self._millijoules = millijoules
        self._last = self._read()

    def microjoules(self) -> int | None:
        """Energy used since the last call; None where the GPU has no counter, or lost its count."""
        before, self._last = self._last, self._read()
        if before is None or self._last is None or self._last < before:
            return None
        return (self._last - before) * 1000

    def _read(self) -> int | None:
        try:
            return self._millijoules()
        except Exception:  # whatever the driver's library raises: there is no figure then
            return None


class NoCounter:
    """A device without a counter."""

    def microjoules(self) -> None:
        """Nobody knows."""


def counter_of(device: "Device | None", root: Path = POWERCAP) -> Counter:
    """The counter that a device's energy shows in: a processor's and what is integrated into it in its package's."""
    if device is None:
        return NoCounter()
    if device.kind == "cpu" or (device.vendor == "intel" and device.is_integrated):
        return PackageCounter(root)
    if device.vendor == "nvidia" and device.uuid.startswith("GPU-"):
        read = _nvml_energy(device.uuid)
        return NvidiaCounter(read) if read is not None else NoCounter()
    return NoCounter()


def _nvml_energy(uuid: str) -> Callable[[], int] | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        handle: Any = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except Exception:  # no binding, no driver, no such GPU
        return None
    return lambda: int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
