"""The loop ``collect → run → scatter`` between a model's queue and its worker.

Everything here runs on the event loop and belongs to one `Instance`; nothing needs a lock.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from appliance.activity import Activity
from appliance.alarm import Alarm
from appliance.batcher import Batcher
from appliance.call import FINISHED, RUNNING, Call, OutputTable, Sink
from appliance.errors import ApplianceError, BackendError, DeadlineExceeded, InvalidRequest
from appliance.gather import Gatherer, Scatterer, read_row_errors
from appliance.metrics import ModelStatistics
from appliance.planner import Signature
from appliance.poison import Suspects
from appliance.shares import Share
from appliance.single_flight import SingleFlight
from appliance.slab import ALIGNMENT, Slab, aligned
from appliance.steps import Steps
from appliance.types import ITEM_BYTES, TensorSpec, Timings
from appliance.wire import worker as frames
from appliance.wire import worker_pb2
from appliance.worker_link import Slot, WorkerLink

_log = logging.getLogger("appliance.instance")

#: Bounds of a slab. Pages are taken on first touch, so a large slab costs nothing until it is used.
_MIN_SLAB_BYTES: Final = 1 << 20
_MAX_SLAB_BYTES: Final = 1 << 26
#: What a dynamic dimension counts for when slabs are sized.
_GUESSED_DIMENSION: Final = 256
_RUN: Final = int(frames.Kind.RUN)


def slab_bytes(specs: tuple[TensorSpec, ...], rows: int) -> int:
    """Bytes for `rows` rows of every tensor, each aligned, within the slab bounds."""
    total = 0
    for spec in specs:
        size = max(ITEM_BYTES[spec.datatype], 1)
        for dimension in spec.shape[1:] if rows > 1 else spec.shape:
            size *= _GUESSED_DIMENSION if dimension < 0 else dimension
        total = aligned(total + size * rows)
    return min(max(total, _MIN_SLAB_BYTES), _MAX_SLAB_BYTES)


class Dispatcher:
    """Takes batches from a queue to a worker and answers back to whoever asked.

    It has one slot more than the worker runs batches at a time, so that the next batch lies ready when one ends.

    Attributes:
        batcher: The queue.
        on_lost: Called by the link when the worker is gone.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        name: str,
        batcher: Batcher,
        statistics: ModelStatistics,
        suspects: Suspects,
        activity: Activity,
        on_lost: Callable[[str], None],
        on_progress: Callable[[], None],
        single_flight: SingleFlight | None = None,
        steps: Steps | None = None,
    ) -> None:
        """Make one without a worker.

        Args:
            loop: The event loop.
            name: The model, for the log.
            batcher: The queue.
            statistics: What happens is counted here.
            suspects: Calls that a worker may have died of.
            activity: Is told of every batch.
            on_lost: See the class.
            on_progress: Called where calls have left.
            single_flight: Knows equal calls, where the model has a cache.
            steps: Knows what is whose step, where the model keeps state between requests.
        """
        self._loop = loop
        self._name = name
        self.batcher = batcher
        self._statistics = statistics
        self._suspects = suspects
        self._activity = activity
        self.on_lost = on_lost
        self._note_progress = on_progress
        self._single_flight = single_flight
        self._steps = steps
        self._share: Share | None = None
        self._link: WorkerLink | None = None
        self._slots: list[Slot] = []
        self._free: list[Slot] = []
        self._batch_number = 0
        self._spill_number = 0x80000000
        self._pump_handle: asyncio.Handle | None = None

    # ---------------------------------------------------------------- the worker

    @property
    def running(self) -> int:
        """Calls the worker has."""
        return sum(len(slot.calls) for slot in self._slots)

    @property
    def oldest_ns(self) -> int:
        """When the batch that is with the worker for the longest was sent; 0 where it has none."""
        return min((slot.started_ns for slot in self._slots if slot.calls), default=0)

    def attach(self, link: WorkerLink, share: Share, signature: Signature, loaded: worker_pb2.Loaded) -> None:
        """Work with a worker that has loaded the model, in its share of the device.

        Raises:
            Overloaded: There is no shared memory to be had.
        """
        is_batched = bool(loaded.max_batch_size)
        self._gatherer = Gatherer(is_batched)
        self._scatterer = Scatterer(signature.output_names, is_batched)
        self._share = share
        self._alarm = Alarm(self._loop, self.pump)
        self._rows = max(loaded.max_batch_size, 1)
        if self._steps is not None:
            self._rows = min(self._rows, frames.MAX_STEPS)
        self._batch_rows = self._rows
        self._padding = ALIGNMENT * len(signature.inputs)
        worker_inputs = tuple(spec for index, spec in signature.inputs.values() if index >= 0)
        sizes = slab_bytes(worker_inputs, self._rows), slab_bytes(signature.public_outputs(), self._rows)
        streams = max(loaded.streams, 1)
        self.batcher.flights.streams = streams
        for number in range(streams + 1):
            self._slots.append(link.make_slot(number, *sizes))
        self._free = list(self._slots)
        self._link = link

    def detach(self) -> None:
        """Give back what there was for a worker that is gone."""
        self.batcher.flights.clear()
        if self._share is not None:
            self._share.leave(time.monotonic_ns())
            self._share = None
            self._alarm.close()
        for slot in self._slots:
            slot.close()
        self._slots = []
        self._free = []
        self._link = None
        self._note_progress()

    # ---------------------------------------------------------------- collect and run

    def wake(self) -> None:
        """Something was queued: look in a later turn of the loop."""
        if self._pump_handle is None and self._free:
            self._pump_handle = self._loop.call_soon(self.pump)

    def pump(self) -> None:
        """Give the worker what it can take now."""
        self._pump_handle = None
        batcher, share = self.batcher, self._share
        while self._free and batcher.queued and share is not None and self._link is not None and not self._link.is_lost:
            if self._suspects and self._must_wait():
                break
            slot = self._free[-1]
            now = time.monotonic_ns()
            if not share.may_run(now):
                break
            calls = batcher.collect(now, self._batch_rows, slot.input.size - self._padding)
            if batcher.late:
                late, batcher.late = batcher.late, []
                self._statistics.cancelled += len(late)
                self.fail(late, DeadlineExceeded("cannot answer in time: the deadline would pass while the model runs"))
                if self._steps is not None:
                    self._steps.skip(late)
                self._note_progress()
                if not calls:
                    continue
            if not calls:
                if batcher.wake_ns:
                    self._alarm.set(batcher.wake_ns)
                break
            if self._single_flight is not None:
                calls = self._single_flight.begin(calls)
            self._free.pop()
            self._run(slot, calls, share, now)

    def _must_wait(self) -> bool:
        """True while a suspect has the worker to itself, or heads the queue: a crash shall have one author."""
        running = [call for slot in self._slots for call in slot.calls]
        if not running:
            return False
        first = self.batcher.peek()
        return any(call.is_alone for call in running) or (first is not None and first.is_alone)

    def _run(self, slot: Slot, calls: list[Call], share: Share, began: int) -> None:
        link = self._link
        if link is None:
            return
        self._activity.note(began)
        for call in calls:
            call.queue_ns = began - call.admitted_ns
        try:
            memory, region = self._room_for(slot, calls, link)
            gathered = self._gatherer.gather(calls, memory, region)
        except Exception as error:
            if not isinstance(error, ApplianceError):  # one that is: no memory for a batch that outgrew its slab
                _log.exception("%s: gathering a batch failed", self._name)
                error = BackendError("cannot run the request: gathering its batch failed")
            self._drop_spill(slot)
            self._free.append(slot)
            self.fail(calls, error)
            if self._steps is not None:
                self._steps.skip(calls)
            self._note_progress()
            return
        self._batch_number += 1
        slot.calls = calls
        slot.batch = self._batch_number
        slot.started_ns = time.monotonic_ns()
        slot.copy_ns = slot.started_ns - began
        slot.flight = self.batcher.begin(calls, slot.started_ns)
        share.begin(slot.started_ns)
        link.send(
            frames.RUN_HEADER.pack(_RUN, slot.number, gathered.tensors, gathered.rows, slot.batch, gathered.wanted)
            + gathered.layout
            + (self._steps.frame(calls) if self._steps is not None else b"")
        )

    def _room_for(self, slot: Slot, calls: list[Call], link: WorkerLink) -> tuple[memoryview, int]:
        """Where to gather: the slot's slab, or a slab of its own for a call too large for it; maps client regions."""
        call = calls[0]
        if len(calls) > 1:
            return slot.input.memory, 0
        outside = 0
        for view, tensor in zip(call.region_views, call.plan.tensors, strict=False):
            if view is not None and view.is_in_place:
                link.map_region(view.region.number, view.region.slab)
                view.region.watch(link.unmap_region)
                outside += max(tensor.byte_length, 0)
        needed = call.nbytes - outside + 64 * len(call.plan.tensors)
        if needed <= slot.input.size:
            return slot.input.memory, 0
        self._spill_number = 0x80000000 | ((self._spill_number + 1) & 0x3FFFFFFF)
        slot.spill = Slab.create(needed, "appliance-spill")
        slot.spill_region = self._spill_number
        link.map_region(slot.spill_region, slot.spill)
        return slot.spill.memory, slot.spill_region

    # ---------------------------------------------------------------- scatter

    def on_done(self, packet: memoryview, attached: Slab | None) -> None:
        """Scatter a batch's answers (called by the link)."""
        try:
            self._take_answers(packet, attached)
        finally:
            if attached is not None:
                attached.close()

    def _take_answers(self, packet: memoryview, attached: Slab | None) -> None:
        _, number, count, row_errors, batch, decode, copy_in, compute, postprocess, copy_out = (
            frames.DONE_HEADER.unpack_from(packet)
        )
        slot = self._slots[number] if number < len(self._slots) else None
        if slot is None or slot.batch != batch or not slot.calls:
            self._break_contract("answered a batch it was not given")
            return
        try:
            table, end = self._scatterer.table(packet, count)
            failed_rows = read_row_errors(packet, end, row_errors) if row_errors else {}
        except ValueError:
            self._break_contract("sent a packet that breaks the format")
            return
        self._end_flight(slot)
        if self._steps is not None:
            self._steps.ran(slot.calls, failed_rows)
        if self.batcher.queued and self._free:
            self.pump()  # the worker runs while the answers are handed out
        memory = attached.memory if attached is not None else slot.output.memory
        timings = Timings(decode, 0, 0, slot.copy_ns + copy_in + copy_out, compute, postprocess)
        rows = self._scatter(slot.calls, table, memory, timings, failed_rows)
        self._statistics.ran(rows, timings, time.time_ns() // 1_000_000)  # shown to people as a date
        self._release(slot)

    def _end_flight(self, slot: Slot, is_measured: bool = True) -> None:
        flight, slot.flight = slot.flight, None
        if flight is not None and self._share is not None:
            now = time.monotonic_ns()
            self.batcher.end(flight, now, is_measured)
            self._share.end(now)

    def _scatter(
        self, calls: list[Call], table: OutputTable, memory: memoryview, timings: Timings, failed_rows: dict[int, str]
    ) -> int:
        """Give every call its rows, or its row's error; returns the rows of the batch."""
        rows = sum([call.plan.rows for call in calls])
        timings.batch_rows = rows
        now = time.monotonic_ns()
        statistics = self._statistics
        sinks: list[Sink] = []
        row = 0
        for call in calls:
            taken = call.plan.rows
            if call.state is RUNNING:
                call.state = FINISHED
                problem = (
                    next((failed_rows[r] for r in range(row, row + taken) if r in failed_rows), "")
                    if failed_rows
                    else ""
                )
                if problem:
                    call.sink.fail(call, InvalidRequest(problem))
                    statistics.fail.add(now - call.admitted_ns)
                else:
                    call.sink.deliver(call, table, memory, row, timings)
                    statistics.success.add(now - call.admitted_ns)
                    statistics.queue.add(call.queue_ns)
                if call.is_alone and self._suspects:
                    self._suspects.absolve(call)
                sinks.append(call.sink)
            row += taken
            call.let_go()
        for sink in sinks if len(sinks) < 2 else dict.fromkeys(sinks):
            sink.flush()
        return rows

    def on_fault(self, slot_number: int, batch: int, message: str, is_out_of_memory: bool = False) -> None:
        """A batch failed as a whole: its calls run once more, each alone, so that a bad one fails by itself.

        Where memory ran out they run in halves, and later batches are no larger; a call that is too large by itself
        says nothing about batches, so the bound is lifted again.
        """
        slot = self._slots[slot_number] if slot_number < len(self._slots) else None
        if slot is None or slot.batch != batch or not slot.calls:
            self._break_contract("failed a batch it was not given")
            return
        self._end_flight(slot, is_measured=False)
        calls = slot.calls
        waiting = [call for call in calls if call.state is RUNNING]
        if len(calls) > 1:
            if is_out_of_memory:
                self._bound_rows(sum(call.plan.rows for call in calls) // 2)
            else:
                for call in waiting:
                    call.is_alone = True
            self.batcher.readmit(waiting)
        else:
            if is_out_of_memory:
                self._batch_rows = self._rows
            self.fail(waiting, BackendError(f"cannot run the request: {message}"))
        gone = [call for call in calls if call.state is FINISHED]
        for call in gone:
            call.let_go()
        if self._steps is not None:
            self._steps.failed(gone)
        self._release(slot)

    def _bound_rows(self, rows: int) -> None:
        if rows < self._batch_rows:
            self._batch_rows = max(rows, 1)
            _log.warning("%s: memory ran out; batches have %d rows at most now", self._name, self._batch_rows)

    def _release(self, slot: Slot) -> None:
        slot.calls = []
        self._drop_spill(slot)
        self._free.append(slot)
        if self.batcher.queued:
            self.pump()
        self._note_progress()

    def _drop_spill(self, slot: Slot) -> None:
        if slot.spill is not None:
            if self._link is not None:
                self._link.unmap_region(slot.spill_region)
            slot.spill.close()
            slot.spill = None

    def _break_contract(self, what: str) -> None:
        _log.error("%s: the worker %s and is replaced", self._name, what)
        if self._link is not None:
            self._link.kill()

    # ---------------------------------------------------------------- failures

    def fail(self, calls: list[Call], error: ApplianceError) -> None:
        """Answer calls that nobody has answered with `error`."""
        now = time.monotonic_ns()
        for call in calls:
            if call.state is not FINISHED:
                call.state = FINISHED
                self._statistics.fail.add(now - call.admitted_ns)
                call.sink.fail(call, error)
                call.sink.flush()
            call.let_go()

    def take_running(self) -> list[Call]:
        """The calls the worker has, which it has no more."""
        calls = [call for slot in self._slots for call in slot.calls]
        for slot in self._slots:
            slot.calls = []
        return calls

    def fail_queued(self, error: ApplianceError) -> None:
        """Answer all that wait with `error`."""
        self.fail(self.batcher.drain(), error)
        self._note_progress()
