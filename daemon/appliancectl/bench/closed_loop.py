"""A closed loop: each request in flight is followed by the next as soon as it is answered."""

import time
from contextlib import AsyncExitStack
from typing import Final

from appliancectl.bench.load import Load
from appliancectl.bench.progress import Advance
from appliancectl.bench.tally import Tally

#: Part of a step's duration that is run before counting begins.
_WARM_UP: Final = 0.1

#: Wait after a refusal, which comes too fast to ask again at once.
_PAUSE_SECONDS: Final = 0.001


def run_closed_loop(load: Load, concurrency: int, advance: Advance) -> Tally:
    """Keep `concurrency` requests in flight for the load's duration.

    Raises:
        ApplianceError: What every further request would meet too.
    """
    if concurrency == 1:
        return _alone(load, advance)
    import asyncio  # costs as much as everything else a short command loads

    return asyncio.run(_together(load, concurrency, advance))


def _alone(load: Load, advance: Advance) -> Tally:
    from appliance_client import ApplianceError

    tally = Tally(load.timeout_s)
    with load.target.client() as client:
        warm_until = time.monotonic() + load.duration_s * _WARM_UP
        while time.monotonic() < warm_until:
            try:
                load.ask(client)
            except ApplianceError as error:
                Tally().refused(error)
                time.sleep(_PAUSE_SECONDS)
        start = told = now = time.monotonic()
        while now - start < load.duration_s:
            try:
                answer = load.ask(client)
                after = time.monotonic()
                tally.answered(after - now, answer.timings)
            except ApplianceError as error:
                after = time.monotonic()
                tally.refused(error)
                time.sleep(_PAUSE_SECONDS)
            now = after
            if now - told > 0.1:
                advance(now - told)
                told = now
        tally.elapsed_s = now - start
        advance(now - told)
    return tally


async def _together(load: Load, concurrency: int, advance: Advance) -> Tally:
    import asyncio

    from appliance_client import ApplianceError, AsyncClient

    tally = Tally(load.timeout_s)
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(load.target.async_client()) for _ in range(load.clients)]
        warm_until = time.monotonic() + load.duration_s * _WARM_UP
        start = told = warm_until
        end = warm_until + load.duration_s

        async def loop(client: AsyncClient) -> None:
            nonlocal told
            while (before := time.monotonic()) < end:
                try:
                    answer = await load.send(client, load.timeout_s)
                    after = time.monotonic()
                    if before >= warm_until:
                        tally.answered(after - before, answer.timings)
                except ApplianceError as error:
                    after = time.monotonic()
                    (tally if before >= warm_until else Tally()).refused(error)
                    await asyncio.sleep(_PAUSE_SECONDS)
                if after - told > 0.1:
                    advance(after - told)
                    told = after

        try:
            async with asyncio.TaskGroup() as loops:
                for number in range(concurrency):
                    loops.create_task(loop(clients[number % len(clients)]))
        except* ApplianceError as group:
            raise group.exceptions[0] from None
        tally.elapsed_s = time.monotonic() - start
    return tally
