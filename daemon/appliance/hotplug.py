"""Word from the kernel that a device came or went.

The kernel broadcasts a message for each change of its device tree on a netlink socket (kobject uevents, netlink(7));
anybody may listen. A message is ``ACTION@PATH`` and then ``KEY=VALUE`` texts, separated by NUL.
"""

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable
from typing import Final

#: Families of devices that models can run on, as the kernel names their subsystems.
SUBSYSTEMS: Final = frozenset({"drm", "accel", "nvidia", "davinci", "cpu"})
_ACTIONS: Final = frozenset({"add", "remove", "online", "offline", "bind", "unbind"})

#: Numbers of linux/netlink.h, and the group that the kernel itself sends to.
_KOBJECT_UEVENT: Final = 15
_KERNEL_GROUP: Final = 1
_MAX_BYTES: Final = 65536


def concerns_devices(message: bytes) -> bool:
    """True where a uevent says that a device models can run on came, went, or got or lost its driver.

    A PCI device counts where its class is a display controller (03) or a processing accelerator (12).
    """
    fields = dict(text.split("=", 1) for text in message.decode("utf-8", "replace").split("\0") if "=" in text)
    if fields.get("ACTION") not in _ACTIONS:
        return False
    if fields.get("SUBSYSTEM") == "pci":
        return fields.get("PCI_CLASS", "").zfill(6)[:2] in ("03", "12")
    return fields.get("SUBSYSTEM") in SUBSYSTEMS


class Hotplug:
    """Calls `on_change` once after a burst of changes. Silent where the kernel lets nobody listen.

    Args:
        on_change: Called from the event loop.
        seconds: How long the burst must be over.
    """

    def __init__(self, on_change: Callable[[], None], seconds: float = 2.0) -> None:
        self._on_change = on_change
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        self._due: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to listen."""
        with contextlib.suppress(OSError):
            sock = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _KOBJECT_UEVENT)
            try:
                sock.setblocking(False)
                sock.bind((0, _KERNEL_GROUP))
            except OSError:
                sock.close()
                raise
            self.listen(sock)

    def listen(self, sock: socket.socket) -> None:
        """Take messages from `sock`, which is closed in the end."""
        self._socket = sock
        self._loop.add_reader(sock.fileno(), self._read)

    def stop(self) -> None:
        """Listen no more."""
        if self._due is not None:
            self._due.cancel()
        if self._socket is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def _read(self) -> None:
        sock = self._socket
        if sock is None:
            return
        try:
            message = sock.recv(_MAX_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            # More came than the socket could hold, so something changed.
            message = b"\0ACTION=add\0SUBSYSTEM=drm" if error.errno == errno.ENOBUFS else b""
        if concerns_devices(message):
            if self._due is not None:
                self._due.cancel()
            self._due = self._loop.call_later(self._seconds, self._on_change)
