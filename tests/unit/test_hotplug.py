"""The kernel's words about devices that come and go."""

import asyncio
import socket
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))

from appliance.hotplug import Hotplug, concerns_devices
from support.workers import until


def uevent(action: str, subsystem: str, **fields: str) -> bytes:
    """As the kernel writes it."""
    pairs = {"ACTION": action, "DEVPATH": "/devices/x", "SUBSYSTEM": subsystem, **fields, "SEQNUM": "4711"}
    return "\0".join([f"{action}@/devices/x", *(f"{key}={value}" for key, value in pairs.items()), ""]).encode()


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (uevent("add", "drm"), True),
        (uevent("remove", "accel"), True),
        (uevent("change", "drm"), False),  # a monitor was plugged in
        (uevent("add", "usb"), False),
        (uevent("bind", "pci", PCI_CLASS="30000"), True),
        (uevent("bind", "pci", PCI_CLASS="120000"), True),
        (uevent("bind", "pci", PCI_CLASS="20000"), False),  # a network card
        (uevent("offline", "cpu"), True),
        (b"\xff\xfe\0=\0==", False),
        (b"", False),
    ],
)
def test_only_devices_that_models_can_run_on_matter(message, expected):
    assert concerns_devices(message) is expected


def test_a_burst_is_one_change():
    async def scenario():
        changes = []
        ours, kernels = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        ours.setblocking(False)
        hotplug = Hotplug(lambda: changes.append(1), seconds=0.05)
        hotplug.listen(ours)
        for message in (uevent("remove", "drm"), uevent("add", "usb"), uevent("add", "drm"), uevent("bind", "accel")):
            kernels.send(message)
        await until(lambda: changes)
        kernels.send(uevent("add", "usb"))
        kernels.send(uevent("remove", "accel"))
        await until(lambda: len(changes) > 1)
        hotplug.stop()
        kernels.close()
        assert changes == [1, 1]

    asyncio.run(scenario())


def test_listening_to_the_kernel_can_be_started_and_stopped_whether_it_allows_it_or_not():
    async def scenario():
        hotplug = Hotplug(lambda: None)
        hotplug.start()
        hotplug.stop()
        hotplug.stop()

    asyncio.run(scenario())
