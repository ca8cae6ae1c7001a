"""Alarms ring once, when they are due and not before, with the kernel's timer and with the loop's."""

import asyncio
import os
import time

import pytest
import uvloop

from appliance import alarm
from appliance.alarm import Alarm


@pytest.fixture(params=["timerfd", "without"])
def _timers(request, monkeypatch):
    if request.param == "without":
        monkeypatch.setattr(alarm._libc, "timerfd_create", lambda clock, flags: -1)


@pytest.mark.usefixtures("_timers")
@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_it_rings_once_and_not_before_it_is_due(run):
    async def scenario():
        rung: asyncio.Queue[int] = asyncio.Queue()
        clock = Alarm(asyncio.get_running_loop(), lambda: rung.put_nowait(time.monotonic_ns()))
        due_ns = time.monotonic_ns() + 20_000_000
        clock.set(due_ns)
        clock.set(due_ns)
        async with asyncio.timeout(10):
            assert await rung.get() >= due_ns - 1_000_000, "a timer of the loop may be early by this"
            clock.set(time.monotonic_ns())
            await rung.get()
        clock.close()
        assert rung.empty()

    run(scenario())


@pytest.mark.usefixtures("_timers")
def test_set_anew_it_forgets_what_it_was_set_to_and_closed_it_is_silent():
    async def scenario():
        rung = []
        clock = Alarm(asyncio.get_running_loop(), lambda: rung.append(1))
        clock.set(time.monotonic_ns() + 5_000_000)
        clock.set(time.monotonic_ns() + 3_600_000_000_000)
        await asyncio.sleep(0.05)
        assert rung == []
        clock.set(time.monotonic_ns() + 5_000_000)
        clock.close()
        await asyncio.sleep(0.05)
        assert rung == []

    asyncio.run(scenario())


def test_its_descriptor_goes_with_it():
    async def scenario():
        before = len(os.listdir("/proc/self/fd"))
        alarms = [Alarm(asyncio.get_running_loop(), print) for _ in range(50)]
        assert len(os.listdir("/proc/self/fd")) == before + 50
        for each in alarms:
            each.close()
        assert len(os.listdir("/proc/self/fd")) == before

    asyncio.run(scenario())
