"""Runs in all streams of a session at once, as measuring makes them."""

import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from appliance.worker.streams import Streams

PATIENCE = 30.0


def streams_of(run, count):
    """The streams of a session whose `run` is a function of no arguments."""
    session = SimpleNamespace(run=lambda _feeds, _names: run())
    return Streams(SimpleNamespace(session=session, outputs=(), streams=count))


def test_each_stream_runs_in_a_thread_of_its_own_the_callers_among_them_and_they_stay_the_same():
    together = threading.Barrier(3, timeout=PATIENCE)
    seen = set()

    def run():
        if threading.get_ident() not in seen:  # the first run of each stream waits for those of the others
            seen.add(threading.get_ident())
            together.wait()

    streams = streams_of(run, 3)
    samples, _ = streams.run_for({}, 0)
    assert (len(samples), len(seen)) == (3, 3)
    assert threading.get_ident() in seen
    for _ in range(5):
        streams.run_for({}, 1_000_000)
    assert len(seen) == 3


def test_a_stream_goes_on_uncounted_while_another_is_still_timed():
    """The first stream's run ends when the other has run ten times, which is long after that one had enough."""
    own, ran_on = threading.get_ident(), threading.Event()
    runs = Counter()

    def run():
        runs[threading.get_ident() == own] += 1
        if threading.get_ident() == own:
            assert ran_on.wait(PATIENCE)
        elif runs[False] == 10:
            ran_on.set()

    samples, count = streams_of(run, 2).run_for({}, 0)
    assert len(samples) == 2
    assert count == runs.total() >= 11


def test_what_goes_wrong_in_one_stream_is_raised_once_the_others_have_ended():
    own, going = threading.get_ident(), []

    def run():
        going.append(1)
        try:
            if threading.get_ident() != own:
                raise RuntimeError("no memory")
            time.sleep(0.001)
        finally:
            going.pop()

    streams = streams_of(run, 3)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no memory"):
            streams.run_for({}, 10_000_000)
        assert not going
