"""What is on the PCI bus, from sysfs."""

import re
from dataclasses import dataclass

from appliance.inventory.system import System, names_of, peek

_DEVICES = "/sys/bus/pci/devices"

#: Base classes of the PCI code and id assignment specification.
DISPLAY = "03"
ACCELERATOR = "12"


@dataclass(frozen=True, slots=True)
class PciDevice:
    """One function of a PCI device.

    Attributes:
        address: ``domain:bus:device.function``.
        vendor: Four hex digits, lower case.
        model: The vendor's number of the device, likewise.
        base_class: Two hex digits: what it is for.
        driver: The kernel's driver bound to it; empty for none.
    """

    address: str
    vendor: str
    model: str
    base_class: str
    driver: str

    @property
    def path(self) -> str:
        """Its directory in sysfs."""
        return f"{_DEVICES}/{self.address}"

    @property
    def number(self) -> str:
        """``vendor:model``, as people look it up."""
        return f"{self.vendor}:{self.model}"


def parse_uevent(address: str, text: str) -> PciDevice | None:
    """A device from the text of its uevent file, or None where that says too little."""
    values = dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))
    vendor, separator, model = values.get("PCI_ID", "").lower().partition(":")
    if not separator:
        return None
    # Six hex digits without the leading zero: class, subclass, programming interface.
    base_class = values.get("PCI_CLASS", "").zfill(6)[:2].lower()
    return PciDevice(address, vendor, model, base_class, values.get("DRIVER", ""))


def scan(system: System) -> tuple[PciDevice, ...]:
    """Every PCI function, in order of addresses; none where there is no such bus."""
    found = (parse_uevent(name, peek(system, f"{_DEVICES}/{name}/uevent")) for name in names_of(system, _DEVICES))
    return tuple(device for device in found if device)


def numa_node(system: System, device: PciDevice) -> str:
    """The NUMA node it hangs on; empty where there is but one."""
    node = peek(system, f"{device.path}/numa_node")
    return node if node.isdigit() else ""
