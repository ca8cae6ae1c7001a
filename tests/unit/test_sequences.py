"""Sequences by themselves: whose step is next, who has a seat, and what becomes of steps that go wrong."""

import random
from itertools import pairwise
from types import SimpleNamespace

import pytest

from appliance.call import FINISHED, QUEUED, Call
from appliance.clients import Client
from appliance.errors import Conflict, InvalidRequest
from appliance.manifest import SequenceSection
from appliance.sequences import Sequences
from appliance.types import SequenceStep
from appliance.wire.worker import STEP, STEP_END, STEP_START

SECOND = 1_000_000_000
ADA, BEA = Client(name="Ada"), Client(name="Bea")


def sequences(max_sequences: int = 4, **section) -> Sequences:
    state = [{"input": "a", "output": "b"}]
    return Sequences(SequenceSection(max_sequences=max_sequences, state=state, **section))


def step(id: int | str | None, flags: str = "", client: Client = ADA, rows: int = 1) -> Call:
    """A step; `flags` holds ``s`` for a start, ``e`` for an end."""
    call = Call(SimpleNamespace(rows=rows, byte_length=16), (), None, client=client)
    call.sequence = None if id is None else SequenceStep(id, "s" in flags, "e" in flags)
    return call


def entered(known: Sequences, *steps: tuple, client: Client = ADA) -> list[Call]:
    """Calls of (id, flags) that were taken in."""
    calls = [step(*each, client=client) for each in steps]
    for call in calls:
        known.enter(call)
    return calls


def taken(known: Sequences) -> list[Call]:
    ready, known.ready = known.ready, []
    return ready


def failures(known: Sequences) -> list[Call]:
    failed, known.failed = known.failed, []
    assert all(isinstance(error, Conflict) for _, error in failed)
    return [call for call, _ in failed]


def seat(known: Sequences, call: Call) -> int:
    return STEP.unpack(known.frame([call]))[0]


# ---------------------------------------------------------------- what is taken


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (step(None), "sequence_id must say"),
        (step(7), "sequence_start"),
        (step(7, "e"), "sequence_start"),
        (step("word"), "sequence_start"),
        (step(7, "s", rows=2), "2 rows"),
    ],
)
def test_what_is_no_step_of_a_sequence_is_refused(call, says):
    known = sequences()
    with pytest.raises(InvalidRequest, match=says):
        known.enter(call)
    assert known.live == 0


def test_a_word_cannot_be_told_to_a_model_as_its_number():
    known = sequences(controls={"correlation_id": "id"})
    with pytest.raises(InvalidRequest, match="must be a number"):
        known.enter(step("word", "s"))
    assert known.enter(step(7, "s"))


def test_steps_of_a_sequence_run_one_at_a_time_in_order():
    known = sequences()
    calls = entered(known, (1, "s"), (1, ""), (1, ""), (1, "e"))
    assert known.waiting == 3
    for before, after in pairwise(calls):
        known.answer(before, 0)
        assert taken(known) == [after]
    assert (known.waiting, known.waiting_bytes, known.live) == (0, 0, 1)
    known.answer(calls[-1], 0)
    assert known.live == 0
    with pytest.raises(InvalidRequest):
        known.enter(step(1))


def test_nothing_follows_an_end_but_a_start():
    known = sequences()
    first, last = entered(known, (1, "s"), (1, "e"))
    with pytest.raises(InvalidRequest):
        known.enter(step(1))
    anew = step(1, "s")
    assert not known.enter(anew)
    known.answer(first, 0)
    known.answer(last, 0)
    assert taken(known) == [last, anew]


def test_a_single_step_may_be_the_whole_sequence():
    known = sequences()
    (only,) = entered(known, (1, "se"))
    assert STEP.unpack(known.frame([only])) == (0, STEP_START | STEP_END, 1)
    known.answer(only, 0)
    assert known.live == 0


def test_a_start_restarts_a_sequence_that_lives_in_its_seat():
    known = sequences()
    (first,) = entered(known, (1, "s"))
    entered(known, (2, "s"))
    known.answer(first, 0)
    (again,) = entered(known, (1, "s"))
    assert seat(known, again) == 0
    assert known.live == 2


def test_what_run_says_of_the_steps_of_a_batch():
    known = sequences()
    calls = [*entered(known, (2**64 - 1, "s")), *entered(known, ("word", "se"), client=BEA)]
    assert list(STEP.iter_unpack(known.frame(calls))) == [(0, STEP_START, 2**64 - 1), (1, STEP_START | STEP_END, 0)]


# ---------------------------------------------------------------- clients


def test_two_clients_with_one_id_have_two_sequences():
    known = sequences()
    (hers,) = entered(known, (1, "s"))
    with pytest.raises(InvalidRequest):
        known.enter(step(1, client=BEA))
    (others,) = entered(known, (1, "s"), client=BEA)
    assert seat(known, hers) != seat(known, others)
    known.answer(hers, 0)
    known.answer(others, 0)
    (goes_on,) = entered(known, (1, "e"), client=BEA)
    assert seat(known, goes_on) == 1
    known.answer(goes_on, 0)
    assert known.enter(step(1))


def test_a_number_and_a_word_are_two_ids():
    known = sequences()
    entered(known, (1, "s"), ("1", "s"))
    assert known.live == 2


def test_a_client_that_leaves_frees_its_seats():
    known = sequences(2)
    idle, busy = entered(known, (1, "s"), (2, "s"))
    known.answer(idle, 0)
    (waits,) = entered(known, (1, "s"), client=BEA)
    known.forget(ADA)
    assert taken(known) == [waits]
    assert known.live == 2
    known.answer(busy, 0)
    assert known.live == 1
    known.forget(ADA)
    known.forget(Client())


def test_of_a_client_that_left_nothing_is_kept_whatever_its_steps_still_do():
    known = sequences(2)
    running, waits = entered(known, (1, "s"), (1, ""))
    (other,) = entered(known, (2, "s"))
    known.forget(ADA)
    known.skip(waits, 0)
    known.fail(running, "reason", 0)
    known.skip(other, 0)
    assert (known.live, known.waiting, taken(known), failures(known)) == (0, 0, [], [])
    assert not known._clients


# ---------------------------------------------------------------- seats


def test_starts_beyond_the_seats_wait_for_one_in_order():
    known = sequences(2)
    first, second, third, fourth = entered(known, (1, "s"), (2, "s"), (3, "s"), (4, "s"))
    (behind,) = entered(known, (3, ""))
    assert (known.live, known.waiting) == (2, 3)
    (last,) = entered(known, (2, "e"))
    known.answer(second, 0)
    assert taken(known) == [last]
    known.answer(last, 0)
    assert taken(known) == [third]
    assert seat(known, third) == 1
    known.skip(first, 0)
    assert taken(known) == [fourth]
    known.answer(third, 0)
    assert taken(known) == [behind]


def test_a_start_that_is_withdrawn_while_it_waits_for_a_seat_leaves_no_trace():
    known = sequences(1)
    entered(known, (1, "s"))
    start, behind = entered(known, (2, "s"), (2, ""))
    known.skip(start, 0)
    assert failures(known) == [behind]
    assert known.waiting == 0
    with pytest.raises(InvalidRequest):
        known.enter(step(2))


def test_the_lowest_seat_is_taken_first():
    known = sequences(8)
    calls = entered(known, *((number, "s") for number in range(1, 7)))
    for number in (4, 1):
        known.answer(calls[number], 0)
        known.answer(entered(known, (number + 1, "e"))[0], 0)
    assert seat(known, entered(known, (9, "s"))[0]) == 1
    assert seat(known, entered(known, (10, "s"))[0]) == 4


# ---------------------------------------------------------------- idling


def test_a_sequence_that_idles_too_long_ends_and_its_client_is_told():
    known = sequences(2, idle_seconds=5)
    first, second = entered(known, (1, "s"), (2, "s"))
    assert known.next_expiry_ns == 0
    known.answer(first, 1 * SECOND)
    known.answer(second, 2 * SECOND)
    assert known.next_expiry_ns == 6 * SECOND
    known.expire(6 * SECOND - 1)
    assert known.live == 2
    known.expire(6 * SECOND)
    assert known.live == 1
    assert known.next_expiry_ns == 7 * SECOND
    with pytest.raises(Conflict, match="no request for 5 s; start it again"):
        known.enter(step(1))
    assert known.enter(step(1, "s"))


def test_a_step_that_comes_in_time_begins_the_idle_time_anew():
    known = sequences(2, idle_seconds=5)
    first, other = entered(known, (1, "s"), (2, "s"))
    known.answer(first, 0)
    known.answer(other, 1 * SECOND)
    (again,) = entered(known, (1, ""))
    known.expire(5 * SECOND)
    known.answer(again, 5 * SECOND)
    assert known.next_expiry_ns == 6 * SECOND
    known.expire(9 * SECOND)
    assert known.live == 1
    assert known.enter(step(1))


def test_an_idle_sequence_makes_way_for_one_that_waits():
    known = sequences(1, idle_seconds=5)
    (first,) = entered(known, (1, "s"))
    (waits,) = entered(known, (1, "s"), client=BEA)
    known.answer(first, 0)
    assert taken(known) == []
    known.expire(5 * SECOND)
    assert taken(known) == [waits]


# ---------------------------------------------------------------- steps that go wrong


def test_a_step_that_never_ran_takes_those_behind_it_along_and_the_sequence_goes_on():
    known = sequences()
    first, second, third, fourth = entered(known, (1, "s"), (1, ""), (1, ""), (1, "e"))
    known.answer(first, 0)
    known.skip(third, 0)
    assert failures(known) == [fourth]
    known.answer(second, 0)
    assert known.enter(step(1))
    assert taken(known) == [second]


def test_steps_from_a_later_start_on_are_spared():
    known = sequences()
    first, second, third, anew, after = entered(known, (1, "s"), (1, ""), (1, ""), (1, "s"), (1, ""))
    known.skip(second, 0)
    assert failures(known) == [third]
    known.answer(first, 0)
    known.answer(anew, 0)
    assert taken(known) == [anew, after]


def test_a_start_that_never_ran_starts_nothing():
    known = sequences()
    first, restart, behind = entered(known, (1, "s"), (1, "s"), (1, ""))
    known.skip(restart, 0)
    assert failures(known) == [behind]
    known.answer(first, 0)
    assert known.live == 0
    with pytest.raises(InvalidRequest):
        known.enter(step(1))


def test_a_step_that_ran_and_was_not_answered_ends_the_sequence():
    known = sequences()
    first, second, anew = entered(known, (1, "s"), (1, ""), (1, "s"))
    known.fail(first, "its last request failed", 0)
    assert failures(known) == [second]
    assert taken(known) == [anew]
    known.fail(anew, "its last request failed", 0)
    assert known.live == 0
    with pytest.raises(Conflict, match="its last request failed; start it again"):
        known.enter(step(1))
    with pytest.raises(Conflict):
        known.enter(step(1))
    assert known.enter(step(1, "s"))


def test_calls_that_are_no_steps_are_passed_over():
    known = sequences()
    (mine,) = entered(known, (1, "s"))
    for call in (step(1, "s"), step(2, "s"), step(None), step(1, client=BEA)):
        known.skip(call, 0)
        known.answer(call, 0)
        known.fail(call, "reason", 0)
    assert (known.live, failures(known)) == (1, [])
    assert seat(known, mine) == 0


def test_with_the_worker_everything_is_lost_but_starts_that_wait():
    known = sequences(6)
    idle, running, queued, start, restarted = entered(known, *((number, "s") for number in range(1, 6)))
    known.answer(idle, 0)
    known.answer(queued, 0)
    (queued,) = entered(known, (3, ""))
    behind_running, anew = entered(known, (2, ""), (2, "s"))
    (behind_start,) = entered(known, (4, ""))
    queued.state = start.state = QUEUED
    running.state = restarted.state = FINISHED
    known.lose("its state was lost with the worker", 0)
    assert set(failures(known)) == {queued, behind_running}
    assert taken(known) == [anew]
    assert known.live == 2  # of start and anew
    for number in (1, 3, 5):
        with pytest.raises(Conflict, match="lost with the worker"):
            known.enter(step(number))
    known.answer(start, 0)
    assert taken(known) == [behind_start]


def test_lost_seats_go_to_starts_that_waited_for_one():
    known = sequences(1)
    (running,) = entered(known, (1, "s"))
    first, second = entered(known, (1, "s"), (2, "s"), client=BEA)
    running.state = FINISHED
    known.lose("its state was lost with the worker", 0)
    assert taken(known) == [first]
    known.skip(first, 0)
    assert taken(known) == [second]


def test_who_comes_after_a_reload_is_told_so():
    before, after = sequences(), sequences()
    (idle, ended) = entered(before, (1, "s"), (2, "se"))
    before.answer(idle, 0)
    before.answer(ended, 0)
    after.inherit(before, "the model was loaded anew")
    with pytest.raises(Conflict, match="loaded anew"):
        after.enter(step(1))
    with pytest.raises(InvalidRequest):
        after.enter(step(2))
    assert after.enter(step(1, "s"))


def test_all_can_be_ended_at_once():
    known = sequences(2)
    calls = entered(known, (1, "s"), (1, ""), (2, "s"), (3, "s"))
    assert set(known.clear()) == {calls[1], calls[3]}
    assert (known.live, known.waiting, known.waiting_bytes) == (0, 0, 0)
    for call in calls:
        known.answer(call, 0)
        known.skip(call, 0)
    assert [known.enter(step(number, "s")) for number in (1, 2, 3)] == [True, True, False]


def test_no_more_than_a_few_ends_of_a_client_are_remembered():
    known = sequences()
    for number in range(1, 1001):
        (call,) = entered(known, (number, "s"))
        known.fail(call, "reason", 0)
    told = 0
    for number in range(1, 1001):
        try:
            known.enter(step(number))
        except Conflict:
            told += 1
        except InvalidRequest:
            pass
    assert told == 64


# ---------------------------------------------------------------- many


def test_ten_thousand_sequences_of_a_hundred_clients_keep_order_and_seats():
    """Whatever happens: one sequence a seat, one step a sequence, and no step before another that came earlier."""
    draw = random.Random(11)
    known = sequences(64, idle_seconds=0.5)
    clients = [Client(name=str(number)) for number in range(100)]
    out: list[Call] = []  # with the queue or the worker
    came: dict[tuple[str, int], list[int]] = {}
    went: dict[tuple[str, int], list[int]] = {}
    pending: set[Call] = set()
    started = refused = 0
    now = 0
    open_ids: list[tuple[Client, int]] = []

    def look() -> None:
        for call in taken(known):
            if call in pending:
                out.append(call)
        for call, _ in known.failed:
            pending.discard(call)
        known.failed = []
        seats = [seat(known, call) for call in out]
        assert len(set(seats)) == len(seats)
        assert known.live <= 64

    number = 0
    while started < 10_000 or pending:
        now += draw.randrange(SECOND // 200)
        choice = draw.random()
        if choice < 0.5 and started < 10_000:
            if open_ids and draw.random() < 0.6:
                client, id = draw.choice(open_ids)
                call = step(id, "e" if draw.random() < 0.3 else "", client)
            else:
                client, id = draw.choice(clients), draw.randrange(1, 50)
                call = step(id, "s", client)
                started += 1
                open_ids.append((client, id))
                if len(open_ids) > 200:
                    open_ids.pop(0)
            number += 1
            call.id = number
            try:
                if known.enter(call):
                    out.append(call)
                pending.add(call)
                came.setdefault((client.name, id), []).append(number)
            except (InvalidRequest, Conflict):
                refused += 1
        elif choice < 0.97 and out:
            call = out.pop(draw.randrange(len(out)))
            pending.discard(call)
            outcome = draw.random()
            if outcome < 0.9:
                went.setdefault((call.client.name, call.sequence.id), []).append(call.id)
                known.answer(call, now)
            elif outcome < 0.95:
                known.fail(call, "reason", now)
            else:
                known.skip(call, now)
        elif choice < 0.98 and pending:
            call = draw.choice(sorted(pending, key=lambda each: each.id))
            if call not in out:
                pending.discard(call)
                known.skip(call, now)
        elif choice < 0.981:
            known.forget(draw.choice(clients))
        else:
            known.expire(now)
        look()
    assert refused > 1000
    for key, order in went.items():
        assert order == [id for id in came[key] if id in set(order)], "steps of a sequence overtook each other"
    assert sum(map(len, went.values())) > 10_000
    known.expire(now + SECOND)
    assert (known.live, known.waiting, known.waiting_bytes) == (0, 0, 0)
    assert sorted(known.seats) == list(range(64))
