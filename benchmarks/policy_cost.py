"""What the batcher's policy costs a request: everything between a validated call and its batch, and back.

Time goes by on a clock of the benchmark's own, so nothing is waited for; what counts is this thread's processor time.
"""

import time
from collections import deque

from appliance.batcher import Batcher
from appliance.call import FINISHED, Call, OutputTable, Plan
from appliance.clients import Client
from appliance.cost_model import CostModel
from appliance.errors import ApplianceError
from appliance.manifest import BatchSection
from appliance.types import Timings
from benchmarks.report import Line, median, median_ratio

ROUNDS = 5
_BUDGET_US = 10.0
_REQUESTS = 20_000
_MAX_ROWS = 64
#: What a batch takes, on the benchmark's clock.
_ROW_NS, _BATCH_NS = 1000, 20_000
_TIMEOUT_NS = 10**9

_PLAN = Plan(
    instance=None,  # nothing is run
    rows=1,
    tensors=(),
    outputs=(0,),
    wanted=1,
    signature=((0, (8,)),),
    byte_length=64,
    has_bytes=False,
)


class _Nowhere:
    """A sink that nobody listens to."""

    def deliver(self, call: Call, table: OutputTable, memory: memoryview, row: int, timings: Timings) -> None:
        """Drop the answer."""

    def fail(self, call: Call, error: ApplianceError) -> None:
        """Drop the error."""

    def flush(self) -> None:
        """Nothing is kept."""


def cost() -> list[Line]:
    """Microseconds of a request by clients, requests in flight and whether they have deadlines."""
    lines = []
    for clients, in_flight, has_deadlines in ((1, 16, False), (16, 16, False), (16, 16, True), (1000, 4000, True)):
        ours, bare = [], []
        for _ in range(ROUNDS):
            ours.append(_policy_us(clients, in_flight, has_deadlines))
            bare.append(_queue_us(in_flight))
        what = f"policy, {clients:,} clients, {in_flight:,} in flight" + (", deadlines" if has_deadlines else "")
        lines.append(
            Line(
                "policy",
                f"{what}: a request",
                median(ours),
                "us",
                f"<= {_BUDGET_US:g} us",
                median(ours) <= _BUDGET_US,
                f"first come first served in a deque {median(bare):.2f} us",
                median_ratio(ours, bare),
            )
        )
    return lines


def _calls(clients: int) -> list[Call]:
    accounts = [Client((number,), str(number)) for number in range(clients)]
    sink = _Nowhere()
    return [Call(_PLAN, (), sink, number, client=accounts[number % clients]) for number in range(_REQUESTS)]


def _policy_us(clients: int, in_flight: int, has_deadlines: bool) -> float:
    calls = _calls(clients)
    batcher = Batcher(BatchSection(), CostModel())
    coming = iter(calls)
    now = waiting = done = 0
    began = time.thread_time()
    while done < _REQUESTS:
        for call in coming:
            call.admitted_ns = now
            if has_deadlines:
                call.deadline_ns = now + _TIMEOUT_NS
            call.charge()
            batcher.admit(call, now)
            waiting += 1
            if waiting == in_flight:
                break
        batch = batcher.collect(now, _MAX_ROWS, 1 << 20)
        flight = batcher.begin(batch, now)
        now += _BATCH_NS + _ROW_NS * len(batch)
        batcher.end(flight, now)
        for call in batch:
            call.state = FINISHED
            call.let_go()
        waiting -= len(batch)
        done += len(batch)
    return (time.thread_time() - began) * 1e6 / _REQUESTS


def _queue_us(in_flight: int) -> float:
    """The same with nothing but a queue, and batches as large as may be."""
    coming = iter(_calls(1))
    queue: deque[Call] = deque()
    now = done = 0
    began = time.thread_time()
    while done < _REQUESTS:
        for call in coming:
            call.admitted_ns = now
            queue.append(call)
            if len(queue) == in_flight:
                break
        batch = [queue.popleft() for _ in range(min(len(queue), _MAX_ROWS))]
        now += _BATCH_NS + _ROW_NS * len(batch)
        for call in batch:
            call.state = FINISHED
            call.let_go()
        done += len(batch)
    return (time.thread_time() - began) * 1e6 / _REQUESTS
