"""Shared memory that the front-end hands to a worker: a slab pair for each slot, and clients' regions by number."""

import mmap
import os
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Area:
    """One mapped memfd. Arrays on it keep the mapping alive, so forgetting an area is always safe."""

    __slots__ = ("_bytes", "byte_length")

    def __init__(self, fd: int, byte_length: int) -> None:
        """Map `byte_length` bytes of `fd`, readable and writable; the descriptor stays the caller's.

        Raises:
            ValueError: The file is shorter, which would end in SIGBUS.
            OSError: It cannot be mapped.
        """
        if os.fstat(fd).st_size < byte_length:
            raise ValueError("cannot map the memory: it is shorter than announced")
        self.byte_length = byte_length
        self._bytes: NDArray[np.uint8]
        if byte_length == 0:
            self._bytes = np.empty(0, dtype=np.uint8)
            return
        try:
            mapped = mmap.mmap(fd, byte_length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except PermissionError:
            # Sealed against writing: its content is final, so a private mapping shows the same and is still writable.
            mapped = mmap.mmap(fd, byte_length, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        self._bytes = np.frombuffer(mapped, dtype=np.uint8)

    def part(self, offset: int, byte_length: int) -> "NDArray[np.uint8]":
        """Bytes `offset` to `offset` + `byte_length`, writable, not copied.

        Raises:
            ValueError: They are not all inside.
        """
        if offset < 0 or byte_length < 0 or offset + byte_length > self.byte_length:
            raise ValueError(f"cannot read {byte_length} bytes at {offset}: the memory has {self.byte_length} bytes")
        return self._bytes[offset : offset + byte_length]

    def array(self, offset: int, shape: tuple[int, ...], dtype: "np.dtype[Any]", byte_length: int) -> "NDArray[Any]":
        """A C-contiguous, writable array on the memory itself.

        Raises:
            ValueError: It is not all inside, or its length does not follow from shape and datatype.
        """
        part = self.part(offset, byte_length)
        if byte_length != prod(shape) * dtype.itemsize:
            raise ValueError(f"cannot read a tensor of shape {list(shape)}: {byte_length} bytes are not its size")
        return part.view(dtype).reshape(shape)


class Slabs(NamedTuple):
    """The memory of one slot."""

    inputs: Area
    outputs: Area


class Memory:
    """Everything mapped. Owned by the thread that receives packets, whose turn it is to; others hold arrays on it."""

    def __init__(self) -> None:
        self._slots: dict[int, Slabs] = {}
        self._regions: dict[int, Area] = {}

    def set_slot(self, slot: int, slabs: Slabs) -> None:
        """Replace the slabs of `slot`."""
        self._slots[slot] = slabs

    def slot(self, slot: int) -> Slabs:
        """The slabs of `slot`.

        Raises:
            ValueError: It has none yet.
        """
        try:
            return self._slots[slot]
        except KeyError:
            raise ValueError(f"cannot use slot {slot}: it has no slabs") from None

    def set_region(self, region: int, area: Area) -> None:
        """Add or replace a region."""
        self._regions[region] = area

    def drop_region(self, region: int) -> None:
        """Forget a region; one that is not known stays unknown."""
        self._regions.pop(region, None)

    def area(self, slot: int, region: int) -> Area:
        """Where a tensor of RUN lies: the slot's input slab for region 0, else the region.

        Raises:
            ValueError: There is no such slot or region.
        """
        if region == 0:
            return self.slot(slot).inputs
        try:
            return self._regions[region]
        except KeyError:
            raise ValueError(f"cannot use region {region}: it is not mapped") from None
