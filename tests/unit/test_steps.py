"""The loop of a model of sequences, with workers that do as the test says."""

import asyncio
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parents[1]))

from appliance.clients import Client
from appliance.errors import (
    BackendError,
    Conflict,
    DeadlineExceeded,
    InvalidManifest,
    InvalidRequest,
    ModelNotReady,
    Overloaded,
    WorkerLost,
)
from appliance.models import Model
from appliance.placement import ChosenBy, Placement
from appliance.planner import make_plan
from appliance.types import ModelState, SequenceStep
from appliance.wire import worker_pb2
from appliance.wire.worker import STEP_END, STEP_START
from support.workers import Crew, Ledger, make_call, make_instance, specs, turns, until

ADA, BEA = Client(name="Ada"), Client(name="Bea")


def run(scenario):
    async def whole():
        await scenario()
        await turns()

    asyncio.run(whole())


@pytest.fixture(autouse=True)
def _eager_workers(monkeypatch):
    """The worker's next batch is sent as soon as there is one: how long batches take here is chance."""
    monkeypatch.setattr("appliance.batcher._LEAD_NS", 1 << 62)


def stateful_model() -> worker_pb2.Loaded:
    return worker_pb2.Loaded(
        inputs=specs(("x", "FP32", (-1, 4)), ("before", "FP32", (-1, 4)), ("START", "FP32", (-1, 1))),
        outputs=specs(("y", "FP32", (-1, 4)), ("after", "FP32", (-1, 4))),
        max_batch_size=8,
    )


SECTION = {"state": [{"input": "before", "output": "after"}], "controls": {"start": "START"}}


async def started(max_sequences: int = 4, batch: dict | None = None, **section):
    crew = Crew(stateful_model())
    instance = make_instance(crew, batch=batch, sequence={**SECTION, "max_sequences": max_sequences, **section})
    await instance.start()
    return instance, crew, Ledger()


def submit(instance, ledger, number: int, id: int | str, flags: str = "", client: Client = ADA, timeout_us: int = 0):
    """Submit a step; `flags` holds ``s`` for a start, ``e`` for an end."""
    call = make_call(instance, ledger, number)
    call.client = client
    call.sequence = SequenceStep(id, "s" in flags, "e" in flags)
    call.limit(timeout_us)
    instance.submit(call)
    return call


def test_states_and_controls_are_hidden_and_made_here():
    async def scenario():
        instance, _, ledger = await started()
        assert [spec.name for spec in instance.signature.public_inputs()] == ["x"]
        assert [spec.name for spec in instance.signature.public_outputs()] == ["y"]
        call = make_call(instance, ledger, 1)
        assert call.plan.outputs == (0,)
        for name, shape in (("before", (1, 4)), ("START", (1, 1))):
            with pytest.raises(InvalidRequest, match=f"cannot take input '{name}': the model takes 'x'"):
                make_plan(instance, instance.signature, [("x", "FP32", (1, 4)), (name, "FP32", shape)], [])
            with pytest.raises(InvalidRequest, match="cannot give output 'after': the model gives 'y'"):
                make_plan(instance, instance.signature, [("x", "FP32", (1, 4))], ["after"])
        await instance.close()

    run(scenario)


def test_a_model_that_gives_nothing_but_states_is_refused():
    async def scenario():
        crew = Crew(stateful_model())
        del crew.loaded.outputs[0]
        instance = make_instance(crew, sequence=SECTION)
        with pytest.raises(InvalidManifest, match="all its outputs are states"):
            await instance.start()
        await instance.close()

    run(scenario)


def test_a_request_without_a_sequence_is_refused():
    async def scenario():
        instance, _, ledger = await started()
        with pytest.raises(InvalidRequest, match="sequence_id must say"):
            instance.submit(make_call(instance, ledger, 1))
        assert (instance.queued, instance.live_sequences) == (0, 0)
        await instance.close()

    run(scenario)


def test_a_batch_has_one_step_of_each_sequence_and_says_whose():
    async def scenario():
        instance, crew, ledger = await started()
        for number, id, flags in ((1, 7, "s"), (2, 8, "s"), (3, 7, ""), (4, 8, ""), (5, 7, "e"), (6, 9, "s")):
            submit(instance, ledger, number, id, flags)
        assert instance.queued == 6
        await turns()
        assert [run.steps for run in crew.worker.runs] == [[(0, STEP_START, 7), (1, STEP_START, 8), (2, STEP_START, 9)]]
        crew.worker.answer()
        await turns()
        assert [run.steps for run in crew.worker.runs] == [[(0, 0, 7), (1, 0, 8)]]
        crew.worker.answer()
        await turns()
        assert [run.steps for run in crew.worker.runs] == [[(0, STEP_END, 7)]]
        crew.worker.answer()
        await turns()
        assert sorted(ledger.answers) == [1, 2, 3, 4, 5, 6]
        assert ledger.answers[5] == bytes([5]) * 16
        assert (instance.live_sequences, instance.queued, instance.running) == (2, 0, 0)
        await instance.close()

    run(scenario)


def test_the_next_step_goes_out_before_the_last_is_answered():
    async def scenario():
        instance, crew, ledger = await started()
        submit(instance, ledger, 1, 7, "s")
        submit(instance, ledger, 2, 7)
        await turns()
        sent_when_told = []
        ledger.on_flush = lambda: sent_when_told.append(len(crew.worker.runs))
        crew.worker.answer()
        assert sent_when_told == [1]
        await turns()
        crew.worker.answer()
        assert sorted(ledger.answers) == [1, 2]
        await instance.close()

    run(scenario)


def test_a_withdrawn_step_that_waits_takes_those_behind_it_along():
    async def scenario():
        instance, crew, ledger = await started()
        submit(instance, ledger, 1, 7, "s")
        waits = submit(instance, ledger, 2, 7)
        submit(instance, ledger, 3, 7)
        await turns()
        instance.cancel(waits)
        assert ledger.errors == {}, "others hear of it later, when whoever withdraws is done"
        await turns()
        assert isinstance(ledger.errors[3], Conflict)
        assert 2 not in ledger.errors
        crew.worker.answer()
        submit(instance, ledger, 4, 7)
        await turns()
        crew.worker.answer()
        assert sorted(ledger.answers) == [1, 4]
        assert instance.queued == 0
        await instance.close()

    run(scenario)


def test_a_step_withdrawn_while_it_runs_ends_its_sequence_once_the_worker_is_done_with_it():
    async def scenario():
        instance, crew, ledger = await started(1)
        runs = submit(instance, ledger, 1, 7, "s")
        await turns()
        instance.cancel(runs)
        submit(instance, ledger, 2, 7)
        submit(instance, ledger, 3, 8, "s")
        await turns()
        assert len(crew.worker.runs) == 1, "its seat is still written to"
        crew.worker.answer()
        await turns()
        assert isinstance(ledger.errors[2], Conflict)
        assert "withdrawn" in str(ledger.errors[2])
        assert crew.worker.runs[0].steps == [(0, STEP_START, 8)]
        with pytest.raises(Conflict, match="start it again"):
            submit(instance, ledger, 4, 7)
        await instance.close()

    run(scenario)


def test_a_deadline_that_passes_while_a_step_waits_changes_nothing():
    async def scenario():
        instance, crew, ledger = await started()
        submit(instance, ledger, 1, 7, "s")
        await turns()
        submit(instance, ledger, 2, 7, timeout_us=20_000)
        await until(lambda: 2 in ledger.errors)
        assert isinstance(ledger.errors[2], DeadlineExceeded)
        crew.worker.answer()
        submit(instance, ledger, 3, 7)
        await turns()
        crew.worker.answer()
        assert sorted(ledger.answers) == [1, 3]
        await instance.close()

    run(scenario)


def test_a_waiting_step_whose_deadlines_do_not_bind_keeps_its_place():
    async def scenario():
        instance, crew, ledger = await started(batch={"timeout_action": "delay"})
        submit(instance, ledger, 1, 7, "s")
        waits = submit(instance, ledger, 2, 7, timeout_us=5_000)
        await turns()
        await until(lambda: waits.deadline_ns == 0)
        crew.worker.answer()
        await turns()
        crew.worker.answer()
        assert sorted(ledger.answers) == [1, 2]
        await instance.close()

    run(scenario)


def test_a_failed_batch_runs_again_step_by_step_and_only_the_bad_one_ends_its_sequence():
    async def scenario():
        instance, crew, ledger = await started()
        for number, id in ((1, 7), (2, 8), (3, 9)):
            submit(instance, ledger, number, id, "s")
        submit(instance, ledger, 4, 8)
        submit(instance, ledger, 5, 9)
        await turns()
        crew.worker.fault()
        await turns()
        while crew.worker.runs:
            (step,) = crew.worker.runs[0].steps
            if step[2] == 8:
                crew.worker.fault("the number 8 is bad")
            else:
                crew.worker.answer()
            await turns()
        assert sorted(ledger.answers) == [1, 3, 5]
        assert isinstance(ledger.errors[2], BackendError)
        assert isinstance(ledger.errors[4], Conflict)
        assert instance.live_sequences == 2
        with pytest.raises(Conflict, match="its last request failed"):
            submit(instance, ledger, 6, 8)
        await instance.close()

    run(scenario)


def test_a_row_that_failed_ends_its_sequence():
    async def scenario():
        instance, crew, ledger = await started()
        submit(instance, ledger, 1, 7, "s")
        submit(instance, ledger, 2, 8, "s")
        await turns()
        crew.worker.answer(row_errors={1: "it is no picture"})
        assert (sorted(ledger.answers), sorted(ledger.errors)) == ([1], [2])
        with pytest.raises(Conflict):
            submit(instance, ledger, 3, 8)
        submit(instance, ledger, 4, 7)
        await instance.close()

    run(scenario)


def test_with_its_worker_a_sequence_is_lost_and_starts_that_waited_run_on_the_next():
    async def scenario():
        instance, crew, ledger = await started(2)
        submit(instance, ledger, 1, 7, "s")
        await turns()
        submit(instance, ledger, 2, 8, "s")
        await turns()
        submit(instance, ledger, 3, 7)
        submit(instance, ledger, 4, 7, "s")
        submit(instance, ledger, 5, 9, "s")
        await turns()
        crew.worker.die()
        assert isinstance(ledger.errors[1], WorkerLost)
        assert isinstance(ledger.errors[2], WorkerLost)
        assert isinstance(ledger.errors[3], Conflict)
        assert ledger.errors[3].is_retryable
        await until(lambda: instance.state is ModelState.READY)
        await until(lambda: crew.worker.runs)
        assert [run.steps for run in crew.worker.runs] == [[(0, STEP_START, 7), (1, STEP_START, 9)]]
        crew.worker.answer()
        with pytest.raises(Conflict, match="its state was lost with the worker; start it again"):
            submit(instance, ledger, 6, 8)
        submit(instance, ledger, 7, 9, "e")
        await turns()
        crew.worker.answer()
        assert sorted(ledger.answers) == [4, 5, 7]
        await instance.close()

    run(scenario)


def test_steps_sent_back_to_the_queue_are_lost_with_the_worker_too():
    """After a fault they stand in the queue, and the state they go on from is gone."""

    async def scenario():
        instance, crew, ledger = await started()
        for number, id in ((1, 7), (2, 8), (3, 9)):
            submit(instance, ledger, number, id, "s")
        await turns()
        crew.worker.answer()
        for number, id, flags in ((4, 7, ""), (5, 8, ""), (6, 9, ""), (7, 10, "s")):
            submit(instance, ledger, number, id, flags)
        await turns()
        crew.worker.fault()
        await turns()
        assert [run.steps for run in crew.worker.runs] == [[(0, 0, 7)], [(1, 0, 8)]]
        assert instance.queued == 2
        crew.worker.die()
        assert {number: type(error) for number, error in ledger.errors.items()} == {
            4: WorkerLost,
            5: WorkerLost,
            6: Conflict,
        }
        await until(lambda: instance.state is ModelState.READY and crew.worker.runs)
        assert [run.steps for run in crew.worker.runs] == [[(3, STEP_START, 10)]]
        crew.worker.answer()
        assert sorted(ledger.answers) == [1, 2, 3, 7]
        await instance.close()

    run(scenario)


def test_a_quarantine_fails_starts_that_wait_for_a_seat():
    async def scenario():
        instance, crew, ledger = await started(1)
        for number in range(2):
            submit(instance, ledger, number, number + 1, "s")
        for count in range(1, 4):
            if count == 3:
                submit(instance, ledger, 10, 10, "s", BEA)
                submit(instance, ledger, 11, 11, "s", BEA)
            await turns()
            crew.worker.die()
            if count < 3:
                await until(lambda: instance.state is ModelState.READY)
        await until(lambda: instance.state is ModelState.QUARANTINED)
        await turns()
        assert isinstance(ledger.errors[11], (ModelNotReady, WorkerLost))
        assert (instance.queued, instance.live_sequences) == (0, 0)
        await instance.close()

    run(scenario)


def test_the_queues_bound_counts_steps_that_wait_here():
    async def scenario():
        instance, _, ledger = await started(batch={"max_queue_size": 3})
        submit(instance, ledger, 1, 7, "s")
        await turns()
        for number in (2, 3, 4):
            submit(instance, ledger, number, 7)
        with pytest.raises(Overloaded):
            submit(instance, ledger, 5, 7)
        with pytest.raises(Overloaded):
            submit(instance, ledger, 6, 8, "s")
        assert instance.live_sequences == 1
        await instance.close()

    run(scenario)


def test_a_start_that_the_queue_refuses_leaves_its_seat():
    async def scenario():
        instance, crew, ledger = await started(batch={"priority_queue_policy": {"2": {"max_queue_size": 1}}})
        submit(instance, ledger, 1, 7, "s")
        with pytest.raises(Overloaded, match="of priority 2"):
            submit(instance, ledger, 2, 8, "s")
        assert instance.live_sequences == 1
        await turns()
        crew.worker.answer()
        await instance.close()

    run(scenario)


def test_a_sequence_that_idles_ends_by_itself_and_makes_way():
    async def scenario():
        instance, crew, ledger = await started(1, idle_seconds=0.05)
        submit(instance, ledger, 1, 7, "s")
        submit(instance, ledger, 2, 8, "s", BEA)
        await turns()
        crew.worker.answer()
        await until(lambda: crew.worker.runs)
        assert crew.worker.runs[0].steps == [(0, STEP_START, 8)]
        crew.worker.answer()
        with pytest.raises(Conflict, match=r"it had no request for 0.05 s"):
            submit(instance, ledger, 3, 7)
        await until(lambda: instance.live_sequences == 0)
        await instance.close()

    run(scenario)


def test_a_client_that_leaves_makes_way():
    async def scenario():
        instance, crew, ledger = await started(1)
        submit(instance, ledger, 1, 7, "s")
        submit(instance, ledger, 2, 7, "s", BEA)
        await turns()
        crew.worker.answer()
        instance.forget(ADA)
        await turns()
        assert crew.worker.runs[0].steps == [(0, STEP_START, 7)]
        crew.worker.answer()
        assert sorted(ledger.answers) == [1, 2]
        await instance.close()

    run(scenario)


def test_draining_waits_for_steps_that_wait():
    async def scenario():
        instance, crew, ledger = await started(1)
        for number, id, flags in ((1, 7, "s"), (2, 7, ""), (3, 7, "e"), (4, 8, "s")):
            submit(instance, ledger, number, id, flags)
        await turns()
        draining = asyncio.ensure_future(instance.drain(30))
        for _ in range(4):
            await turns()
            assert not draining.done()
            crew.worker.answer()
        await draining
        assert sorted(ledger.answers) == [1, 2, 3, 4]
        await instance.close()

    run(scenario)


def test_closing_fails_what_waits():
    async def scenario():
        instance, _, ledger = await started(1)
        for number, id, flags in ((1, 7, "s"), (2, 7, ""), (3, 8, "s")):
            submit(instance, ledger, number, id, flags)
        await turns()
        await instance.close()
        assert sorted(ledger.errors) == [1, 2, 3]
        assert all(isinstance(error, ModelNotReady) for error in ledger.errors.values())

    run(scenario)


def test_who_goes_on_after_a_reload_is_told_to_start_again():
    async def scenario():
        instance, crew, ledger = await started()
        submit(instance, ledger, 1, 7, "s")
        await turns()
        crew.worker.answer()
        other, _, _ = await started()
        other.inherit(instance)
        with pytest.raises(Conflict, match="loaded anew"):
            submit(other, ledger, 2, 7)
        await instance.close()
        await other.close()

    run(scenario)


def test_no_measurement_takes_the_state_of_sequences_that_live_away_but_an_administrator_may(tmp_path):
    async def scenario():
        instance, crew, ledger = await started()
        submit(instance, ledger, 1, 7, "s")
        await turns()
        crew.worker.answer()
        replacements = []

        def new_instance(manifest, placement):
            replacements.append(make_instance(Crew(stateful_model()), sequence=SECTION))
            return replacements[-1]

        model = Model("model", tmp_path, None, None, None, None, None, lambda name: None)
        (tmp_path / "model.toml").write_text("")
        manifest = SimpleNamespace()
        model._instance = instance
        model._prepared = SimpleNamespace(version="1", manifest=manifest, placements=[], fingerprint=(manifest, ()))
        model._new_instance = new_instance
        placement = Placement("fake", "", worker_pb2.Load(model="model", version="1"), "other", ChosenBy.MEASURED)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("appliance.models.read_manifest", lambda directory: manifest)
            patch.setattr("appliance.models._files", lambda directory, artifacts: ())
            with pytest.raises(Conflict, match="the state of 1 sequences"):
                await model.move(placement)
            assert replacements == []
            submit(instance, ledger, 2, 7)
            await turns()
            crew.worker.answer()
            assert sorted(ledger.answers) == [1, 2]
            await model.move(replace(placement, chosen_by=ChosenBy.PINNED))
        (serves,) = replacements
        assert model.serving() is serves
        with pytest.raises(Conflict, match="loaded anew"):
            submit(serves, ledger, 3, 7)
        await model.stop(5)

    run(scenario)


def test_a_step_that_crashes_workers_is_refused_and_its_sequence_can_be_started_again():
    async def scenario():
        instance, crew, ledger = await started()
        for attempt in range(2):
            submit(instance, ledger, attempt, 7, "s").contents = [b"\x66" * 16]
            await turns()
            crew.worker.die()
            await until(lambda: instance.state is ModelState.READY)
        poison = make_call(instance, ledger, 9, fill=0x66)
        poison.client, poison.sequence = ADA, SequenceStep(7, True, False)
        with pytest.raises(InvalidRequest):
            instance.submit(poison)
        assert instance.live_sequences == 0
        submit(instance, ledger, 10, 7, "s")
        await until(lambda: crew.worker.runs)
        crew.worker.answer()
        assert sorted(ledger.answers) == [10]
        await instance.close()

    run(scenario)


def test_queue_time_counts_from_when_a_step_came():
    async def scenario():
        instance, crew, ledger = await started()
        submit(instance, ledger, 1, 7, "s")
        call = submit(instance, ledger, 2, 7)
        await turns()
        came = time.monotonic_ns()
        await until(lambda: time.monotonic_ns() - came > 3_000_000)
        crew.worker.answer()
        await turns()
        assert call.queue_ns > 3_000_000
        crew.worker.answer()
        await instance.close()

    run(scenario)
