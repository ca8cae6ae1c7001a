"""Deadlines of calls on a clock that the test turns."""

from types import SimpleNamespace

import pytest

from appliance import deadline as deadline_module
from appliance.call import FINISHED, NEW
from appliance.deadline import Deadlines

SECOND = 1_000_000_000


class Loop:
    """Timers of an event loop that go off when the test says so."""

    def __init__(self, monkeypatch) -> None:
        self.now_ns = 1000 * SECOND
        self.timers = []
        monkeypatch.setattr(deadline_module, "time", SimpleNamespace(monotonic_ns=lambda: self.now_ns))

    def call_later(self, delay, callback):
        timer = SimpleNamespace(due_ns=self.now_ns + round(delay * SECOND), callback=callback, is_cancelled=False)
        timer.cancel = lambda: setattr(timer, "is_cancelled", True)
        self.timers.append(timer)
        return timer

    @property
    def armed(self):
        return [timer for timer in self.timers if not timer.is_cancelled]

    def advance(self, seconds: float) -> None:
        """Move the clock and let what is due go off, in order."""
        end = self.now_ns + round(seconds * SECOND)
        while due := [timer for timer in self.armed if timer.due_ns <= end]:
            timer = min(due, key=lambda timer: timer.due_ns)
            self.timers.remove(timer)
            self.now_ns = max(self.now_ns, timer.due_ns)
            timer.callback()
        self.now_ns = end


@pytest.fixture
def loop(monkeypatch):
    return Loop(monkeypatch)


@pytest.fixture
def expired():
    return []


@pytest.fixture
def deadlines(loop, expired):
    def expire(call):
        call.state = FINISHED
        expired.append(call.name)

    return Deadlines(loop, expire)


def call(loop, name, seconds):
    return SimpleNamespace(name=name, deadline_ns=loop.now_ns + round(seconds * SECOND), state=NEW)


def test_calls_expire_in_the_order_of_their_deadlines_and_not_before(loop, deadlines, expired):
    for name, seconds in (("c", 3), ("a", 1), ("b", 2)):
        deadlines.add(call(loop, name, seconds))
    loop.advance(0.999)
    assert expired == []
    loop.advance(0.001)
    assert expired == ["a"]
    loop.advance(5)
    assert expired == ["a", "b", "c"]
    assert loop.armed == []


def test_calls_of_one_deadline_expire_together_in_the_order_they_came(loop, deadlines, expired):
    for name in "abc":
        deadlines.add(call(loop, name, 1))
    loop.advance(1)
    assert expired == ["a", "b", "c"]


def test_a_call_that_is_finished_does_not_expire(loop, deadlines, expired):
    first, second = call(loop, "first", 1), call(loop, "second", 2)
    deadlines.add(first)
    deadlines.add(second)
    first.state = FINISHED
    loop.advance(3)
    assert expired == ["second"]


def test_one_timer_is_armed_however_many_calls_there_are(loop, deadlines):
    for number in range(100):
        deadlines.add(call(loop, number, 100 - number))
        assert len(loop.armed) == 1
    assert loop.armed[0].due_ns == loop.now_ns + SECOND


def test_a_deadline_that_has_passed_already_expires_on_the_next_turn(loop, deadlines, expired):
    deadlines.add(call(loop, "late", -5))
    assert expired == []
    loop.advance(0)
    assert expired == ["late"]


def test_a_timer_that_goes_off_early_expires_nothing_and_is_armed_again(loop, deadlines, expired):
    """Event loops round: a timer may go off half a millisecond early."""
    deadlines.add(call(loop, "a", 1))
    timer = loop.armed[0]
    loop.timers.remove(timer)
    loop.now_ns += SECOND - 400_000
    timer.callback()
    assert expired == []
    loop.advance(0.001)
    assert expired == ["a"]


def test_finished_calls_with_far_deadlines_are_forgotten(loop, deadlines):
    """An hour's deadline must not keep every answered call of that hour in memory."""
    kept = [call(loop, "kept", 3600) for _ in range(10)]
    for one in kept:
        deadlines.add(one)
    for number in range(50_000):
        one = call(loop, number, 3600)
        deadlines.add(one)
        one.state = FINISHED
        assert len(deadlines._heap) <= 4097
    assert all(any(entry[2] is one for entry in deadlines._heap) for one in kept)


def test_many_unfinished_calls_are_all_kept(loop, deadlines, expired):
    for number in range(10_000):
        deadlines.add(call(loop, number, 1 + number / 1e6))
    loop.advance(2)
    assert expired == list(range(10_000))


def test_an_enormous_deadline_is_no_error(loop, deadlines, expired):
    deadlines.add(call(loop, "never", 1e12))
    deadlines.add(call(loop, "soon", 1))
    loop.advance(1)
    assert expired == ["soon"]
