"""The queue of one model: who comes next, who shares a batch, who is refused, and that nothing withdrawn stays.

Time is what the tests say it is, in nanoseconds.
"""

import random
from types import SimpleNamespace

import pytest

from appliance.batcher import Batcher
from appliance.call import FINISHED, NEW, QUEUED, RUNNING, Call, Plan
from appliance.clients import Client
from appliance.cost_model import CostModel
from appliance.errors import DeadlineExceeded, Overloaded
from appliance.manifest import BatchSection

MS = 1_000_000
#: A manifest that asks for the largest batch there is, as Triton gives it.
EAGER = {"preferred_batch_sizes": [65536]}

ANNA, BERT, CORA = (Client((name,), name) for name in ("anna", "bert", "cora"))


def make_plan(signature="s", rows=1, units=1) -> Plan:
    return Plan(SimpleNamespace(), rows, (), (), 0, (signature,), 0, False, units=units, cost=rows * units)


def make_call(signature="s", rows=1, nbytes=10, is_alone=False, client=ANNA, priority=0, deadline=0, units=1) -> Call:
    call = Call(make_plan(signature, rows, units), (), SimpleNamespace(), client=client, deadline_ns=deadline)
    call.nbytes = nbytes
    call.is_alone = is_alone
    call.priority = priority
    return call


def make_batcher(size=1000, nbytes=1 << 30, streams=1, cost=None, **section) -> Batcher:
    section = {"max_queue_size": size, "max_queue_bytes": nbytes, **(section or EAGER)}
    return Batcher(BatchSection(**section), cost or CostModel(), streams)


def known_cost(slope_ms=1.0, intercept_ms=0.0, units=1) -> CostModel:
    """A cost model that has seen enough batches of 1 to 8 rows to be sure."""
    cost = CostModel()
    line = cost.line(units)
    for turn in range(200):
        rows = 1 << turn % 4
        cost.note(line, rows, int((slope_ms * rows + intercept_ms) * MS))
    assert line.ns(4) == pytest.approx((slope_ms * 4 + intercept_ms) * MS, rel=0.02)
    return cost


def admit(batcher, *calls, now=0):
    for call in calls:
        call.admitted_ns = now
        batcher.admit(call, now)
    return calls


def collect(batcher, rows=8, nbytes=1 << 30, now=0):
    return batcher.collect(now, rows, nbytes)


def counts(batcher):
    rows = sum(lane.rows for level in batcher.levels for lane in level.lanes.values())
    return batcher.queued, rows, batcher.queued_bytes


# ---------------------------------------------------------------- who comes next


def test_a_single_request_on_an_idle_model_is_taken_at_once():
    """No delay is bought with the hope for more, whatever batches cost: asked the first time, the queue gives it."""
    for cost in (CostModel(), known_cost(1, 0), known_cost(0.05, 20)):
        batcher = Batcher(BatchSection(), cost)
        (call,) = admit(batcher, make_call())
        assert collect(batcher, rows=64) == [call]
        assert call.state is RUNNING
        assert counts(batcher) == (0, 0, 0)


def test_a_batch_is_everything_there_is_up_to_the_models_rows():
    batcher = make_batcher()
    calls = admit(batcher, *(make_call() for _ in range(20)))
    assert collect(batcher) == list(calls[:8])
    assert collect(batcher) == list(calls[8:16])
    assert collect(batcher) == list(calls[16:])
    assert collect(batcher) == []


def test_rows_are_counted_and_the_order_is_kept():
    batcher = make_batcher()
    calls = admit(batcher, *(make_call(rows=rows) for rows in (3, 4, 2, 1, 8, 1)))
    assert collect(batcher) == list(calls[:2]), "the third would be the ninth row, and none overtakes it"
    assert collect(batcher) == list(calls[2:4])
    assert collect(batcher) == [calls[4]]
    assert collect(batcher) == [calls[5]]


def test_shapes_never_share_a_batch_and_the_most_urgent_goes_first():
    batcher = make_batcher()
    calls = [make_call(name) for name in "abacb"]
    for now, call in enumerate(calls):
        admit(batcher, call, now=now)
    a1, b1, a2, c1, b2 = calls
    assert collect(batcher) == [a1, a2]
    assert collect(batcher) == [b1, b2]
    assert collect(batcher) == [c1]


def test_a_stream_of_one_shape_does_not_starve_another():
    batcher = make_batcher()
    admit(batcher, *(make_call("busy") for _ in range(20)))
    (lonely,) = admit(batcher, make_call("lonely"), now=1)
    for turn in range(4):
        assert lonely.state is QUEUED
        admit(batcher, *(make_call("busy") for _ in range(8)), now=turn + 2)
        collect(batcher)
    assert lonely.state is RUNNING


def test_a_batch_fits_the_slab_and_one_call_alone_may_be_larger():
    batcher = make_batcher()
    calls = admit(batcher, *(make_call(nbytes=nbytes) for nbytes in (40, 60, 1, 500, 40)))
    assert collect(batcher, nbytes=100) == list(calls[:2])
    assert collect(batcher, nbytes=100) == [calls[2]]
    assert collect(batcher, nbytes=100) == [calls[3]]
    assert collect(batcher, nbytes=100) == [calls[4]]


def test_who_must_be_alone_is_alone():
    batcher = make_batcher()
    one, alone, other, last = admit(batcher, make_call(), make_call(is_alone=True), make_call(), make_call())
    assert collect(batcher) == [one]
    assert collect(batcher) == [alone]
    assert collect(batcher) == [other, last]


def test_a_model_without_batches_gets_one_call_at_a_time():
    batcher = make_batcher()
    calls = admit(batcher, *(make_call() for _ in range(3)))
    assert [collect(batcher, rows=1) for _ in range(3)] == [[call] for call in calls]


def test_of_one_client_the_earliest_deadline_goes_first():
    batcher = make_batcher()
    late, none, soon, sooner = admit(
        batcher, *(make_call(deadline=deadline) for deadline in (900 * MS, 0, 500 * MS, 400 * MS))
    )
    assert [collect(batcher, rows=1) for _ in range(4)] == [[sooner], [soon], [late], [none]]


def test_calls_with_deadlines_pass_one_without_for_no_longer_than_a_second():
    batcher = make_batcher()
    (patient,) = admit(batcher, make_call())
    for tenths in range(1, 30):
        now = tenths * 100 * MS
        admit(batcher, make_call(deadline=now + 150 * MS), now=now)
        if patient in collect(batcher, rows=1, now=now):
            assert now <= 1000 * MS
            return
    pytest.fail("it starved")


# ---------------------------------------------------------------- clients share


def test_a_client_with_a_thousand_waiting_calls_leaves_the_other_its_half():
    batcher = make_batcher(size=2000)
    admit(batcher, *(make_call() for _ in range(1000)))
    (theirs,) = admit(batcher, make_call(client=BERT), now=5)
    assert theirs in collect(batcher), "it is in the very next batch"
    admit(batcher, *(make_call(client=BERT) for _ in range(100)), now=6)
    taken = [call.client for _ in range(10) for call in collect(batcher)]
    assert taken.count(BERT) == pytest.approx(40, abs=1)


def test_shares_follow_weights_and_what_calls_cost():
    heavy = Client(("heavy",), "heavy", weight=3.0)
    batcher = make_batcher(size=4000)
    admit(batcher, *(make_call(client=heavy) for _ in range(900)), *(make_call(client=BERT) for _ in range(900)))
    taken = [call.client for _ in range(50) for call in collect(batcher)]
    assert taken.count(heavy) == pytest.approx(300, abs=3)
    batcher = make_batcher(size=4000)
    admit(batcher, *(make_call(rows=4) for _ in range(500)), *(make_call(client=BERT) for _ in range(900)))
    rows = {ANNA: 0, BERT: 0}
    for _ in range(50):
        for call in collect(batcher):
            rows[call.client] += call.plan.rows
    assert rows[ANNA] == pytest.approx(rows[BERT], abs=8)


def test_who_pauses_saves_nothing_up():
    batcher = make_batcher(size=5000)
    admit(batcher, make_call(client=BERT))
    collect(batcher)
    admit(batcher, *(make_call() for _ in range(3000)))
    for _ in range(100):
        collect(batcher)
    admit(batcher, *(make_call(client=BERT) for _ in range(500)))
    taken = [call.client for _ in range(10) for call in collect(batcher)]
    assert taken.count(BERT) == pytest.approx(40, abs=2), "half, not all of it until it has caught up"


def test_shares_hold_however_much_was_served_before():
    """Virtual times that grew for ever would be too coarse for small calls at last."""
    batcher = make_batcher()
    heavy = Client(("heavy",), "heavy", weight=0.001)
    for _ in range(40):
        admit(batcher, make_call("large", client=heavy, units=1 << 40))
        collect(batcher)
    admit(batcher, *(make_call(client=client) for client in (ANNA, BERT) for _ in range(50)))
    taken = [call.client for _ in range(50) for call in collect(batcher, rows=1)]
    assert taken.count(ANNA) == 25


def test_ten_thousand_clients_are_each_served_in_turn():
    batcher = make_batcher(size=100_000)
    clients = [Client((number,), str(number)) for number in range(10_000)]
    for _ in range(2):
        admit(batcher, *(make_call(client=client) for client in clients))
    admit(batcher, *(make_call() for _ in range(50)))
    first = [call.client for _ in range(1251) for call in collect(batcher)]
    assert set(clients) <= set(first)
    assert len(batcher.drain()) == 20_050 - len(first)
    assert counts(batcher) == (0, 0, 0)


def test_clients_that_are_gone_are_forgotten():
    batcher = make_batcher()
    for number in range(20_000):
        admit(batcher, make_call(f"s{number % 3000}", client=Client((number,), str(number))))
        collect(batcher)
    level = batcher.levels[1]
    assert len(level._flows) <= 2048
    assert len(level.lanes) <= 2048
    assert sum(len(lane.queues) for lane in level.lanes.values()) <= 2048


@pytest.mark.parametrize("is_busy", [False, True])
def test_clients_that_send_one_request_each_leave_nothing_behind(is_busy):
    """Of one shape, as connections that come and go do; alone or beside a client that always waits."""
    batcher = make_batcher()
    for number in range(10_000):
        if is_busy and batcher.queued < 10:
            admit(batcher, *(make_call(client=CORA) for _ in range(100)))
        (call,) = admit(batcher, make_call(client=Client((number,), str(number))))
        while call.state is QUEUED:
            collect(batcher, rows=1)
    level = batcher.levels[1]
    (lane,) = level.lanes.values()
    assert max(len(kept) for kept in (lane.queues, lane._heap, level._flows, level._heap)) <= 2048


# ---------------------------------------------------------------- levels of priority


def test_a_more_urgent_level_goes_first_and_zero_or_too_large_a_number_is_the_default():
    batcher = make_batcher()
    background, default, unknown, interactive = admit(
        batcher, *(make_call(priority=priority) for priority in (3, 0, 77, 1))
    )
    assert collect(batcher) == [interactive]
    assert collect(batcher) == [default, unknown]
    assert collect(batcher) == [background]


def test_levels_never_share_a_batch():
    batcher = make_batcher()
    admit(batcher, *(make_call(priority=1 + number % 3) for number in range(9)))
    assert [sorted({call.priority for call in collect(batcher)}) for _ in range(3)] == [[1], [2], [3]]


def test_background_finishes_under_constant_interactive_load():
    """A level that is passed over gathers the right to one part in sixteen."""
    cost = known_cost(1.0, 0.5)
    batcher = make_batcher(size=10_000, cost=cost)
    background = admit(batcher, *(make_call(priority=3) for _ in range(40)))
    now = served = 0
    while any(call.state is QUEUED for call in background):
        while batcher.queued < 60:
            admit(batcher, make_call(priority=1), now=now)
        batch = collect(batcher, now=now)
        now += int(cost.line(1).ns(len(batch)))
        served += 1
        assert served < 200, "it starves"
    assert served > 5 * 16, "and takes no more than its part"


def test_as_many_levels_as_the_manifest_says_each_with_its_own_bound():
    batcher = make_batcher(
        priority_levels=5, default_priority_level=4, priority_queue_policy={5: {"max_queue_size": 2}}, **EAGER
    )
    calls = admit(batcher, *(make_call(priority=priority) for priority in (5, 0, 1, 5)))
    with pytest.raises(Overloaded, match="2 of priority 5 wait already"):
        admit(batcher, make_call(priority=5))
    assert collect(batcher) == [calls[2]]
    assert collect(batcher) == [calls[1]]
    assert collect(batcher) == [calls[0], calls[3]]


# ---------------------------------------------------------------- how many


def test_where_batching_gains_nothing_few_calls_do_not_wait_for_one_another():
    batcher = Batcher(BatchSection(), known_cost(1.0, 0.0))
    admit(batcher, *(make_call() for _ in range(6)))
    assert [len(collect(batcher, rows=32)) for _ in range(6)] == [1] * 6


def test_where_a_batch_costs_what_a_row_does_all_share_one():
    batcher = Batcher(BatchSection(), known_cost(0.01, 10.0))
    admit(batcher, *(make_call() for _ in range(20)))
    assert len(collect(batcher, rows=32)) == 20


def test_preferred_sizes_and_a_delay_are_tritons():
    batcher = make_batcher(preferred_batch_sizes=[4, 8], max_queue_delay_us=2000)
    admit(batcher, *(make_call() for _ in range(3)), now=0)
    assert collect(batcher, now=1 * MS) == []
    assert batcher.wake_ns == 2 * MS, "when the oldest has waited for as long as it may"
    assert len(collect(batcher, now=2 * MS)) == 3
    admit(batcher, *(make_call() for _ in range(7)), now=3 * MS)
    assert len(collect(batcher, rows=16, now=3 * MS)) == 4, "the largest preferred size there is"
    assert collect(batcher, rows=16, now=3 * MS) == []
    admit(batcher, *(make_call() for _ in range(5)), now=3 * MS)
    assert len(collect(batcher, rows=16, now=3 * MS)) == 8


@pytest.mark.parametrize(
    ("first", "then"),
    [({}, {"signature": "other"}), ({"client": BERT}, {"signature": "other"}), ({"priority": 1}, {"priority": 3})],
)
def test_a_batch_that_is_held_back_holds_up_no_other_that_is_full(first, then):
    batcher = make_batcher(max_queue_delay_us=2000)
    (held,) = admit(batcher, make_call(**first), now=0)
    full = admit(batcher, *(make_call(**then) for _ in range(8)), now=1 * MS)
    assert collect(batcher, now=1 * MS) == list(full)
    assert collect(batcher, now=1 * MS) == []
    assert batcher.wake_ns == 2 * MS
    (other,) = admit(batcher, make_call("third", client=CORA), now=int(1.5 * MS))
    assert collect(batcher, now=2 * MS) == [held]
    assert collect(batcher, now=3 * MS) == []
    assert batcher.wake_ns == 3.5 * MS
    assert collect(batcher, now=4 * MS) == [other]
    assert counts(batcher) == (0, 0, 0)


@pytest.mark.parametrize("priority", [0, 1, 3])
def test_a_preferred_size_is_what_it_is_in_every_level(priority):
    batcher = make_batcher(cost=known_cost(1.0, 0.0), preferred_batch_sizes=[4])
    (urgent,) = admit(batcher, make_call(priority=1))
    assert collect(batcher) == [urgent]
    calls = admit(batcher, *(make_call(priority=priority) for _ in range(8)), now=1 * MS)
    assert collect(batcher, now=1 * MS) == list(calls[:4])


def test_a_preferred_size_that_no_batch_can_have_holds_no_full_one_back():
    """The session takes fewer rows, or memory ran out."""
    batcher = make_batcher(preferred_batch_sizes=[16], max_queue_delay_us=2000)
    calls = admit(batcher, *(make_call() for _ in range(8)))
    assert collect(batcher, rows=8, now=1 * MS) == list(calls)


def test_the_worker_gets_its_next_batch_just_before_it_ends_the_last():
    """Who comes while a batch runs can be in the next one, and the worker need not wait for it."""
    batcher = make_batcher(cost=known_cost(10.0, 0.0))
    admit(batcher, make_call())
    flight = batcher.begin(collect(batcher, now=0), 0)
    first, second = admit(batcher, make_call(), make_call(), now=2 * MS)
    assert collect(batcher, now=5 * MS) == []
    assert collect(batcher, now=int(9.9 * MS)) == [first, second]
    batcher.end(flight, 10 * MS)


def test_with_two_streams_two_batches_run():
    batcher = make_batcher(cost=known_cost(10.0, 0.0), streams=2)
    admit(batcher, make_call("a"), make_call("b"), make_call("c"))
    assert batcher.begin(collect(batcher), 0).ends_ns == batcher.begin(collect(batcher), 0).ends_ns
    assert collect(batcher) == []
    assert batcher.flights.free_ns == pytest.approx(10 * MS, rel=0.02)


# ---------------------------------------------------------------- who is refused


def test_the_queue_is_bounded_by_count():
    batcher = make_batcher(size=2)
    admit(batcher, make_call(), make_call())
    third = make_call()
    with pytest.raises(Overloaded, match="2 wait already and max_queue_size is 2"):
        batcher.admit(third, 0)
    assert third.state is NEW
    assert counts(batcher) == (2, 2, 20)
    collect(batcher, rows=1)
    batcher.admit(third, 0)


def test_the_queue_is_bounded_by_bytes():
    batcher = make_batcher(nbytes=100)
    first = admit(batcher, make_call(nbytes=60), make_call(nbytes=40))[0]
    with pytest.raises(Overloaded, match="max_queue_bytes = 100"):
        batcher.admit(make_call(nbytes=1), 0)
    batcher.admit(make_call(nbytes=0), 0)
    batcher.withdraw(first)
    batcher.admit(make_call(nbytes=60), 0)
    with pytest.raises(Overloaded):
        batcher.admit(make_call(nbytes=101), 0)


def test_what_is_on_its_way_counts():
    batcher = make_batcher(size=3, nbytes=100)
    admit(batcher, make_call())
    batcher.check_room(10, coming=1, coming_bytes=10)
    with pytest.raises(Overloaded):
        batcher.check_room(10, coming=2)
    with pytest.raises(Overloaded):
        batcher.check_room(10, coming=1, coming_bytes=81)


def test_who_was_admitted_once_is_readmitted_whatever_the_bounds():
    batcher = make_batcher(size=2, nbytes=20)
    calls = list(admit(batcher, make_call(), make_call()))
    assert collect(batcher) == calls
    admit(batcher, make_call(), make_call())
    batcher.readmit(calls)
    assert counts(batcher) == (4, 4, 40)
    assert collect(batcher, rows=2) == calls, "before those that came after them"


def ran(batcher, now):
    """Have a batch end at `now`, so that predictions are fresh."""
    batcher.end(batcher.begin(collect(batcher, rows=1, now=now - 10 * MS), now - 10 * MS), now)


def test_a_deadline_that_cannot_be_met_is_refused_at_once():
    batcher = make_batcher(cost=known_cost(10.0, 0.0))
    admit(batcher, make_call())
    ran(batcher, 100 * MS)
    now = 100 * MS
    admit(batcher, *(make_call(deadline=now + 85 * MS) for _ in range(8)), now=now)
    with pytest.raises(DeadlineExceeded, match=r"expected in 9.* ms and the deadline is in 85 ms"):
        admit(batcher, make_call(deadline=now + 85 * MS), now=now)
    admit(batcher, make_call(deadline=now + 120 * MS), now=now)
    admit(batcher, make_call(deadline=now + 30 * MS, client=BERT), now=now)
    assert batcher.queued == 10, "another client has its own share"


def test_calls_of_less_urgent_levels_are_not_ahead():
    batcher = make_batcher(cost=known_cost(10.0, 0.0))
    admit(batcher, make_call())
    ran(batcher, 100 * MS)
    admit(batcher, *(make_call(priority=2) for _ in range(50)), now=100 * MS)
    admit(batcher, make_call(priority=1, deadline=130 * MS), now=100 * MS)
    with pytest.raises(DeadlineExceeded):
        admit(batcher, make_call(priority=3, deadline=130 * MS), now=100 * MS)


def test_a_prediction_that_is_wrong_refuses_nobody_for_ever():
    """Where nothing has run for a second, a call runs that the prediction would turn away."""
    batcher = make_batcher(cost=known_cost(10_000.0, 0.0))
    admit(batcher, make_call())
    ran(batcher, 100 * MS)
    with pytest.raises(DeadlineExceeded):
        admit(batcher, make_call(deadline=600 * MS), now=500 * MS)
    (probe,) = admit(batcher, make_call(deadline=1300 * MS), now=1200 * MS)
    assert collect(batcher, now=1200 * MS) == [probe]


def test_who_cannot_end_in_time_any_more_is_dropped_from_the_batch_and_never_runs():
    batcher = make_batcher(cost=known_cost(10.0, 0.0))
    admit(batcher, make_call())
    ran(batcher, 100 * MS)
    tight, loose = admit(batcher, make_call(deadline=145 * MS), make_call(deadline=400 * MS), now=100 * MS)
    assert collect(batcher, now=140 * MS) == [loose]
    assert batcher.late == [tight]
    assert counts(batcher) == (0, 0, 0)


def test_where_deadlines_do_not_bind_they_only_order():
    batcher = make_batcher(cost=known_cost(10.0, 0.0), timeout_action="delay", **EAGER)
    admit(batcher, make_call())
    ran(batcher, 100 * MS)
    soon, other = admit(batcher, make_call(deadline=101 * MS), make_call(), now=100 * MS)
    assert collect(batcher, rows=1, now=100 * MS) == [soon]
    (soon,) = admit(batcher, make_call(deadline=102 * MS), now=101 * MS)
    batcher.delay(soon, 102 * MS)
    assert collect(batcher, rows=1, now=103 * MS) == [other], "past its deadline it goes behind"
    assert collect(batcher, rows=1, now=103 * MS) == [soon]
    assert counts(batcher) == (0, 0, 0)


# ---------------------------------------------------------------- who is withdrawn


def test_a_withdrawn_call_is_in_no_batch():
    batcher = make_batcher()
    calls = admit(batcher, *(make_call() for _ in range(5)))
    for position in (0, 2, 4):
        batcher.withdraw(calls[position])
        assert calls[position].state is FINISHED
    assert counts(batcher) == (2, 2, 20)
    assert collect(batcher) == [calls[1], calls[3]]


def stored(batcher) -> int:
    """Calls the queue still refers to, alive or not."""
    return sum(
        len(queue._in_order) + len(queue._others)
        for level in batcher.levels
        for lane in level.lanes.values()
        for queue in lane.queues.values()
    )


def test_withdrawn_calls_do_not_pile_up_behind_one_that_waits():
    batcher = make_batcher()
    (waiting,) = admit(batcher, make_call("waits"))
    chance = random.Random(1)
    for number in range(50_000):
        deadline = chance.randrange(1, 1000) * MS
        (call,) = admit(batcher, make_call("waits" if number % 2 else f"s{number}", deadline=deadline))
        batcher.withdraw(call)
    assert stored(batcher) < 200
    assert len(batcher.levels[1].lanes) <= 2048
    assert collect(batcher) == [waiting]


def test_shapes_that_came_once_are_forgotten():
    """A call withdrawn in the shadow of a batch of its shape leaves nothing behind."""
    batcher = make_batcher()
    for number in range(5000):
        first, second = admit(batcher, make_call(f"s{number}"), make_call(f"s{number}"))
        batcher.withdraw(second)
        assert collect(batcher, rows=1) == [first]
    assert stored(batcher) == 0
    assert len(batcher.levels[1].lanes) <= 2048


def test_a_readmitted_call_is_taken_once():
    batcher = make_batcher()
    first, second, third = admit(batcher, *(make_call("ab"[number % 2]) for number in range(3)))
    assert collect(batcher) == [first, third]
    batcher.readmit([third])
    assert batcher.drain() == [third, second]
    assert counts(batcher) == (0, 0, 0)
    assert stored(batcher) == 0


def test_draining_takes_all_in_order_and_nothing_can_withdraw_them_twice():
    batcher = make_batcher()
    calls = [make_call("abc"[number % 3], client=(ANNA, BERT)[number % 2]) for number in range(7)]
    for now, call in enumerate(calls):
        admit(batcher, call, now=now)
    batcher.withdraw(calls[3])
    drained = batcher.drain()
    assert drained == [*calls[:3], *calls[4:]]
    assert all(call.state is RUNNING for call in drained)
    assert counts(batcher) == (0, 0, 0)


@pytest.mark.parametrize("seed", range(20))
def test_random_arrivals_withdrawals_and_batches_keep_the_books(seed):
    """Against a plain list: what a batch may hold, the order of each client, counts, and that each call ends once."""
    chance = random.Random(seed)
    cost = known_cost(1.0, chance.choice((0.0, 1.0, 10.0)))
    batcher = make_batcher(60, 1500, cost=cost, **chance.choice((EAGER, {"max_batch_seconds": 30.0})))
    waiting: list[Call] = []
    ended: list[Call] = []
    for now in range(3000):
        act = chance.random()
        if act < 0.5:
            call = make_call(
                chance.choice("abc"),
                chance.randrange(1, 5),
                chance.randrange(60),
                chance.random() < 0.05,
                chance.choice((ANNA, BERT, CORA)),
                chance.choice((0, 1, 2, 3, 9)),
                chance.choice((0, 0, now + 10_000 * MS)),
            )
            try:
                admit(batcher, call, now=now)
                waiting.append(call)
            except Overloaded:
                assert len(waiting) == 60 or sum(each.nbytes for each in waiting) + call.nbytes > 1500
        elif act < 0.65 and waiting:
            call = waiting.pop(chance.randrange(len(waiting)))
            batcher.withdraw(call)
            ended.append(call)
        elif act < 0.9:
            batch = batcher.collect(now, 8, 200)
            assert bool(batch) == bool(waiting)
            assert not batcher.late
            if batch:
                first = batch[0]
                assert {(call.plan.signature, call.level) for call in batch} == {(first.plan.signature, first.level)}
                assert len(batch) == 1 or sum(call.plan.rows for call in batch) <= 8
                assert len(batch) == 1 or sum(call.nbytes for call in batch) <= 200
                assert len(batch) == 1 or not any(call.is_alone for call in batch)
                for client in (ANNA, BERT, CORA):
                    mine = [call for call in batch if call.client is client]
                    same = [
                        call
                        for call in waiting
                        if call.client is client
                        and call.level is first.level
                        and call.plan.signature == first.plan.signature
                    ]
                    assert mine == same[: len(mine)], "a client's calls are taken in order"
                waiting = [call for call in waiting if call not in batch]
                if chance.random() < 0.1:
                    batcher.readmit(batch)
                    waiting = batch + waiting
                else:
                    ended += batch
        assert counts(batcher) == (
            len(waiting),
            sum(call.plan.rows for call in waiting),
            sum(call.nbytes for call in waiting),
        )
        assert sum(level.calls for level in batcher.levels) == len(waiting)
        for level in batcher.levels:
            mine = [call for call in waiting if call.level is level]
            assert level.cost == sum(call.plan.cost for call in mine)
            assert level.weight == len({call.client for call in mine})
            for client, flow in level._flows.items():
                assert flow.cost == sum(call.plan.cost for call in mine if call.client is client)
        assert sum(level.cost for level in batcher.levels) == sum(call.plan.cost for call in waiting)
    assert len(set(map(id, ended))) == len(ended)
    assert set(map(id, batcher.drain())) == set(map(id, waiting))
    assert [level.weight for level in batcher.levels] == [0.0] * 3
