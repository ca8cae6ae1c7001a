"""Memory shared with the daemon, for inputs too large to be worth copying through a socket."""

import fcntl
import mmap
import os
from typing import Final

#: Inputs from this size on travel in a region, unless the caller chose another threshold.
DEFAULT_THRESHOLD_BYTES: Final = 256 * 1024

#: Bytes of regions one connection keeps; what exceeds it is given back after use.
DEFAULT_POOL_BYTES: Final = 256 * 1024 * 1024

_SMALLEST_BYTES: Final = 1024 * 1024
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class Region:
    """A sealed memfd, mapped here.

    Attributes:
        identifier: The number it has on its connection.
        byte_size: Its size.
        memory: The mapping.
    """

    __slots__ = ("byte_size", "descriptor", "identifier", "memory")

    def __init__(self, identifier: int, byte_size: int) -> None:
        self.identifier = identifier
        self.byte_size = byte_size
        self.descriptor = os.memfd_create("appliance-client", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.descriptor, byte_size)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)
            self.memory = mmap.mmap(self.descriptor, byte_size)
        except BaseException:
            os.close(self.descriptor)
            raise

    def forget_descriptor(self) -> None:
        """Close the descriptor once it has been sent; the mapping stays."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def close(self) -> None:
        """Unmap; safe to call again."""
        self.forget_descriptor()
        self.memory.close()


class RegionPool:
    """The regions of one connection: which exist, which are free. No I/O beyond making and unmapping memory.

    A free region is handed out most recently used first, so a caller that repeats one shape keeps sending the very same
    head. A region is free again when the answer to the request that used it has come.

    Args:
        max_regions: Regions the server lets the connection hold; 0 where it takes none.
        max_region_bytes: Its largest region.
        max_bytes: Bytes to keep at most.
    """

    def __init__(self, max_regions: int, max_region_bytes: int, max_bytes: int = DEFAULT_POOL_BYTES) -> None:
        self._max_regions = max_regions
        self._max_region_bytes = max_region_bytes
        self._max_bytes = max_bytes
        self._free: list[Region] = []
        self._count = 0
        self._byte_size = 0
        self._is_closed = False

    @property
    def is_usable(self) -> bool:
        """False where the server takes no regions."""
        return self._max_regions > 0

    def refuse(self) -> None:
        """Note that the server refused a region: no more are offered, inputs travel in the frame."""
        self._max_regions = 0

    def take(self, byte_size: int) -> Region | None:
        """The most recently used free region that holds `byte_size` and is not four times too large, or None."""
        for position in range(len(self._free) - 1, -1, -1):
            if byte_size <= self._free[position].byte_size <= max(4 * byte_size, _SMALLEST_BYTES):
                return self._free.pop(position)
        return None

    def make(self, identifier: int, byte_size: int) -> tuple[Region | None, list[Region]]:
        """A new region for `byte_size`, and those to release first because they would not fit beside it.

        The region is None where none may be made: too large, too many in use, or the system has no memory for it.
        """
        size = max(_SMALLEST_BYTES, 1 << (byte_size - 1).bit_length())
        if size > self._max_region_bytes:
            size = byte_size
        if size > self._max_region_bytes:
            return None, []
        surplus: list[Region] = []
        while self._free and (self._count >= self._max_regions or self._byte_size + size > self._max_bytes):
            surplus.append(self._drop(self._free.pop(0)))
        if self._count >= self._max_regions:
            return None, surplus
        try:
            region = Region(identifier, size)
        except OSError:
            return None, surplus
        self._count += 1
        self._byte_size += size
        return region, surplus

    def give_back(self, region: Region) -> Region | None:
        """Take a region back after use; returns it where it is to be released instead of kept."""
        if self._is_closed:
            region.close()
            return None
        if self._byte_size > self._max_bytes:
            return self._drop(region)
        self._free.append(region)
        return None

    def discard(self, region: Region) -> None:
        """Drop a region the server never took."""
        self._drop(region)

    def close(self) -> None:
        """Unmap what is free; what is in use is unmapped when given back."""
        self._is_closed = True
        while self._free:
            self._free.pop().close()

    def _drop(self, region: Region) -> Region:
        self._count -= 1
        self._byte_size -= region.byte_size
        region.close()
        return region
