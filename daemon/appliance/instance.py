"""A loaded model: its queue, its worker, and the loop ``collect → run → scatter`` between them.

Everything here runs on the event loop and belongs to one `Instance`; nothing needs a lock. When the worker dies, calls
it had fail retryably, calls still queued wait for the restart, and new ones are refused until the model is ready again.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from appliance.activity import Activity
from appliance.batcher import Batcher, EagerPolicy
from appliance.call import FINISHED, NEW, QUEUED, RUNNING, Call, OutputTable, Sink
from appliance.config import WorkersSection
from appliance.crashes import CrashHistory
from appliance.deadline import Deadlines
from appliance.errors import (
    ApplianceError,
    ArtifactCorrupt,
    BackendError,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotReady,
    WorkerLost,
)
from appliance.gather import Gatherer, Scatterer, read_row_errors
from appliance.manifest import Manifest
from appliance.metrics import ModelStatistics
from appliance.placement import Placement
from appliance.planner import Signature, check_text, signature_of
from appliance.poison import Suspects
from appliance.slab import ALIGNMENT, Slab, aligned
from appliance.text import Tokens
from appliance.text_plans import TextPlans
from appliance.types import ITEM_BYTES, ModelState, TensorSpec, Timings
from appliance.wire import worker as frames
from appliance.wire import worker_pb2
from appliance.worker_link import LinkListener, Slot, WorkerLink

_log = logging.getLogger("appliance.instance")

#: Batches a worker holds: one running, one gathered behind it.
_SLOTS: Final = 2
#: Bounds of a slab. Pages are taken on first touch, so a large slab costs nothing until it is used.
_MIN_SLAB_BYTES: Final = 1 << 20
_MAX_SLAB_BYTES: Final = 1 << 26
#: What a dynamic dimension counts for when slabs are sized.
_GUESSED_DIMENSION: Final = 256
_RUN: Final = int(frames.Kind.RUN)


#: How an instance gets a link to a worker that it has still to start.
LinkMaker = Callable[[asyncio.AbstractEventLoop, LinkListener, str], WorkerLink]


def slab_bytes(specs: tuple[TensorSpec, ...], rows: int) -> int:
    """Bytes for `rows` rows of every tensor, each aligned, within the slab bounds."""
    total = 0
    for spec in specs:
        size = max(ITEM_BYTES[spec.datatype], 1)
        for dimension in spec.shape[1:] if rows > 1 else spec.shape:
            size *= _GUESSED_DIMENSION if dimension < 0 else dimension
        total = aligned(total + size * rows)
    return min(max(total, _MIN_SLAB_BYTES), _MAX_SLAB_BYTES)


class Instance:
    """A session with its queue and worker.

    Attributes:
        state: Where it stands.
        reason: Why it is not ready.
        signature: What the session takes and gives; set by `start`.
        loaded: What the worker reported; set by `start`.
        accepts: True while calls are taken; plans are good for as long.
        restarts: Times the worker was started again.
        last_crash: How the worker ended when it crashed last; empty while it never has.
        load_ns: How long the last start took.
        default_timeout_us: The manifest's deadline for requests; 0 for none.
    """

    signature: Signature

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        manifest: Manifest,
        placement: Placement,
        settings: WorkersSection,
        statistics: ModelStatistics,
        deadlines: Deadlines,
        on_change: Callable[[], None],
        make_link: LinkMaker = WorkerLink,
        activity: Activity | None = None,
    ) -> None:
        self._loop = loop
        self._make_link = make_link
        self._manifest = manifest
        self.placement = placement
        self._settings = settings
        self._statistics = statistics
        self._deadlines = deadlines
        self._on_change = on_change
        self._activity = activity or Activity()
        self._batcher = Batcher(EagerPolicy(), manifest.batch.max_queue_size, manifest.batch.max_queue_bytes)
        self._link: WorkerLink | None = None
        self._slots: list[Slot] = []
        self._free: list[Slot] = []
        self._batch_number = 0
        self._spill_number = 0x80000000
        self._pump_handle: asyncio.Handle | None = None
        self._watchdog: asyncio.TimerHandle | None = None
        self._watch_due_ns = 0
        self._crashes = CrashHistory(settings)
        self._suspects = Suspects()
        self._restart: asyncio.Task[None] | None = None
        self._idle: asyncio.Event = asyncio.Event()
        self._idle.set()
        self._is_closing = False
        self.default_timeout_us = manifest.batch.default_timeout_ms * 1000
        self._held = 0
        self._held_bytes = 0
        self._text_plans = TextPlans(self)
        self.state = ModelState.LOADING
        self.reason = ""
        self.loaded = worker_pb2.Loaded()
        self.accepts = False
        self.restarts = 0
        self.last_crash = ""
        self.load_ns = 0

    # ---------------------------------------------------------------- life

    @property
    def pid(self) -> int | None:
        """The worker's process id, or None."""
        return self._link.pid if self._link is not None else None

    @property
    def fallback(self) -> str:
        """Why it does not run where it was to; empty where it does."""
        execution = self.loaded.execution
        if self.placement.fallback or execution.device == self.placement.load.device:
            return self.placement.fallback
        reason = execution.reason or "the runtime gives no reason"
        return f"{self.placement.variant} ran on {execution.device!r}: {reason}"

    @property
    def queued(self) -> int:
        """Calls waiting."""
        return self._batcher.queued

    @property
    def running(self) -> int:
        """Calls the worker has."""
        return sum(len(slot.calls) for slot in self._slots)

    async def start(self) -> None:
        """Start the worker, load and warm up, and take calls.

        Raises:
            ApplianceError: The model cannot be loaded; nothing is left behind.
        """
        began = time.monotonic_ns()
        link = self._make_link(self._loop, self, f"{self._manifest.name} ({self.placement.backend})")
        loaded = await link.start(self.placement.python, self.placement.load, self._settings.load_seconds)
        try:
            self._take_in(loaded, link)
        except BaseException:
            self._drop_worker()
            await link.close()
            raise
        self.load_ns = time.monotonic_ns() - began
        self._note_fallback()
        self.accepts = not self._is_closing
        self._set_state(ModelState.READY)
        self._arm_watchdog()
        self._pump()

    def _note_fallback(self) -> None:
        """Never silently: count it and, unless the manifest allows it, say so in the log."""
        if self.fallback:
            self._statistics.fallbacks += 1
            if self._manifest.fallback != "allow":
                device = self.loaded.execution.device
                _log.warning("%s runs on %s as a fallback: %s", self._manifest.name, device, self.fallback)

    def _take_in(self, loaded: worker_pb2.Loaded, link: WorkerLink) -> None:
        """Make ready for a worker that has loaded the model.

        Raises:
            ArtifactCorrupt: After a restart the model has other tensors than before, for which no plan is good.
            InvalidManifest: The text section does not fit the session.
            Overloaded: There is no shared memory to be had.
        """
        signature = signature_of(loaded, self._manifest)
        if getattr(self, "signature", signature) != signature:
            raise ArtifactCorrupt(
                f"cannot restart model {self._manifest.name!r}: its files changed while it was loaded; load it again"
            )
        if self._manifest.text is not None:
            check_text(self._manifest.text, signature, self._manifest.name)
        self.signature = signature
        self.loaded = loaded
        self._gatherer = Gatherer(bool(loaded.max_batch_size))
        self._scatterer = Scatterer(signature.output_names, bool(loaded.max_batch_size))
        self._rows = self._batch_rows = max(loaded.max_batch_size, 1)
        self._padding = ALIGNMENT * len(signature.inputs)
        worker_inputs = tuple(spec for index, spec in signature.inputs.values() if index >= 0)
        sizes = slab_bytes(worker_inputs, self._rows), slab_bytes(signature.public_outputs(), self._rows)
        for number in range(_SLOTS):
            self._slots.append(link.make_slot(number, *sizes))
        self._free = list(self._slots)
        self._link = link

    async def drain(self, grace_seconds: float) -> None:
        """Take no new calls and wait for those admitted; after the grace the rest fails with `ModelNotReady`."""
        self.accepts = False
        self._is_closing = True
        try:
            async with asyncio.timeout(grace_seconds):
                await self._wait_idle()
        except TimeoutError:
            _log.warning("%s: requests were still running after %g s", self._manifest.name, grace_seconds)

    async def _wait_idle(self) -> None:
        while self._batcher.queued or self._held or any(slot.calls for slot in self._slots):
            if self._link is None and self._restart is None:
                return
            self._idle.clear()
            await self._idle.wait()

    async def close(self, error: ApplianceError | None = None) -> None:
        """End the worker; calls still here fail with `error`, by default `ModelNotReady`."""
        self.accepts = False
        self._is_closing = True
        if self._restart is not None:
            self._restart.cancel()
            await asyncio.wait({self._restart})
            self._restart = None
        if self._watchdog is not None:
            self._watchdog.cancel()
        error = error or ModelNotReady(f"cannot run the request: model {self._manifest.name!r} is being unloaded")
        self._fail_running(error)
        self._fail_queued(error)
        link = self._link
        self._drop_worker()
        if link is not None:
            await link.close()
        self._set_state(ModelState.UNLOADED)

    def _set_state(self, state: ModelState, reason: str = "") -> None:
        if (self.state, self.reason) != (state, reason):
            self.state, self.reason = state, reason
            self._on_change()

    # ---------------------------------------------------------------- admission

    def refusal(self) -> ApplianceError:
        """The error for a call that comes while the instance takes none."""
        return ModelNotReady(
            f"cannot run the request: model {self._manifest.name!r} is {self.reason or self.state.value}"
        )

    def check_room(self, nbytes: int) -> None:
        """Refuse a call that will be submitted later, once its text is tokenised.

        Raises:
            Overloaded: The queue is full.
        """
        self._batcher.check_room(nbytes, self._held, self._held_bytes)

    def submit(self, call: Call, was_held: bool = False) -> None:
        """Queue a call; the answer goes to its sink, always from a later turn of the loop.

        Args:
            call: The call.
            was_held: It was on its way here when calls were still taken (see `hold`), so draining does not refuse it.

        Raises:
            ApplianceError: The call is not admitted, and its sink hears nothing of it.
        """
        try:
            if not (self.accepts or (was_held and self.state in (ModelState.READY, ModelState.RESTARTING))):
                raise self.refusal()
            call.admitted_ns = time.monotonic_ns()
            if call.deadline_ns:
                if call.deadline_ns <= call.admitted_ns:
                    raise DeadlineExceeded("cannot run the request: its deadline has passed")
                if not was_held:  # who held it watches its deadline
                    self._deadlines.add(call)
            if self._suspects:
                self._suspects.judge(call, call.admitted_ns)
            self._batcher.admit(call)
        except ApplianceError as error:
            call.state = FINISHED
            call.let_go()
            self._statistics.refuse(error.kind)
            raise
        if self._pump_handle is None and self._free:
            self._pump_handle = self._loop.call_soon(self._pump)

    def cancel(self, call: Call, error: ApplianceError | None = None) -> None:
        """Withdraw a call: one that waits never runs, of one that runs the answer is dropped.

        The sink hears of it only where `error` is given.
        """
        if call.state is QUEUED:
            self._batcher.withdraw(call)
        elif call.state is RUNNING:
            call.state = FINISHED
        elif call.state is NEW:
            call.state = FINISHED
            call.let_go()
        else:
            return
        self._statistics.cancelled += 1
        if error is not None:
            call.sink.fail(call, error)
            call.sink.flush()
        self._note_progress()

    def hold(self, nbytes: int) -> None:
        """A call of `nbytes` is on its way (its text is being tokenised): it counts as queued, and draining waits."""
        self._held += 1
        self._held_bytes += nbytes

    def unhold(self, nbytes: int) -> None:
        """The call that was on its way is queued or given up."""
        self._held -= 1
        self._held_bytes -= nbytes
        self._note_progress()

    def give_tokens(self, call: Call, place: int, tokens: Tokens) -> None:
        """Put token ids in the place of a call's texts, and the plan for them in the place of its plan.

        Raises:
            BackendError: The model takes no text.
        """
        if self._manifest.text is None:
            raise BackendError("cannot run the request: the model takes no text")
        self._text_plans.give(call, place, tokens, self._manifest.text)

    # ---------------------------------------------------------------- collect, run, scatter

    def _pump(self) -> None:
        self._pump_handle = None
        while self._free and self._link is not None and not self._link.is_lost:
            if self._suspects and self._must_wait():
                break
            slot = self._free[-1]
            calls = self._batcher.collect(self._batch_rows, slot.input.size - self._padding, _SLOTS - len(self._free))
            if not calls:
                break
            self._free.pop()
            self._run(slot, calls)

    def _must_wait(self) -> bool:
        """True while a suspect has the worker to itself, or heads the queue: a crash shall have one author."""
        running = [call for slot in self._slots for call in slot.calls]
        if not running:
            return False
        first = self._batcher.peek()
        return any(call.is_alone for call in running) or (first is not None and first.is_alone)

    def _run(self, slot: Slot, calls: list[Call]) -> None:
        link = self._link
        if link is None:
            return
        began = time.monotonic_ns()
        self._activity.note(began)
        for call in calls:
            call.queue_ns = began - call.admitted_ns
        try:
            memory, region = self._room_for(slot, calls, link)
            gathered = self._gatherer.gather(calls, memory, region)
        except Exception as error:
            if not isinstance(error, ApplianceError):  # one that is: no memory for a batch that outgrew its slab
                _log.exception("%s: gathering a batch failed", self._manifest.name)
                error = BackendError("cannot run the request: gathering its batch failed")
            self._drop_spill(slot)
            self._free.append(slot)
            self._fail(calls, error)
            self._note_progress()
            return
        self._batch_number += 1
        slot.calls = calls
        slot.batch = self._batch_number
        slot.started_ns = time.monotonic_ns()
        slot.copy_ns = slot.started_ns - began
        link.send(
            frames.RUN_HEADER.pack(_RUN, slot.number, gathered.tensors, gathered.rows, slot.batch, gathered.wanted)
            + gathered.layout
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
        memory = attached.memory if attached is not None else slot.output.memory
        timings = Timings(decode, 0, 0, slot.copy_ns + copy_in + copy_out, compute, postprocess)
        rows = self._scatter(slot.calls, table, memory, timings, failed_rows)
        self._statistics.ran(rows, timings, time.time_ns() // 1_000_000)  # shown to people as a date
        self._release(slot)

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
        calls = slot.calls
        waiting = [call for call in calls if call.state is RUNNING]
        if len(calls) > 1:
            if is_out_of_memory:
                self._bound_rows(sum(call.plan.rows for call in calls) // 2)
            else:
                for call in waiting:
                    call.is_alone = True
            self._batcher.readmit(waiting)
        else:
            if is_out_of_memory:
                self._batch_rows = self._rows
            self._fail(waiting, BackendError(f"cannot run the request: {message}"))
        for call in calls:
            if call.state is FINISHED:
                call.let_go()
        self._release(slot)

    def _bound_rows(self, rows: int) -> None:
        if rows < self._batch_rows:
            self._batch_rows = max(rows, 1)
            _log.warning("%s: memory ran out; batches have %d rows at most now", self._manifest.name, self._batch_rows)

    def _release(self, slot: Slot) -> None:
        slot.calls = []
        self._drop_spill(slot)
        self._free.append(slot)
        if self._batcher.queued:
            self._pump()
        self._note_progress()

    def _drop_spill(self, slot: Slot) -> None:
        if slot.spill is not None:
            if self._link is not None:
                self._link.unmap_region(slot.spill_region)
            slot.spill.close()
            slot.spill = None

    def _note_progress(self) -> None:
        if not self._idle.is_set():
            self._idle.set()

    def _fail(self, calls: list[Call], error: ApplianceError) -> None:
        now = time.monotonic_ns()
        for call in calls:
            if call.state is not FINISHED:
                call.state = FINISHED
                self._statistics.fail.add(now - call.admitted_ns)
                call.sink.fail(call, error)
                call.sink.flush()
            call.let_go()

    def _fail_running(self, error: ApplianceError) -> None:
        for slot in self._slots:
            calls, slot.calls = slot.calls, []
            self._fail(calls, error)

    def _fail_queued(self, error: ApplianceError) -> None:
        self._fail(self._batcher.drain(), error)
        self._note_progress()

    # ---------------------------------------------------------------- crashes, hangs, restarts

    def _break_contract(self, what: str) -> None:
        _log.error("%s: the worker %s and is replaced", self._manifest.name, what)
        if self._link is not None:
            self._link.kill()

    def _arm_watchdog(self) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
        interval = min(self._settings.heartbeat_seconds, self._manifest.batch.max_batch_seconds) / 2
        self._watch_due_ns = time.monotonic_ns() + int(interval * 1e9)
        self._watchdog = self._loop.call_later(interval, self._watch)

    def _watch(self) -> None:
        """Kill a worker whose batch runs too long, or that no longer answers when asked."""
        link = self._link
        if link is None:
            return
        now = time.monotonic_ns()
        heartbeat_ns = self._settings.heartbeat_seconds * 1e9
        limit_ns = self._manifest.batch.max_batch_seconds * 1e9
        oldest = min((slot.started_ns for slot in self._slots if slot.calls), default=0)
        silent_ns = now - link.last_heard_ns
        if oldest:
            overdue = min(now - oldest, silent_ns) > limit_ns
        else:
            overdue = silent_ns > 2 * heartbeat_ns
            if silent_ns > heartbeat_ns:
                link.send(bytes((frames.Kind.PING,)))
        # Where this comes late, it was the daemon that stood still, and the worker's answer may lie unread.
        if overdue and now - self._watch_due_ns < min(heartbeat_ns, limit_ns) / 2:
            _log.error("%s: the worker has not answered for %.1f s and is killed", self._manifest.name, silent_ns / 1e9)
            link.kill()
        self._arm_watchdog()

    def on_lost(self, reason: str) -> None:
        """The worker died: fail what it had, restart or quarantine (called by the link)."""
        _log.error("%s: the worker %s", self._manifest.name, reason)
        self.last_crash = reason
        self.accepts = False
        now = time.monotonic_ns()
        running = [call for slot in self._slots for call in slot.calls]
        for call in running:
            self._suspects.blame(call, len(running) == 1, now)
        self._crashes.note(now)
        self._set_state(ModelState.RESTARTING, f"restarting: its worker {reason}")
        self._fail_running(
            WorkerLost(f"cannot finish the request: the worker of model {self._manifest.name!r} {reason}")
        )
        self._drop_worker()
        self._judge_queued(now)
        if not self._is_closing or self._batcher.queued or self._held:
            self._restart = self._loop.create_task(self._restart_worker())

    def _judge_queued(self, now_ns: int) -> None:
        """Calls that wait may repeat one that was in flight when the worker crashed."""
        if not self._suspects:
            return
        waiting: list[Call] = []
        condemned: list[tuple[Call, ApplianceError]] = []
        for call in self._batcher.drain():
            try:
                self._suspects.judge(call, now_ns)
                waiting.append(call)
            except InvalidRequest as error:
                condemned.append((call, error))
        self._batcher.readmit(waiting)
        for call, reason in condemned:
            self._fail([call], reason)

    def _drop_worker(self) -> None:
        for slot in self._slots:
            slot.close()
        self._slots = []
        self._free = []
        self._link = None
        self._note_progress()

    async def _restart_worker(self) -> None:
        """Start a worker again, at once after a first crash, with back-off after more; quarantine after too many."""
        while True:
            quarantine = self._crashes.quarantine_seconds(time.monotonic_ns())
            if quarantine:
                reason = (
                    f"quarantined for {quarantine:g} s: its worker crashed {len(self._crashes)} times within a minute"
                )
                self._set_state(ModelState.QUARANTINED, reason)
                self._fail_queued(self.refusal())
                await asyncio.sleep(quarantine)
                self._crashes.release(time.monotonic_ns())
            else:
                await asyncio.sleep(self._crashes.backoff_seconds())
            try:
                await self.start()
            except Exception as error:  # whatever it is, the model must not stay down for it
                _log.error("%s: %s", self._manifest.name, error, exc_info=not isinstance(error, ApplianceError))
                self._set_state(ModelState.RESTARTING, f"restarting: {error}")
                self._crashes.note(time.monotonic_ns())
                continue
            self.restarts += 1
            self._restart = None
            _log.info("%s: the worker runs again", self._manifest.name)
            return

    def expire(self, call: Call) -> None:
        """Answer a call whose deadline passed (called by `Deadlines`)."""
        self.cancel(call, DeadlineExceeded("cannot answer in time: the deadline has passed"))
