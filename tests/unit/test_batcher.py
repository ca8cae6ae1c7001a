"""The queue of one model: who comes next, who shares a batch, who is refused, and that nothing withdrawn stays."""

import random
from types import SimpleNamespace

import pytest

from appliance.batcher import Batcher, EagerPolicy
from appliance.call import FINISHED, NEW, QUEUED, RUNNING, Call, Plan
from appliance.errors import Overloaded


def make_plan(signature="s", rows=1) -> Plan:
    return Plan(SimpleNamespace(), rows, (), (), 0, (signature,), 0, False)


def make_call(signature="s", rows=1, nbytes=10, is_alone=False) -> Call:
    call = Call(make_plan(signature, rows), (), SimpleNamespace())
    call.nbytes = nbytes
    call.is_alone = is_alone
    return call


def make_batcher(size=1000, nbytes=1 << 30, policy=None) -> Batcher:
    return Batcher(policy or EagerPolicy(), size, nbytes)


def admit(batcher, *calls):
    for call in calls:
        batcher.admit(call)
    return calls


def collect(batcher, rows=8, nbytes=1 << 30):
    return batcher.collect(rows, nbytes, 0)


def counts(batcher):
    return batcher.queued, batcher.queued_rows, batcher.queued_bytes


# ---------------------------------------------------------------- who comes next


def test_a_single_request_on_an_idle_model_is_taken_at_once():
    """No delay is bought with the hope for more: asked the first time, the queue gives what it has."""
    batcher = make_batcher()
    (call,) = admit(batcher, make_call())
    assert EagerPolicy().rows_to_take(1, 64, 0) == 1
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


def test_signatures_never_share_a_batch_and_the_oldest_goes_first():
    batcher = make_batcher()
    a1, b1, a2, c1, b2 = admit(batcher, *(make_call(name) for name in "abacb"))
    assert collect(batcher) == [a1, a2]
    assert collect(batcher) == [b1, b2]
    assert collect(batcher) == [c1]


def test_a_stream_of_one_signature_does_not_starve_another():
    batcher = make_batcher()
    admit(batcher, *(make_call("busy") for _ in range(20)))
    (lonely,) = admit(batcher, make_call("lonely"))
    for _ in range(4):
        assert lonely.state is QUEUED
        admit(batcher, *(make_call("busy") for _ in range(8)))
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


class Hold:
    """A policy that holds everything back until four rows wait, and notes what it was told."""

    def __init__(self):
        self.told = []

    def rows_to_take(self, waiting_rows, max_rows, in_flight):
        self.told.append((waiting_rows, max_rows, in_flight))
        return 0 if waiting_rows < 4 else 2


def test_the_policy_decides_how_many_and_whether():
    policy = Hold()
    batcher = make_batcher(policy=policy)
    calls = admit(batcher, make_call(rows=1), make_call(rows=2))
    assert batcher.collect(8, 1 << 30, 1) == []
    assert policy.told == [(3, 8, 1)]
    assert [call.state for call in calls] == [QUEUED, QUEUED]
    last = admit(batcher, make_call(rows=1))[0]
    assert collect(batcher) == [calls[0]], "two rows more would be three"
    assert counts(batcher) == (2, 3, 20)
    assert last.state is QUEUED


# ---------------------------------------------------------------- who is refused


def test_the_queue_is_bounded_by_count():
    batcher = make_batcher(size=2)
    admit(batcher, make_call(), make_call())
    third = make_call()
    with pytest.raises(Overloaded, match="2 wait already and max_queue_size is 2"):
        batcher.admit(third)
    assert third.state is NEW
    assert counts(batcher) == (2, 2, 20)
    collect(batcher, rows=1)
    batcher.admit(third)


def test_the_queue_is_bounded_by_bytes():
    batcher = make_batcher(nbytes=100)
    first = admit(batcher, make_call(nbytes=60), make_call(nbytes=40))[0]
    with pytest.raises(Overloaded, match="max_queue_bytes = 100"):
        batcher.admit(make_call(nbytes=1))
    batcher.admit(make_call(nbytes=0))
    batcher.withdraw(first)
    batcher.admit(make_call(nbytes=60))
    with pytest.raises(Overloaded):
        batcher.admit(make_call(nbytes=101))


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
    """Calls the queue still refers to, alive or not, and its signatures."""
    return len(batcher._arrivals) + sum(map(len, batcher._queues.values())) + len(batcher._queues)


def test_withdrawn_calls_do_not_pile_up_behind_one_that_waits():
    batcher = make_batcher()
    (waiting,) = admit(batcher, make_call("waits"))
    for number in range(50_000):
        (call,) = admit(batcher, make_call(f"s{number}"))
        batcher.withdraw(call)
    assert stored(batcher) < 4000
    assert collect(batcher) == [waiting]
    assert stored(batcher) == 0


def test_signatures_that_came_once_are_forgotten():
    """A call withdrawn in the shadow of a batch of its signature leaves nothing behind."""
    batcher = make_batcher()
    for number in range(2000):
        first, second = admit(batcher, make_call(f"s{number}"), make_call(f"s{number}"))
        batcher.withdraw(second)
        assert collect(batcher, rows=1) == [first]
    assert stored(batcher) == 0


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
    calls = admit(batcher, *(make_call("abc"[number % 3]) for number in range(7)))
    batcher.withdraw(calls[3])
    drained = batcher.drain()
    assert drained == [*calls[:3], *calls[4:]]
    assert all(call.state is RUNNING for call in drained)
    assert counts(batcher) == (0, 0, 0)


@pytest.mark.parametrize("seed", range(20))
def test_random_arrivals_withdrawals_and_batches_keep_the_books(seed):
    """Against a plain list: order, sharing, counts, and that every call ends exactly once."""
    chance = random.Random(seed)
    batcher = make_batcher(size=60, nbytes=1500)
    waiting: list[Call] = []
    ended: list[Call] = []
    for _ in range(3000):
        act = chance.random()
        if act < 0.5:
            call = make_call(chance.choice("abc"), chance.randrange(1, 5), chance.randrange(60), chance.random() < 0.05)
            try:
                batcher.admit(call)
                waiting.append(call)
            except Overloaded:
                assert len(waiting) == 60 or sum(each.nbytes for each in waiting) + call.nbytes > 1500
        elif act < 0.65 and waiting:
            call = waiting.pop(chance.randrange(len(waiting)))
            batcher.withdraw(call)
            ended.append(call)
        elif act < 0.9:
            batch = batcher.collect(8, 200, 0)
            assert bool(batch) == bool(waiting)
            if batch:
                assert batch[0] is waiting[0]
                same = [call for call in waiting if call.plan.signature == batch[0].plan.signature]
                assert batch == same[: len(batch)]
                assert len(batch) == 1 or sum(call.plan.rows for call in batch) <= 8
                assert len(batch) == 1 or sum(call.nbytes for call in batch) <= 200
                assert len(batch) == 1 or not any(call.is_alone for call in batch)
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
    assert len(set(map(id, ended))) == len(ended)
    assert batcher.drain() == waiting
