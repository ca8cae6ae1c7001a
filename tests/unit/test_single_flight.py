"""Equal requests: one run for all, and nobody's deadline, withdrawal or place in the queue is felt by another."""

import random
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parents[1]))

from appliance.cache import ResponseCache
from appliance.call import FINISHED, NEW, QUEUED, RUNNING, Call, OutputTable
from appliance.clients import Client
from appliance.errors import BackendError, DeadlineExceeded, InvalidRequest, Overloaded, WorkerLost
from appliance.manifest import CacheSection, Manifest
from appliance.metrics import ModelStatistics
from appliance.planner import make_plan, signature_of
from appliance.region import Region
from appliance.single_flight import SingleFlight
from appliance.slab import Slab
from appliance.types import CacheStatus, Timings
from appliance.wire.worker import TensorLayout
from support.workers import Ledger, echo_model

SIGNATURE = signature_of(echo_model(), Manifest(name="m", artifacts=[{"path": "1/model.onnx", "format": "onnx"}]))


class Stage:
    """A model's queue and worker as far as single flight sees them: what is queued stays until the test runs it."""

    def __init__(self, max_bytes=1 << 20, max_request_bytes=1 << 20, max_waiting=100) -> None:
        self.now_ns = 1000
        self.statistics = ModelStatistics()
        self.cache = ResponseCache(CacheSection(max_bytes=max_bytes), self.statistics)
        self.queue: list[Call] = []
        self.later: list = []
        self.flight = SingleFlight(
            self.cache,
            self.statistics,
            max_request_bytes,
            max_waiting,
            lambda priority: priority or 2,
            self.withdraw,
            self.later.append,
            lambda: self.now_ns,
        )

    def withdraw(self, place: Call) -> None:
        assert place.state is not FINISHED, "withdrawn twice"
        if place.state is QUEUED:
            self.queue.remove(place)
            place.let_go()
        place.state = FINISHED

    def enter(self, call: Call, error: Exception | None = None) -> Call | None:
        """What the engine does with a call; `error` refuses the place it gets."""
        call.charge()
        place = self.flight.enter(call)
        if place is not None and place is not call:
            if error is not None:
                if self.flight.give_up(place, call):
                    raise error
            else:
                place.state = QUEUED
                place.admitted_ns = self.now_ns
                self.queue.append(place)
        return place

    def cancel(self, call: Call) -> None:
        """What an instance does with a call that waits."""
        assert call.state is NEW
        call.state = FINISHED
        call.let_go()
        self.flight.leave(call)

    def collect(self, *places: Call) -> list[Call]:
        """Take these calls, by default all, as a batch."""
        batch = list(places) or self.queue[:]
        for place in batch:
            self.queue.remove(place)
            place.state = RUNNING
            place.queue_ns = self.now_ns - place.admitted_ns
        return self.flight.begin(batch)

    def answer(self, batch: list[Call]) -> None:
        """Give every call its tensors back, as a dispatcher does."""
        content = b"".join(bytes(place.contents[0]) for place in batch)
        rows = sum(place.plan.rows for place in batch)
        layout = TensorLayout(0, "FP32", (rows, 4), 0, 0, len(content))
        table = OutputTable(((0, "FP32", (4,)),), {0: layout}, SIGNATURE.output_names, True)
        row = 0
        for place in batch:
            if place.state is RUNNING:
                place.state = FINISHED
                place.sink.deliver(place, table, memoryview(content), row, Timings(compute_ns=7, batch_rows=rows))
                self.statistics.success.add(self.now_ns - place.admitted_ns)
                self.statistics.queue.add(place.queue_ns)
            row += place.plan.rows
            place.let_go()
        self.flight.flush()

    def fail(self, places: list[Call], error: Exception) -> None:
        """Fail calls, as a dispatcher does."""
        for place in places:
            if place.state is not FINISHED:
                place.state = FINISHED
                self.statistics.fail.add(self.now_ns - place.admitted_ns)
                place.sink.fail(place, error)
                place.sink.flush()
            place.let_go()

    def turn(self) -> None:
        """Another turn of the loop."""
        later, self.later[:] = self.later[:], []
        for each in later:
            each()

    def is_clean(self) -> bool:
        """Nothing is remembered of calls that are over."""
        flight = self.flight
        return not (flight._joints or flight._asked or flight._waiting or flight._hits or flight._unflushed)


def make_call(ledger, number=1, fill=1, rows=1, deadline_ns=0, priority=0, client=None) -> Call:
    plan = make_plan(None, SIGNATURE, [("x", "FP32", (rows, 4))], [])
    call = Call(plan, [bytes([fill]) * (16 * rows)], ledger, number, deadline_ns, client or Client())
    call.priority = priority
    return call


@pytest.fixture
def stage():
    return Stage()


@pytest.fixture
def ledger():
    return Ledger()


# ---------------------------------------------------------------- one run for all


def test_equal_calls_run_once_and_each_gets_the_answer(stage, ledger):
    for number in range(5):
        stage.enter(make_call(ledger, number))
    assert len(stage.queue) == 1
    stage.answer(stage.collect())
    assert ledger.answers == dict.fromkeys(range(5), b"\1" * 16)
    assert ledger.flushes == 1, "one write for all answers of a sink"
    assert stage.statistics.success.count == 5
    assert (stage.statistics.cache_miss.count, stage.statistics.cache_joined) == (1, 4)
    assert stage.is_clean()


def test_different_calls_run_each(stage, ledger):
    calls = [make_call(ledger, 0), make_call(ledger, 1, fill=2), make_call(ledger, 2, rows=2)]
    for call in calls:
        stage.enter(call)
    assert len(stage.queue) == 3
    stage.answer(stage.collect())
    assert ledger.answers == {0: b"\1" * 16, 1: b"\2" * 16, 2: b"\1" * 32}


def test_calls_join_one_that_runs_already(stage, ledger):
    stage.enter(make_call(ledger, 0))
    batch = stage.collect()
    stage.enter(make_call(ledger, 1))
    assert stage.queue == []
    stage.answer(batch)
    assert set(ledger.answers) == {0, 1}


def test_an_answer_that_was_given_is_given_again_in_a_later_turn(stage, ledger):
    stage.enter(make_call(ledger, 0))
    stage.answer(stage.collect())
    call = make_call(ledger, 1)
    assert stage.enter(call) is None
    stage.enter(make_call(ledger, 2))
    assert stage.queue == []
    assert set(ledger.answers) == {0}
    assert len(stage.later) == 1, "one turn for all"
    stage.turn()
    assert ledger.answers == dict.fromkeys(range(3), b"\1" * 16)
    assert call.state is FINISHED
    assert (stage.statistics.cache_hit.count, stage.statistics.success.count) == (2, 3)
    assert stage.statistics.queue.count == 3
    assert stage.is_clean()


def test_a_call_withdrawn_before_its_hit_is_delivered_hears_nothing(stage, ledger):
    stage.enter(make_call(ledger, 0))
    stage.answer(stage.collect())
    call = make_call(ledger, 1)
    stage.enter(call)
    stage.cancel(call)
    stage.turn()
    assert set(ledger.answers) == {0}
    assert stage.statistics.success.count == 1


def test_times_are_each_callers_own(stage):
    heard = {}

    class Clocked(Ledger):
        def deliver(self, call, table, memory, row, timings):
            heard[call.id] = (call.queue_ns, timings.compute_ns, timings.batch_rows)

    sink = Clocked()
    stage.enter(make_call(sink, 0))
    stage.now_ns += 500
    stage.enter(make_call(sink, 1))
    stage.now_ns += 500
    batch = stage.collect()
    stage.now_ns += 100
    stage.enter(make_call(sink, 2))
    stage.now_ns += 100
    stage.answer(batch)
    assert heard == {0: (1000, 7, 1), 1: (500, 7, 1), 2: (0, 7, 1)}
    assert stage.statistics.success.ns == 1200 + 700 + 100
    stage.enter(make_call(sink, 3))
    stage.turn()
    assert heard[3] == (0, 0, 0)


def test_tensors_over_the_bound_are_left_alone(ledger):
    stage = Stage(max_request_bytes=16)
    call = make_call(ledger, 0, rows=2)
    assert stage.enter(call) is call
    assert stage.statistics.cache_miss.count == 0
    assert stage.is_clean()
    assert stage.enter(make_call(ledger, 1)) is not None


def test_what_a_client_changes_in_its_region_meanwhile_reaches_nobody(stage, ledger):
    """Else it could make others get the answer to another question."""
    freed = []
    slab = Slab.create(4096, "test")
    region = Region(slab, lambda: freed.append(True))
    slab.memory[:16] = b"\1" * 16
    call = make_call(ledger, 0)
    call.contents = [region.view(0, 16)]
    call.use_regions([SimpleNamespace(region=region, offset=0, is_in_place=True)])
    place = stage.enter(call)
    slab.memory[:16] = b"\2" * 16
    region.release()
    assert freed, "the copy needs the region no more"
    assert not place.region_views
    stage.answer(stage.collect())
    assert ledger.answers[0] == b"\1" * 16
    stage.enter(make_call(ledger, 1, fill=1))
    stage.turn()
    assert ledger.answers[1] == b"\1" * 16


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("error", [InvalidRequest("bad"), WorkerLost("gone"), BackendError("broken")])
def test_an_error_is_everybodys_and_is_never_kept(stage, ledger, error):
    for number in range(3):
        stage.enter(make_call(ledger, number))
    stage.fail(stage.collect(), error)
    assert ledger.errors == dict.fromkeys(range(3), error)
    assert stage.statistics.fail.count == 3
    assert stage.is_clean()
    assert len(stage.cache) == 0
    assert stage.enter(make_call(ledger, 4)) is not None, "the next one runs"


def test_a_refused_call_is_refused_and_the_next_one_runs(stage, ledger):
    call = make_call(ledger, 0)
    with pytest.raises(Overloaded):
        stage.enter(call, Overloaded("full"))
    assert call.state is FINISHED
    assert call.client.requests == 0
    assert stage.is_clean()
    assert stage.enter(make_call(ledger, 1)) is not None


def test_calls_that_wait_without_a_place_are_bounded(ledger):
    stage = Stage(max_waiting=3)
    for number in range(50):
        stage.enter(make_call(ledger, number, fill=number))
    for number in range(3):
        stage.enter(make_call(ledger, 100 + number, fill=number))
    late = make_call(ledger, 200, fill=0)
    with pytest.raises(Overloaded, match="3 wait for equal ones already and max_queue_size is 3"):
        stage.enter(late)
    late.let_go()
    stage.answer(stage.collect())
    assert len(ledger.answers) == 53
    assert stage.is_clean()


# ---------------------------------------------------------------- who leaves


def test_the_first_may_leave_and_the_run_goes_on_for_the_others(stage, ledger):
    first, second = make_call(ledger, 0), make_call(ledger, 1)
    stage.enter(first)
    stage.enter(second)
    stage.cancel(first)
    assert len(stage.queue) == 1
    stage.answer(stage.collect())
    assert set(ledger.answers) == {1}
    assert stage.is_clean()


def test_when_the_last_leaves_nothing_runs(stage, ledger):
    calls = [make_call(ledger, number) for number in range(3)]
    for call in calls:
        stage.enter(call)
    for call in calls:
        stage.cancel(call)
    assert stage.queue == []
    assert stage.is_clean()
    assert stage.enter(make_call(ledger, 9)) is not None


def test_when_the_last_leaves_a_run_its_answer_is_dropped(stage, ledger):
    call = make_call(ledger, 0)
    stage.enter(call)
    batch = stage.collect()
    stage.cancel(call)
    stage.enter(make_call(ledger, 1))
    assert len(stage.queue) == 1, "what runs for nobody is waited for by nobody"
    stage.answer(batch)
    assert ledger.answers == {}
    stage.answer(stage.collect())
    assert set(ledger.answers) == {1}
    assert stage.is_clean()


def test_a_run_may_last_as_long_as_the_most_patient_of_those_who_wait(stage, ledger):
    (place,) = [stage.enter(make_call(ledger, 0, deadline_ns=5000))]
    assert place.deadline_ns == 5000
    stage.enter(make_call(ledger, 1, deadline_ns=9000))
    assert place.deadline_ns == 9000
    stage.enter(make_call(ledger, 2, deadline_ns=7000))
    assert place.deadline_ns == 9000
    stage.enter(make_call(ledger, 3))
    assert place.deadline_ns == 0
    stage.enter(make_call(ledger, 4, deadline_ns=99_000, client=place.client))
    assert place.deadline_ns == 0


def test_where_deadlines_do_not_bind_one_waits_on_and_goes_behind_those_with_time_left(stage, ledger):
    first, second = make_call(ledger, 0, deadline_ns=5000), make_call(ledger, 1, deadline_ns=9000)
    place = stage.enter(first)
    stage.enter(second)
    assert stage.flight.forgive(first) == [], "the second has time left"
    assert place.deadline_ns == 0
    assert stage.flight.forgive(second) == [place]
    stage.answer(stage.collect())
    assert set(ledger.answers) == {0, 1}


def test_one_that_comes_after_its_deadline_is_refused(stage, ledger):
    with pytest.raises(DeadlineExceeded):
        stage.enter(make_call(ledger, 0, deadline_ns=stage.now_ns))
    assert stage.statistics.refused == {"deadline-exceeded": 1}
    assert stage.is_clean()


def test_the_hit_rate_counts_all_that_were_spared_a_run(stage, ledger):
    assert stage.flight.status() == CacheStatus(0, 0, 0.0)
    stage.enter(make_call(ledger, 0))
    stage.enter(make_call(ledger, 1))
    stage.answer(stage.collect())
    for number in (2, 3):
        stage.enter(make_call(ledger, number))
    stage.turn()
    assert stage.flight.status() == CacheStatus(1, stage.cache.nbytes, 0.75)


def test_one_that_is_withdrawn_while_others_hear_their_answer_hears_none(stage):
    """A connection that breaks while answers are written withdraws what it has outstanding."""
    second = None

    class Breaking(Ledger):
        def deliver(self, call, table, memory, row, timings):
            super().deliver(call, table, memory, row, timings)
            stage.cancel(second)

    sink, other = Breaking(), Ledger()
    second = make_call(other, 1)
    stage.enter(make_call(sink, 0))
    stage.enter(second)
    stage.answer(stage.collect())
    assert (set(sink.answers), other.answers) == ({0}, {})
    assert stage.is_clean()


# ---------------------------------------------------------------- who comes first


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"priority": 3}, {"priority": 0}),
        ({"priority": 0}, {"priority": 1}),
        ({}, {"deadline_ns": 5000}),
        ({"deadline_ns": 9000}, {"deadline_ns": 5000}),
    ],
)
def test_one_that_would_be_served_earlier_gets_a_place_of_its_own(stage, ledger, first, second):
    client = Client()
    slow = stage.enter(make_call(ledger, 0, client=client, **first))
    fast = stage.enter(make_call(ledger, 1, client=client, **second))
    assert stage.queue == [slow, fast]
    assert stage.collect(fast) == [fast]
    assert stage.queue == [], "what the other place was for is running"
    stage.answer([fast])
    assert set(ledger.answers) == {0, 1}
    assert stage.statistics.success.count == 2
    assert stage.is_clean()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {}),
        ({"priority": 2}, {"priority": 0}),
        ({"priority": 1}, {"priority": 3, "deadline_ns": 5000}),
        ({"deadline_ns": 5000}, {"deadline_ns": 9000}),
        ({"deadline_ns": 5000}, {}),
    ],
)
def test_one_that_would_not_gets_none(stage, ledger, first, second):
    client = Client()
    stage.enter(make_call(ledger, 0, client=client, **first))
    assert stage.enter(make_call(ledger, 1, client=client, **second)) is None


def test_a_client_with_little_in_flight_does_not_wait_behind_one_with_much(stage, ledger):
    busy, calm = Client(), Client()
    for number in range(10):
        stage.enter(make_call(ledger, number, fill=number, client=busy))
    assert len(stage.queue) == 10
    place = stage.enter(make_call(ledger, 10, fill=9, client=calm))
    assert stage.queue[-1] is place
    assert stage.enter(make_call(ledger, 11, fill=9, client=Client())) is None, "it has as little, and came later"


def test_whichever_place_comes_first_answers_all_and_no_batch_holds_two(stage, ledger):
    slow = stage.enter(make_call(ledger, 0, priority=3))
    other = stage.enter(make_call(ledger, 1, fill=7))
    fast = stage.enter(make_call(ledger, 2, priority=1))
    batch = stage.collect(slow, other, fast)
    assert batch == [slow, other]
    assert fast.state is FINISHED
    assert fast.client.requests == 0
    stage.answer(batch)
    assert set(ledger.answers) == {0, 1, 2}
    assert stage.is_clean()


def test_nobody_gets_a_place_while_an_equal_call_runs(stage, ledger):
    stage.enter(make_call(ledger, 0, priority=3))
    stage.collect()
    assert stage.enter(make_call(ledger, 1, priority=1)) is None


def test_places_of_equal_calls_are_few(stage, ledger):
    client = Client()
    for number in range(100):
        stage.enter(make_call(ledger, number, deadline_ns=100_000 - number, client=client))
    assert len(stage.queue) == 4
    stage.answer(stage.collect())
    assert len(ledger.answers) == 100


def test_a_place_that_is_refused_leaves_its_call_waiting_with_the_others(stage, ledger):
    stage.enter(make_call(ledger, 0, priority=3))
    call = make_call(ledger, 1, priority=1)
    stage.enter(call, Overloaded("full"))
    assert call.state is NEW
    assert call.client.requests == 1
    stage.answer(stage.collect())
    assert set(ledger.answers) == {0, 1}
    assert call.client.requests == 0


def test_a_place_that_is_too_late_is_no_loss_to_those_with_time_left(stage, ledger):
    client = Client()
    patient = stage.enter(make_call(ledger, 0, client=client))
    hasty = stage.enter(make_call(ledger, 1, deadline_ns=2000, client=client))
    stage.queue.remove(hasty)
    hasty.state = RUNNING
    stage.fail([hasty], DeadlineExceeded("too late"))
    assert ledger.errors == {}
    stage.answer(stage.collect(patient))
    assert set(ledger.answers) == {0, 1}


def test_the_place_that_runs_may_be_queued_again_for_as_long_as_anybody_waits(stage, ledger):
    """A batch that failed as a whole is queued again, call by call."""
    client = Client()
    stage.enter(make_call(ledger, 0, client=client))
    hasty = stage.enter(make_call(ledger, 1, deadline_ns=2000, client=client))
    assert stage.collect(hasty) == [hasty]
    assert hasty.deadline_ns == 0
    stage.queue.append(hasty)
    hasty.state = QUEUED
    stage.answer(stage.collect())
    assert set(ledger.answers) == {0, 1}
    assert stage.is_clean()


# ---------------------------------------------------------------- accounts


def test_a_call_is_on_its_clients_account_once_and_a_waiting_one_without_bytes(stage, ledger):
    one, other = Client(), Client()
    stage.enter(make_call(ledger, 0, client=one))
    stage.enter(make_call(ledger, 1, client=other))
    assert (one.requests, one.bytes) == (1, 16)
    assert (other.requests, other.bytes) == (1, 0)
    stage.answer(stage.collect())
    assert (one.requests, one.bytes, other.requests, other.bytes) == (0, 0, 0, 0)
    stage.enter(make_call(ledger, 2, client=one))
    assert one.requests == 0, "a hit holds nothing"


def test_a_hundred_thousand_calls_leave_nothing_behind():
    """Random arrivals, withdrawals, batches, failures: everybody who stayed hears once, and of its own question."""
    chance = random.Random(7)
    stage = Stage(max_bytes=20_000, max_waiting=40)
    clients = [Client() for _ in range(8)]
    heard: dict[int, object] = {}
    waiting: dict[int, Call] = {}

    class Sink:
        def deliver(self, call, table, memory, row, timings):
            self.note(call, bytes(table.view(0, memory, row, call.plan.rows)[1]))

        def fail(self, call, error):
            self.note(call, error)

        def note(self, call, what):
            assert heard.setdefault(call.id, what) is what, "heard twice"
            del waiting[call.id]

        def flush(self):
            pass

    sinks = [Sink() for _ in clients]
    questions: dict[int, int] = {}
    withdrawn = set()
    running: list[Call] = []
    for number in range(100_000):
        stage.now_ns += chance.randrange(100)
        action = chance.random()
        if action < 0.6:
            which = chance.randrange(len(clients))
            fill = min(int(chance.expovariate(0.05)), 255)
            deadline_ns = stage.now_ns + 1 + chance.randrange(10_000) if chance.random() < 0.3 else 0
            call = make_call(sinks[which], number, fill, 1, deadline_ns, chance.randrange(4), clients[which])
            questions[number] = fill
            waiting[number] = call
            try:
                stage.enter(call, Overloaded("full") if len(stage.queue) > 60 else None)
            except Overloaded:
                call.let_go()
                del waiting[number]
        elif action < 0.75 and waiting:
            call = waiting.pop(chance.choice(list(waiting)))
            withdrawn.add(call.id)
            stage.cancel(call)
        elif action < 0.85 and stage.queue and not running:
            running = stage.collect(*chance.sample(stage.queue, min(len(stage.queue), 8)))
        elif action < 0.95:
            if chance.random() < 0.2:
                stage.fail(running, WorkerLost("gone"))
            elif running:
                stage.answer(running)
            running = []
        else:
            stage.turn()
        assert 0 <= stage.cache.nbytes <= 20_000
    stage.answer(running)
    while stage.queue:
        stage.answer(stage.collect())
    stage.turn()
    assert waiting == {}
    assert stage.is_clean()
    assert not withdrawn & heard.keys()
    assert all((client.requests, client.bytes) == (0, 0) for client in clients)
    for number, what in heard.items():
        assert isinstance(what, WorkerLost) or what == struct.pack("16B", *[questions[number]] * 16)
    counts = stage.statistics
    assert min(counts.cache_hit.count, counts.cache_joined, counts.cache_evictions) > 1000
    answered = sum(isinstance(what, bytes) for what in heard.values())
    assert counts.success.count == answered
    assert counts.fail.count == len(heard) - answered
