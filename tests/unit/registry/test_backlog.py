"""The order, the bound and the waiting of writes that are not on disk yet."""

import asyncio

import pytest

from appliance.backlog import Backlog


def changes(batch) -> list[str]:
    return [pending.change["text"] for pending in batch]


def add(backlog, name: str, text: str = ""):
    pending = backlog.add((name,), {"text": text or name})
    written = asyncio.get_running_loop().create_future()
    pending.waiting.append(written)
    return written


def test_of_one_thing_the_newest_is_written_after_what_came_before_it_and_all_who_wait_are_told():
    async def scenario():
        backlog = Backlog(10)
        first, other, second = add(backlog, "a", "old"), add(backlog, "b"), add(backlog, "a", "new")
        batch = backlog.batch()
        assert changes(batch) == ["b", "new"]
        backlog.done(batch)
        assert [await first, await other, await second] == [True, True, True]
        assert len(backlog) == 0

    asyncio.run(scenario())


def test_what_is_changed_again_while_it_is_being_written_is_written_again():
    async def scenario():
        backlog = Backlog(10)
        first = add(backlog, "a", "old")
        batch = backlog.batch()
        second = add(backlog, "a", "new")
        backlog.done(batch)
        assert await first
        assert not second.done()
        assert changes(backlog.batch()) == ["new"]

    asyncio.run(scenario())


def test_the_oldest_goes_where_too_many_wait():
    async def scenario():
        backlog = Backlog(3)
        first, *rest = [add(backlog, name) for name in "abcd"]
        assert await first is False
        assert not any(each.done() for each in rest)
        assert changes(backlog.batch()) == ["b", "c", "d"]
        assert backlog.dropped == 1

    asyncio.run(scenario())


def test_nobody_waits_for_what_fails_and_it_is_kept():
    async def scenario():
        backlog = Backlog(10)
        written = add(backlog, "a")
        backlog.stop_waiting()
        assert await written is False
        assert ("a",) in backlog

    asyncio.run(scenario())


def test_a_batch_is_bounded_by_size_and_never_empty():
    backlog = Backlog(10)
    for name in "abc":
        backlog.add((name,), {"text": name * 100_000})
    assert len(backlog.batch()) == 1


def test_what_is_no_json_is_refused_at_once():
    with pytest.raises(TypeError):
        Backlog(10).add(("a",), {"text": b"bytes"})
