"""Task ``measure``, in a process of its own. What a run takes is nobody's to assert; that it was counted rightly is."""

import asyncio
import json
import os
import select
import subprocess
import sys

import numpy as np
import pytest
import worker_harness as harness

from appliance.child import ChildFailed
from appliance.measurement import MIN_SAMPLES, Point
from appliance.worker.disturbance import busy_seconds
from appliance.worker.measuring import peak_bytes

SAMPLE_OF = {name: str(harness.MODELS / name / "samples/evaluation.jsonl") for name in ("digits", "language-id")}


@pytest.fixture(autouse=True)
def _fakes(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", harness.environment()["PYTHONPATH"])
    monkeypatch.syspath_prepend(str(harness.FAKES))


def measured(load, meanwhile=None, patience=harness.PATIENCE, **fields):
    question = {"task": "measure", "load": load, "rows": [1, 2], "seconds": 0.0, "sample": None, **fields}
    return harness.run_task(question, patience, meanwhile)


def points(answers):
    return [Point(**point) for point in harness.said(answers, "point")]


# ---------------------------------------------------------------- the course of it


@pytest.mark.parametrize(
    ("name", "backend", "precision", "tokens"),
    [
        ("digits", "onnxruntime", "FP32", 0),
        ("language-id", "onnxruntime", "FP32", 32),
        ("digits", "openvino", "FP32", 0),
    ],
)
def test_a_sample_model_is_measured_as_it_would_be_served(name, backend, precision, tokens):
    load = harness.load_of(harness.MODELS / name, backend, precision=precision)
    answers = measured(load, rows=[1, 4, 1000], seconds=0.05, sample=SAMPLE_OF[name])
    assert not harness.said(answers, "failed")
    (loaded,) = harness.said(answers, "loaded")
    assert loaded.pop("load_ms") > 0
    assert loaded.pop("runtime").startswith(f"{backend} ")
    assert loaded.pop("provider")
    assert loaded == {
        "device": "cpu", "precision": precision, "reason": "", "max_batch_size": 64, "tokens": tokens, "units": tokens,
        "streams": 1,
    }  # fmt: skip
    assert [point.rows for point in points(answers)] == [1, 4], "1000 rows are more than a batch"
    for point in points(answers):
        assert point.samples >= MIN_SAMPLES
        assert point.median_us > 0
        assert point.spread_us >= 0
    (result,) = harness.said(answers, "result")
    assert result["peak_bytes"] > 10 << 20
    assert answers[-1] == {"result": result}
    steps = [progress["step"] for progress in harness.said(answers, "progress")]
    assert steps == ["loading", "measuring", "measuring", "measuring"]


def test_what_was_measured_before_is_left_out(tmp_path):
    answers = measured(harness.fake_load(tmp_path, {"max_batch_size": 8}), rows=[8, 4, 2, 1, 1], done=[2, 4])
    assert [point.rows for point in points(answers)] == [1, 8]
    assert len(harness.said(answers, "result")) == 1


def test_a_model_without_batch_dimension_is_measured_once(tmp_path):
    behaviour = {"inputs": [["x", "FP32", [3]]], "outputs": [["y", "FP32", [3]]]}
    load = harness.fake_load(tmp_path, {"max_batch_size": 0}, **behaviour)
    assert [point.rows for point in points(measured(load))] == [0]
    assert points(measured(load, done=[0])) == []


def test_dynamic_dimensions_have_the_length_of_the_sample_or_of_the_first_run(tmp_path):
    behaviour = {"inputs": [["x", "FP32", [-1, -1]]], "outputs": [["y", "FP32", [-1, -1]]]}
    load = harness.fake_load(tmp_path, {"max_batch_size": 8}, **behaviour)
    assert harness.said(measured(load), "loaded")[0]["tokens"] == 8
    lines = [json.dumps({"inputs": {"x": [0.5] * length}}) for length in (3, 5, 5, 3, 5, 7)]
    (tmp_path / "s.jsonl").write_text("\n".join(lines))
    answers = measured(load, sample=str(tmp_path / "s.jsonl"), rows=[8])
    assert harness.said(answers, "loaded")[0]["tokens"] == 5
    assert [point.rows for point in points(answers)] == [8], "three rows make up eight"


def test_units_are_the_elements_of_the_open_dimensions_of_the_largest_input(tmp_path):
    inputs = [["x", "FP32", [-1, -1, 3, -1]], ["m", "FP32", [-1, -1]], ["z", "FP32", [-1, 100]]]
    behaviour = {"inputs": inputs, "outputs": [["y", "FP32", [-1, -1, 3, -1]]]}
    (loaded,) = harness.said(measured(harness.fake_load(tmp_path, {"max_batch_size": 8}, **behaviour)), "loaded")
    assert (loaded["tokens"], loaded["units"]) == (8, 64)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_several_streams_are_measured_together_and_the_smallest_batch_also_alone(backend):
    load = harness.load_of(harness.MODELS / "digits", backend, options={"streams": "2", "threads": "1"})
    answers = measured(load, rows=[4, 2, 8], seconds=0.05, done=[4])
    (loaded,) = harness.said(answers, "loaded")
    assert loaded["streams"] == 2
    found = points(answers)
    assert [(point.rows, point.alone_us is not None) for point in found] == [(2, True), (8, False)]
    assert all(point.samples >= MIN_SAMPLES and point.median_us > 0 for point in found)
    again = points(measured(load, rows=[4, 2, 8], seconds=0.05, done=[2]))
    assert [(point.rows, point.alone_us) for point in again] == [(4, None), (8, None)], "the smallest is known"


def test_a_run_that_fails_in_one_of_several_streams_fails_the_task(tmp_path):
    load = harness.fake_load(tmp_path, {"max_batch_size": 64}, streams=3, raise_above=BROKEN)
    assert failure(measured(load, rows=[16]))[1] == f"cannot measure 16 rows: RuntimeError: {BROKEN['says']}"


def test_prints_of_a_plugin_do_not_spoil_the_answer(tmp_path):
    load = harness.fake_load(tmp_path, {"max_batch_size": 8}, on_load="print", on_warmup="print")
    assert len(points(measured(load))) == 2


def test_the_task_gives_way_to_everything_else(tmp_path):
    gate = tmp_path / "gate"
    found = []

    async def look(child):
        await harness.until(lambda: os.getpriority(os.PRIO_PROCESS, child.pid) == 19)
        found.append(19)
        gate.touch()

    measured(harness.fake_load(tmp_path, {"max_batch_size": 8}, load_gate=str(gate)), look)
    assert found == [19]


def test_peak_memory_is_what_the_kernel_says():
    assert peak_bytes("Name:\tpython\nVmPeak:\t  9999 kB\nVmHWM:\t   512 kB\nVmRSS:\t 10 kB\n") == 512 * 1024
    assert peak_bytes("Name:\tpython\n") == 0
    assert peak_bytes("VmHWM:\n") == 0


# ---------------------------------------------------------------- what disturbs


STAT = """cpu  900 0 0 0 0 0 0 0 0 0
cpu0 100 20 30 4000 50 6 7 8 900 1000
cpu1 1 0 0 0 0 0 0 0 0 0
cpu10 500 0 0 0 0 0 0 0 0 0
intr 1 2 3
"""


def test_work_is_read_off_the_cores_that_may_be_used():
    ticks = os.sysconf("SC_CLK_TCK")
    assert busy_seconds(STAT, {0}) == pytest.approx((100 + 20 + 30 + 6 + 7 + 8) / ticks)
    assert busy_seconds(STAT, {1, 10}) == pytest.approx(501 / ticks)


@pytest.mark.parametrize("text", ["", "cpu0 1 2\n", "cpu0 a b c d e f g h\n", STAT.replace("cpu1 ", "cpu2 ")])
def test_a_core_that_the_kernel_does_not_tell_of_leaves_it_unknown(text):
    assert busy_seconds(text, {0, 1}) is None


def test_a_point_measured_beside_busy_processes_says_so(tmp_path):
    """One loop for each core, at a higher priority than the task's."""
    loop = "print('on', flush=True)\nwhile True: pass"
    busy = [subprocess.Popen([sys.executable, "-c", loop], stdout=subprocess.PIPE) for _ in os.sched_getaffinity(0)]
    try:
        for process in busy:
            assert process.stdout.readline() == b"on\n"
        answers = measured(harness.fake_load(tmp_path, {"max_batch_size": 8}, c_us=1000), rows=[1], seconds=0.2)
    finally:
        for process in busy:
            process.kill()
            process.wait()
            process.stdout.close()
    (point,) = points(answers)
    assert point.is_disturbed
    assert point.samples >= MIN_SAMPLES


ATTEMPT = """
import json, os, signal, sys
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # as in a task: a signal taken by another thread may come late, or get lost
from types import SimpleNamespace
from appliance.worker import measuring
from appliance.worker.disturbance import Suspensions
from appliance.worker.energy import NoCounter

stops = {int(number) for number in sys.argv[1:]}
# One attempt, whatever else the machine does: one tick of the kernel's clock can be many times a stretch this short.
measuring.MAX_FOREIGN_SHARE = float("inf")

class Session:
    runs = 0
    def run(self, feeds, names):
        self.runs += 1
        if self.runs in stops:
            os.kill(os.getpid(), signal.SIGSTOP)
        return {}

session = Session()
model = SimpleNamespace(session=session, outputs=(), max_batch_size=1, streams=1)
point = measuring._Stopwatch(model, Suspensions(), NoCounter(), 0).point(1, {}, is_smallest=True)
print(json.dumps([session.runs, point.samples]))
"""


@pytest.mark.parametrize("stops", [(), (1,), (4,), (5, 8), (4, 5, 6, 7, 8)])
def test_a_run_in_which_the_process_was_stopped_is_not_counted(stops):
    """With real signals. Three runs warm up, five are timed; of those each one with a stop is repeated."""
    process = subprocess.Popen([sys.executable, "-c", ATTEMPT, *map(str, stops)], stdout=subprocess.PIPE)
    try:
        for _ in stops:
            harness.continue_when_stopped(process.pid)
        runs, samples = json.loads(process.stdout.read())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert samples == 5
    assert runs == 3 + 5 + sum(stop > 3 for stop in stops)


def test_a_load_during_which_the_process_was_stopped_is_repeated(tmp_path):
    log, stopped = tmp_path / "loads", []

    async def go_on(child):
        while len(stopped) < 3:
            await harness.until(lambda: harness.state_of(child.pid) == "T")
            child.suspend()
            child.resume()
            stopped.append(child.pid)  # it was continued at once: the next stop seen is another

    load = harness.fake_load(tmp_path, {"max_batch_size": 8}, on_load="stop", load_log=str(log))
    answers = measured(load, go_on)
    assert len(points(answers)) == 2
    assert len(log.read_text().splitlines()) == 3, "the third is taken as it is"


def test_a_task_suspended_again_and_again_still_finishes(tmp_path):
    async def tease(child):
        for _ in range(20):
            child.suspend()
            await harness.until(lambda: harness.state_of(child.pid) in "TXZ")
            child.resume()
            await asyncio.sleep(0.03)

    load = harness.fake_load(tmp_path, {"max_batch_size": 8}, c_us=2000)
    answers = measured(load, tease, rows=[1, 2, 4], seconds=0.1)
    assert [point.samples >= MIN_SAMPLES for point in points(answers)] == [True, True, True]


# ---------------------------------------------------------------- what goes wrong


def failure(answers):
    (failed,) = harness.said(answers, "failed")
    assert answers[-1] == {"failed": failed}
    assert set(failed) == {"kind", "message"}
    return failed["kind"], failed["message"]


BAD_QUESTIONS = {
    "no load": ({"load": None}, "'load' is no base64 of a Load message"),
    "no base64": ({"load": "###"}, "'load' is no base64 of a Load message"),
    "no message": ({"load": "/////w=="}, "'load' is no base64 of a Load message"),
    "negative rows": ({"rows": [-1]}, "'rows' must be a list of numbers"),
    "rows no list": ({"rows": 1}, "'rows' must be a list of numbers"),
    "rows true": ({"rows": [True]}, "'rows' must be a list of numbers"),
    "done": ({"done": "1"}, "'done' must be a list of numbers"),
    "seconds": ({"seconds": "1"}, "'seconds' must be a number"),
    "endless": ({"seconds": 1e9}, "'seconds' must be a number"),
    "sample": ({"sample": 3}, "'sample' is no path"),
    "task": ({"task": "dance"}, "cannot do task 'dance'"),
}


@pytest.mark.parametrize("name", BAD_QUESTIONS)
def test_a_bad_question_is_refused(tmp_path, name):
    change, expected = BAD_QUESTIONS[name]
    kind, message = failure(measured(harness.fake_load(tmp_path, {"max_batch_size": 8}), **change)
                            if "load" not in change else measured(**change))  # fmt: skip
    assert kind == "invalid-request"
    assert expected in message


@pytest.mark.parametrize("question", [[], 3, "task", None])
def test_a_question_that_is_no_object_is_refused(question):
    assert failure(harness.run_task(question)) == (
        "invalid-request",
        "cannot do the task: the question is no JSON object",
    )


@pytest.mark.parametrize(
    ("behaviour", "kind", "expected"),
    [
        ({"on_load": "raise"}, "backend-error", "the fake device raised on command"),
        ({"on_warmup": "memory"}, "backend-error", "cannot warm the model up: MemoryError"),
        ({"inputs": [], "outputs": []}, "backend-error", "has no inputs"),
    ],
)
def test_a_variant_that_cannot_be_loaded_fails_with_the_reason(tmp_path, behaviour, kind, expected):
    found, message = failure(measured(harness.fake_load(tmp_path, {"max_batch_size": 8}, **behaviour)))
    assert found == kind
    assert expected in message
    assert str(tmp_path) not in message


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("raise", "cannot measure 1 rows: RuntimeError: the fake device raised on command"),
        ("missing", "cannot measure 1 rows: the backend broke its contract: output 'y' is missing"),
        ("rows", "cannot measure 1 rows: the backend broke its contract: output 'y' has shape [0, 16]"),
        ("memory", "cannot measure 1 rows: MemoryError: the fake device is full"),
    ],
)
def test_a_run_that_fails_fails_the_task_with_the_reason(tmp_path, command, expected):
    answers = measured(harness.fake_load(tmp_path, {"max_batch_size": 8}), sample=commanding(tmp_path, command))
    kind, message = failure(answers)
    assert kind == "backend-error"
    assert message.startswith(expected)


# what runtimes say; loading warms up with eight rows at most
FULL = {"rows": 8, "says": "Failed to allocate memory for requested buffer of size 4294967296"}
BROKEN = {"rows": 8, "says": "index 7 is out of bounds"}


@pytest.mark.parametrize(("rows", "done", "kept"), [([4, 8, 16, 32], [], [4, 8]), ([2, 4, 8, 16], [2, 4, 8], [])])
def test_where_memory_ends_what_was_measured_with_fewer_rows_stands(tmp_path, rows, done, kept):
    answers = measured(harness.fake_load(tmp_path, {"max_batch_size": 64}, raise_above=FULL), rows=rows, done=done)
    assert [point.rows for point in points(answers)] == kept
    assert not harness.said(answers, "failed")
    assert list(answers[-1]) == ["result"]


@pytest.mark.parametrize(("behaviour", "rows"), [(FULL, [16, 32]), (BROKEN, [4, 8, 16])])
def test_where_memory_ends_at_once_or_something_else_goes_wrong_the_task_fails(tmp_path, behaviour, rows):
    answers = measured(harness.fake_load(tmp_path, {"max_batch_size": 64}, raise_above=behaviour), rows=rows)
    kind, message = failure(answers)
    assert kind == "backend-error"
    assert message == f"cannot measure 16 rows: RuntimeError: {behaviour['says']}"


def commanding(directory, command):
    """A sample of one row that makes the fake backend obey `command`."""
    from fake_backend import MAGIC

    np.savez(directory / "s.npz", x=np.full((1, 16), MAGIC[command], np.float32))
    return str(directory / "s.npz")


@pytest.mark.parametrize(("command", "expected"), [("crash", "SIGSEGV"), ("kill", "SIGKILL")])
def test_the_parent_sees_a_crash_in_a_run(tmp_path, command, expected):
    with pytest.raises(ChildFailed, match=expected):
        measured(harness.fake_load(tmp_path, {"max_batch_size": 8}), sample=commanding(tmp_path, command))


@pytest.mark.parametrize("behaviour", [{"on_load": "hang"}, {"on_warmup": "hang-gil"}])
def test_the_parent_sees_a_task_that_hangs(tmp_path, behaviour):
    with pytest.raises(ChildFailed, match=r"it gave no answer within 1\.5 s"):
        measured(harness.fake_load(tmp_path, {"max_batch_size": 8}, **behaviour), patience=1.5)


def test_a_sample_that_is_of_no_use_fails_the_task(tmp_path):
    load = harness.fake_load(tmp_path, {"max_batch_size": 8})
    assert failure(measured(load, sample=str(tmp_path / "none.jsonl")))[0] == "invalid-request"
    (tmp_path / "s.jsonl").write_text("")
    assert "it has no rows" in failure(measured(load, sample=str(tmp_path / "s.jsonl")))[1]
    (tmp_path / "s.jsonl").write_text('{"inputs": {"x": [1]}}')
    assert "must have [16]" in failure(measured(load, sample=str(tmp_path / "s.jsonl")))[1]


def test_a_precision_the_backend_does_not_offer_fails_with_its_words():
    load = harness.load_of(harness.MODELS / "digits", "onnxruntime", precision="INT4-WEIGHTS")
    assert failure(measured(load))[0] == "backend-error"


def test_a_task_whose_parent_is_gone_ends():
    """It dies with its parent, and what it still says goes to nobody."""
    program = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-P', '-m', 'appliance.worker.task'],"
        " stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "print(child.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    pid = int(parent.stdout.readline())
    descriptor = os.pidfd_open(pid)
    parent.kill()
    parent.wait()
    parent.stdin.close()
    parent.stdout.close()
    assert select.select([descriptor], [], [], harness.PATIENCE)[0]
    os.close(descriptor)
