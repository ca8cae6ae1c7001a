"""The loop of one model with workers that do as the test says, and the link to a real process that does not."""

import asyncio
import itertools
import logging
import os
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parents[1]))

from appliance import dispatcher, slab
from appliance import instance as instance_module
from appliance.errors import (
    ArtifactCorrupt,
    BackendError,
    DeadlineExceeded,
    InvalidManifest,
    InvalidRequest,
    ModelNotReady,
    Overloaded,
    ShuttingDown,
    WorkerLost,
)
from appliance.planner import make_plan
from appliance.text import Tokens
from appliance.types import ModelState
from appliance.wire import worker as frames
from appliance.wire import worker_pb2
from appliance.worker_link import WorkerLink
from support.workers import Crew, Ledger, echo_model, make_call, make_instance, specs, turns, until


def run(scenario):
    """Run a coroutine function; what it leaves running is an error of the test."""

    async def whole():
        await scenario()
        await turns()

    asyncio.run(whole())


@pytest.fixture(autouse=True)
def _eager_workers(monkeypatch):
    """The worker's next batch is sent as soon as there is one: how long batches take here is chance."""
    monkeypatch.setattr("appliance.batcher._LEAD_NS", 1 << 62)


async def started(crew: Crew | None = None, **options):
    crew = crew or Crew()
    instance = make_instance(crew, **options)
    await instance.start()
    return instance, crew


# -------------------------------------------------------------------------------------------------- the usual


def test_calls_are_batched_while_the_worker_is_busy_and_each_gets_its_rows():
    async def scenario():
        instance, crew = await started()
        ledger = Ledger()
        for number in range(9):
            instance.submit(make_call(instance, ledger, number, rows=1 + number % 3))
            await turns(1 if number < 2 else 0)
        await turns()
        assert [run.rows for run in crew.worker.runs] == [1, 2]
        assert (instance.running, instance.queued) == (2, 7)
        crew.worker.answer()
        crew.worker.answer()
        assert [run.rows for run in crew.worker.runs] == [6, 6], "3 + 1 + 2, since 3 more are more than 8"
        crew.worker.answer()
        assert [run.rows for run in crew.worker.runs] == [6, 3]
        crew.worker.answer()
        crew.worker.answer()
        expected = {number: bytes([number]) * 16 * (1 + number % 3) for number in range(9)}
        assert ledger.answers == expected
        assert ledger.errors == {}
        assert (instance.running, instance.queued) == (0, 0)
        await instance.close()

    run(scenario)


def test_a_call_is_never_answered_while_it_is_submitted():
    async def scenario():
        instance, crew = await started()
        ledger = Ledger()
        instance.submit(make_call(instance, ledger, 1))
        assert crew.worker.runs == []
        await turns()
        assert len(crew.worker.runs) == 1
        await instance.close()

    run(scenario)


def test_a_row_error_fails_its_call_only():
    async def scenario():
        instance, crew = await started()
        ledger = Ledger()
        for number in range(3):
            instance.submit(make_call(instance, ledger, number, rows=2))
        await turns()
        crew.worker.answer(row_errors={3: "cannot decode the picture"})
        assert set(ledger.answers) == {0, 2}
        assert isinstance(ledger.errors[1], InvalidRequest)
        await instance.close()

    run(scenario)


def test_a_failed_batch_runs_again_call_by_call():
    """The calls that run again are answered once, counted once, and leave nothing in the queue."""

    async def scenario():
        instance, crew = await started()
        ledger = Ledger()
        for number in range(4):
            instance.submit(make_call(instance, ledger, number))
        await turns()
        crew.worker.fault("index out of range")
        await turns()
        for number in range(4):
            assert len(crew.worker.runs) in (1, 2)
            assert crew.worker.runs[0].rows == 1
            crew.worker.fault("index out of range") if number == 2 else crew.worker.answer()
        assert set(ledger.answers) == {0, 1, 3}
        assert isinstance(ledger.errors[2], BackendError)
        assert (instance.running, instance.queued) == (0, 0)
        assert await drained(instance)
        await instance.close()

    run(scenario)


def test_a_batch_that_memory_did_not_suffice_for_runs_in_halves_and_later_ones_are_no_larger():
    async def scenario():
        instance, crew = await started(Crew(echo_model(rows=8)))
        ledger = Ledger()

        async def send(*numbers):
            for number in numbers:
                instance.submit(make_call(instance, ledger, number))
            await turns()

        await send(*range(8))
        assert [run.rows for run in crew.worker.runs] == [8]
        crew.worker.fault("CUDA out of memory", is_out_of_memory=True)
        await turns()
        assert [run.rows for run in crew.worker.runs] == [4, 4]
        crew.worker.answer()
        crew.worker.answer()
        await send(*range(10, 18))
        assert [run.rows for run in crew.worker.runs] == [4, 4], "it has learned"
        crew.worker.answer()
        crew.worker.answer()
        assert set(ledger.answers) == {*range(8), *range(10, 18)}
        assert not ledger.errors
        await send(20)
        crew.worker.fault("CUDA out of memory", is_out_of_memory=True)
        assert isinstance(ledger.errors[20], BackendError), "a call too large by itself fails"
        await send(*range(30, 38))
        assert [run.rows for run in crew.worker.runs] == [8], "and says nothing about batches"
        crew.worker.answer()
        await instance.close()

    run(scenario)


async def drained(instance) -> bool:
    """True where draining ends by itself."""
    async with asyncio.timeout(30):
        await instance.drain(25)
    return not instance.queued and not instance.running


def test_a_crash_after_a_failed_batch_leaves_every_waiting_call_in_the_queue_once():
    """Calls that run again stand in the queue anew, and are looked through for repeats of what crashed."""

    async def scenario():
        instance, crew = await started(Crew(echo_model(width=-1, rows=2)))
        ledger = Ledger()
        for number, width in enumerate((4, 5, 4, 5, 5, 5)):
            instance.submit(make_call(instance, ledger, number, width=width))
        await turns()
        assert [run.rows for run in crew.worker.runs] == [2, 2]
        crew.worker.fault()
        await turns()
        assert (instance.running, instance.queued) == (3, 3)
        crew.worker.die()
        assert instance.queued == 3
        await turns(20)
        while crew.worker.runs:
            crew.worker.answer()
        assert set(ledger.errors) == {0, 1, 3}
        assert set(ledger.answers) == {2, 4, 5}
        assert (instance.queued, instance._batcher.queued_bytes) == (0, 0)
        assert await drained(instance)
        await instance.close()

    run(scenario)


def test_unloading_with_calls_that_were_sent_back_to_the_queue_counts_them_once():
    async def scenario():
        instance, crew = await started()
        ledger = Ledger()
        for number in range(6):
            instance.submit(make_call(instance, ledger, number))
        await turns()
        crew.worker.fault()
        await turns()
        await instance.close()
        assert {type(error) for error in ledger.errors.values()} == {ModelNotReady}
        assert set(ledger.errors) == set(range(6))
        assert (instance.running, instance.queued) == (0, 0)

    run(scenario)


def test_a_connection_that_breaks_while_the_queue_is_failed_is_not_counted_twice():
    """Its flush finds the socket broken and withdraws its other calls, which are being failed."""

    async def scenario():
        instance, _ = await started()
        ledger = Ledger()
        calls = [make_call(instance, ledger, number) for number in range(30)]

        def withdraw_all():
            if not instance.queued:  # those that ran have failed, and those that waited are being failed
                for call in calls:
                    instance.cancel(call)

        ledger.on_flush = withdraw_all
        for call in calls:
            instance.submit(call)
            await turns(1)
        assert instance.queued == 28
        await instance.close()
        assert instance.queued == 0
        assert instance._batcher.queued_bytes == 0
        assert await drained(instance)

    run(scenario)


def test_batches_of_many_tensors_stay_inside_their_slab():
    """Each tensor starts at a multiple of 64 bytes, which the bytes of the calls do not say."""

    async def scenario():
        loaded = worker_pb2.Loaded(
            inputs=specs(*((f"x{place}", "UINT8", (-1, -1)) for place in range(5))),
            outputs=specs(("y", "UINT8", (-1, -1))),
            max_batch_size=64,
        )
        instance, crew = await started(Crew(loaded))
        ledger = Ledger()
        size = crew.worker.slots[0].input.size
        width = size // 5 // 40
        heads = [(f"x{place}", "UINT8", (1, width)) for place in range(5)]
        plan = make_plan(instance, instance.signature, heads, [])
        for number in range(120):
            instance.submit(instance_module.Call(plan, [bytes([number]) * width] * 5, ledger, number))
        await turns()
        while crew.worker.runs:
            batch = crew.worker.runs[0]
            assert max(tensor.offset + tensor.byte_length for tensor in batch.tensors) <= size
            crew.worker.answer()
        assert set(ledger.answers) == set(range(120))
        await instance.close()

    run(scenario)


def test_a_call_larger_than_the_slab_gets_one_of_its_own_and_gives_it_back():
    async def scenario():
        instance, crew = await started(Crew(echo_model(width=-1)))
        ledger = Ledger()
        width = crew.worker.slots[0].input.size // 4 + 1
        instance.submit(make_call(instance, ledger, 1, width=width))
        await turns()
        slot = crew.worker.slots[crew.worker.runs[0].slot]
        assert crew.worker.runs[0].tensors[0].region == slot.spill_region
        assert slot.spill is not None
        crew.worker.runs.clear()
        crew.worker.die()
        assert slot.spill is None
        assert isinstance(ledger.errors[1], WorkerLost)
        await instance.close()

    run(scenario)


def test_a_batch_that_cannot_be_gathered_fails_and_frees_its_slot(monkeypatch):
    async def scenario():
        instance, crew = await started()
        ledger = Ledger()
        gather = instance._dispatcher._gatherer.gather

        def broken(calls, memory, region):
            if calls[0].id < 3:
                raise ValueError("memoryview assignment: lvalue and rvalue have different structures")
            return gather(calls, memory, region)

        monkeypatch.setattr(instance._dispatcher._gatherer, "gather", broken)
        for number in range(6):
            instance.submit(make_call(instance, ledger, number))
            await turns()
        while crew.worker.runs:
            crew.worker.answer()
        assert set(ledger.answers) == {3, 4, 5}
        assert all(isinstance(ledger.errors[number], BackendError) for number in range(3))
        assert (instance.running, instance.queued) == (0, 0)
        await instance.close()

    run(scenario)


def test_a_deadline_that_passes_in_the_queue_fails_the_call_and_it_never_runs():
    async def scenario():
        instance, crew = await started(Crew(echo_model(rows=1)))
        ledger = Ledger()
        for number in range(3):
            call = make_call(instance, ledger, number)
            call.deadline_ns = time.monotonic_ns() + (5_000_000 if number == 2 else 3_600_000_000_000)
            instance.submit(call)
            await turns()
        await until(lambda: ledger.errors)
        assert isinstance(ledger.errors[2], DeadlineExceeded)
        crew.worker.answer()
        crew.worker.answer()
        assert crew.worker.runs == []
        assert set(ledger.answers) == {0, 1}
        await instance.close()

    run(scenario)


def test_a_full_queue_refuses_and_says_so():
    async def scenario():
        instance, _ = await started(batch={"max_queue_size": 2})
        ledger = Ledger()
        for number in range(2):
            instance.submit(make_call(instance, ledger, number))
        with pytest.raises(Overloaded, match="max_queue_size"):
            instance.submit(make_call(instance, ledger, 2))
        assert instance._statistics.refused == {"overloaded": 1}
        await instance.close()

    run(scenario)


# -------------------------------------------------------------------------------------------------- death


def test_death_fails_what_runs_keeps_what_waits_and_says_so_first():
    """The state changes before the calls hear of it: who is told of the loss finds the model not ready."""

    async def scenario():
        states = []
        crew = Crew(echo_model(rows=1))
        instance = make_instance(crew, lambda: states.append(instance.state))
        await instance.start()
        ledger = Ledger()
        seen = []
        ledger.on_flush = lambda: seen.append((instance.state, instance.accepts))
        for number in range(5):
            instance.submit(make_call(instance, ledger, number))
        await turns()
        first = crew.worker
        first.die()
        assert set(ledger.errors) == {0, 1}
        assert all(isinstance(error, WorkerLost) for error in ledger.errors.values())
        assert set(seen) == {(ModelState.RESTARTING, False)}
        with pytest.raises(ModelNotReady):
            instance.submit(make_call(instance, ledger, 9))
        await turns(10)
        assert crew.worker is not first
        while crew.worker.runs:
            crew.worker.answer()
        assert set(ledger.answers) == {2, 3, 4}
        assert instance.restarts == 1
        assert states == [ModelState.READY, ModelState.RESTARTING, ModelState.READY]
        await instance.close()
        assert crew.worker.was_closed

    run(scenario)


def test_calls_that_come_between_the_loss_and_its_report_wait_for_the_restart():
    """The worker is gone, but how it ended is not known yet: nothing is handed to it any more."""

    async def scenario():
        instance, crew = await started()
        ledger = Ledger()
        first = crew.worker
        first.is_lost = True
        instance.submit(make_call(instance, ledger, 1))
        await turns()
        assert first.runs == []
        first.die()
        await turns(10)
        crew.worker.answer()
        assert set(ledger.answers) == {1}
        await instance.close()

    run(scenario)


def test_a_restart_that_fails_for_any_reason_is_tried_again(caplog):
    """Out of descriptors, say, which is no error of the appliance's own."""

    async def scenario():
        instance, crew = await started(crashes_to_quarantine=100)
        outcomes = iter([OSError(24, "Too many open files"), BackendError("no"), RuntimeError("a bug")])

        async def load():
            error = next(outcomes, None)
            if error is not None:
                raise error
            return crew.loaded

        crew.load = load
        crew.worker.die()
        await until(lambda: instance.state is ModelState.READY)
        assert len(crew.made) == 5
        await instance.close()

    with caplog.at_level(logging.CRITICAL, "appliance"):
        run(scenario)


def test_slots_that_cannot_be_made_leave_nothing_behind(monkeypatch):
    """Neither at the load nor descriptors: the slabs made before the one that failed are closed."""

    async def scenario():
        crew = Crew()
        instance = make_instance(crew)
        create = slab.Slab.create
        count = itertools.count()

        def scarce(size, name):
            if next(count) == 3:
                raise Overloaded("cannot make shared memory")
            return create(size, name)

        monkeypatch.setattr("appliance.worker_link.Slab.create", scarce)
        descriptors = len(os.listdir("/proc/self/fd"))
        with pytest.raises(Overloaded):
            await instance.start()
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert crew.worker.was_closed
        assert instance.pid is None

    run(scenario)


def test_a_restarted_worker_with_other_tensors_is_refused():
    async def scenario():
        instance, crew = await started(crashes_to_quarantine=2)
        crew.loaded = echo_model(width=5)
        first = crew.worker
        first.die()
        await until(lambda: instance.state is ModelState.QUARANTINED)
        assert all(worker.was_closed for worker in crew.made[1:])
        with pytest.raises(ModelNotReady):
            instance.submit(make_call(instance, Ledger(), 1))
        await instance.close()

    run(scenario)
    error = ArtifactCorrupt("x")
    assert error.kind == "artifact-corrupt"


def test_closing_while_a_restart_loads_waits_for_its_end():
    """No worker is adopted by an instance that is closed."""

    async def scenario():
        instance, crew = await started()
        loading = asyncio.Event()
        given_up = []

        async def load():
            loading.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                await asyncio.sleep(0)
                given_up.append(True)
                raise

        crew.load = load
        crew.worker.die()
        await loading.wait()
        await instance.close()
        assert given_up == [True]
        assert instance.state is ModelState.UNLOADED
        assert instance.pid is None

    run(scenario)


def test_too_many_crashes_fail_what_waits_and_a_pause_follows():
    async def scenario():
        crew = Crew(echo_model(rows=1))
        instance, _ = await started(crew, crashes_to_quarantine=2, quarantine_seconds=0.01)
        ledger = Ledger()
        for number in range(8):
            instance.submit(make_call(instance, ledger, number))
        await turns()
        crew.worker.die()
        await turns(10)
        assert instance.state is ModelState.READY
        crew.worker.die()
        await turns(10)
        assert instance.state is ModelState.QUARANTINED
        assert "2 times" in instance.reason
        assert isinstance(ledger.errors[7], ModelNotReady)
        assert len(ledger.errors) == 8
        await until(lambda: instance.state is ModelState.READY)
        instance.submit(make_call(instance, ledger, 8))
        await turns()
        crew.worker.answer()
        assert set(ledger.answers) == {8}
        await instance.close()

    run(scenario)


# -------------------------------------------------------------------------------------------------- poison


def crash_with(instance, crew) -> None:
    crew.worker.runs.clear()
    crew.worker.die()


def test_only_a_call_that_had_the_worker_to_itself_is_condemned():
    """Two calls are in flight at a crash; both come back; the innocent is answered, the other is refused at last."""

    async def scenario():
        instance, crew = await started(crashes_to_quarantine=10)
        ledger = Ledger()
        numbers = itertools.count()

        def submit(fill):
            number = next(numbers)
            instance.submit(make_call(instance, ledger, number, fill=fill))
            return number

        submit(1)
        await turns()
        submit(2)
        await turns()
        assert len(crew.worker.runs) == 2
        crash_with(instance, crew)
        await turns(20)
        innocent, poison, stranger = submit(1), submit(2), submit(3)
        await turns()
        assert [run.rows for run in crew.worker.runs] == [1], "suspects share the worker with nobody"
        crew.worker.answer()
        assert innocent in ledger.answers
        assert len(crew.worker.runs) == 1
        assert instance.queued == 1
        crash_with(instance, crew)
        assert isinstance(ledger.errors[poison], WorkerLost)
        await until(lambda: instance.state is ModelState.READY)
        await turns()
        crew.worker.answer()
        assert stranger in ledger.answers
        with pytest.raises(InvalidRequest, match="twice"):
            submit(2)
        innocent = submit(1)
        await turns()
        crew.worker.answer()
        assert innocent in ledger.answers
        await instance.close()

    run(scenario)


def test_copies_of_a_condemned_call_that_wait_already_are_refused_with_it():
    async def scenario():
        instance, crew = await started(Crew(echo_model(rows=2)), crashes_to_quarantine=10)
        ledger = Ledger()
        for number in range(8):
            instance.submit(make_call(instance, ledger, number, fill=7))
        instance.submit(make_call(instance, ledger, 8, fill=1))
        await turns()
        crash_with(instance, crew)
        await turns(20)
        assert len(crew.worker.runs) == 1
        assert crew.worker.runs[0].rows == 1
        crash_with(instance, crew)
        await until(lambda: instance.state is ModelState.READY)
        await turns()
        kinds = [type(ledger.errors[number]) for number in range(8)]
        assert kinds == [WorkerLost] * 5 + [InvalidRequest] * 3
        crew.worker.answer()
        assert set(ledger.answers) == {8}
        await instance.close()

    run(scenario)


# -------------------------------------------------------------------------------------------------- hangs


class Clock:
    """Stands in for the module's `time`."""

    def __init__(self, monkeypatch) -> None:
        self.now_ns = time.monotonic_ns()
        monkeypatch.setattr(
            instance_module,
            "time",
            SimpleNamespace(monotonic_ns=lambda: self.now_ns, time_ns=time.time_ns),
        )

    def advance(self, seconds: float) -> None:
        self.now_ns += int(seconds * 1e9)


def watched(instance, clock, seconds: float, step: float = 0.5) -> None:
    """Let the watchdog look every `step` seconds, as its timer would."""
    passed = 0.0
    while passed < seconds:
        clock.advance(step)
        passed += step
        instance._watch()


def test_an_idle_worker_is_asked_and_killed_if_it_stays_silent(monkeypatch):
    async def scenario():
        clock = Clock(monkeypatch)
        instance, crew = await started(heartbeat_seconds=1.0)
        crew.worker.last_heard_ns = clock.now_ns
        watched(instance, clock, 1.5)
        assert bytes((frames.Kind.PING,)) in crew.worker.sent
        assert not crew.worker.was_killed
        watched(instance, clock, 1.5)
        assert crew.worker.was_killed
        await instance.close()

    run(scenario)


def test_a_batch_that_runs_too_long_has_its_worker_killed(monkeypatch):
    """Time the batch spent behind another does not count."""

    async def scenario():
        clock = Clock(monkeypatch)
        instance, crew = await started(Crew(echo_model(rows=1)), heartbeat_seconds=1.0, batch={"max_batch_seconds": 4})
        ledger = Ledger()
        crew.worker.last_heard_ns = clock.now_ns
        for number in range(2):
            instance.submit(make_call(instance, ledger, number))
        await turns()
        watched(instance, clock, 3.5)
        crew.worker.answer()
        crew.worker.last_heard_ns = clock.now_ns
        watched(instance, clock, 3.5)
        assert not crew.worker.was_killed
        watched(instance, clock, 1.0)
        assert crew.worker.was_killed
        await instance.close()

    run(scenario)


def test_a_batch_that_hangs_in_one_stream_has_its_worker_killed_however_busily_others_answer(monkeypatch):
    """Twice its time, since it may have waited behind another before it ran."""

    async def scenario():
        clock = Clock(monkeypatch)
        loaded = echo_model(rows=1)
        loaded.streams = 2
        instance, crew = await started(Crew(loaded), heartbeat_seconds=1.0, batch={"max_batch_seconds": 4})
        ledger = Ledger()
        instance.submit(make_call(instance, ledger, 0))
        await turns()
        (hung,) = crew.worker.runs
        for number in range(1, 10):
            assert not crew.worker.was_killed
            instance.submit(make_call(instance, ledger, number))
            await turns()
            crew.worker.answer(next(run for run in crew.worker.runs if run is not hung))
            crew.worker.last_heard_ns = clock.now_ns
            watched(instance, clock, 1.0)
        assert crew.worker.was_killed
        assert set(ledger.answers) == set(range(1, 10))
        await instance.close()

    run(scenario)


def test_a_daemon_that_stood_still_asks_before_it_kills(monkeypatch):
    async def scenario():
        clock = Clock(monkeypatch)
        instance, crew = await started(heartbeat_seconds=1.0)
        crew.worker.last_heard_ns = clock.now_ns
        clock.advance(3600)
        instance._watch()
        assert bytes((frames.Kind.PING,)) in crew.worker.sent
        assert not crew.worker.was_killed
        crew.worker.last_heard_ns = clock.now_ns
        watched(instance, clock, 1.0)
        assert not crew.worker.was_killed
        await instance.close()

    run(scenario)


def test_there_is_one_watchdog_however_often_the_worker_was_restarted(monkeypatch):
    async def scenario():
        instance, crew = await started(crashes_to_quarantine=1000)
        loop = asyncio.get_running_loop()
        armed = []
        call_later = loop.call_later

        def counting(delay, callback, *args):
            handle = call_later(delay, callback, *args)
            if callback == instance._watch:
                armed.append(handle)
            return handle

        monkeypatch.setattr(loop, "call_later", counting)
        for _ in range(20):
            crew.worker.die()
            await until(lambda: instance.state is ModelState.READY)
            instance._crashes._crashes_ns.clear()
        assert len([handle for handle in armed if not handle.cancelled()]) == 1
        await instance.close()
        assert all(handle.cancelled() for handle in armed)

    run(scenario)


@pytest.mark.parametrize("packet", ["unknown batch", "unknown slot", "truncated"])
def test_a_worker_that_answers_nonsense_is_killed(packet, caplog):
    async def scenario():
        instance, crew = await started()
        ledger = Ledger()
        instance.submit(make_call(instance, ledger, 1))
        await turns()
        batch = crew.worker.runs[0]
        slot, number, tensors = batch.slot, batch.batch, 1
        if packet == "unknown batch":
            number += 1
        elif packet == "unknown slot":
            slot = 77
        header = frames.DONE_HEADER.pack(frames.Kind.DONE, slot, tensors, 0, number, 0, 0, 0, 0, 0)
        instance._dispatcher.on_done(memoryview(header), None)
        assert crew.worker.was_killed
        crew.worker.die()
        assert isinstance(ledger.errors[1], WorkerLost)
        await instance.close()

    with caplog.at_level(logging.CRITICAL, "appliance"):
        run(scenario)


# -------------------------------------------------------------------------------------------------- ending


def test_draining_takes_nothing_new_but_waits_for_what_is_on_its_way():
    """A call whose text was being tokenised when the instance was replaced is still answered by it."""

    async def scenario():
        instance, crew = await started()
        ledger = Ledger()
        instance.hold(16)
        draining = asyncio.ensure_future(instance.drain(60))
        await turns()
        with pytest.raises(ModelNotReady):
            instance.submit(make_call(instance, ledger, 1))
        assert not draining.done()
        instance.submit(make_call(instance, ledger, 2), was_held=True)
        instance.unhold(16)
        await turns()
        assert not draining.done()
        crew.worker.answer()
        await draining
        assert set(ledger.answers) == {2}
        await instance.close()
        with pytest.raises(ModelNotReady):
            instance.submit(make_call(instance, ledger, 3), was_held=True)

    run(scenario)


def test_draining_gives_up_after_its_grace_and_closing_fails_the_rest(caplog):
    async def scenario():
        instance, crew = await started(Crew(echo_model(rows=1)))
        ledger = Ledger()
        for number in range(4):
            instance.submit(make_call(instance, ledger, number))
        await turns()
        await instance.drain(0.01)
        assert ledger.errors == {}
        await instance.close(ShuttingDown("the daemon is stopping"))
        assert {type(error) for error in ledger.errors.values()} == {ShuttingDown}
        assert len(ledger.errors) == 4
        assert crew.worker.was_closed
        await instance.close()

    with caplog.at_level(logging.CRITICAL, "appliance"):
        run(scenario)


def test_draining_ends_with_a_call_that_is_dropped_since_it_would_be_late(monkeypatch):
    clock = SimpleNamespace(now=1_000_000_000)
    frozen = SimpleNamespace(monotonic_ns=lambda: clock.now, time_ns=lambda: 0)
    monkeypatch.setattr(dispatcher, "time", frozen)
    monkeypatch.setattr(instance_module, "time", frozen)

    async def scenario():
        instance, crew = await started(batch={"preferred_batch_sizes": [], "max_queue_delay_us": 20_000})
        monkeypatch.setattr(instance._deadlines, "add", lambda call: None)  # its timers are of real time
        ledger = Ledger()

        for number in range(6):
            instance.submit(make_call(instance, ledger, number))
            await turns()
            clock.now += 20_000_000
            instance._dispatcher.pump()  # as the alarm has it
            clock.now += 10_000_000
            crew.worker.answer()
        late = make_call(instance, ledger, 6)
        late.deadline_ns = clock.now + 25_000_000
        instance.submit(late)
        draining = asyncio.ensure_future(instance.drain(3600))
        await turns()
        clock.now += 20_000_000
        instance._dispatcher.pump()
        assert type(ledger.errors[6]) is DeadlineExceeded
        async with asyncio.timeout(30):
            await draining
        await instance.close()

    run(scenario)


@pytest.mark.parametrize("is_noticed", [False, True])
def test_a_deadline_that_passes_while_texts_are_tokenised_does_not_bind_where_none_does(is_noticed):
    async def scenario():
        instance, crew = await started(batch={"timeout_action": "delay"})
        ledger = Ledger()
        call = make_call(instance, ledger, 1)
        call.deadline_ns = 1
        if is_noticed:
            instance.expire(call)
        instance.submit(call, was_held=True)
        await turns()
        crew.worker.answer()
        assert set(ledger.answers) == {1}
        await instance.close()

    run(scenario)


def test_a_worker_that_dies_while_its_instance_drains_is_replaced_for_what_waits():
    async def scenario():
        instance, crew = await started(Crew(echo_model(rows=1)))
        ledger = Ledger()
        for number in range(4):
            instance.submit(make_call(instance, ledger, number))
        await turns()
        draining = asyncio.ensure_future(instance.drain(60))
        await turns()
        crew.worker.die()
        await turns(20)
        assert not draining.done()
        while crew.worker.runs:
            crew.worker.answer()
        await draining
        assert set(ledger.answers) == {2, 3}
        assert not instance.accepts
        await instance.close()

    run(scenario)


def test_a_worker_that_dies_with_nothing_left_to_do_ends_the_draining():
    async def scenario():
        instance, crew = await started()
        ledger = Ledger()
        instance.submit(make_call(instance, ledger, 1))
        await turns()
        draining = asyncio.ensure_future(instance.drain(60))
        await turns()
        crew.worker.die()
        await draining
        assert len(crew.made) == 1
        await instance.close()

    run(scenario)


def test_tokens_take_the_place_of_texts_and_other_regions_keep_theirs():
    """A tensor that lies in a client's region is still found there once the text before it has become two tensors."""

    async def scenario():
        from appliance.manifest import ArtifactEntry, Manifest, TextSection

        loaded = worker_pb2.Loaded(
            inputs=specs(
                ("input_ids", "INT64", (-1, -1)), ("attention_mask", "INT64", (-1, -1)), ("x", "FP32", (-1, 4))
            ),
            outputs=specs(("y", "FP32", (-1, 4))),
            max_batch_size=8,
        )
        crew = Crew(loaded)
        instance = make_instance(crew)
        instance._manifest = Manifest(
            name="model", artifacts=[ArtifactEntry(path="1/model.onnx", format="onnx")], text=TextSection()
        )
        await instance.start()
        heads = [("text", "BYTES", (1, 1)), ("x", "FP32", (1, 4))]
        plan = make_plan(instance, instance.signature, heads, [])
        assert plan.is_text
        call = instance_module.Call(plan, [b"\x02\0\0\0hi", b"x" * 16], Ledger(), 1)
        used = []
        region = SimpleNamespace(acquire=lambda: used.append(1), release_use=lambda: used.append(-1))
        view = SimpleNamespace(region=region, offset=0)
        call.use_regions([None, view])
        instance.give_tokens(call, 0, Tokens(16, bytes(128), bytes(128), 5))
        assert [tensor.place for tensor in call.plan.tensors] == [0, 1, 2]
        assert list(call.region_views) == [None, None, view]
        assert list(call.contents) == [bytes(128), bytes(128), b"x" * 16]
        assert call.nbytes == 272
        assert not call.plan.is_text
        call.let_go()
        assert sum(used) == 0
        await instance.close()

    run(scenario)


@pytest.mark.parametrize(
    ("ids", "message"),
    [(("ids", "INT64", (-1, -1)), "no such input"), (("input_ids", "INT32", (-1, -1)), "INT32")],
)
def test_a_text_section_that_does_not_fit_the_session_is_told_at_the_load(ids, message):
    async def scenario():
        from appliance.manifest import ArtifactEntry, Manifest, TextSection

        loaded = worker_pb2.Loaded(inputs=specs(ids), outputs=specs(("y", "FP32", (-1, 4))), max_batch_size=8)
        crew = Crew(loaded)
        instance = make_instance(crew)
        entry = ArtifactEntry(path="1/model.onnx", format="onnx")
        instance._manifest = Manifest(name="model", artifacts=[entry], text=TextSection(mask=""))
        with pytest.raises(InvalidManifest, match=message):
            await instance.start()
        assert crew.worker.was_closed

    run(scenario)


# -------------------------------------------------------------------------------------------------- the link


class Witness:
    """What a link tells its listener."""

    def __init__(self) -> None:
        self.lost: list[str] = []
        self.heard = asyncio.Event()

    def on_done(self, packet, attached):
        pass

    def on_fault(self, slot, batch, message, is_out_of_memory):
        pass

    def on_lost(self, reason):
        self.lost.append(reason)
        self.heard.set()


SCRIPT = """#!{python} -IS
import os, socket, sys, time
link = socket.socket(fileno=int(sys.argv[sys.argv.index("--fd") + 1]))
link.recv(200000)
{body}
"""


def scripted(tmp_path, body: str) -> str:
    """An interpreter to give to `WorkerLink.start` that is really a worker of a few lines."""
    path = tmp_path / "worker"
    path.write_text(SCRIPT.format(python=sys.executable, body=body))
    path.chmod(0o700)
    return str(path)


FAILED = bytes((frames.Kind.FAILED,)) + worker_pb2.Failed(kind="no-placement", message="no").SerializeToString()
LOADED = bytes((frames.Kind.LOADED,)) + echo_model().SerializeToString()


def test_a_load_that_fails_is_told_once_and_never_as_a_loss(tmp_path):
    """The worker says why and is gone at once, so that its end arrives with its words."""
    python = scripted(tmp_path, f"link.send({FAILED!r})")

    async def scenario():
        for _ in range(10):
            witness = Witness()
            link = WorkerLink(asyncio.get_running_loop(), witness, "test")
            with pytest.raises(Exception, match=r"^no$") as caught:
                await link.start(python, worker_pb2.Load(), 30)
            assert caught.value.kind == "no-placement"
            await asyncio.sleep(0.02)  # whatever was still under way would be heard now
            assert witness.lost == []
            assert link.pid is None

    run(scenario)


def test_a_worker_that_ends_as_soon_as_it_has_loaded_is_a_failed_load_or_a_loss_but_never_silence(tmp_path):
    python = scripted(tmp_path, f"link.send({LOADED!r})")

    async def scenario():
        for _ in range(10):
            witness = Witness()
            link = WorkerLink(asyncio.get_running_loop(), witness, "test")
            try:
                await link.start(python, worker_pb2.Load(), 30)
            except WorkerLost:
                assert witness.lost == []
                continue
            async with asyncio.timeout(30):
                await witness.heard.wait()
            assert witness.lost == ["exited with code 0"]

    run(scenario)


class EagerProcess:
    """A process that is gone when it is asked, for a `WorkerLink` whose other end is in the test's hands."""

    pid = 2**22 + 1  # beyond what the kernel gives
    returncode = 0

    async def wait(self) -> int:
        return 0


async def half_open(monkeypatch, packets: list[bytes]) -> tuple[WorkerLink, Witness]:
    """A link whose worker has sent `packets` and closed before the loop looks; `start` is up to the test."""
    witness = Witness()
    link = WorkerLink(asyncio.get_running_loop(), witness, "test")

    async def spawn(python):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        link._socket, link._process = ours, EagerProcess()
        asyncio.get_running_loop().add_reader(ours, link._on_readable)
        for packet in packets:
            theirs.send(packet)
        theirs.close()

    monkeypatch.setattr(link, "_spawn", spawn)
    return link, witness


def test_the_end_of_a_worker_that_failed_to_load_is_not_a_loss_even_if_it_is_read_first(monkeypatch):
    """The refusal, the end of file and the end of the process are all there before `start` goes on."""

    async def scenario():
        link, witness = await half_open(monkeypatch, [FAILED])
        loop = asyncio.get_running_loop()
        starting = loop.create_task(link.start("", worker_pb2.Load(), 30))
        await asyncio.sleep(0)
        link._on_readable()
        link._on_readable()
        with pytest.raises(Exception, match=r"^no$"):
            await starting
        await turns(20)
        assert witness.lost == []

    run(scenario)


def test_a_worker_that_is_gone_before_start_returns_is_a_failed_load(monkeypatch):
    """Otherwise the listener would hear of the loss of a worker that it has not got yet, and never again."""

    async def scenario():
        link, witness = await half_open(monkeypatch, [LOADED])
        starting = asyncio.get_running_loop().create_task(link.start("", worker_pb2.Load(), 30))
        await asyncio.sleep(0)
        link._on_readable()
        link._on_readable()
        with pytest.raises(WorkerLost):
            await starting
        await turns(20)
        assert witness.lost == []

    run(scenario)


@pytest.mark.parametrize("body", ["time.sleep(3600)", "link.close(); time.sleep(3600)", "raise SystemExit(3)"])
def test_a_worker_that_does_not_load_leaves_neither_process_nor_descriptor(tmp_path, body):
    python = scripted(tmp_path, body)

    async def scenario():
        async def attempt() -> None:
            link = WorkerLink(asyncio.get_running_loop(), Witness(), "test")
            with pytest.raises((BackendError, WorkerLost)):
                await link.start(python, worker_pb2.Load(), 0.5)
            assert link.pid is None

        await attempt()  # makes what the loop keeps
        descriptors = len(os.listdir("/proc/self/fd"))
        await attempt()
        await turns(20)
        assert len(os.listdir("/proc/self/fd")) == descriptors

    run(scenario)


def test_a_packet_that_cannot_be_read_costs_the_worker_its_place(tmp_path, caplog):
    """Neither an exception on the loop nor silence: it is killed, and that is a loss like any other."""
    python = scripted(tmp_path, f"link.send({LOADED!r}); link.send({bytes((frames.Kind.FAULT,))!r}); time.sleep(3600)")

    async def scenario():
        witness = Witness()
        link = WorkerLink(asyncio.get_running_loop(), witness, "test")
        await link.start(python, worker_pb2.Load(), 30)
        async with asyncio.timeout(30):
            await witness.heard.wait()
        assert witness.lost == ["was ended by SIGKILL"]
        await link.close()

    with caplog.at_level(logging.CRITICAL + 1, "appliance"):
        run(scenario)


def test_an_interpreter_that_does_not_exist_is_a_backend_error(tmp_path):
    async def scenario():
        link = WorkerLink(asyncio.get_running_loop(), Witness(), "test")
        descriptors = len(os.listdir("/proc/self/fd"))
        with pytest.raises(BackendError, match="cannot start a worker"):
            await link.start(str(tmp_path / "absent"), worker_pb2.Load(), 30)
        assert len(os.listdir("/proc/self/fd")) == descriptors

    run(scenario)


def test_a_manifest_that_fits_into_no_packet_is_told_at_once():
    async def scenario():
        link = WorkerLink(asyncio.get_running_loop(), Witness(), "test")
        with pytest.raises(InvalidManifest, match="bytes"):
            await link.start("", worker_pb2.Load(manifest="x" * 200_000), 30)

    run(scenario)


def test_a_flood_on_standard_error_is_cut_and_does_not_block_the_worker(tmp_path, caplog):
    flood = 'os.write(2, b"noise\\n" * 200_000)'
    python = scripted(tmp_path, f"{flood}\nlink.send({LOADED!r})\n{flood}")

    async def scenario():
        witness = Witness()
        link = WorkerLink(asyncio.get_running_loop(), witness, "test")
        await link.start(python, worker_pb2.Load(), 30)
        async with asyncio.timeout(30):
            await witness.heard.wait()
        await link.close()

    with caplog.at_level(logging.INFO, "appliance"):
        run(scenario)
    lines = [record for record in caplog.records if "noise" in record.getMessage()]
    assert 0 < len(lines) < 1000
    assert any("writes too much" in record.getMessage() for record in caplog.records)
