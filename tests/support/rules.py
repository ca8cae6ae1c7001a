"""Other servers' rules for batches, in virtual time, for one worker and one queue: what the ablation compares with.

They see the same requests as the daemon's own policy, and the same service times (`support.simulator`). Each is
written after its source's description; what costs real servers time beside their rule costs nothing here.
"""

from collections import deque
from collections.abc import Sequence
from typing import Final

from support.simulator import MS, SECOND, Arrival, Fate, Outcome, Service

_ENDLESS: Final = 1 << 62
#: BentoML looks at its queue this often.
_TICK_NS: Final = MS
#: BentoML fits its line to so many batches, and learns the waiting time from them, each so many ns.
_BATCHES: Final = 50
_REFRESH_NS: Final = 5 * SECOND
_DECAY: Final = 0.95


class _Queue:
    """Requests in the order in which they come, and one server.

    Attributes:
        outcome: What became of them.
        waiting: Numbers of those that wait.
    """

    def __init__(self, arrivals: Sequence[Arrival], service: Service, max_queue: int = _ENDLESS) -> None:
        self._arrivals = arrivals
        self._service = service
        self._max_queue = max_queue
        self._next = 0
        self.outcome = Outcome(list(arrivals))
        self.waiting: deque[int] = deque()

    @property
    def next_ns(self) -> int:
        """When the next request comes."""
        return self._arrivals[self._next].at_ns if self._next < len(self._arrivals) else _ENDLESS

    def admit(self, now: int) -> None:
        """Let all that come until `now` queue up, as far as there is room."""
        while self.next_ns <= now:
            if len(self.waiting) < self._max_queue:
                self.waiting.append(self._next)
            else:
                self._close(self._next, Fate.REFUSED, self.next_ns)
            self._next += 1
        self.outcome.peak_queued = max(self.outcome.peak_queued, len(self.waiting))

    def came_ns(self, place: int) -> int:
        """When the request at a place of the queue came."""
        return self._arrivals[self.waiting[place]].at_ns

    def drop(self, now: int, fate: Fate) -> None:
        """The oldest does not run."""
        self._close(self.waiting.popleft(), fate, now)

    def drop_expired(self, now: int) -> None:
        """Those whose deadline has passed do not run."""
        while self.waiting:
            oldest = self._arrivals[self.waiting[0]]
            if not oldest.patience_ns or oldest.at_ns + oldest.patience_ns >= now:
                return
            self.drop(now, Fate.EXPIRED)

    def serve(self, rows: int, now: int) -> int:
        """Run the oldest `rows`; returns when they are done."""
        numbers = [self.waiting.popleft() for _ in range(rows)]
        ended = now + self._service.took_ns(rows, 1, numbers[0], now)
        for number in numbers:
            self._close(number, Fate.ANSWERED, ended)
        return ended

    def _close(self, number: int, fate: Fate, now: int) -> None:
        self.outcome.fates[number] = fate
        self.outcome.ended_ns[number] = now


def triton(
    arrivals: Sequence[Arrival], service: Service, max_rows: int, delay_ns: int = 0, max_queue: int = _ENDLESS
) -> Outcome:
    """Triton's dynamic batcher: what waits goes at once when the server is free, or when the oldest waited `delay_ns`.

    With ``max_rows`` of 1 it is a server without batching. Source: Triton's user guide, "Dynamic batcher", with
    ``max_queue_delay_microseconds``, ``max_queue_size`` and ``timeout_action: REJECT``.
    """
    queue = _Queue(arrivals, service, max_queue)
    now = 0
    while queue.waiting or queue.next_ns < _ENDLESS:
        if not queue.waiting:
            now = max(now, queue.next_ns)
        queue.admit(now)
        queue.drop_expired(now)
        if not queue.waiting:
            continue
        due = queue.came_ns(0) + delay_ns
        while len(queue.waiting) < max_rows and now < due:
            now = min(due, queue.next_ns)
            queue.admit(now)
        now = queue.serve(min(len(queue.waiting), max_rows), now)
    return queue.outcome


def bentoml(arrivals: Sequence[Arrival], service: Service, max_rows: int, max_latency_ns: int = 60 * SECOND) -> Outcome:
    """BentoML's adaptive batching: wait while that is thought to make the average wait shorter.

    It looks each millisecond. With n requests, the youngest of which has waited w, it waits on while
    ``n * (w + tick + a) <= 0.95 * (average wait of the oldest)``, with a from a least-squares line through the last 50
    batches, fitted each 5 s; the oldest is cancelled where its age and the predicted time for all n exceed
    `max_latency_ns`. Source: `CorkDispatcher` in bentoml/_internal/marshal/dispatcher.py, in the version that runs the
    oldest first, after its training phase.
    """
    queue = _Queue(arrivals, service)
    fit = _Fit(max_latency_ns)
    now = free = 0
    while queue.waiting or queue.next_ns < _ENDLESS:
        if not queue.waiting:
            now = max(now, queue.next_ns)
        if now < free:
            now += -(-(free - now) // _TICK_NS) * _TICK_NS
        queue.admit(now)
        waiting = len(queue.waiting)
        age = now - queue.came_ns(0)
        if waiting > 1 and age + fit.slope * waiting + fit.intercept >= max_latency_ns:
            queue.drop(now, Fate.DROPPED)
        elif (
            waiting < max_rows
            and waiting * (now - queue.came_ns(-1) + _TICK_NS + fit.slope) <= fit.average_wait * _DECAY
        ):
            now += _TICK_NS
        else:
            rows = min(waiting, max_rows)
            free = queue.serve(rows, now)
            fit.note(rows, age, free - now, now)
    return queue.outcome


class _Fit:
    """BentoML's optimizer.

    Attributes:
        slope: Nanoseconds a row adds.
        intercept: Nanoseconds of a batch whatever its rows.
        average_wait: How long the oldest of a batch has waited on average, in nanoseconds.
    """

    def __init__(self, max_latency_ns: int) -> None:
        self.slope = min(2 * SECOND, max_latency_ns / 15)
        self.intercept = min(SECOND, max_latency_ns / 30)
        self.average_wait = 0.0
        self._batches: deque[tuple[int, int, int]] = deque(maxlen=_BATCHES)
        self._refresh_ns = 0

    def note(self, rows: int, wait: int, took: int, now: int) -> None:
        """A batch ran."""
        self._batches.append((rows, wait, took))
        if now < self._refresh_ns and len(self._batches) > 3:  # its training refreshes after each of the first
            return
        self._refresh_ns = now + _REFRESH_NS
        number = len(self._batches)
        x = sum(batch[0] for batch in self._batches) / number
        y = sum(batch[2] for batch in self._batches) / number
        self.average_wait = sum(batch[1] for batch in self._batches) / number
        square = sum((batch[0] - x) ** 2 for batch in self._batches)
        if square:
            slope = sum((batch[0] - x) * (batch[2] - y) for batch in self._batches) / square
            intercept = y - slope * x
        else:  # the solution of least norm
            slope, intercept = y * x / (x * x + 1), y / (x * x + 1)
        self.slope, self.intercept = max(slope, 1000.0), max(intercept, 0.0)
