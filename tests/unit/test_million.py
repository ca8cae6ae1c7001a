"""A million requests of sixteen clients through the whole of an instance, in virtual time.

The real admission, queue, gathering and scattering with a worker that echoes; the clock is the test's. A request's
tensor says which request it is, so an answer that reached the wrong one would show.
"""

import asyncio
import random
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

sys.path.append(str(Path(__file__).parents[1]))

from appliance import dispatcher, instance
from appliance.call import FINISHED, Call
from appliance.clients import Client
from appliance.errors import ApplianceError, DeadlineExceeded
from appliance.planner import make_plan
from support.workers import Crew, echo_model, make_instance, turns

REQUESTS = 1_000_000
CLIENTS = 16
MS = 1_000_000


class Checked:
    """A client: checks each answer as it comes and counts how its calls ended."""

    def __init__(self, account: Client) -> None:
        self.account = account
        self.ends: Counter[str] = Counter()
        self.open: dict[int, Call] = {}

    def deliver(self, call, table, memory, row, timings) -> None:
        shape, content = table.view(0, memory, row, call.plan.rows)
        assert shape == (call.plan.rows, 2)
        assert content == call.id.to_bytes(8, "little") * call.plan.rows, "another request's answer"
        del self.open[call.id]
        self.ends["answered"] += 1

    def fail(self, call, error) -> None:
        assert isinstance(error, DeadlineExceeded)
        del self.open[call.id]
        self.ends["late"] += 1

    def flush(self) -> None:
        pass


def test_a_million_requests_with_random_cancellations_each_end_once_and_with_their_own_answer(monkeypatch):
    """Reliability 80."""
    clock = SimpleNamespace(now=0)
    frozen = SimpleNamespace(monotonic_ns=lambda: clock.now, time_ns=lambda: 0)
    monkeypatch.setattr(dispatcher, "time", frozen)
    monkeypatch.setattr(instance, "time", frozen)
    chance = random.Random(80)
    draw = chance.random

    async def scenario():
        crew = Crew(echo_model(width=2, rows=32))
        served = make_instance(crew, batch={"preferred_batch_sizes": []})
        monkeypatch.setattr(served._deadlines, "add", lambda call: None)  # its timers are of real time
        await served.start()
        plans = [make_plan(served, served.signature, [("x", "FP32", (rows, 2))], []) for rows in (1, 1, 1, 1, 2, 3)]
        clients = [Checked(Client((number,), str(number), weight=1 + number % 3)) for number in range(CLIENTS)]
        worker = crew.worker
        refused = 0
        largest = 0
        for number in range(REQUESTS):
            client = clients[int(draw() * CLIENTS)]
            plan = plans[int(draw() * 6)]
            call = Call(plan, [number.to_bytes(8, "little") * plan.rows], client, number, 0, client.account)
            call.nbytes = 8 * plan.rows
            chosen = draw()
            call.priority = int(chosen * 40)  # of ten requests one names a level
            if chosen > 0.8:
                call.deadline_ns = clock.now + int(draw() * 20 * MS)
            try:
                call.charge()
                served.submit(call)
                client.open[number] = call
            except ApplianceError:
                refused += 1
                call.let_go()
            if draw() < 0.06 and client.open:
                victim = client.open.pop(next(iter(client.open)) if draw() < 0.5 else next(reversed(client.open)))
                served.cancel(victim)
                client.ends["cancelled"] += 1
            clock.now += int(draw() * 100_000)
            largest = max(largest, served.queued)
            if draw() < 0.12:
                await asyncio.sleep(0)  # the loop's turn: the queue is looked at
                while worker.runs and draw() < 0.9:
                    clock.now += 50_000 + 20_000 * worker.runs[0].rows
                    worker.answer()
                    await asyncio.sleep(0)
        while worker.runs or served.queued:
            while worker.runs:
                clock.now += MS
                worker.answer()
            await turns(2)
        ends = sum((client.ends for client in clients), Counter())
        assert ends.total() + refused == REQUESTS
        assert not any(client.open for client in clients)
        assert min(ends["answered"], ends["cancelled"], ends["late"] + refused) > 5000, ends
        assert (served.queued, served.running, served._batcher.queued_bytes) == (0, 0, 0)
        assert [(client.account.requests, client.account.bytes) for client in clients] == [(0, 0)] * CLIENTS
        assert largest < 4096
        assert all(call.state is FINISHED for client in clients for call in client.open.values())
        await served.close()
        return ends, refused

    asyncio.run(scenario())
