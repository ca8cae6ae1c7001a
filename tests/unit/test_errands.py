"""Tasks in real processes: how they fail, how they give way to requests, and that they end with whoever asked.

All but one run a script in place of the interpreter, since what a task computes is nobody's business here.
"""

import asyncio
import base64
import shlex
import sys
import time
from contextlib import aclosing
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))

from appliance.activity import Activity
from appliance.errands import Errands
from appliance.errors import BackendError, InvalidRequest, NoPlacement, WorkerLost
from appliance.jobs import Job, JobState
from appliance.placement import Placement
from appliance.wire import worker_pb2
from support.processes import is_over, state
from support.workers import until

PATIENCE = 50.0
SCRIPT = """
import json, os, signal, subprocess, sys, time

def say(document):
    print(json.dumps(document), flush=True)

def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.005)

question = json.load(sys.stdin)
arguments = sys.argv[1:]
"""
AN_HOUR_NS = 3600 * 10**9


class Setting:
    """What an errand needs; `busy` and `looks` are the answer to, and number of, questions whether requests run."""

    def __init__(self, directory: Path, resume_seconds: float = 0.0) -> None:
        self.directory = directory
        self.activity = Activity()
        self.job = Job("1", "tune", "model", state=JobState.RUNNING)
        self.busy = False
        self.looks = 0
        self.errands = Errands(self.activity, self._is_busy, resume_seconds)

    def _is_busy(self) -> bool:
        self.looks += 1
        return self.busy

    def run(self, program: str, seconds: float = PATIENCE, **question):
        """The answers of a task that `program` stands for."""
        script, python = self.directory / "script.py", self.directory / "python"
        script.write_text(SCRIPT + program)
        python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(script))} "$@"\n')
        python.chmod(0o700)
        return self.ask(str(python), seconds, **question)

    def ask(self, python: str, seconds: float = PATIENCE, task: str = "measure", **question):
        placement = Placement("quick", python, worker_pb2.Load(backend="quick", device="cpu"))
        return aclosing(self.errands.run(self.job, placement, {"task": task, **question}, seconds))

    async def looked_again(self, times: int = 3) -> None:
        """Wait until it was looked a few times more whether requests run."""
        before = self.looks
        await until(lambda: self.looks >= before + times)

    def is_left_alone(self) -> bool:
        """True where nothing of an errand is left."""
        return self.activity.listener is None and self.job.state is JobState.RUNNING


async def everything(said) -> list[dict]:
    async with said as answers:
        return [answer async for answer in answers]


# ---------------------------------------------------------------- what is said


def test_a_task_is_asked_and_its_answers_are_passed_on(tmp_path):
    setting = Setting(tmp_path)
    program = "say({'asked': question, 'arguments': arguments})\nsay({'result': {}})"
    first, second = asyncio.run(everything(setting.run(program, rows=[1, 2])))
    assert first["arguments"] == ["-P", "-m", "appliance.worker.task"]
    assert (first["asked"]["task"], first["asked"]["rows"]) == ("measure", [1, 2])
    load = worker_pb2.Load.FromString(base64.b64decode(first["asked"]["load"]))
    assert (load.backend, load.device) == ("quick", "cpu")
    assert second == {"result": {}}
    assert setting.is_left_alone()


def test_without_an_interpreter_of_its_own_a_task_runs_in_the_daemons():
    """The real one, which has no such task."""
    setting = Setting(Path())
    with pytest.raises(InvalidRequest, match="cannot do task 'dance': there are measure, evaluate and quantize"):
        asyncio.run(everything(setting.ask("", task="dance")))
    assert setting.is_left_alone()


# ---------------------------------------------------------------- how it fails


@pytest.mark.parametrize(("kind", "error"), [("no-placement", NoPlacement), ("a kind of the future", BackendError)])
def test_a_task_that_fails_raises_the_kind_it_said(tmp_path, kind, error):
    setting = Setting(tmp_path)
    said = {"failed": {"kind": kind, "message": "cannot load it: of no use"}}
    with pytest.raises(error, match=r"^cannot load it: of no use$") as caught:
        asyncio.run(everything(setting.run(f"say({said!r})")))
    assert type(caught.value) is error
    assert setting.is_left_alone()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "cannot measure: its process was killed by SIGSEGV"),
        ("say({})\nsys.exit('no luck')", "cannot measure: its process ended with status 1 before it was done: no luck"),
        ("sys.exit(3)", "cannot measure: its process ended with status 3 and no answer"),
        ("print('garbage')", "cannot measure: its answer is not JSON"),
        ("say([1])", "cannot measure: its answer is not a JSON object"),
    ],
)
def test_a_task_that_crashes_or_says_garbage_is_a_backend_error_that_names_the_task(tmp_path, program, message):
    setting = Setting(tmp_path)
    with pytest.raises(BackendError) as caught:
        asyncio.run(everything(setting.run(program)))
    assert str(caught.value) == message
    assert setting.is_left_alone()


def test_a_task_that_hangs_is_a_backend_error(tmp_path):
    setting = Setting(tmp_path)
    with pytest.raises(BackendError, match=r"^cannot measure: it gave no answer within 0\.3 s$"):
        asyncio.run(everything(setting.run("time.sleep(3600)", 0.3)))
    assert setting.is_left_alone()


def test_a_task_that_somebody_killed_is_lost_and_may_be_tried_again(tmp_path):
    setting = Setting(tmp_path)
    with pytest.raises(WorkerLost, match=r"^cannot measure: its process was killed by SIGKILL$") as caught:
        asyncio.run(everything(setting.run("os.kill(os.getpid(), signal.SIGKILL)")))
    assert caught.value.is_retryable
    assert setting.is_left_alone()


def test_an_interpreter_that_is_not_there_is_a_backend_error(tmp_path):
    setting = Setting(tmp_path)
    with pytest.raises(BackendError, match=r"^cannot measure: No such file or directory$"):
        asyncio.run(everything(setting.ask(str(tmp_path / "nothing"))))
    assert setting.is_left_alone()


# ---------------------------------------------------------------- giving way

HELD = "say({'pid': os.getpid()})\nwait_for(question['gate'])\nsay({'result': {}})"


def test_activity_suspends_it_at_once_and_it_goes_on_when_requests_have_stayed_away(tmp_path):
    async def scenario():
        setting, gate = Setting(tmp_path), tmp_path / "gate"
        async with setting.run(HELD, gate=str(gate)) as answers:
            pid = (await anext(answers))["pid"]
            for _ in range(2):
                # The last request lies in the future, so that they have not stayed away.
                setting.activity.note(time.monotonic_ns() + AN_HOUR_NS)
                assert setting.job.state is JobState.PAUSED
                await until(lambda: state(pid) == "T")
                await setting.looked_again()
                assert (setting.job.state, state(pid)) == (JobState.PAUSED, "T")
                setting.activity.last_ns = 0
                await until(lambda: setting.job.state is JobState.RUNNING)
                await until(lambda: state(pid) != "T")
            gate.touch()
            assert await anext(answers) == {"result": {}}
        assert setting.is_left_alone()
        assert setting.job.paused_seconds > 0

    asyncio.run(scenario())


def test_it_waits_for_the_seconds_it_was_told(tmp_path):
    async def scenario():
        setting = Setting(tmp_path, resume_seconds=3600)
        async with setting.run(HELD, gate=str(tmp_path / "gate")) as answers:
            await anext(answers)
            setting.activity.note(time.monotonic_ns())
            await setting.looked_again()
            assert setting.job.state is JobState.PAUSED
            setting.activity.last_ns -= 2 * AN_HOUR_NS
            await until(lambda: setting.job.state is JobState.RUNNING)

    asyncio.run(scenario())


def test_it_stays_suspended_while_requests_wait_or_run(tmp_path):
    async def scenario():
        setting, gate = Setting(tmp_path), tmp_path / "gate"
        setting.busy = True
        async with setting.run(HELD, gate=str(gate)) as answers:
            pid = (await anext(answers))["pid"]
            assert setting.job.state is JobState.PAUSED, "requests were there before it"
            await until(lambda: state(pid) == "T")
            await setting.looked_again()
            assert setting.job.state is JobState.PAUSED
            gate.touch()
            setting.busy = False
            assert await anext(answers) == {"result": {}}
            assert setting.job.state is JobState.RUNNING

    asyncio.run(scenario())


def test_it_is_not_suspended_before_its_first_word(tmp_path):
    """Until then it would not end with the daemon."""

    async def scenario():
        setting, gate = Setting(tmp_path), tmp_path / "gate"
        setting.busy = True
        pids = tmp_path / "pid"
        program = f"open({str(pids)!r}, 'w').write(str(os.getpid()))\nwait_for(question['gate'])\n{HELD}"
        async with setting.run(program, gate=str(gate)) as answers:
            first = asyncio.ensure_future(anext(answers))
            await until(lambda: pids.exists() and pids.read_text())
            setting.activity.note(time.monotonic_ns())
            assert setting.job.state is JobState.RUNNING
            gate.touch()
            await first
            assert setting.job.state is JobState.PAUSED

    asyncio.run(scenario())


# ---------------------------------------------------------------- the end

GROUP = """
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
say({"pids": [os.getpid(), other.pid]})
time.sleep(3600)
"""


@pytest.mark.parametrize("is_suspended", [False, True])
def test_closing_the_iterator_kills_the_whole_group_and_takes_the_listener_back(tmp_path, is_suspended):
    async def scenario():
        setting = Setting(tmp_path)
        setting.busy = is_suspended
        async with setting.run(GROUP) as answers:
            pids = (await anext(answers))["pids"]
            assert setting.activity.listener is not None
            if is_suspended:
                await until(lambda: all(state(pid) == "T" for pid in pids))
        await until(lambda: all(map(is_over, pids)))
        assert setting.is_left_alone()

    asyncio.run(scenario())


def test_a_job_that_is_cancelled_takes_the_process_with_it(tmp_path):
    async def scenario():
        setting, pids = Setting(tmp_path), []

        async def work():
            async with setting.run(GROUP) as answers:
                async for answer in answers:
                    pids.extend(answer["pids"])

        working = asyncio.ensure_future(work())
        await until(lambda: pids)
        working.cancel()
        await asyncio.wait({working})
        assert working.cancelled()
        await until(lambda: all(map(is_over, pids)))
        assert setting.is_left_alone()

    asyncio.run(scenario())
