"""The daemon's own queue and policy in virtual time: nothing here waits, and every run is the same.

`Simulation` does with `appliance.batcher.Batcher` what `appliance.dispatcher` does with it, for a worker whose batches
take what a `Service` says. It has no sockets, slabs or processes. All times are nanoseconds; requests come at times
that are known beforehand, or when something of theirs ends.
"""

import bisect
import heapq
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import count
from types import SimpleNamespace
from typing import NamedTuple

from appliance.batcher import Batcher
from appliance.call import FINISHED, NEW, QUEUED, RUNNING, Call, Plan
from appliance.clients import Client
from appliance.cost_model import CostModel
from appliance.errors import ApplianceError
from appliance.manifest import BatchSection

MS = 1_000_000
SECOND = 1_000_000_000


class Arrival(NamedTuple):
    """One request.

    Attributes:
        at_ns: When it comes.
        client: Whose it is.
        rows: Rows it brings.
        units: Elements of a row's variable dimensions; requests of different ones share no batch.
        priority: As a request says it; 0 for the default.
        patience_ns: Its deadline, from when it comes; 0 for none.
        leaves_ns: When its client cancels it, from when it comes; 0 for never.
    """

    at_ns: int
    client: str = ""
    rows: int = 1
    units: int = 1
    priority: int = 0
    patience_ns: int = 0
    leaves_ns: int = 0


def poisson(rng: random.Random, rate: float, number: int, **of_each) -> list[Arrival]:
    """`number` requests that come one by one, `rate` a second."""
    return bursts(rng, rate, number, 1, **of_each)


def bursts(rng: random.Random, rate: float, number: int, size: int, **of_each) -> list[Arrival]:
    """`number` requests in groups of `size` that come at once; `rate` requests a second."""
    found: list[Arrival] = []
    now = 0.0
    while len(found) < number:
        now += rng.expovariate(rate / size) * SECOND
        found += [Arrival(int(now), **of_each)] * min(size, number - len(found))
    return found


def merge(*streams: Iterable[Arrival]) -> list[Arrival]:
    """Several streams of requests as one."""
    return sorted((arrival for stream in streams for arrival in stream), key=lambda arrival: arrival.at_ns)


@dataclass
class Service:
    """What batches take: ``slope * rows * units + intercept``, and what comes in between.

    Attributes:
        slope_ns: What a row of one unit adds.
        intercept_ns: What a batch costs whatever its rows.
        noise: Relative standard deviation; a batch that begins with the same request is as slow under every rule.
        slow: From when batches take so many times as long: (ns, factor), ascending.
        stalls: The first batch after a time takes so much longer: (ns, ns), ascending.
        seed: Of the noise.
    """

    slope_ns: float
    intercept_ns: float
    noise: float = 0.0
    slow: Sequence[tuple[int, float]] = ()
    stalls: Sequence[tuple[int, int]] = ()
    seed: int = 0
    _factors: list[float] = field(default_factory=list, init=False)
    _stalled: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.noise:
            rng = random.Random(self.seed)
            self._factors = [max(1 + rng.gauss(0, self.noise), 0.2) for _ in range(4096)]

    def ns(self, rows: int, units: int = 1) -> float:
        """A batch that nothing disturbs."""
        return self.slope_ns * rows * units + self.intercept_ns

    def took_ns(self, rows: int, units: int, first: int, now_ns: int) -> int:
        """A batch that begins at `now_ns` and whose first request has the number `first`."""
        took = self.slope_ns * rows * units + self.intercept_ns
        if self._factors:
            took *= self._factors[first % 4096]
        if self.slow:
            place = bisect.bisect_right(self.slow, now_ns, key=lambda change: change[0])
            if place:
                took *= self.slow[place - 1][1]
        while self._stalled < len(self.stalls) and self.stalls[self._stalled][0] <= now_ns:
            took += self.stalls[self._stalled][1]
            self._stalled += 1
        return max(int(took), 1)

    def capacity(self, max_rows: int) -> float:
        """Rows a second at the largest batch."""
        return max_rows / self.ns(max_rows) * SECOND


class Fate(Enum):
    """What became of a request."""

    WAITS = "waits"
    ANSWERED = "answered"
    REFUSED = "refused"  # when it came
    DROPPED = "dropped"  # when its batch was made, since it would have been late
    EXPIRED = "expired"  # its deadline passed
    CANCELLED = "cancelled"


class Batch(NamedTuple):
    """A batch that ran.

    Attributes:
        began_ns: When the worker began it.
        ended_ns: When it was done.
        rows: Its rows.
        numbers: Its requests.
        predicted_ns: What the batcher thought it would take.
    """

    began_ns: int
    ended_ns: int
    rows: int
    numbers: tuple[int, ...]
    predicted_ns: float = 0.0


class Outcome:
    """What became of all requests.

    Attributes:
        arrivals: They, by number.
        ended_ns: When each was answered, refused or given up; 0 where it still waits.
        fates: What became of each.
        batches: In the order in which they ended; only where they were asked for.
        peak_queued: Most requests that waited at once.
    """

    def __init__(self, arrivals: list[Arrival]) -> None:
        self.arrivals = arrivals
        self.ended_ns = [0] * len(arrivals)
        self.fates = [Fate.WAITS] * len(arrivals)
        self.batches: list[Batch] = []
        self.peak_queued = 0

    def latencies_ns(self, skip: float = 0.0, chosen: Callable[[Arrival], bool] | None = None) -> list[int]:
        """How long answers took, ascending.

        Args:
            skip: Share of the requests that came first and do not count.
            chosen: Which requests count.
        """
        first = int(len(self.arrivals) * skip)
        return sorted(
            ended - arrival.at_ns
            for arrival, ended, fate in zip(
                self.arrivals[first:], self.ended_ns[first:], self.fates[first:], strict=True
            )
            if fate is Fate.ANSWERED and (chosen is None or chosen(arrival))
        )

    def goodput(self, from_ns: int, to_ns: int) -> float:
        """Answers a second, in time, of requests that came in between."""
        good = sum(
            fate is Fate.ANSWERED
            and from_ns <= arrival.at_ns < to_ns
            and (not arrival.patience_ns or ended <= arrival.at_ns + arrival.patience_ns)
            for arrival, ended, fate in zip(self.arrivals, self.ended_ns, self.fates, strict=True)
        )
        return good / (to_ns - from_ns) * SECOND

    def counts(self) -> Counter[Fate]:
        """How many came to which fate."""
        return Counter(self.fates)


def percentile(ascending: Sequence[int], share: float) -> float:
    """The value below which `share` of `ascending` lie; NaN of nothing."""
    return ascending[min(int(len(ascending) * share), len(ascending) - 1)] if ascending else float("nan")


_END, _LEAVE, _EXPIRE, _WAKE, _ARRIVE = range(5)


class Simulation:
    """A model's queue and its worker.

    Attributes:
        batcher: The daemon's own.
        clients: By name; those that are not here yet come with weight 1 and without bounds.
        now_ns: What time it is.
        outcome: What has become of the requests so far.
    """

    def __init__(
        self,
        service: Service,
        max_rows: int = 32,
        streams: int = 1,
        section: BatchSection | None = None,
        cost_model: CostModel | None = None,
        clients: dict[str, Client] | None = None,
        keeps_batches: bool = False,
    ) -> None:
        self._service = service
        self._max_rows = max_rows
        self._keeps_batches = keeps_batches
        self.batcher = Batcher(section or BatchSection(max_queue_size=1_000_000), cost_model or CostModel(), streams)
        self.clients = clients if clients is not None else {}
        self._plans: dict[tuple[int, int], Plan] = {}
        self._events: list[tuple[int, int, int, object]] = []
        self._order = count()
        self._free_slots = streams + 1
        self._free_at = [0] * streams
        self._alarm_ns = 0
        self._calls: dict[int, Call] = {}
        self._follow: Callable[[int, int], Arrival | None] | None = None
        self.now_ns = 0
        self.outcome = Outcome([])

    def run(
        self,
        arrivals: list[Arrival],
        follow: Callable[[int, int], Arrival | None] | None = None,
        until_ns: int | None = None,
    ) -> Outcome:
        """Let `arrivals`, which ascend, come, and go on until nothing is left or time is up.

        Args:
            arrivals: The requests.
            follow: Asked with a request's number and the time whenever one has ended, for one more that it brings.
            until_ns: When to stop.
        """
        outcome = self.outcome = Outcome(list(arrivals))
        self._follow = follow
        events = self._events
        place = 0
        while True:
            if place < len(arrivals) and (not events or arrivals[place].at_ns <= events[0][0]):
                now = arrivals[place].at_ns
                number, kind = place, _ARRIVE
            elif events:
                now, _, kind, what = heapq.heappop(events)
                if kind == _ARRIVE:
                    assert isinstance(what, Arrival)
                    number = len(outcome.fates)
                    outcome.arrivals.append(what)
                    outcome.ended_ns.append(0)
                    outcome.fates.append(Fate.WAITS)
            else:
                return outcome
            if until_ns is not None and now > until_ns:
                self.now_ns = until_ns
                return outcome
            self.now_ns = now
            if kind == _ARRIVE:
                if number == place < len(arrivals):
                    place += 1
                self._arrive(number, outcome.arrivals[number], now)
                # Those that come at once are read at once: the dispatcher looks in a later turn of its loop.
                if place >= len(arrivals) or arrivals[place].at_ns > now:
                    self._pump(now)
            elif kind == _END:
                self._end(what, now)
            elif kind == _WAKE:
                if now == self._alarm_ns:  # else it has been set anew since
                    self._alarm_ns = 0
                    self._pump(now)
            else:
                self._give_up(what, Fate.CANCELLED if kind == _LEAVE else Fate.EXPIRED, now)

    # ---------------------------------------------------------------- requests come and go

    def _arrive(self, number: int, arrival: Arrival, now: int) -> None:
        client = self.clients.get(arrival.client)
        if client is None:
            client = self.clients[arrival.client] = Client((arrival.client,), arrival.client)
        plan = self._plans.get(arrival[2:4])
        if plan is None:
            plan = self._plans[arrival[2:4]] = _plan(arrival.rows, arrival.units)
        call = Call(plan, (), None, number, client=client)
        call.priority = arrival.priority
        call.admitted_ns = now
        if arrival.patience_ns:
            call.deadline_ns = now + arrival.patience_ns
        try:
            call.charge()
            self.batcher.admit(call, now)
        except ApplianceError:
            call.state = FINISHED
            call.let_go()
            self._close(number, Fate.REFUSED, now)
            return
        if arrival.patience_ns:
            heapq.heappush(self._events, (call.deadline_ns, next(self._order), _EXPIRE, call))
        if arrival.leaves_ns:
            heapq.heappush(self._events, (now + arrival.leaves_ns, next(self._order), _LEAVE, call))
        if self.batcher.queued > self.outcome.peak_queued:
            self.outcome.peak_queued = self.batcher.queued

    def _give_up(self, call: Call, fate: Fate, now: int) -> None:
        """What `appliance.instance.Instance.cancel` does."""
        if call.state is QUEUED:
            self.batcher.withdraw(call)
        elif call.state is RUNNING:
            call.state = FINISHED
        else:
            assert call.state is not NEW
            return
        self._close(call.id, fate, now)

    def _close(self, number: int, fate: Fate, now: int) -> None:
        self.outcome.fates[number] = fate
        self.outcome.ended_ns[number] = now
        if self._follow is not None:
            another = self._follow(number, now)
            if another is not None:
                assert another.at_ns >= now
                heapq.heappush(self._events, (another.at_ns, next(self._order), _ARRIVE, another))

    # ---------------------------------------------------------------- what the dispatcher does

    def _pump(self, now: int) -> None:
        batcher = self.batcher
        while self._free_slots and batcher.queued:
            calls = batcher.collect(now, self._max_rows, 1 << 60)
            if batcher.late:
                late, batcher.late = batcher.late, []
                for call in late:
                    call.state = FINISHED
                    call.let_go()
                    self._close(call.id, Fate.DROPPED, now)
                if not calls:
                    continue
            if not calls:
                if batcher.wake_ns and batcher.wake_ns != self._alarm_ns:
                    self._alarm_ns = batcher.wake_ns
                    heapq.heappush(self._events, (self._alarm_ns, next(self._order), _WAKE, None))
                return
            self._free_slots -= 1
            flight = batcher.begin(calls, now)
            free_at = self._free_at
            began = max(now, free_at[0])
            ended = began + self._service.took_ns(flight.rows, calls[0].plan.units, calls[0].id, began)
            heapq.heapreplace(free_at, ended)
            heapq.heappush(self._events, (ended, next(self._order), _END, (flight, calls, began)))

    def _end(self, what: object, now: int) -> None:
        flight, calls, began = what
        batcher = self.batcher
        if self._keeps_batches:
            self.outcome.batches.append(
                Batch(began, now, flight.rows, tuple(call.id for call in calls), flight.line.ns(flight.rows))
            )
        batcher.end(flight, now)
        if batcher.queued and self._free_slots:
            self._pump(now)
        for call in calls:
            if call.state is RUNNING:
                call.state = FINISHED
                self._close(call.id, Fate.ANSWERED, now)
            call.let_go()
        self._free_slots += 1
        if batcher.queued:
            self._pump(now)


def _plan(rows: int, units: int) -> Plan:
    return Plan(
        SimpleNamespace(), rows, (), (), 0, (rows > 0, units), 0, has_bytes=False, units=units, cost=rows * units
    )
