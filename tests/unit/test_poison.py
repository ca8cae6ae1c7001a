"""Requests that were in flight when a worker crashed, known again by what they hold."""

from types import SimpleNamespace

import pytest

from appliance.errors import InvalidRequest
from appliance.poison import Suspects

MINUTE = 60_000_000_000


def call(content: bytes = b"poison", shape=(4,)):
    plan = SimpleNamespace(signature=((0, shape),))
    return SimpleNamespace(plan=plan, contents=[content], is_alone=False)


def is_alone(suspects, one, now_ns: int = 0) -> bool:
    suspects.judge(one, now_ns)
    return one.is_alone


def test_a_stranger_passes():
    suspects = Suspects()
    assert len(suspects) == 0
    assert not is_alone(suspects, call())


def test_after_one_crash_a_request_runs_alone():
    suspects = Suspects()
    suspects.blame(call(), False, 0)
    assert is_alone(suspects, call())
    assert not is_alone(suspects, call(b"other"))
    assert not is_alone(suspects, call(shape=(2, 2)))


def test_even_a_request_that_was_alone_at_its_first_crash_gets_a_second_chance():
    suspects = Suspects()
    suspects.blame(call(), True, 0)
    assert is_alone(suspects, call())


def test_a_second_crash_alone_condemns():
    suspects = Suspects()
    suspects.blame(call(), False, 0)
    suspects.blame(call(), True, 0)
    with pytest.raises(InvalidRequest, match="crashed the model's worker twice"):
        suspects.judge(call(), 0)
    suspects.judge(call(b"other"), 0)


def test_crashes_in_company_never_condemn():
    suspects = Suspects()
    for _ in range(5):
        suspects.blame(call(), False, 0)
    assert is_alone(suspects, call())


def test_an_answer_absolves():
    suspects = Suspects()
    suspects.blame(call(), False, 0)
    suspects.absolve(call())
    assert len(suspects) == 0
    assert not is_alone(suspects, call())
    suspects.absolve(call(b"never blamed"))


def test_after_ten_minutes_all_is_forgotten():
    suspects = Suspects()
    suspects.blame(call(), False, 0)
    suspects.blame(call(), True, 0)
    suspects.blame(call(b"later"), False, 5 * MINUTE)
    with pytest.raises(InvalidRequest):
        suspects.judge(call(), 10 * MINUTE)
    assert not is_alone(suspects, call(), 11 * MINUTE)
    assert is_alone(suspects, call(b"later"), 11 * MINUTE)
    assert not is_alone(suspects, call(b"later"), 16 * MINUTE)
    assert len(suspects) == 0


def test_no_more_than_256_are_remembered_the_oldest_go_first():
    suspects = Suspects()
    for number in range(300):
        suspects.blame(call(str(number).encode()), False, number)
    assert len(suspects) == 256
    assert not is_alone(suspects, call(b"0"), 300)
    assert is_alone(suspects, call(b"299"), 300)


def test_what_a_request_holds_counts_not_what_holds_it():
    """Bytes, a view and a bytearray of the same bytes are the same request."""
    suspects = Suspects()
    suspects.blame(call(b"poison"), False, 0)
    assert is_alone(suspects, call(memoryview(b"poison")))
    assert is_alone(suspects, call(bytearray(b"poison")))


def test_requests_that_look_alike_at_their_ends_are_told_apart():
    """Most requests are told from every suspect by their ends alone; these are not, and it makes no difference."""
    suspects = Suspects()
    head, tail = b"h" * 1000, b"t" * 1000
    suspects.blame(call(head + b"bad" + tail), False, 0)
    assert not is_alone(suspects, call(head + b"ok!" + tail))
    assert is_alone(suspects, call(head + b"bad" + tail))
    suspects.blame(call(head + b"odd" + tail), False, 0)
    suspects.absolve(call(head + b"bad" + tail))
    assert not is_alone(suspects, call(head + b"bad" + tail))
    assert is_alone(suspects, call(head + b"odd" + tail))


def test_a_stranger_is_let_pass_without_reading_all_of_it():
    suspects = Suspects()
    suspects.blame(call(b"poison"), False, 0)
    suspects.fingerprint = None  # would raise
    assert not is_alone(suspects, call(bytes(1 << 20)))
