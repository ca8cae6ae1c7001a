"""A request on its way: the validated plan it follows and the call that carries its tensors.

A plan is what validation leaves of a request's head (names, datatypes, shapes, outputs wanted): it depends on nothing
else, so a transport may keep it and reuse it for as long as `Plan.instance` accepts calls.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from appliance.clients import NOBODY, Client
from appliance.errors import ApplianceError, InvalidRequest
from appliance.region import Region
from appliance.types import Buffer, RequestOptions, SequenceStep, Tensor, Timings
from appliance.wire.worker import TensorLayout

if TYPE_CHECKING:
    from appliance.instance import Instance
    from appliance.waiting import Level, Queue


class PlannedTensor(NamedTuple):
    """One input of a plan.

    Attributes:
        place: Place in the worker's input table.
        datatype: Open Inference Protocol datatype.
        row_shape: Shape without the batch dimension; the full shape for a model without one.
        byte_length: Bytes the tensor must have; -1 for BYTES.
        elements: How many elements it holds.
    """

    place: int
    datatype: str
    row_shape: tuple[int, ...]
    byte_length: int
    elements: int


@dataclass(slots=True, eq=False)
class Plan:
    """A validated request head.

    Attributes:
        instance: Who runs it.
        rows: Rows of the batch dimension; 1 for a model without one.
        units: Elements of a row's variable dimensions, such as padded tokens; 1 where all are fixed.
        cost: Rows times units: what the call counts for where clients share.
        tensors: The inputs, in the client's order.
        outputs: Places in the worker's output table, in the order wanted.
        wanted: The same as the RUN frame's bit mask.
        signature: Calls of equal signatures may share a batch.
        byte_length: Bytes of all fixed-size inputs.
        has_bytes: True where an input is of datatype BYTES, whose content must be walked.
        is_text: True where a text input is to be tokenised before the call can be queued.
        heads: Whatever a transport keeps per output table, such as encoded response heads.
    """

    instance: "Instance"
    rows: int
    tensors: tuple[PlannedTensor, ...]
    outputs: tuple[int, ...]
    wanted: int
    signature: tuple[object, ...]
    byte_length: int
    has_bytes: bool
    is_text: bool = False
    units: int = 1
    cost: int = 1
    heads: "dict[tuple[object, ...], bytes]" = field(default_factory=dict)


class OutputTable(NamedTuple):
    """Where a batch's outputs lie: what a DONE frame's layout says, ready for slicing.

    Attributes:
        signature: Equal for batches whose rows look alike, whatever their number.
        tensors: By place in the worker's output table.
        names: By place in the worker's output table.
        is_batched: True where the first dimension counts rows.
    """

    signature: tuple[object, ...]
    tensors: dict[int, TensorLayout]
    names: Sequence[str]
    is_batched: bool

    def view(self, index: int, memory: memoryview, row: int, rows: int) -> tuple[tuple[int, ...], memoryview]:
        """Shape and bytes of rows ``row`` to ``row + rows`` of one output, valid until the slot is used again."""
        _, datatype, shape, _, offset, byte_length = self.tensors[index]
        if datatype == "BYTES":
            table = self.starts(index, memory)
            start = offset + table.nbytes
            content = memory[start + table[row] : start + table[row + rows]]
        elif self.is_batched:
            row_bytes = byte_length // shape[0]
            content = memory[offset + row * row_bytes : offset + (row + rows) * row_bytes]
        else:
            content = memory[offset : offset + byte_length]
        return ((rows, *shape[1:]) if self.is_batched else shape), content

    def starts(self, index: int, memory: memoryview) -> memoryview:
        """Where each row of an output of BYTES begins, and where the last ends, in bytes behind this very table."""
        _, _, shape, _, offset, _ = self.tensors[index]
        return memory[offset : offset + 8 * ((shape[0] if self.is_batched else 1) + 1)].cast("Q")

    def tensor(self, index: int, memory: memoryview, row: int, rows: int) -> Tensor:
        """One output that owns its bytes."""
        shape, content = self.view(index, memory, row, rows)
        return Tensor(self.names[index], self.tensors[index].datatype, shape, bytes(content))


class Sink(Protocol):
    """Where answers go. All three are called on the event loop and must not block or raise."""

    def deliver(self, call: "Call", table: OutputTable, memory: memoryview, row: int, timings: Timings) -> None:
        """Take the answer; `memory` is valid until the next `flush` returns."""
        ...

    def fail(self, call: "Call", error: ApplianceError) -> None:
        """Take the failure; may be called while `deliver` calls of the same batch are unflushed."""
        ...

    def flush(self) -> None:
        """Called once after the deliveries of a batch."""
        ...


class CallState(IntEnum):
    """Where a call stands."""

    NEW = 0
    QUEUED = 1
    RUNNING = 2
    FINISHED = 3


#: The states by plain names: reading a member off its class takes ten times as long, and every request does so often.
NEW: Final = CallState.NEW
QUEUED: Final = CallState.QUEUED
RUNNING: Final = CallState.RUNNING
FINISHED: Final = CallState.FINISHED


class RegionView(NamedTuple):
    """Where a tensor's bytes lie in a client's region.

    Attributes:
        region: The region.
        offset: Where in it.
        is_in_place: True where the worker may read them there. The client can change them while it does, so only what
            no runtime uses as an index or a count is read in place.
    """

    region: Region
    offset: int
    is_in_place: bool


class Call:
    """One request between admission and answer. Owned by the instance's event loop.

    Attributes:
        plan: What to run.
        contents: Bytes of each planned tensor; dropped once copied into a slab.
        region_views: For each tensor the region its bytes lie in, or None; empty where no tensor has one.
        sink: Who gets the answer.
        id: The sink's own number.
        client: Whose account it goes on.
        deadline_ns: CLOCK_MONOTONIC nanoseconds; 0 for none.
        admitted_ns: When it was admitted.
        queue_ns: Time it waited; set when a batch takes it.
        tokenise_ns: Time its texts took; 0 without text.
        nbytes: Bytes it holds in the queue.
        is_alone: True where it must not share a batch.
        due_ns: What the batcher orders its client's calls by, CLOCK_MONOTONIC.
        level: The level of priority it waits in.
        queue: The queue it stands in.
        priority: As sent: 1 is the most urgent, 0 stands for the model's default.
        sequence: Its place in a sequence, or None.
    """

    __slots__ = (
        "_charged",
        "admitted_ns",
        "client",
        "contents",
        "deadline_ns",
        "due_ns",
        "id",
        "is_alone",
        "level",
        "nbytes",
        "plan",
        "priority",
        "queue",
        "queue_ns",
        "region_views",
        "sequence",
        "sink",
        "state",
        "tokenise_ns",
    )

    due_ns: int
    level: "Level"
    queue: "Queue"

    def __init__(
        self,
        plan: Plan,
        contents: Sequence[Buffer],
        sink: Sink,
        id: int = 0,
        deadline_ns: int = 0,
        client: Client = NOBODY,
    ) -> None:
        self.plan = plan
        self.contents = contents
        self.region_views: Sequence[RegionView | None] = ()
        self.sink = sink
        self.id = id
        self.deadline_ns = deadline_ns
        self.client = client
        self._charged = -1
        self.admitted_ns = 0
        self.queue_ns = 0
        self.tokenise_ns = 0
        self.nbytes = plan.byte_length
        self.is_alone = False
        self.priority = 0
        self.sequence: SequenceStep | None = None
        self.state: CallState = NEW

    def ask(self, options: RequestOptions, timeout_us: int) -> None:
        """Schedule the call as its request asks.

        Args:
            options: What the request's parameters say.
            timeout_us: Its transport's own time limit, 0 for none.

        Raises:
            InvalidRequest: It belongs to a sequence, and the model has none.
        """
        instance = self.plan.instance
        if options.sequence is not None and not instance.takes_sequences:
            self.let_go()
            raise InvalidRequest("cannot continue a sequence: the model is not stateful, so sequence_id must be 0")
        self.priority = options.priority
        self.sequence = options.sequence
        policies = instance.policies
        policy = policies.get(options.priority) or policies[0]
        self.limit(timeout_us, options.timeout_us if policy.allows_override else 0, policy.default_timeout_us)

    def limit(self, *timeouts_us: int) -> None:
        """Set the deadline by the shortest of some timeouts in microseconds from now, 0 being none."""
        if any(timeouts_us):
            self.deadline_ns = time.monotonic_ns() + min(timeout for timeout in timeouts_us if timeout > 0) * 1000

    def charge(self) -> None:
        """Put the call on its client's account until `let_go`.

        Raises:
            Overloaded: The client has as much in flight as it may.
        """
        self.client.take(self.nbytes)
        self._charged = self.nbytes

    def use_regions(self, views: Sequence[RegionView | None]) -> None:
        """Take the tensors' bytes from regions; `views` has one entry per tensor."""
        self.region_views = views
        for view in views:
            if view is not None:
                view.region.acquire()

    def let_go(self) -> None:
        """Drop the tensors, which are copied or will not be needed, and take the call off its client's account."""
        self.contents = ()
        if self._charged >= 0:
            self.client.give_back(self._charged)
            self._charged = -1
        views, self.region_views = self.region_views, ()
        for view in views:
            if view is not None:
                view.region.release_use()
