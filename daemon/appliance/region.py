"""A client's memfd region and who still uses it."""

import itertools
from collections.abc import Callable
from typing import Final

from appliance.errors import InvalidRequest
from appliance.slab import Slab

_numbers: Final = itertools.count(1)


class Region:
    """A region of a connection; freed once it is released and no call uses it any more.

    Attributes:
        number: Its number between front-end and workers, never reused within 2^31 regions.
        slab: The mapping.
    """

    __slots__ = ("_is_released", "_listeners", "_on_free", "_uses", "number", "slab")

    def __init__(self, slab: Slab, on_free: Callable[[], None]) -> None:
        self.number = next(_numbers) & 0x7FFFFFFF
        self.slab = slab
        self._uses = 0
        self._is_released = False
        self._on_free = on_free
        self._listeners: set[Callable[[int], None]] = set()

    def view(self, offset: int, size: int) -> memoryview:
        """`size` bytes at `offset`.

        Raises:
            InvalidRequest: They do not lie inside the region.
        """
        if offset < 0 or size < 0 or offset + size > self.slab.size:
            raise InvalidRequest(
                f"cannot use the region: offset {offset} and {size} bytes reach beyond its {self.slab.size} bytes"
            )
        return self.slab.memory[offset : offset + size]

    def watch(self, forget: Callable[[int], None]) -> None:
        """Have `forget` called with the region's number when it is freed."""
        self._listeners.add(forget)

    def acquire(self) -> None:
        """One more call uses the region."""
        self._uses += 1

    def release_use(self) -> None:
        """A call is through with the region."""
        self._uses -= 1
        self._free_if_unused()

    def release(self) -> None:
        """The client gives the region back, or is gone."""
        self._is_released = True
        self._free_if_unused()

    def _free_if_unused(self) -> None:
        if not self._is_released or self._uses or self.slab.fd < 0:
            return
        for forget in self._listeners:
            forget(self.number)
        self._listeners.clear()
        self.slab.close()
        self._on_free()
