"""An alarm that rings to the tenth of a millisecond; a timer of uvloop's is exact to a whole one.

It is a timerfd(2) that the event loop watches. Python has a function for that from 3.13 on; until then it is libc's.
"""

import asyncio
import contextlib
import ctypes
import os
import struct
import time
from collections.abc import Callable
from typing import Final

_libc: Final = ctypes.CDLL(None, use_errno=True)

#: linux/timerfd.h; the flags are O_CLOEXEC and O_NONBLOCK.
_FLAGS: Final = os.O_CLOEXEC | os.O_NONBLOCK
_ABSOLUTE: Final = 1
#: struct itimerspec: interval and first expiration, each seconds and nanoseconds.
_SPECIFICATION: Final = struct.Struct("qqqq")


class Alarm:
    """One alarm; where the kernel gives no descriptor for it, it rings by the loop's own timer.

    Args:
        loop: The event loop.
        ring: Called on it when the time has come.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop = loop
        self._ring = ring
        self._due_ns = 0
        self._fd: int = _libc.timerfd_create(time.CLOCK_MONOTONIC, _FLAGS)
        self._timer: asyncio.TimerHandle | None = None
        if self._fd >= 0:
            loop.add_reader(self._fd, self._on_readable)

    def set(self, due_ns: int) -> None:
        """Ring at `due_ns` of CLOCK_MONOTONIC, and not when it was set to before."""
        if due_ns == self._due_ns:
            return
        self._due_ns = due_ns
        if self._fd >= 0:
            seconds, nanoseconds = divmod(due_ns, 1_000_000_000)
            _libc.timerfd_settime(self._fd, _ABSOLUTE, _SPECIFICATION.pack(0, 0, seconds, nanoseconds), None)
        else:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_later(max(due_ns - time.monotonic_ns(), 0) / 1e9, self._go_off)

    def close(self) -> None:
        """Never ring again."""
        if self._timer is not None:
            self._timer.cancel()
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _on_readable(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it was set anew meanwhile
            os.read(self._fd, 8)
            self._go_off()

    def _go_off(self) -> None:
        self._due_ns = 0
        self._ring()
