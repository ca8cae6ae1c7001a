"""A loaded model: who may call it, and the life of its worker. What it does with calls is `appliance.dispatcher`'s.

When the worker dies, calls it had fail retryably, calls still queued wait for the restart, and new ones are refused
until the model is ready again.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from appliance.activity import Activity
from appliance.batcher import Batcher
from appliance.cache import ResponseCache
from appliance.call import FINISHED, NEW, QUEUED, RUNNING, Call
from appliance.clients import Client
from appliance.config import WorkersSection
from appliance.cost_model import CostModel
from appliance.crashes import CrashHistory
from appliance.deadline import Deadlines
from appliance.dispatcher import Dispatcher
from appliance.errors import (
    ApplianceError,
    ArtifactCorrupt,
    BackendError,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotReady,
    WorkerLost,
)
from appliance.manifest import Manifest, SequenceSection
from appliance.metrics import ModelStatistics
from appliance.placement import Placement
from appliance.planner import Signature, check_text, signature_of
from appliance.poison import Suspects
from appliance.shares import Shares
from appliance.single_flight import SingleFlight
from appliance.steps import Steps
from appliance.text import Tokens
from appliance.text_plans import TextPlans
from appliance.types import ModelState
from appliance.wire import worker as frames
from appliance.wire import worker_pb2
from appliance.worker_link import LinkListener, WorkerLink

_log = logging.getLogger("appliance.instance")

#: How an instance gets a link to a worker that it has still to start.
LinkMaker = Callable[[asyncio.AbstractEventLoop, LinkListener, str], WorkerLink]


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
        policies: How calls of each level of priority queue, and under 0 those of requests that name none.
        default_timeout_us: The manifest's deadline for requests that name no priority; 0 for none.
        takes_sequences: True where the model keeps state between requests.
        single_flight: Answers equal calls with one run, or from the cache; None for a model without a cache.
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
        shares: Shares | None = None,
    ) -> None:
        self._loop = loop
        self._make_link = make_link
        self._manifest = manifest
        self.placement = placement
        self._settings = settings
        self._statistics = statistics
        self._deadlines = deadlines
        self._on_change = on_change
        self._link: WorkerLink | None = None
        self._watchdog: asyncio.TimerHandle | None = None
        self._watch_due_ns = 0
        self._crashes = CrashHistory(settings)
        self._suspects = Suspects()
        self.cost_model = CostModel()
        self.cost_model.seed(placement.measurement)
        self._batcher = Batcher(manifest.batch, self.cost_model)
        self.single_flight = self._make_single_flight() if manifest.cache.max_bytes else None
        self._steps = self._make_steps(manifest.sequence) if manifest.sequence is not None else None
        self._shares = shares or Shares(loop)
        self._dispatcher = Dispatcher(
            loop,
            manifest.name,
            self._batcher,
            statistics,
            self._suspects,
            activity or Activity(),
            self._note_lost,
            self._note_progress,
            self.single_flight,
            self._steps,
        )
        self._restart: asyncio.Task[None] | None = None
        self._idle: asyncio.Event = asyncio.Event()
        self._idle.set()
        self._is_closing = False
        self.policies = manifest.batch.policies()
        self.default_timeout_us = self.policies[0].default_timeout_us
        self.takes_sequences = manifest.sequence is not None
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

    def _make_single_flight(self) -> SingleFlight:
        section = self._manifest.cache
        return SingleFlight(
            ResponseCache(section, self._statistics),
            self._statistics,
            section.max_request_bytes,
            self._manifest.batch.max_queue_size,
            lambda priority: self._batcher.level_of(priority).number,
            self._give_up,
            self._loop.call_soon,
        )

    def _make_steps(self, section: SequenceSection) -> Steps:
        return Steps(
            self._loop,
            section,
            self._batcher,
            self._suspects,
            lambda calls, error: self._dispatcher.fail(calls, error),
            self._note_steps,
        )

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
        return self._batcher.queued + (self._steps.waiting if self._steps is not None else 0)

    @property
    def queued_by_priority(self) -> tuple[int, ...]:
        """Calls in the queue, by level, the most urgent first."""
        return tuple(level.calls for level in self._batcher.levels)

    @property
    def queued_bytes(self) -> int:
        """Bytes of tensors in the queue."""
        return self._batcher.queued_bytes

    @property
    def running(self) -> int:
        """Calls the worker has."""
        return self._dispatcher.running

    @property
    def live_sequences(self) -> int:
        """Sequences whose state the worker keeps."""
        return self._steps.sequences.live if self._steps is not None else 0

    async def start(self) -> None:
        """Start the worker, load and warm up, and take calls.

        Raises:
            ApplianceError: The model cannot be loaded; nothing is left behind.
        """
        began = time.monotonic_ns()
        link = self._make_link(self._loop, self._dispatcher, f"{self._manifest.name} ({self.placement.backend})")
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
        self._dispatcher.pump()

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
        if self.single_flight is not None:
            self.single_flight.cache.clear()  # the files may have changed, and with them the answers
        dispatcher = self._dispatcher
        share = self._shares.enter(self.placement.load.device, self._manifest.instances.weight, dispatcher.pump)
        dispatcher.attach(link, share, signature, loaded)
        self._link = link

    async def drain(self, grace_seconds: float) -> None:
        """Take no new calls and wait for those admitted; after the grace the rest fails with `ModelNotReady`."""
        self.accepts = False
        self._is_closing = True
        if self.single_flight is not None:
            self.single_flight.cache.clear()  # nobody reads it any more
        try:
            async with asyncio.timeout(grace_seconds):
                await self._wait_idle()
        except TimeoutError:
            _log.warning("%s: requests were still running after %g s", self._manifest.name, grace_seconds)

    async def _wait_idle(self) -> None:
        while self.queued or self._held or self._dispatcher.running:
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
        self._dispatcher.fail(self._dispatcher.take_running(), error)
        if self._steps is not None:
            self._steps.close(error)
        self._dispatcher.fail_queued(error)
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
                    if not was_held or self._batcher.level_of(call.priority).rejects_late:
                        raise DeadlineExceeded("cannot run the request: its deadline has passed")
                    call.deadline_ns = 0
                elif not was_held:  # who held it watches its deadline
                    self._deadlines.add(call)
            if self._suspects:
                self._suspects.judge(call, call.admitted_ns)
            if self._steps is not None and not self._steps.enter(call):
                return
            self._batcher.admit(call, call.admitted_ns)
        except ApplianceError as error:
            call.state = FINISHED
            call.let_go()
            if self._steps is not None:
                self._steps.skip([call])
            self._statistics.refuse(error.kind)
            raise
        self._dispatcher.wake()

    def _give_up(self, place: Call) -> None:
        """Take a call out of the queue, or from the worker, that nobody waits for."""
        if place.state is QUEUED:
            self._batcher.withdraw(place)
            return
        if place.state is NEW:
            place.let_go()
        place.state = FINISHED

    def cancel(self, call: Call, error: ApplianceError | None = None) -> None:
        """Withdraw a call: one that waits never runs, of one that runs the answer is dropped.

        The sink hears of it only where `error` is given.
        """
        is_running = call.state is RUNNING
        if call.state is QUEUED:
            self._batcher.withdraw(call)
        elif is_running:
            call.state = FINISHED
        elif call.state is NEW:
            call.state = FINISHED
            call.let_go()
            if self.single_flight is not None:
                self.single_flight.leave(call)
        else:
            return
        if self._steps is not None and not is_running:
            self._steps.skip([call])
        self._statistics.cancelled += 1
        if error is not None:
            call.sink.fail(call, error)
            call.sink.flush()
        self._note_progress()

    def forget(self, client: Client) -> None:
        """A client is gone, and its sequences with it."""
        if self._steps is not None:
            self._steps.forget(client)

    def inherit(self, replaced: "Instance") -> None:
        """Take the place of an instance: who goes on with a sequence of that one is told to start it again."""
        if self._steps is not None and replaced._steps is not None:
            self._steps.sequences.inherit(replaced._steps.sequences, "the model was loaded anew")

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

    def _note_steps(self) -> None:
        self._dispatcher.wake()
        self._note_progress()

    def _note_progress(self) -> None:
        if not self._idle.is_set():
            self._idle.set()

    # ---------------------------------------------------------------- crashes, hangs, restarts

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
        oldest = self._dispatcher.oldest_ns
        silent_ns = now - link.last_heard_ns
        waited_ns = now - oldest if oldest else silent_ns
        if oldest:
            # Behind others a batch waits for one of them to end, and others' answers must not hide that one hangs.
            overdue = min(waited_ns, silent_ns) > limit_ns or waited_ns > 2 * limit_ns
        else:
            overdue = silent_ns > 2 * heartbeat_ns
            if silent_ns > heartbeat_ns:
                link.send(bytes((frames.Kind.PING,)))
        # Where this comes late, it was the daemon that stood still, and the worker's answer may lie unread.
        if overdue and now - self._watch_due_ns < min(heartbeat_ns, limit_ns) / 2:
            _log.error("%s: the worker has not answered for %.1f s and is killed", self._manifest.name, waited_ns / 1e9)
            link.kill()
        self._arm_watchdog()

    def _note_lost(self, reason: str) -> None:
        """The worker died: fail what it had, restart or quarantine (called by the link)."""
        _log.error("%s: the worker %s", self._manifest.name, reason)
        self.last_crash = reason
        self.accepts = False
        now = time.monotonic_ns()
        running = self._dispatcher.take_running()
        for call in running:
            self._suspects.blame(call, len(running) == 1, now)
        self._crashes.note(now)
        self._set_state(ModelState.RESTARTING, f"restarting: its worker {reason}")
        lost = WorkerLost(f"cannot finish the request: the worker of model {self._manifest.name!r} {reason}")
        self._dispatcher.fail(running, lost)
        self._drop_worker()
        self._judge_queued(now)
        if self._steps is not None:
            self._steps.lose()
        if not self._is_closing or self.queued or self._held:
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
            self._dispatcher.fail([call], reason)
        if self._steps is not None:
            self._steps.skip([call for call, _ in condemned])

    def _drop_worker(self) -> None:
        self._dispatcher.detach()
        self._link = None

    async def _restart_worker(self) -> None:
        """Start a worker again, at once after a first crash, with back-off after more; quarantine after too many."""
        while True:
            quarantine = self._crashes.quarantine_seconds(time.monotonic_ns())
            if quarantine:
                reason = (
                    f"quarantined for {quarantine:g} s: its worker crashed {len(self._crashes)} times within a minute"
                )
                self._set_state(ModelState.QUARANTINED, reason)
                if self._steps is not None:
                    self._steps.fail_all(self.refusal())
                self._dispatcher.fail_queued(self.refusal())
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
        """Answer a call whose deadline passed (called by `Deadlines`), unless its priority's deadlines do not bind."""
        if call.state in (QUEUED, RUNNING) and not call.level.rejects_late:
            if call.state is QUEUED:
                self._batcher.delay(call, time.monotonic_ns())
            return
        if self.single_flight is not None and not self._batcher.level_of(call.priority).rejects_late:
            for place in self.single_flight.forgive(call):
                self._batcher.delay(place, time.monotonic_ns())
            return
        if call.state is NEW and not self._batcher.level_of(call.priority).rejects_late:
            call.deadline_ns = 0  # it waits for its turn in its sequence, or for its texts to be tokenised
            return
        self.cancel(call, DeadlineExceeded("cannot answer in time: the deadline has passed"))
