"""Copying a batch into its slab and reading where its answers lie: the two ends of the shared-memory transfer."""

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

from appliance.call import Call, OutputTable, PlannedTensor
from appliance.slab import aligned
from appliance.types import ITEM_BYTES
from appliance.wire import worker as frames
from appliance.wire.worker import TensorLayout

#: Layouts kept per worker and direction; all are dropped when there are more.
_MAX_KEPT: Final = 512


class Gathered(NamedTuple):
    """A batch in shared memory.

    Attributes:
        layout: What follows RUN_HEADER.
        tensors: How many tensors the layout has.
        rows: Rows of the batch.
        wanted: Mask of the outputs any of its calls wants.
    """

    layout: bytes
    tensors: int
    rows: int
    wanted: int


class Gatherer:
    """Lays batches out and keeps the layouts of shapes that repeat."""

    def __init__(self, is_batched: bool) -> None:
        self._is_batched = is_batched
        self._kept: dict[tuple[object, ...], tuple[bytes, tuple[int, ...]]] = {}

    def gather(self, calls: Sequence[Call], memory: memoryview, region: int) -> Gathered:
        """Copy the tensors of `calls`, all of one signature, into `memory`, which the worker knows as `region`.

        Region 0 is the slot's slab. A tensor that may be read in its client's region is not copied where its call runs
        alone.
        """
        first = calls[0].plan
        rows = wanted = 0
        for call in calls:
            rows += call.plan.rows
            wanted |= call.plan.wanted
        if first.has_bytes or region or (calls[0].region_views and len(calls) == 1):
            layout = self._lay_out_each(calls, rows, memory, region)
        else:
            layout = self._lay_out_kept(calls, rows, memory)
        return Gathered(layout, len(first.tensors), rows, wanted)

    def _shape(self, tensor: PlannedTensor, rows: int) -> tuple[int, ...]:
        return (rows, *tensor.row_shape) if self._is_batched else tensor.row_shape

    def _lay_out_kept(self, calls: Sequence[Call], rows: int, memory: memoryview) -> bytes:
        plan = calls[0].plan
        key = (plan.signature, rows)
        kept = self._kept.get(key)
        if kept is None:
            layouts = []
            offset = 0
            for tensor in plan.tensors:
                shape = self._shape(tensor, rows)
                size = math.prod(shape) * ITEM_BYTES[tensor.datatype]
                layouts.append(TensorLayout(tensor.place, tensor.datatype, shape, 0, offset, size))
                offset = aligned(offset + size)
            if len(self._kept) >= _MAX_KEPT:
                self._kept.clear()
            kept = self._kept[key] = (frames.pack_layout(layouts), tuple(layout.offset for layout in layouts))
        layout_bytes, offsets = kept
        for place, position in enumerate(offsets):
            for call in calls:
                content = call.contents[place]
                end = position + len(content)
                memory[position:end] = content
                position = end
        return layout_bytes

    def _lay_out_each(self, calls: Sequence[Call], rows: int, memory: memoryview, region: int) -> bytes:
        views = calls[0].region_views if len(calls) == 1 else ()
        layouts = []
        offset = 0
        for place, tensor in enumerate(calls[0].plan.tensors):
            shape = self._shape(tensor, rows)
            shared = views[place] if views else None
            if shared is not None and shared.is_in_place:
                size = len(calls[0].contents[place])
                layouts.append(
                    TensorLayout(tensor.place, tensor.datatype, shape, shared.region.number, shared.offset, size)
                )
                continue
            position = offset
            for call in calls:
                content = call.contents[place]
                end = position + len(content)
                memory[position:end] = content
                position = end
            layouts.append(TensorLayout(tensor.place, tensor.datatype, shape, region, offset, position - offset))
            offset = aligned(position)
        return frames.pack_layout(layouts)


class Scatterer:
    """Reads DONE layouts and keeps those that repeat."""

    def __init__(self, names: Sequence[str], is_batched: bool) -> None:
        self._names = names
        self._is_batched = is_batched
        self._kept: dict[bytes, tuple[OutputTable, int]] = {}

    def table(self, packet: memoryview, count: int) -> tuple[OutputTable, int]:
        """The output table of a DONE packet with `count` tensors, and where its row errors begin.

        Raises:
            ValueError: The packet breaks its format.
        """
        start = frames.DONE_HEADER.size
        key = bytes(packet[start:])
        kept = self._kept.get(key)
        if kept is not None:
            return kept
        layouts, end = frames.unpack_layout(packet, start, count)
        skip = 1 if self._is_batched else 0
        table = OutputTable(
            signature=tuple((layout.place, layout.datatype, layout.shape[skip:]) for layout in layouts),
            tensors={layout.place: layout for layout in layouts},
            names=self._names,
            is_batched=self._is_batched,
        )
        if len(self._kept) >= _MAX_KEPT:
            self._kept.clear()
        if end == len(packet):
            self._kept[key] = (table, end)
        return table, end


def read_row_errors(packet: memoryview, start: int, count: int) -> dict[int, str]:
    """Row errors of a DONE packet by row.

    Raises:
        ValueError: The packet is shorter than it says.
    """
    errors = {}
    for _ in range(count):
        if len(packet) - start < frames.ROW_ERROR.size:
            raise ValueError("cannot read the packet: its row errors are truncated")
        row, length = frames.ROW_ERROR.unpack_from(packet, start)
        start += frames.ROW_ERROR.size
        errors[row] = bytes(packet[start : start + length]).decode("utf-8", "replace")
        start += length
    return errors
