"""Large inputs travel in sealed shared memory that is registered once and used again."""

import asyncio
import os
import threading

import numpy as np
import pytest

from appliance.wire.native import Frame
from appliance_client import AsyncClient, Client, ConnectionLost, InvalidRequest
from appliance_client.regions import Region, RegionPool

LARGE = np.arange(150_000, dtype=np.float32)


def blocking(path, *inputs, **options):
    with Client(path, **options) as client:
        return [client.infer("m", values) for values in inputs]


def concurrent(path, *inputs, **options):
    async def run():
        async with AsyncClient(path, **options) as client:
            return [await client.infer("m", values) for values in inputs]

    return asyncio.run(run())


both = pytest.mark.parametrize("infer", [blocking, concurrent])


@both
def test_a_large_input_travels_in_a_region_and_the_next_one_in_the_same(peer, infer):
    heads, regions = [], []

    def respond(session, request):
        heads.append(request.head)
        regions.append(request.regions)
        session.echo(request)

    peer.models["m"] = respond
    first, second = infer(peer.path, {"x": LARGE}, {"x": LARGE + 1})
    assert (first["x"] == LARGE).all()
    assert (second["x"] == LARGE + 1).all()
    assert len(peer.received(Frame.REGION)) == 1
    assert regions[0] == regions[1] != []
    assert heads[0] == heads[1]
    assert all(len(body) == len(heads[0]) for _, body in peer.received(Frame.INFER))


@both
def test_inputs_of_one_request_share_a_region(peer, infer):
    inputs = {"x": LARGE, "small": np.arange(3, dtype=np.int8), "t": ["ab", "c"], "y": LARGE[::-1]}
    (answer,) = infer(peer.path, inputs)
    assert (answer["x"] == LARGE).all()
    assert (answer["y"] == LARGE[::-1]).all()
    assert answer["small"].tolist() == [0, 1, 2]
    assert answer.text("t") == ["ab", "c"]
    assert len(peer.received(Frame.REGION)) == 1


@both
@pytest.mark.parametrize("options", [{"region_threshold": None}, {"region_threshold": 600_001}])
def test_below_the_threshold_inputs_travel_in_the_frame(peer, infer, options):
    infer(peer.path, {"x": LARGE}, **options)
    assert not peer.received(Frame.REGION)


@both
def test_the_threshold_is_the_callers(peer, infer):
    infer(peer.path, {"x": np.ones(4)}, region_threshold=32)
    assert len(peer.received(Frame.REGION)) == 1


@both
def test_a_daemon_that_takes_no_regions_gets_inputs_in_the_frame(peer, infer):
    peer.max_regions = 0
    (answer,) = infer(peer.path, {"x": LARGE})
    assert (answer["x"] == LARGE).all()
    assert not peer.received(Frame.REGION)


@both
def test_a_daemon_that_refuses_a_region_is_not_asked_again(peer, infer):
    peer.region_error = ("permission-denied", "cannot take the region: no", False)
    for answer in infer(peer.path, {"x": LARGE}, {"x": LARGE}):
        assert (answer["x"] == LARGE).all()
    assert len(peer.received(Frame.REGION)) == 1


@both
def test_a_daemon_that_refuses_a_region_for_now_is_asked_again(peer, infer):
    peer.region_error = ("overloaded", "cannot take the region: full", True)
    for answer in infer(peer.path, {"x": LARGE}, {"x": LARGE}):
        assert (answer["x"] == LARGE).all()
    assert len(peer.received(Frame.REGION)) == 2


@both
def test_an_input_larger_than_a_region_may_be_travels_in_the_frame(peer, infer):
    peer.max_region_bytes = 100_000
    (answer,) = infer(peer.path, {"x": LARGE})
    assert (answer["x"] == LARGE).all()
    assert not peer.received(Frame.REGION)


@both
def test_without_memory_for_a_region_inputs_travel_in_the_frame(peer, infer, monkeypatch):
    def refuse(name, flags):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", refuse)
    (answer,) = infer(peer.path, {"x": LARGE})
    assert (answer["x"] == LARGE).all()


@both
def test_what_fits_neither_region_nor_frame_is_refused(peer, infer):
    peer.max_region_bytes, peer.max_frame_bytes = 100_000, 100_000
    with pytest.raises(InvalidRequest, match="takes at most 100000"):
        infer(peer.path, {"x": LARGE})


@both
def test_a_region_is_used_again_after_an_error(peer, infer):
    peer.models["m"] = lambda session, request: (
        session.error(request.identifier, "model-not-ready")
        if len(peer.received(Frame.INFER)) == 1
        else session.echo(request)
    )

    def tolerant(path):
        if infer is blocking:
            with Client(path) as client:
                with pytest.raises(Exception, match="cannot"):
                    client.infer("m", {"x": LARGE})
                client.infer("m", {"x": LARGE})
        else:

            async def run():
                async with AsyncClient(path) as client:
                    with pytest.raises(Exception, match="cannot"):
                        await client.infer("m", {"x": LARGE})
                    await client.infer("m", {"x": LARGE})

            asyncio.run(run())

    tolerant(peer.path)
    assert len(peer.received(Frame.REGION)) == 1


@both
def test_memory_above_the_pools_bound_is_given_back(peer, infer):
    infer(peer.path, {"x": LARGE}, {"x": np.ones(400_000)}, {"x": LARGE}, region_pool_bytes=1 << 20)
    assert len(peer.received(Frame.REGION)) == 3
    peer.wait_for(Frame.RELEASE, 2)


@both
def test_another_size_gets_another_region_within_the_daemons_bound(peer, infer):
    peer.max_regions = 2
    sizes = (100_000, 600_000, 3_000_000)
    infer(peer.path, *({"x": np.ones(size)} for size in sizes))
    assert len(peer.received(Frame.REGION)) == 3
    assert len(peer.received(Frame.RELEASE)) == 1


def test_requests_in_flight_use_different_regions(peer):
    """The peer answers only when it has both requests, so both regions are in use at once."""
    held = []

    def respond(session, request):
        held.append(request)
        if len(held) == 2:
            for each in held:
                session.echo(each)

    peer.models["m"] = respond

    async def run():
        async with AsyncClient(peer.path) as client:
            return await asyncio.gather(client.infer("m", {"x": LARGE}), client.infer("m", {"x": LARGE + 1}))

    first, second = asyncio.run(run())
    assert (first["x"] == LARGE).all()
    assert (second["x"] == LARGE + 1).all()
    assert held[0].regions != held[1].regions


def test_where_all_regions_are_in_use_inputs_travel_in_the_frame(peer):
    peer.max_regions = 1
    held = []

    def respond(session, request):
        held.append(request)
        if len(held) == 3:
            for each in held:
                session.echo(each)

    peer.models["m"] = respond
    with Client(peer.path) as client:
        answers = list(client.stream("m", ({"x": LARGE + k} for k in range(3))))
    assert [float(answer["x"][0]) for answer in answers] == [0.0, 1.0, 2.0]
    assert [len(each.regions) for each in held] == [1, 0, 0]


def test_a_cancelled_request_keeps_its_region_until_its_last_answer(peer):
    release = threading.Event()

    def respond(session, request):
        if len(peer.received(Frame.INFER)) > 1:
            session.echo(request)

    def on_cancel(session, identifier):
        release.wait(20)
        session.error(identifier, "cancelled")

    peer.models["m"], peer.on_cancel = respond, on_cancel

    async def run():
        async with AsyncClient(peer.path) as client:
            first = asyncio.ensure_future(client.infer("m", {"x": LARGE}))
            await asyncio.to_thread(peer.wait_for, Frame.INFER)
            first.cancel()
            await asyncio.to_thread(peer.wait_for, Frame.CANCEL)
            second = asyncio.ensure_future(client.infer("m", {"x": LARGE + 1}))
            await asyncio.sleep(0)
            release.set()
            assert (await second)["x"][0] == 1.0
            assert (await client.infer("m", {"x": LARGE + 2}))["x"][0] == 2.0

    asyncio.run(run())
    assert len(peer.received(Frame.REGION)) == 2


def test_regions_leave_no_descriptor_and_no_mapping_behind(peer, open_descriptors):
    def mappings():
        with open("/proc/self/maps") as maps:
            return sum("appliance-client" in line for line in maps)

    blocking(peer.path, {"x": LARGE})
    peer.hang_up()
    before = open_descriptors()
    for infer in (blocking, concurrent):
        for _ in range(5):
            infer(peer.path, {"x": LARGE}, {"x": LARGE})
    peer.hang_up()
    assert open_descriptors() == before
    assert mappings() == 0


def test_a_lost_connection_gives_its_memory_back(peer, open_descriptors):
    peer.models["m"] = lambda session, request: session.socket.shutdown(2)
    for infer in (blocking, concurrent):
        with pytest.raises(ConnectionLost):
            infer(peer.path, {"x": LARGE})
    peer.hang_up()
    with open("/proc/self/maps") as maps:
        assert not any("appliance-client" in line for line in maps)


def test_the_pool_hands_out_the_most_recently_used_region_that_fits():
    pool = RegionPool(8, 1 << 30)
    small, _ = pool.make(1, 100)
    large, _ = pool.make(2, 10_000_000)
    other, _ = pool.make(3, 100)
    for region in (small, large, other):
        assert pool.give_back(region) is None
    assert pool.take(9_000_000) is large
    assert pool.take(100) is other
    assert pool.take(100) is small
    assert pool.take(100) is None
    for region in (small, large, other):
        pool.give_back(region)
    pool.close()


def test_a_region_cannot_shrink_or_grow():
    region = Region(1, 1 << 20)
    for size in (0, 1 << 21):
        with pytest.raises(PermissionError):
            os.ftruncate(region.descriptor, size)
    region.close()
    region.close()
