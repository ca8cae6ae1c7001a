"""Shared memory between processes: sealed memfds, mapped.

A slab is made by the front-end for one worker; a region is a client's memfd, checked before it is mapped. Seals
against shrinking and growing are what makes a mapping safe: without them the other side could truncate the file and
the next access would raise SIGBUS.
"""

import contextlib
import fcntl
import mmap
import os
import stat
from typing import Final, Self

from appliance.errors import InvalidRequest, Overloaded

#: F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL of linux/fcntl.h; Python names them since 3.8.
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_NEEDED: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW

#: Tensors begin at multiples of this, so that vector loads never straddle cache lines.
ALIGNMENT: Final = 64


def aligned(offset: int) -> int:
    """`offset` rounded up to `ALIGNMENT`."""
    return (offset + ALIGNMENT - 1) & -ALIGNMENT


class Slab:
    """A memfd of fixed size, mapped into this process.

    Attributes:
        fd: The descriptor, for passing on.
        size: Bytes.
        memory: The whole of it, writable, format "B".
    """

    __slots__ = ("_map", "fd", "memory", "size")

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size
        self._map = mmap.mmap(fd, size)
        self.memory = memoryview(self._map)

    @classmethod
    def create(cls, size: int, name: str) -> Self:
        """Make a sealed slab of `size` bytes; pages are taken on first touch.

        Raises:
            Overloaded: The kernel grants no memory or descriptor for it.
        """
        fd = -1
        try:
            fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return cls(fd, size)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise Overloaded(f"cannot make {size} bytes of shared memory: {error.strerror}") from error

    @classmethod
    def adopt(cls, fd: int, size: int) -> Self:
        """Map a client's memfd; takes `fd` over, also when it raises.

        Raises:
            InvalidRequest: It is no memfd, not open for reading and writing, not sealed against shrinking and growing,
                or smaller than `size`.
        """
        try:
            check_memfd(fd, size)
            return cls(fd, size)
        except OSError as error:
            os.close(fd)
            raise InvalidRequest(f"cannot use the region: mapping it failed ({error.strerror})") from error
        except InvalidRequest:
            os.close(fd)
            raise

    def close(self) -> None:
        """Unmap and close. Views still alive keep the mapping until they go."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        self.memory.release()
        with contextlib.suppress(BufferError):  # a view in use keeps the mapping; it goes with the last view
            self._map.close()


def check_memfd(fd: int, size: int) -> None:
    """Check that `fd` is a sealed memfd of at least `size` bytes, open for reading and writing.

    Raises:
        InvalidRequest: It is not; the message says which rule.
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise InvalidRequest("cannot use the region: the descriptor is not a memfd")
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise InvalidRequest("cannot use the region: the descriptor is not a memfd") from error
    if seals & _NEEDED != _NEEDED:
        raise InvalidRequest("cannot use the region: it must be sealed with F_SEAL_SHRINK and F_SEAL_GROW")
    if seals & (fcntl.F_SEAL_WRITE | getattr(fcntl, "F_SEAL_FUTURE_WRITE", 0x10)):
        raise InvalidRequest("cannot use the region: it must not be sealed against writing")
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        raise InvalidRequest("cannot use the region: it must be open for reading and writing")
    if status.st_size < size or size <= 0:
        raise InvalidRequest(f"cannot use the region: it has {status.st_size} bytes and {size} were declared")
