"""``appliancectl bench`` against a real daemon: open loops, and LoadGen's scenarios."""

import importlib.util
import json
import os
import signal
import subprocess
import sys

import pytest

from appliance_client import Client
from support.daemon import FAKE_BACKEND, children, command_line, is_alive, start_daemon, wait_until
from support.models import write_fake

needs_loadgen = pytest.mark.skipif(
    importlib.util.find_spec("mlperf_loadgen") is None,
    reason="mlcommons-loadgen is not installed: it has wheels for Linux on x86-64 and Python 3.11 to 3.13",
)

PROGRAM = [sys.executable, "-c", "from appliancectl.cli import main; main()", "bench"]


def bench(running, *arguments):
    """Run the command to its end."""
    words = [*PROGRAM, *map(str, arguments), "--socket-dir", running.socket_dir]
    return subprocess.run(words, capture_output=True, timeout=50, check=False, text=True)


def result(running, *arguments):
    ended = bench(running, *arguments, "--json")
    assert ended.returncode == 0, (ended.stdout, ended.stderr)
    return json.loads(ended.stdout)


def begin(running, *arguments):
    """Start the command, as from a terminal: it heeds SIGINT."""
    words = [*PROGRAM, *map(str, arguments), "--socket-dir", running.socket_dir]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A daemon with ``slow``, which takes 20 ms for each request and lets one other wait."""
    models = tmp_path_factory.mktemp("models")
    write_fake(models / "slow", batch={"max_queue_size": 1}, manifest="max_batch_size = 1", c_us=20_000)
    with start_daemon(tmp_path_factory.mktemp("run"), models, environment=FAKE_BACKEND) as running:
        yield running


# ---------------------------------------------------------------- loops


@pytest.mark.parametrize("arrivals", ["poisson", "uniform", "burst"])
def test_an_open_loop_offers_what_was_asked_for(daemon, arrivals):
    options = ["--burst", 8] if arrivals == "burst" else []
    steps = result(
        daemon, "identity", "--rate", "200,800", "--arrivals", arrivals, *options, "--duration", 0.4, "--clients", 3
    )["steps"]
    assert [step["rate"] for step in steps] == [200, 800]
    for step in steps:
        assert step["offered"] == step["requests"] + sum(step["errors"].values())
        assert step["rate"] / 2 < step["offered"] / 0.4 < step["rate"] * 2  # a short schedule varies
        assert step["p50_ms"] <= step["p90_ms"] <= step["p99_ms"] <= step["p99_9_ms"]
        assert step["late_p99_ms"] >= 0
        assert step["mean"]["batch_rows"] >= 1
        assert step["goodput_per_s"] is None


def test_what_is_too_much_is_refused_and_counted(slow):
    (step,) = result(slow, "slow", "--rate", 500, "--duration", 0.5, "--timeout", 200)["steps"]
    assert sum(step["errors"].values()) > 0
    assert set(step["errors"]) <= {"overloaded", "deadline-exceeded"}
    assert step["requests"] > 0
    assert step["offered"] == step["requests"] + sum(step["errors"].values())
    assert step["goodput_per_s"] <= step["requests_per_s"] < step["offered_per_s"]


def test_an_open_loop_for_people(daemon):
    shown = bench(daemon, "identity", "--rate", 100, "--duration", 0.3, "--timeout", 1000)
    assert shown.returncode == 0, shown.stderr
    assert all(word in shown.stdout for word in ("offered", "answered", "in time", "p99.9 ms", "late p99"))


def test_a_closed_loop_may_have_deadlines_and_several_connections(daemon):
    steps = result(daemon, "identity", "--concurrency", "1,8", "--clients", 4, "--timeout", 5000, "--duration", 0.3)[
        "steps"
    ]
    assert [step["concurrency"] for step in steps] == [1, 8]
    assert all(step["goodput_per_s"] > 0 for step in steps)


@pytest.mark.parametrize(
    ("priority", "load"), [("background", ["--concurrency", "1,2"]), ("1", ["--rate", 100])], ids=["closed", "open"]
)
def test_requests_have_the_priority_they_are_given(daemon, priority, load):
    steps = result(daemon, "identity", *load, "--duration", 0.2, "--priority", priority)["steps"]
    assert all(step["requests"] > 0 and not step["errors"] for step in steps)


def test_an_open_loop_is_interrupted_at_once(daemon):
    started = begin(daemon, "digits", "--rate", 50, "--duration", 300)
    with Client(daemon.infer_socket) as client:
        before = client.statistics("digits")[0].success.count
        wait_until(lambda: client.statistics("digits")[0].success.count > before, "requests are answered")
    started.send_signal(signal.SIGINT)
    output, said = started.communicate(timeout=30)
    assert (output, said.strip()) == ("", "")
    assert started.returncode == 130


# ---------------------------------------------------------------- LoadGen


@needs_loadgen
@pytest.mark.parametrize("scenario", ["single-stream", "multi-stream", "server", "offline"])
def test_a_loadgen_scenario_runs_against_the_model_and_against_nobody(daemon, scenario):
    options = ["--target-qps", 100, "--target-latency", 5000] if scenario == "server" else []
    found = result(daemon, "identity", "--scenario", scenario, "--duration", 0.3, "--priority", "interactive", *options)
    assert (found["scenario"], found["model"], found["refused"], found["logs"]) == (scenario, "identity", {}, None)
    for figures in (found["measured"], found["floor"]):
        assert figures["samples_per_s"] > 0
        assert figures["queries"] > 0
        if scenario != "offline":
            assert 0 < figures["p50_ms"] <= figures["p90_ms"] <= figures["p99_ms"] <= figures["p99_9_ms"]
    if scenario != "server":  # whose rate is given
        assert found["floor"]["samples_per_s"] > found["measured"]["samples_per_s"]


@needs_loadgen
def test_values_given_are_samples_and_logs_are_kept(daemon, tmp_path):
    logs = tmp_path / "new" / "logs"
    shown = bench(
        daemon, "language-id", "-i", "hello", "-i", "guten Tag", "-i", "bonjour",
        "--scenario", "multi-stream", "--duration", 0.3, "--clients", 2, "--keep-logs", logs,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("LoadGen scenario multi-stream: ")
    assert "nobody" in shown.stdout
    assert str(logs) in shown.stdout
    for run in ("run", "floor"):
        log = (logs / run / "mlperf_log_detail.txt").read_text()
        assert '"key": "qsl_reported_total_count", "value": 3' in log


@needs_loadgen
def test_what_is_refused_is_sent_again_until_it_is_answered(slow):
    found = result(slow, "slow", "--scenario", "multi-stream", "--duration", 0.3)
    assert found["refused"]["overloaded"] > 0
    assert found["measured"]["queries"] > 0


@needs_loadgen
def test_an_unmet_target_is_said(daemon):
    options = ["--target-qps", 100, "--target-latency", 0.001]
    found = result(daemon, "identity", "--scenario", "server", *options, "--duration", 0.3)
    assert not found["measured"]["valid"]
    assert "the 99th percentile is over the target latency" in found["measured"]["reasons"]


@needs_loadgen
def test_what_no_request_can_mend_ends_a_scenario(daemon, tmp_path):
    wrong = bench(daemon, "identity", "-i", "[1, 2]", "--scenario", "offline")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "cannot take input 'x'" in wrong.stderr
    unknown = bench(daemon, "no-such-model", "--scenario", "offline", "--json")
    assert (unknown.returncode, json.loads(unknown.stdout)["kind"]) == (1, "model-not-found")
    lacking = bench(daemon, "digits", "-i", "no such file", "--scenario", "single-stream")
    assert (lacking.returncode, "no such file" in lacking.stderr) == (1, True)
    occupied = tmp_path / "file"
    occupied.touch()
    refused = bench(daemon, "identity", "--scenario", "offline", "--keep-logs", occupied / "logs")
    assert (refused.returncode, "cannot keep logs" in refused.stderr) == (1, True)


def harness_of(process):
    """The process in which LoadGen runs."""
    return next((pid for pid in children(process.pid) if b"appliancectl.bench.harness" in command_line(pid)), None)


@pytest.fixture
def under_way(daemon, tmp_path):
    """Starts a scenario of seconds: gives the command and LoadGen's process once LoadGen sends."""
    started = []

    def start(scenario):
        options = ["--target-qps", 50] if scenario == "server" else []
        process = begin(daemon, "digits", "--scenario", scenario, "--duration", 5, "--keep-logs", tmp_path, *options)
        started.append(process)
        log = tmp_path / "run" / "mlperf_log_detail.txt"
        wait_until(lambda: log.exists() or process.poll() is not None, "LoadGen runs")
        return process, harness_of(process)

    yield start
    for process in started:
        process.kill()
        process.communicate()


@needs_loadgen
@pytest.mark.parametrize("scenario", ["single-stream", "server"])
def test_a_scenario_is_interrupted_at_once(under_way, scenario):
    process, harness = under_way(scenario)
    process.send_signal(signal.SIGINT)
    output, said = process.communicate(timeout=30)
    assert (output, said.strip()) == ("", "")
    assert process.returncode == 130
    wait_until(lambda: not is_alive(harness), "LoadGen's process is gone")


@needs_loadgen
def test_loadgen_s_process_does_not_outlive_the_command(under_way):
    process, harness = under_way("single-stream")
    process.kill()
    process.communicate()
    wait_until(lambda: not is_alive(harness), "LoadGen's process is gone")


@needs_loadgen
def test_a_crash_of_loadgen_s_process_is_an_error(under_way):
    process, harness = under_way("multi-stream")
    os.kill(harness, signal.SIGKILL)
    output, said = process.communicate(timeout=30)
    assert (process.returncode, output) == (1, "")
    assert said.startswith("cannot finish the scenario: LoadGen's process ended with -9")


@needs_loadgen
def test_a_daemon_that_goes_away_ends_a_scenario(own_daemon, model_repository, tmp_path):
    """One that sends from LoadGen's own thread, and one that sends from an event loop."""
    running = own_daemon(model_repository, repository={"load": ["identity"]})
    processes, logs = [], []
    for scenario, *options in (["single-stream"], ["server", "--target-qps", 50]):
        kept = tmp_path / scenario
        logs.append(kept / "run" / "mlperf_log_detail.txt")
        options += ["--duration", 5, "--keep-logs", kept]
        processes.append(begin(running, "identity", "--scenario", scenario, *options))
    wait_until(lambda: all(log.exists() for log in logs) or any(p.poll() for p in processes), "LoadGen runs")
    running.stop(signal.SIGKILL)
    for process in processes:
        output, said = process.communicate(timeout=30)
        assert (process.returncode, output) == (3, "")
        assert said.startswith("cannot ")
