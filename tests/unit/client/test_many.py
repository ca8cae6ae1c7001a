"""Many requests: streams, several answers to one request, threads, tasks, cancellation, forks."""

import asyncio
import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from appliance.wire.native import FLAG_MORE, Frame
from appliance_client import ApplianceError, AsyncClient, Client, DeadlineExceeded, InvalidRequest, ModelNotFound

PATIENCE_SECONDS = 20


def value(number):
    return {"x": np.array([number], np.int64)}


def numbers(answers):
    return [answer if isinstance(answer, ApplianceError) else int(answer["x"][0]) for answer in answers]


def blocking_stream(path, inputs, into=None, **options):
    got = [] if into is None else into
    with Client(path) as client:
        for answer in client.stream("m", inputs, **options):
            got.append(answer)
    return got


def concurrent_stream(path, inputs, into=None, **options):
    got = [] if into is None else into

    async def run():
        async with AsyncClient(path) as client:
            async for answer in client.stream("m", inputs, **options):
                got.append(answer)

    asyncio.run(run())
    return got


streams = pytest.mark.parametrize("stream", [blocking_stream, concurrent_stream])


def in_reverse(size):
    """A model that answers requests `size` at a time, the last one first."""
    held = []

    def respond(session, request):
        held.append(request)
        if len(held) == size:
            while held:
                session.echo(held.pop())

    return respond


@streams
@pytest.mark.parametrize("count", [0, 1, 5, 100])
def test_a_stream_gives_every_answer_in_order(peer, stream, count):
    assert numbers(stream(peer.path, map(value, range(count)))) == list(range(count))
    assert len(peer.sessions) <= 1


@streams
def test_every_request_of_a_stream_has_its_priority(peer, stream):
    seen = []
    peer.models["m"] = lambda session, request: (
        seen.append(request.message.parameters["priority"].int64_param),
        session.echo(request),
    )
    stream(peer.path, map(value, range(3)), priority=3)
    assert seen == [3, 3, 3]


@streams
def test_a_stream_gives_answers_in_order_whatever_order_they_come_in(peer, stream):
    peer.models["m"] = in_reverse(4)
    assert numbers(stream(peer.path, map(value, range(12)), max_in_flight=4)) == list(range(12))


@streams
def test_a_stream_keeps_the_smaller_bound_on_requests_in_flight(peer, stream):
    peer.max_requests_in_flight = 3
    peer.models["m"] = in_reverse(3)
    assert numbers(stream(peer.path, map(value, range(9)), max_in_flight=100)) == list(range(9))


@streams
def test_a_stream_reads_its_inputs_only_as_far_ahead_as_it_may_send(peer, stream):
    drawn = []

    def inputs():
        for number in range(10):
            drawn.append(number)
            yield value(number)

    ahead = []
    peer.models["m"] = lambda session, request: (ahead.append(len(drawn)), session.echo(request))
    stream(peer.path, inputs(), max_in_flight=2)
    assert all(seen <= number + 3 for number, seen in enumerate(ahead))


@streams
def test_the_first_error_of_a_stream_is_raised_in_its_turn(peer, stream):
    got = []

    inputs = [value(number) if number != 3 else {"x": object()} for number in range(6)]
    with pytest.raises(InvalidRequest):
        stream(peer.path, inputs, into=got)
    assert numbers(got) == [0, 1, 2]


@streams
def test_a_stream_gives_errors_in_place_where_it_is_asked_to(peer, stream):
    def respond(session, request):
        if request.contents[0][0] % 2:
            session.error(request.identifier, "model-not-found")
        else:
            session.echo(request)

    peer.models["m"] = respond
    inputs = [value(0), value(1), {"x": object()}, value(3), value(4)]
    got = numbers(stream(peer.path, inputs, return_errors=True))
    assert [type(each) for each in got] == [int, ModelNotFound, InvalidRequest, ModelNotFound, int]


def only_the_first(size):
    """A model that has `size` requests before it answers the first of them, and no other."""
    held = []

    def respond(session, request):
        held.append(request)
        if len(held) == size:
            session.echo(held[0])

    return respond


def test_a_stream_left_early_withdraws_what_is_in_flight(peer):
    peer.models["m"] = only_the_first(3)
    with Client(peer.path) as client:
        for _ in client.stream("m", map(value, range(5)), max_in_flight=3):
            break
        gc.collect()
        peer.models.clear()
        assert numbers([client.infer("m", value(7))]) == [7]
    assert len(peer.sessions) == 2


def test_a_concurrent_stream_left_early_withdraws_what_is_in_flight(peer):
    peer.models["m"] = only_the_first(3)

    async def run():
        async with AsyncClient(peer.path) as client:
            answers = client.stream("m", map(value, range(5)), max_in_flight=3)
            async for _ in answers:
                break
            await answers.aclose()
            await asyncio.to_thread(peer.wait_for, Frame.CANCEL, 2)
            peer.models.clear()
            assert numbers([await client.infer("m", value(7))]) == [7]

    asyncio.run(run())
    assert len(peer.sessions) == 1


def test_a_stream_gives_an_answer_before_it_waits_for_the_next_input(peer):
    """Each input but the first is made from the answer before it; without that promise this would wait for ever."""
    answered = asyncio.Event()

    async def inputs():
        yield value(0)
        await answered.wait()
        yield value(1)

    async def run():
        got = []
        async with AsyncClient(peer.path) as client:
            async for answer in client.stream("m", inputs()):
                got.append(answer)
                answered.set()
        return got

    assert numbers(asyncio.run(run())) == [0, 1]


def test_a_blocking_stream_gives_answers_that_have_come_before_it_draws_the_next_input(peer):
    got = []

    def inputs():
        for number in range(4):
            if number:
                peer.wait_for(Frame.INFER, number)
                answered[number - 1].wait(PATIENCE_SECONDS)
            known.append(len(got))
            yield value(number)

    known: list[int] = []
    answered = [threading.Event() for _ in range(4)]
    peer.models["m"] = lambda session, request: (session.echo(request), answered[request.contents[0][0]].set())
    with Client(peer.path) as client:
        for answer in client.stream("m", inputs()):
            got.append(answer)
    assert known[-1] >= 2


def test_streams_of_large_inputs_and_answers_do_not_lock_up(peer):
    """The peer reads nothing while it sends: a client that only sent would wait for it for ever."""
    size = 400_000
    with Client(peer.path, region_threshold=None) as client:
        inputs = ({"x": np.full(size, number, np.uint8)} for number in range(24))
        assert [int(answer["x"][0]) for answer in client.stream("m", inputs)] == list(range(24))


def test_many_large_concurrent_calls_do_not_lock_up(peer):
    async def run():
        async with AsyncClient(peer.path, region_threshold=None) as client:
            calls = (client.infer("m", {"x": np.full(400_000, number, np.uint8)}) for number in range(40))
            return await asyncio.gather(*calls)

    assert [int(answer["x"][0]) for answer in asyncio.run(run())] == list(range(40))


def several(session, request):
    for _ in range(3):
        session.echo(request, FLAG_MORE)
    session.result(request.identifier, [])


def blocking_results(path, **options):
    with Client(path) as client:
        return list(client.results("m", value(5), **options))


def concurrent_results(path, **options):
    async def run():
        async with AsyncClient(path) as client:
            return [answer async for answer in client.results("m", value(5), **options)]

    return asyncio.run(run())


results = pytest.mark.parametrize("results", [blocking_results, concurrent_results])


@results
def test_every_answer_to_one_request_is_given_but_an_empty_last_one(peer, results):
    peer.models["m"] = several
    assert numbers(results(peer.path)) == [5, 5, 5]


@results
def test_a_request_for_several_answers_has_its_priority(peer, results):
    seen = []
    peer.models["m"] = lambda session, request: (
        seen.append(request.message.parameters["priority"].int64_param),
        several(session, request),
    )
    assert numbers(results(peer.path, priority=1)) == [5, 5, 5]
    assert seen == [1]


@results
def test_a_last_answer_with_outputs_is_given(peer, results):
    peer.models["m"] = lambda session, request: (session.echo(request, FLAG_MORE), session.echo(request))
    assert numbers(results(peer.path)) == [5, 5]


@results
def test_an_error_after_some_answers_ends_them(peer, results):
    peer.models["m"] = lambda session, request: (
        session.echo(request, FLAG_MORE),
        session.error(request.identifier, "model-not-found"),
    )
    with pytest.raises(ModelNotFound):
        results(peer.path)


@results
def test_answers_that_cease_are_given_up_after_the_timeout(peer, results):
    peer.models["m"] = lambda session, request: session.echo(request, FLAG_MORE)
    with pytest.raises(DeadlineExceeded):
        results(peer.path, timeout=0.05)


def test_one_answer_is_not_taken_from_a_model_that_gives_several(peer):
    peer.models["m"] = several
    with Client(peer.path) as client:
        with pytest.raises(InvalidRequest, match=r"iterate over results\(\)"):
            client.infer("m", value(1))
        peer.models.clear()
        assert numbers([client.infer("m", value(2))]) == [2]


def test_one_answer_is_not_taken_concurrently_from_a_model_that_gives_several(peer):
    peer.models["m"] = several

    async def run():
        async with AsyncClient(peer.path) as client:
            with pytest.raises(InvalidRequest, match=r"iterate over results\(\)"):
                await client.infer("m", value(1))
            assert numbers([await client.infer("other", value(2))]) == [2]

    asyncio.run(run())


def test_results_left_early_withdraw_the_request(peer):
    peer.models["m"] = lambda session, request: session.echo(request, FLAG_MORE)

    async def run():
        async with AsyncClient(peer.path) as client:
            answers = client.results("m", value(1))
            await anext(answers)
            await answers.aclose()
            await asyncio.to_thread(peer.wait_for, Frame.CANCEL)
            assert numbers([await client.infer("other", value(2))]) == [2]

    asyncio.run(run())
    with Client(peer.path) as client:
        for _ in client.results("m", value(1)):
            break
        gc.collect()
        assert numbers([client.infer("other", value(2))]) == [2]


def test_threads_share_a_client_and_each_gets_its_own_answers(peer):
    with Client(peer.path, max_connections=4) as client, ThreadPoolExecutor(16) as pool:
        answers = pool.map(lambda number: client.infer("m", value(number)), range(800))
        assert numbers(answers) == list(range(800))
    assert len(peer.sessions) <= 4


def test_threads_do_not_wait_for_one_another(peer):
    """The peer answers only when both requests are there."""
    both_there = threading.Barrier(2)
    peer.models["m"] = lambda session, request: (both_there.wait(PATIENCE_SECONDS), session.echo(request))
    with Client(peer.path) as client, ThreadPoolExecutor(2) as pool:
        assert numbers(pool.map(lambda number: client.infer("m", value(number)), range(2))) == [0, 1]


def test_a_thread_that_finds_every_connection_busy_waits_no_longer_than_its_timeout(peer):
    release = threading.Event()
    peer.models["slow"] = lambda session, request: (release.wait(PATIENCE_SECONDS), session.echo(request))
    with Client(peer.path, max_connections=1) as client, ThreadPoolExecutor(2) as pool:
        slow = pool.submit(client.infer, "slow", value(1))
        peer.wait_for(Frame.INFER)
        with pytest.raises(DeadlineExceeded):
            client.infer("m", value(2), timeout=0.05)
        waiting = pool.submit(client.infer, "m", value(3))
        release.set()
        assert numbers([slow.result(PATIENCE_SECONDS), waiting.result(PATIENCE_SECONDS)]) == [1, 3]


def test_a_forked_child_uses_connections_of_its_own(peer):
    with Client(peer.path) as client:
        client.infer("m", value(1))
        child = os.fork()
        if child == 0:
            try:
                code = 0 if numbers([client.infer("m", value(2))]) == [2] else 1
            except BaseException:
                code = 2
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert numbers([client.infer("m", value(3))]) == [3]
    assert len(peer.sessions) == 2


def test_concurrent_calls_share_one_connection_and_get_their_own_answers(peer):
    peer.models["m"] = in_reverse(8)

    async def run():
        async with AsyncClient(peer.path) as client:
            return await asyncio.gather(*(client.infer("m", value(number)) for number in range(400)))

    assert numbers(asyncio.run(run())) == list(range(400))
    assert len(peer.sessions) == 1


def test_concurrent_calls_keep_the_daemons_bound_by_waiting(peer):
    peer.max_requests_in_flight = 2
    peer.models["m"] = in_reverse(2)

    async def run():
        async with AsyncClient(peer.path) as client:
            return await asyncio.gather(*(client.infer("m", value(number)) for number in range(20)))

    assert numbers(asyncio.run(run())) == list(range(20))


def test_a_call_cancelled_while_it_waits_for_room_leaves_the_others_their_turn(peer):
    peer.max_requests_in_flight = 1
    release = threading.Event()
    peer.models["slow"] = lambda session, request: (release.wait(PATIENCE_SECONDS), session.echo(request))

    async def run():
        async with AsyncClient(peer.path) as client:
            slow = asyncio.ensure_future(client.infer("slow", value(0)))
            await asyncio.to_thread(peer.wait_for, Frame.INFER)
            waiting = [asyncio.ensure_future(client.infer("m", value(number))) for number in range(1, 5)]
            await asyncio.sleep(0)
            waiting[0].cancel()
            release.set()
            return await asyncio.gather(slow, *waiting, return_exceptions=True)

    answers = asyncio.run(run())
    assert isinstance(answers[1], asyncio.CancelledError)
    assert numbers([answers[0], *answers[2:]]) == [0, 2, 3, 4]


def test_a_call_that_waits_for_room_waits_no_longer_than_its_timeout(peer):
    peer.max_requests_in_flight = 1
    peer.models["m"] = lambda session, request: None

    async def run():
        async with AsyncClient(peer.path) as client:
            first = asyncio.ensure_future(client.infer("m", value(0)))
            await asyncio.to_thread(peer.wait_for, Frame.INFER)
            with pytest.raises(DeadlineExceeded):
                await client.infer("m", value(1), timeout=0.05)
            first.cancel()

    asyncio.run(run())


def test_cancelling_a_task_withdraws_its_request_and_harms_no_other(peer):
    release = threading.Event()
    peer.models["slow"] = lambda session, request: None
    peer.models["m"] = lambda session, request: (release.wait(PATIENCE_SECONDS), session.echo(request))

    async def run():
        async with AsyncClient(peer.path) as client:
            slow = asyncio.ensure_future(client.infer("slow", value(1)))
            ((identifier, _),) = await asyncio.to_thread(peer.wait_for, Frame.INFER)
            other = asyncio.ensure_future(client.infer("m", value(2)))
            await asyncio.to_thread(peer.wait_for, Frame.INFER, 2)
            slow.cancel()
            with pytest.raises(asyncio.CancelledError):
                await slow
            release.set()
            assert numbers([await other]) == [2]
            assert await asyncio.to_thread(peer.wait_for, Frame.CANCEL) == [(identifier, b"")]
            assert numbers([await client.infer("m", value(3))]) == [3]

    asyncio.run(run())


def test_an_answer_that_crosses_its_cancellation_is_dropped(peer):
    release = threading.Event()
    peer.models["slow"] = lambda session, request: (release.wait(PATIENCE_SECONDS), session.echo(request))
    peer.on_cancel = lambda session, identifier: None

    async def run():
        async with AsyncClient(peer.path) as client:
            slow = asyncio.ensure_future(client.infer("slow", value(1)))
            await asyncio.to_thread(peer.wait_for, Frame.INFER)
            slow.cancel()
            with pytest.raises(asyncio.CancelledError):
                await slow
            release.set()
            assert numbers([await client.infer("m", value(3))]) == [3]

    asyncio.run(run())
    assert len(peer.sessions) == 1


def test_a_call_given_up_on_is_withdrawn(peer):
    peer.models["slow"] = lambda session, request: None

    async def run():
        async with AsyncClient(peer.path) as client:
            with pytest.raises(DeadlineExceeded):
                await client.infer("slow", value(1), timeout=0.05)
            await asyncio.to_thread(peer.wait_for, Frame.CANCEL)
            assert numbers([await client.infer("m", value(3))]) == [3]

    asyncio.run(run())
    assert len(peer.sessions) == 1


def test_concurrent_first_calls_open_one_connection(peer):
    async def run():
        async with AsyncClient(peer.path) as client:
            await asyncio.gather(*(client.infer("m", value(number)) for number in range(10)))

    asyncio.run(run())
    assert len(peer.sessions) == 1


def test_calls_under_way_fail_when_the_client_is_closed(peer):
    peer.models["m"] = lambda session, request: None

    async def run():
        client = AsyncClient(peer.path)
        call = asyncio.ensure_future(client.infer("m", value(1)))
        await asyncio.to_thread(peer.wait_for, Frame.INFER)
        await client.close()
        with pytest.raises(ApplianceError, match="was closed"):
            await call

    asyncio.run(run())


def test_the_client_runs_on_uvloop_too(peer):
    uvloop = pytest.importorskip("uvloop")

    async def run():
        async with AsyncClient(peer.path) as client:
            calls = (client.infer("m", {"x": np.full(100_000, number)}) for number in range(20))
            return await asyncio.gather(*calls)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert [int(answer["x"][0]) for answer in runner.run(run())] == list(range(20))
