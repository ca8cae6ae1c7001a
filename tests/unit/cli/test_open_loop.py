"""The open loop against the daemon's own native server, with an engine that stalls when told to."""

import asyncio
import socket
import threading
import time

import numpy as np
import pytest

from appliance.config import LimitsSection
from appliance.server.native import NativeServer
from appliance_client import ModelNotFound
from appliancectl.bench import open_loop
from appliancectl.bench.arrivals import instants
from appliancectl.bench.load import Load
from appliancectl.bench.open_loop import run_open_loop
from appliancectl.target import Target
from support.echo_engine import EchoEngine

PATIENCE_SECONDS = 20
RATE = 100.0

#: Requests due in the half second of `run` and the twentieth before it, less one for rounding; so many are not counted.
DUE = 54
NOT_COUNTED = 6


class Served:
    """A native server in a thread of its own; `engine` is its EchoEngine."""

    def __init__(self, path):
        self.path = path
        self.engine: EchoEngine
        self._is_up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self):
        self._thread.start()
        assert self._is_up.wait(PATIENCE_SECONDS)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join(PATIENCE_SECONDS)

    async def _run(self):
        self._loop, self._done, self.engine = asyncio.get_running_loop(), asyncio.Event(), EchoEngine()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.setblocking(False)
            listener.bind(str(self.path / "infer.sock"))
            listener.listen()
            server = NativeServer(self.engine, LimitsSection(), frozenset())
            server.start(listener)
            self._is_up.set()
            await self._done.wait()
            server.stop_accepting()
            await server.stop()

    def release_after(self, count):
        """Let the engine answer once so many requests have reached it, and not before."""

        async def wait():
            for _ in range(count):
                await self.engine.started.get()
            self.engine.release.set()

        return asyncio.run_coroutine_threadsafe(wait(), self._loop)


@pytest.fixture
def served(tmp_path):
    with Served(tmp_path) as running:
        yield running


def run(served, model, due_s=None, duration_s=0.5, **options):
    inputs = {"x": np.zeros(4, np.float32)}
    load = Load(Target(served.path, wants_json=True), model, inputs, duration_s, **options)
    return run_open_loop(load, instants("uniform", RATE) if due_s is None else due_s, lambda _: None)


def test_everything_due_is_sent_and_answered(served):
    tally = run(served, "echo", clients=3)
    assert tally.offered == len(tally.latencies_s) == len(tally.lateness_s)
    assert abs(tally.offered - 50) <= 1  # both ends of the schedule are rounded
    assert not tally.errors
    assert min(tally.lateness_s) >= 0


def test_requests_are_sent_when_due_though_none_before_was_answered(served):
    """The engine answers the first only after it has the last: a closed loop would wait for ever."""
    released = served.release_after(DUE)
    tally = run(served, "hang")
    assert released.done()
    assert tally.offered == len(tally.latencies_s)
    assert tally.in_flight >= DUE


def test_latency_counts_from_the_moment_a_request_was_due(served):
    """All are answered after the last was due, so each waited at least as long as the schedule went on after it."""
    released = served.release_after(DUE)
    tally = run(served, "hang")
    assert released.done()
    longest_first = sorted(tally.latencies_s, reverse=True)
    for number in range(DUE - NOT_COUNTED):
        assert longest_first[number] >= (DUE - NOT_COUNTED - 1 - number) / RATE - 1e-6


def test_a_sender_that_lags_is_not_flattered(served):
    """Whatever kept a request from being sent in time counts, and how late it was sent is told."""
    lag_s = 0.3

    def lagging():
        yield from (0.06, 0.07)
        time.sleep(lag_s)  # the sender's own delay, not a wait for the server
        yield from (0.08, 0.09)

    tally = run(served, "echo", lagging())
    assert len(tally.latencies_s) == 4
    late = [lateness for lateness in tally.lateness_s if lateness >= lag_s - 0.02]
    assert len(late) >= 2
    assert sum(latency >= lag_s - 0.02 for latency in tally.latencies_s) >= 2
    assert max(tally.latencies_s) >= max(tally.lateness_s)


def test_deadlines_count_from_the_moment_a_request_was_due(served):
    """A request that is sent when its deadline has passed is refused, and no answer is made up for it."""

    def lagging():
        yield 0.06
        time.sleep(0.3)
        yield 0.07

    tally = run(served, "echo", lagging(), timeout_s=0.2)
    assert tally.errors["deadline-exceeded"] >= 1
    assert tally.offered == 2 == len(tally.latencies_s) + tally.errors.total()


def test_deadlines_reach_the_daemon(served):
    tally = run(served, "hang", timeout_s=0.1)
    assert dict(tally.errors) == {"deadline-exceeded": tally.offered}
    assert all(0 < request.timeout_us <= 100_000 for request in served.engine.requests)


@pytest.mark.parametrize("priority", [0, 3])
def test_the_priority_reaches_the_daemon(served, priority):
    run(served, "echo", priority=priority)
    assert {request.priority for request in served.engine.requests} == {priority}


def test_what_is_never_answered_is_counted(served, monkeypatch):
    monkeypatch.setattr(open_loop, "_DRAIN_SECONDS", 0.1)
    tally = run(served, "hang")
    assert dict(tally.errors) == {"unanswered": tally.offered}


def test_a_stalled_daemon_costs_the_sender_a_bounded_number_of_requests(served, monkeypatch):
    monkeypatch.setattr(open_loop, "_DRAIN_SECONDS", 0.1)
    monkeypatch.setattr(open_loop, "_MAX_IN_FLIGHT", 20)
    tally = run(served, "hang")
    assert tally.in_flight == 20
    assert tally.errors.total() == tally.offered
    assert tally.errors["not-sent"] >= tally.offered - 20


def test_refusals_are_counted_by_kind(served):
    tally = run(served, "overloaded")
    assert dict(tally.errors) == {"overloaded": tally.offered}
    assert tally.row()["p50_ms"] is None


def test_an_error_that_would_only_repeat_itself_ends_the_measurement(served):
    with pytest.raises(ModelNotFound):
        run(served, "model-not-found")
