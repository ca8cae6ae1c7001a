"""The queue of long work: order, giving way, cancelling, bounds, and what is told of jobs that ended."""

import asyncio
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parents[1]))

from appliance.errors import Conflict, InvalidRequest, NoPlacement
from appliance.jobs import Job, Jobs, JobState
from support.workers import turns, until


class Works:
    """Work that a test holds and lets go; `log` tells what began and ended, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}

    def held(self, name: str):
        """Work that waits until the test sets its gate; gives back its name."""
        gate = self.gates[name] = asyncio.Event()

        async def work(job: Job) -> dict:
            self.log.append(f"{name} begins")
            try:
                await gate.wait()
            except asyncio.CancelledError:
                self.log.append(f"{name} is cancelled")
                raise
            self.log.append(f"{name} ends")
            return {"name": name}

        return work

    def submit(self, jobs: Jobs, name: str, by_itself: bool = False) -> Job:
        return jobs.submit("tune", name, self.held(name), by_itself)


def run(scenario):
    async def whole():
        jobs = Jobs()
        try:
            await scenario(jobs, Works())
        finally:
            await jobs.close()

    asyncio.run(whole())


async def nothing(_job: Job) -> dict:
    return {}


# ---------------------------------------------------------------- order


def test_jobs_run_one_at_a_time_in_the_order_they_came():
    async def scenario(jobs, works):
        submitted = [works.submit(jobs, name) for name in "abc"]
        await turns()
        assert [job.state for job in submitted] == [JobState.RUNNING, JobState.QUEUED, JobState.QUEUED]
        assert jobs.listed() == submitted
        for gate in works.gates.values():
            gate.set()
        await until(lambda: jobs.is_idle)
        assert works.log == ["a begins", "a ends", "b begins", "b ends", "c begins", "c ends"]
        assert [job.result for job in submitted] == [{"name": name} for name in "abc"]
        assert {job.state for job in submitted} == {JobState.DONE}
        assert all(job.began <= job.ended for job in submitted)
        assert jobs.listed() == submitted

    run(scenario)


def test_a_queue_that_ran_empty_goes_on_with_the_next_job():
    async def scenario(jobs, _works):
        first = jobs.submit("tune", "a", nothing)
        await until(lambda: jobs.is_idle)
        second = jobs.submit("tune", "b", nothing)
        await until(lambda: jobs.is_idle)
        assert [first.state, second.state] == [JobState.DONE, JobState.DONE]

    run(scenario)


def test_the_job_of_a_model_is_found_until_it_is_over():
    async def scenario(jobs, works):
        running, waiting = works.submit(jobs, "a"), works.submit(jobs, "b")
        await turns()
        assert (jobs.of("tune", "a"), jobs.of("tune", "b")) == (running, waiting)
        assert (jobs.of("quantize", "a"), jobs.of("tune", "c")) == (None, None)
        works.gates["a"].set()
        await until(lambda: running.is_over)
        assert jobs.of("tune", "a") is None
        assert jobs.find(running.id) is running

    run(scenario)


# ---------------------------------------------------------------- giving way


def test_a_job_of_the_daemons_own_gives_way_to_one_that_somebody_asks_for():
    async def scenario(jobs, works):
        own = works.submit(jobs, "own", by_itself=True)
        await turns()
        asked = works.submit(jobs, "asked")
        await until(lambda: asked.state is JobState.RUNNING)
        assert own.state is JobState.CANCELLED
        assert works.log == ["own begins", "own is cancelled", "asked begins"]

    run(scenario)


@pytest.mark.parametrize(("first", "second"), [(True, True), (False, False), (False, True)])
def test_nothing_else_gives_way(first, second):
    async def scenario(jobs, works):
        running = works.submit(jobs, "running", first)
        await turns()
        waiting = works.submit(jobs, "waiting", second)
        await turns()
        assert (running.state, waiting.state) == (JobState.RUNNING, JobState.QUEUED)

    run(scenario)


# ---------------------------------------------------------------- cancelling


def test_a_waiting_job_that_is_cancelled_never_runs():
    async def scenario(jobs, works):
        running, waiting = works.submit(jobs, "running"), works.submit(jobs, "waiting")
        await turns()
        assert jobs.cancel(waiting.id) is waiting
        assert waiting.state is JobState.CANCELLED
        works.gates["running"].set()
        await until(lambda: jobs.is_idle)
        assert running.state is JobState.DONE
        assert "waiting begins" not in works.log

    run(scenario)


def test_a_running_job_that_is_cancelled_ends_before_the_next_begins():
    async def scenario(jobs, works):
        running, waiting = works.submit(jobs, "running"), works.submit(jobs, "waiting")
        await turns()
        jobs.cancel(running.id)
        await until(lambda: waiting.state is JobState.RUNNING)
        assert (running.state, running.error) == (JobState.CANCELLED, "")
        assert works.log == ["running begins", "running is cancelled", "waiting begins"]

    run(scenario)


def test_a_job_that_is_over_stays_as_it_is_when_it_is_cancelled():
    async def scenario(jobs, works):
        done = jobs.submit("tune", "done", nothing)
        await until(lambda: done.is_over)
        running = works.submit(jobs, "running")
        await turns()
        assert jobs.cancel(done.id) is done
        await turns()
        assert (done.state, running.state) == (JobState.DONE, JobState.RUNNING)
        assert jobs.listed() == [done, running]

    run(scenario)


def test_a_number_that_nobody_has_is_refused():
    async def scenario(jobs, _works):
        for ask in (jobs.find, jobs.cancel):
            with pytest.raises(InvalidRequest, match="cannot find job '7': there is none of that number"):
                ask("7")

    run(scenario)


# ---------------------------------------------------------------- bounds


def test_64_jobs_may_wait_and_the_next_is_refused():
    async def scenario(jobs, works):
        works.submit(jobs, "running")
        await turns()
        for number in range(64):
            works.submit(jobs, f"waiting-{number}")
        with pytest.raises(Conflict, match="cannot queue the job: 64 are waiting"):
            works.submit(jobs, "one-more")
        assert len(jobs.listed()) == 65
        jobs.cancel(jobs.listed()[-1].id)
        works.submit(jobs, "one-more")

    run(scenario)


def test_the_last_50_that_ended_are_kept():
    async def scenario(jobs, works):
        ended = [jobs.submit("tune", str(number), nothing) for number in range(55)]
        running = works.submit(jobs, "running")
        await until(lambda: running.state is JobState.RUNNING)
        assert jobs.listed() == [*ended[-50:], running]
        assert jobs.find(ended[5].id) is ended[5]
        with pytest.raises(InvalidRequest, match="or it ended long ago"):
            jobs.find(ended[4].id)

    run(scenario)


# ---------------------------------------------------------------- failing


def test_an_error_that_clients_may_see_is_kept_with_its_kind():
    async def fail(_job):
        raise NoPlacement("cannot place model 'a': nothing fits")

    async def scenario(jobs, _works):
        job = jobs.submit("tune", "a", fail)
        after = jobs.submit("tune", "b", nothing)
        await until(lambda: jobs.is_idle)
        assert (job.state, job.error) == (JobState.FAILED, "cannot place model 'a': nothing fits")
        document = job.as_json()
        assert (document["state"], document["error_kind"]) == ("failed", "no-placement")
        assert after.state is JobState.DONE

    run(scenario)


def test_any_other_error_is_internal_and_its_details_are_in_the_log_alone(caplog):
    async def fail(_job):
        raise ZeroDivisionError("the details")

    async def scenario(jobs, _works):
        job = jobs.submit("tune", "a", fail)
        await until(lambda: job.is_over)
        assert job.state is JobState.FAILED
        assert job.error == "cannot tune model 'a': an internal error; the log has it"
        assert job.kind_of_error == "internal"
        (line,) = [record for record in caplog.records if record.name == "appliance.jobs"]
        assert (line.levelname, line.getMessage()) == ("ERROR", f"job {job.id} (tune a) failed")
        assert "the details" in line.exc_text

    run(scenario)


# ---------------------------------------------------------------- the end, and what is told


def test_closing_cancels_what_runs_and_nothing_runs_afterwards():
    async def scenario(jobs, works):
        running, waiting = works.submit(jobs, "running"), works.submit(jobs, "waiting")
        await turns()
        await jobs.close()
        assert jobs.is_closing
        assert jobs.is_idle
        assert running.state is JobState.CANCELLED
        late = works.submit(jobs, "late")
        await turns()
        assert works.log == ["running begins", "running is cancelled"]
        assert (waiting.is_over, late.is_over) == (False, False), "whoever stops the daemon wants them resumed later"

    run(scenario)


def test_progress_pauses_and_time_are_told(monkeypatch):
    ticks = itertools.count(100.0, 2.0)
    monkeypatch.setattr("appliance.jobs.time", SimpleNamespace(monotonic=lambda: next(ticks)))
    job = Job("1", "tune", "a", state=JobState.RUNNING, began=90.0)
    job.progress("measuring", 2, 5)
    job.yield_now()  # at 100
    told = job.as_json()  # at 102
    assert (told["state"], told["step"], told["done"], told["total"]) == ("paused", "measuring", 2, 5)
    assert told["seconds"] == 12.0
    job.go_on()  # at 104
    assert (job.state, job.paused_seconds) == (JobState.RUNNING, 4.0)
    job.go_on()
    assert job.as_json()["paused_seconds"] == 4.0
    assert Job("2", "tune", "a").as_json()["seconds"] == 0.0
