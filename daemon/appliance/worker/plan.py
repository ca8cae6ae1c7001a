"""From the layout bytes of a RUN packet to what a run needs, kept for as long as the same layout comes again."""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Final

from appliance.types import TensorSpec
from appliance.wire.worker import RUN_HEADER, TensorLayout, unpack_layout
from appliance.worker.memory import Area, Memory
from appliance.worker.model import ServedModel
from appliance.worker.tensors import DTYPES, array_of_elements, fits, split_elements

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from appliance.worker.answer import Targets

#: Layouts kept; a stream of ever new shapes starts again from none.
MAX_PLANS: Final = 512

_SHAPE_AND_BATCH: Final = struct.Struct("<QQ")  # kind, slot, tensors and rows as one number; the batch's number
_ALL_BEYOND: Final = 63


@dataclass(slots=True)
class Plan:
    """One layout, resolved.

    Attributes:
        slot: The slot it runs in.
        rows: Rows of the batch.
        feeds: Session inputs that are views on shared memory.
        fresh: Session inputs made anew for each batch: name and maker, which raises ValueError for bytes that lie.
        pictures: The bytes of the image input, or None.
        runs: Session outputs to compute.
        wanted: Index and specification of each output to answer with.
        needs_classes: True where an output of the classifier is among them.
        area: The slot's output slab.
        regions: Regions its inputs lie in.
        targets: Where the last answer of this layout went; None before the first.
        steps: The steps of the batch that has the slot; None for a model without sequences.
    """

    slot: int
    rows: int
    feeds: "dict[str, NDArray[Any]]"
    fresh: "tuple[tuple[str, Callable[[], NDArray[Any]]], ...]"
    pictures: "NDArray[Any] | None"
    runs: tuple[str, ...]
    wanted: tuple[tuple[int, TensorSpec], ...]
    needs_classes: bool
    area: Area
    regions: frozenset[int]
    targets: "Targets | None" = None
    steps: "NDArray[Any] | None" = None


class Planner:
    """Resolves packets against one model. Owned by the thread that receives packets, whose turn it is to.

    A plan names its slot, so it belongs to the thread that runs the slot's batch until that is answered.
    """

    def __init__(self, model: ServedModel, memory: Memory) -> None:
        self._model = model
        self._memory = memory
        self._inputs = (*model.inputs, *model.edge_inputs)
        self._outputs = (*model.outputs, *model.edge_outputs)
        self._plans: dict[tuple[int, bytes], Plan] = {}

    def forget(self) -> None:
        """Drop every plan, since a slot's slabs change."""
        self._plans.clear()

    def forget_region(self, region: int) -> None:
        """Drop the plans that read from `region`, so that its memory can go."""
        self._plans = {key: plan for key, plan in self._plans.items() if region not in plan.regions}

    def plan(self, packet: memoryview) -> tuple[Plan, int]:
        """The plan for a RUN packet, and the batch's number.

        Raises:
            ValueError: The packet is truncated, or does not suit the model or the memory.
        """
        steps = None
        if self._model.states is not None:
            packet, steps = self._model.states.split(packet)
        try:
            shape, batch = _SHAPE_AND_BATCH.unpack_from(packet)
        except struct.error:
            raise ValueError("cannot run a batch: its packet is truncated") from None
        key = (shape, packet[_SHAPE_AND_BATCH.size :].tobytes())
        plan = self._plans.get(key)
        if plan is None:
            plan = self._resolve(packet)
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            self._plans[key] = plan
        plan.steps = steps
        return plan, batch

    def _resolve(self, packet: memoryview) -> Plan:
        try:
            _, slot, count, rows, _, mask = RUN_HEADER.unpack_from(packet)
        except struct.error:
            raise ValueError("cannot run a batch: its packet is truncated") from None
        tensors, end = unpack_layout(packet, RUN_HEADER.size, count)
        if end != len(packet):
            raise ValueError("cannot run a batch: bytes follow its tensor table")
        if rows < 1 or (self._model.max_batch_size and rows > self._model.max_batch_size):
            raise ValueError(
                f"cannot run a batch of {rows} rows: the model takes 1 to {self._model.max_batch_size or 1}"
            )
        plan = Plan(
            slot=slot,
            rows=rows,
            feeds={},
            fresh=(),
            pictures=None,
            runs=(),
            wanted=self._wanted(mask),
            needs_classes=False,
            area=self._memory.slot(slot).outputs,
            regions=frozenset(tensor.region for tensor in tensors),
        )
        self._choose_runs(plan)
        self._bind_inputs(plan, tensors)
        return plan

    def _wanted(self, mask: int) -> tuple[tuple[int, TensorSpec], ...]:
        wanted = tuple((index, spec) for index, spec in enumerate(self._outputs) if mask >> min(index, _ALL_BEYOND) & 1)
        if not wanted:
            raise ValueError("cannot run a batch: no output is wanted")
        return wanted

    def _choose_runs(self, plan: Plan) -> None:
        own = len(self._model.outputs)
        names = [spec.name for index, spec in plan.wanted if index < own]
        plan.needs_classes = any(index >= own for index, _ in plan.wanted)
        if plan.needs_classes and self._model.classifier and self._model.classifier.logits not in names:
            names.append(self._model.classifier.logits)
        if self._model.states is not None:
            names += [name for name in self._model.states.outputs if name not in names]
        plan.runs = tuple(names)

    def _bind_inputs(self, plan: Plan, tensors: Sequence[TensorLayout]) -> None:
        fresh: list[tuple[str, Callable[[], NDArray[Any]]]] = []
        fed: set[str] = set(self._model.states.inputs) if self._model.states is not None else set()
        for tensor in tensors:
            spec = self._checked_spec(tensor, plan.rows)
            is_picture = tensor.place >= len(self._model.inputs)
            name = self._model.pictures.tensor if is_picture and self._model.pictures else spec.name
            if name in fed:
                raise ValueError(f"cannot run a batch: input {name!r} comes twice")
            fed.add(name)
            area = self._memory.area(plan.slot, tensor.region)
            if is_picture:
                plan.pictures = area.part(tensor.offset, tensor.byte_length)
            elif tensor.datatype == "BYTES":
                fresh.append((name, _elements_maker(area.part(tensor.offset, tensor.byte_length), tensor.shape)))
            else:
                dtype = DTYPES[tensor.datatype]
                array = area.array(tensor.offset, tensor.shape, dtype, tensor.byte_length)
                if array.flags.aligned:
                    plan.feeds[name] = array
                else:
                    fresh.append((name, array.copy))
        missing = [spec.name for spec in self._model.inputs if spec.name not in fed]
        if missing:
            raise ValueError(f"cannot run a batch: input {missing[0]!r} is missing")
        plan.fresh = tuple(fresh)

    def _checked_spec(self, tensor: TensorLayout, rows: int) -> TensorSpec:
        if tensor.place >= len(self._inputs):
            raise ValueError(f"cannot run a batch: the model has no input {tensor.place}")
        spec = self._inputs[tensor.place]
        is_picture = tensor.place >= len(self._model.inputs)
        suits = (
            prod(tensor.shape) == rows and min(tensor.shape, default=1) >= 0 if is_picture else fits(tensor.shape, spec)
        )
        if tensor.datatype != spec.datatype or not suits:
            raise ValueError(
                f"cannot run a batch: input {spec.name!r} is {tensor.datatype} {list(tensor.shape)} and the model "
                f"takes {spec.datatype} {list(spec.shape)}"
            )
        if self._model.max_batch_size and tensor.shape[0] != rows and not is_picture:
            raise ValueError(f"cannot run a batch: input {spec.name!r} has {tensor.shape[0]} rows, not {rows}")
        return spec


def _elements_maker(content: "NDArray[Any]", shape: tuple[int, ...]) -> "Callable[[], NDArray[Any]]":
    count = prod(shape)

    def make() -> "NDArray[Any]":
        # One copy before anything is checked: a client may rewrite its region at any time.
        return array_of_elements(split_elements(content.tobytes(), count), shape)

    return make
