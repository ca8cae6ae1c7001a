"""The queue of one model and the choice of the next batch.

Bounded by count and bytes. Levels of priority come first, in a level clients share by weight, of a client the most
urgent call goes first, and a batch holds calls of one shape (`appliance.waiting`). How many rows it takes is the
policy's choice (`appliance.policy`), by what batches cost on this placement (`appliance.cost_model`); the manifest's
``max_queue_delay_us`` and ``preferred_batch_sizes`` put Triton's fixed rule in its place.

The module knows no model semantics, no sockets and no clock: whoever calls says what time it is.
"""

from typing import Final

from appliance.call import FINISHED, QUEUED, RUNNING, Call
from appliance.cost_model import CostModel
from appliance.errors import DeadlineExceeded, Overloaded
from appliance.flights import Flight, Flights
from appliance.manifest import BatchSection
from appliance.policy import Policy
from appliance.waiting import Lane, Level, Queue

#: A call is due then if it has no deadline, or a later one: those with deadlines pass it for no longer.
_PATIENCE_NS: Final = 1_000_000_000
#: A level that is passed over for so many ns gathers the right to one, so that nothing starves.
_AGEING: Final = 16
#: The worker gets its next batch when the one it runs is to end within this time: less than a batch is gathered in, so
#: that it need not wait, and short, since whoever comes later than that cannot be in it.
_LEAD_NS: Final = 250_000
#: Batches seen before predictions turn calls away.
_MIN_SAMPLES: Final = 3
#: A batch so soon after the last that was learned from teaches nothing new and is not worth the time.
_LESSON_NS: Final = 250_000
#: A level that was served within this time is expected to be used again.
_LATELY_NS: Final = 1_000_000_000
#: What predictions are multiplied by at most, beside their spread, while costs are underestimated.
_MAX_MARGIN: Final = 3.0
#: With no batch for so long a prediction may be wrong for ever, so a call it would turn away runs.
_DOUBT_NS: Final = 1_000_000_000


class Batcher:
    """Calls waiting for one model, and predictions for those it runs.

    Attributes:
        queued: Calls waiting.
        queued_bytes: Bytes of their tensors.
        levels: The most urgent first.
        flights: What the worker has.
        cost_model: What batches cost.
        wake_ns: When a batch that is held back is due; 0 where none is.
        late: Calls that the last `collect` dropped since their deadline cannot be met; whoever called it fails them.
    """

    def __init__(self, section: BatchSection, cost_model: CostModel, streams: int = 1) -> None:
        self._max_queue_size = section.max_queue_size
        self._max_queue_bytes = section.max_queue_bytes
        self._policy = Policy(section)
        self.flights = Flights(streams)
        self._max_rows = 1
        self._last_lesson_ns = -_LESSON_NS
        self._overrun = 1.0  # how much longer than few should the last batches took, until that is learned
        self._margin = 1.0  # on predictions; above 1 while they let calls in that were late after all
        self.cost_model = cost_model
        self.levels = [Level(number, cost_model) for number in range(1, section.levels + 1)]
        self._default = self.levels[section.default_level - 1]
        for level in self.levels:
            policy = section.policy(level.number)
            level.rejects_late = not policy.is_delayed
            level.max_calls = policy.max_queue_size
        self.queued = 0
        self.queued_bytes = 0
        self.wake_ns = 0
        self.late: list[Call] = []

    # ---------------------------------------------------------------- calls come and go

    def check_room(self, nbytes: int, coming: int = 0, coming_bytes: int = 0) -> None:
        """Refuse what cannot be queued, `coming` calls of `coming_bytes` being on their way.

        Raises:
            Overloaded: The queue holds as many requests or bytes as it may.
        """
        waiting = self.queued + coming
        if waiting >= self._max_queue_size:
            raise Overloaded(
                f"cannot queue the request: {waiting} wait already and max_queue_size is {self._max_queue_size}"
            )
        if self.queued_bytes + coming_bytes + nbytes > self._max_queue_bytes:
            raise Overloaded(
                f"cannot queue the request: with its {nbytes} bytes the queue would hold more than "
                f"max_queue_bytes = {self._max_queue_bytes}"
            )

    def level_of(self, priority: int) -> Level:
        """The level of a request's `priority`: 1 and up; any other is the default, as with Triton."""
        return self.levels[priority - 1] if 0 < priority <= len(self.levels) else self._default

    def admit(self, call: Call, now_ns: int) -> None:
        """Queue `call`.

        Raises:
            Overloaded: See `check_room`; also where its level is full.
            DeadlineExceeded: It is predicted to end after its deadline.
        """
        if self.queued >= self._max_queue_size or self.queued_bytes + call.nbytes > self._max_queue_bytes:
            self.check_room(call.nbytes)
        level = self.level_of(call.priority) if call.priority else self._default
        if level.calls >= level.max_calls:
            raise Overloaded(
                f"cannot queue the request: {level.calls} of priority {level.number} wait already and its "
                f"max_queue_size is {level.max_calls}"
            )
        queue = level.queue_for(call)
        call.due_ns = now_ns + _PATIENCE_NS
        if call.deadline_ns:
            if call.deadline_ns < call.due_ns:
                call.due_ns = call.deadline_ns
            if level.rejects_late:
                self._foresee(call, level, queue, now_ns)
        call.level = level
        call.queue = queue
        queue.push(call)
        self._count_in(call)

    def readmit(self, calls: list[Call]) -> None:
        """Queue calls that were admitted once already, whatever the bounds, before all that came after them."""
        for call in reversed(calls):
            level = self.level_of(call.priority)
            queue = level.queue_for(call)
            call.level = level
            call.queue = queue
            queue.push_first(call)
            self._count_in(call)

    def delay(self, call: Call, now_ns: int) -> None:
        """Put a queued call behind those whose deadlines have not passed; it has none from now on."""
        queue = call.queue
        queue.remove(call)
        call.level.count_out(queue, 1, call.plan.rows, call.plan.cost)
        call.deadline_ns = 0
        call.due_ns = now_ns + _PATIENCE_NS
        queue.push(call)
        call.level.count_in(queue, call)

    def withdraw(self, call: Call) -> None:
        """Take a queued call out; its state becomes FINISHED and no batch will hold it."""
        call.state = FINISHED
        call.queue.note_withdrawn()
        self.queued -= 1
        self.queued_bytes -= call.nbytes
        call.level.count_out(call.queue, 1, call.plan.rows, call.plan.cost)
        call.let_go()

    def drain(self) -> list[Call]:
        """Take every queued call, oldest first, as RUNNING like a batch's, so that nothing withdraws them."""
        calls = [call for level in self.levels for call in level.take_all()]
        calls.sort(key=_admitted)
        for call in calls:
            call.state = RUNNING
        self.queued = self.queued_bytes = 0
        return calls

    def _count_in(self, call: Call) -> None:
        call.state = QUEUED
        self.queued += 1
        self.queued_bytes += call.nbytes
        call.level.count_in(call.queue, call)

    # ---------------------------------------------------------------- predictions

    def _foresee(self, call: Call, level: Level, queue: Queue, now_ns: int) -> None:
        """Refuse a call that would end after its deadline.

        What is ahead of it: the batches under way, all of more urgent levels, and of its own level as much as is served
        while it waits for its client's turn.
        """
        line = queue.lane.line
        if line.samples < _MIN_SAMPLES:
            return
        plan = call.plan
        ahead = 0.0
        for each in self.levels:
            if each is level:
                break
            ahead += each.cost
        if level.calls:
            flow = queue.flow
            weight = flow.client.weight
            others = level.weight - weight if flow.queues else level.weight
            own = flow.cost * queue.share_before(call.due_ns) if flow.queues else 0.0
            ahead += min(level.cost - flow.cost, (own + plan.cost) * others / weight) + own
        slope, intercept = line.slope_ns, line.intercept_ns
        factor = (1 + 2 * line.spread) * max(self._margin, self._overrun)
        budget_ns = call.deadline_ns - now_ns
        # As large as batches may be for two to fit into its time: one may have begun just before.
        fit = (budget_ns / factor / 2 - intercept) / slope if slope > 0 else self._max_rows
        rows = max(min(int(fit), self._max_rows), plan.rows, 1)
        before = ahead / plan.units * (slope + intercept / rows) / self.flights.streams
        took_ns = max(self.flights.free_ns - now_ns, 0) + (before + slope * rows + intercept) * factor
        if took_ns > budget_ns and now_ns - self.flights.last_end_ns < _DOUBT_NS:
            raise DeadlineExceeded(
                f"cannot answer in time: the answer is expected in {took_ns / 1e6:.3g} ms and the deadline is in "
                f"{budget_ns / 1e6:.3g} ms"
            )

    def begin(self, calls: list[Call], now_ns: int) -> Flight:
        """A batch goes to the worker."""
        rows = 0
        for call in calls:
            rows += call.plan.rows
        line = calls[0].queue.lane.line
        self._policy.note(rows, line, self._max_rows, self.flights.streams, now_ns)
        return self.flights.begin(line, rows, now_ns)

    def end(self, flight: Flight, now_ns: int, is_measured: bool = True) -> None:
        """The worker is done with a batch; what it took counts where `is_measured`."""
        self.flights.end(flight, now_ns)
        if is_measured and now_ns - self._last_lesson_ns >= _LESSON_NS:
            self._last_lesson_ns = now_ns
            line, took_ns = flight.line, max(now_ns - flight.began_ns, 1)
            if line.samples >= _MIN_SAMPLES:
                overrun = min(max(took_ns / line.late_ns(flight.rows), 1.0), _MAX_MARGIN)
                self._overrun += (overrun - self._overrun) / 2
            self.cost_model.note(line, flight.rows, took_ns)

    # ---------------------------------------------------------------- the next batch

    def collect(self, now_ns: int, max_rows: int, max_bytes: int) -> list[Call]:
        """Take the next batch: calls of one shape; empty where there is none or it is held back.

        Args:
            now_ns: What time it is.
            max_rows: Most rows the session takes; 1 for a model without batch dimension.
            max_bytes: Bytes of tensors the slab holds. One call alone may be larger.
        """
        self.wake_ns = 0
        self._max_rows = max_rows
        if not self.queued:
            return []
        early_ns = self.flights.free_ns - _LEAD_NS
        if early_ns > now_ns:
            self.wake_ns = early_ns
            return []
        level = self._next_level(max_rows, now_ns)
        queue = level.next()
        lane = queue.lane
        policy = self._policy
        if policy.delay_ns and not self._is_due(queue, max_rows, now_ns):
            found = self._next_due(max_rows, now_ns)
            if found is None:
                return []
            level, queue = found
            lane = queue.lane
        limit = policy.rows_to_take(lane.rows, lane.line, max_rows, self.flights)
        if level.number > 1:
            limit = self._bound(level, lane, limit, max_rows, now_ns)
        level.served_ns = now_ns
        batch = self._fill(level, queue, limit, max_bytes, now_ns)
        if batch and len(self.levels) > 1 and self.queued > level.calls:
            self._age(level, lane.line.ns(limit))
        return batch

    def _next_level(self, max_rows: int, now_ns: int) -> Level:
        """The most urgent level, unless one that was passed over has gathered the time for a batch."""
        levels = self.levels
        first = next(level for level in levels if level.calls)
        if first.calls < self.queued:
            for level in levels[first.number :]:
                if level.calls and level.credit:
                    lane = level.next().lane
                    rows = self._policy.rows_to_take(lane.rows, lane.line, max_rows, self.flights)
                    if level.credit >= lane.line.ns(self._bound(level, lane, rows, max_rows, now_ns)):
                        return level
        return first

    def _is_due(self, queue: Queue, max_rows: int, now_ns: int) -> bool:
        """True where a batch that begins with `queue` is held back no longer; else the alarm is set for it."""
        due_ns = queue.head().admitted_ns + self._policy.delay_ns
        if due_ns <= now_ns or self._policy.is_full(queue.lane.rows, max_rows):
            return True
        if not self.wake_ns or due_ns < self.wake_ns:
            self.wake_ns = due_ns
        return False

    def _next_due(self, max_rows: int, now_ns: int) -> tuple[Level, Queue] | None:
        """Whose turn it is among the shapes that are held back no longer, where the first in turn is."""
        for level in self.levels:
            queues = [lane.next() for lane in level.lanes.values() if lane.active]
            due = [queue for queue in queues if self._is_due(queue, max_rows, now_ns)]
            if due:
                self.wake_ns = 0
                return level, min(due, key=_time)
        return None

    def _bound(self, level: Level, lane: Lane, limit: int, max_rows: int, now_ns: int) -> int:
        """Rows of a batch of a level that others are more urgent than: they may come at any time and would wait for it.

        So where they have come lately it is no larger than pays, and so in the background always. It has two rows at
        least, or what batches of several cost would never be seen again where it once looked as if they did not pay.
        """
        if self._policy.is_fixed:
            return limit
        is_background = level.number > self._default.number
        if is_background or any(now_ns - each.served_ns < _LATELY_NS for each in self.levels[: level.number - 1]):
            return min(limit, max(lane.line.efficient_rows(max_rows), 2))
        return limit

    def _age(self, served: Level, took_ns: float) -> None:
        """Let levels that were passed over gather time, and take it from the one that was served."""
        for level in self.levels:
            if level is served or not level.calls:
                level.credit = 0.0
            else:
                level.credit += took_ns / _AGEING

    def _fill(self, level: Level, queue: Queue, limit: int, max_bytes: int, now_ns: int) -> list[Call]:
        """Take calls of one shape up to `limit` rows, `queue` first, then by turns.

        A call with a deadline makes the batch no larger than can end by then. One that cannot end by then at all is
        dropped, and so is one that has waited for more than half of its time and would have a batch run for it that is
        less than half as large as it should be: others, which have more time, would be late for it, one after another.
        """
        lane = queue.lane
        batch: list[Call] = []
        taken = nbytes = 0
        wanted = min(limit, lane.rows) / 2
        begins_ns = self._begin_of(lane, now_ns) if level.rejects_late else 0
        while True:
            # As much as this client may have before it is another's turn.
            calls = rows = cost = served = 0
            is_shared = lane.active > 1
            is_full = False
            while calls < queue.live:
                call = queue.head()
                plan = call.plan
                if batch and (taken + plan.rows > limit or nbytes + call.nbytes > max_bytes or call.is_alone):
                    is_full = True
                    break
                if begins_ns and call.deadline_ns:
                    fit = lane.line.rows_within((call.deadline_ns - begins_ns) / self._overrun)
                    is_old = now_ns - call.admitted_ns > call.deadline_ns - now_ns
                    if fit < plan.rows or (is_old and fit < wanted):
                        queue.pop()
                        call.state = RUNNING
                        calls += 1
                        rows += plan.rows
                        cost += plan.cost
                        self.late.append(call)
                        self.queued_bytes -= call.nbytes
                        continue
                    if fit < taken + plan.rows:
                        is_full = True
                        break
                    limit = min(limit, fit)
                queue.pop()
                call.state = RUNNING
                calls += 1
                rows += plan.rows
                cost += plan.cost
                served += plan.cost
                batch.append(call)
                taken += plan.rows
                nbytes += call.nbytes
                if taken >= limit or call.is_alone:
                    is_full = True
                    break
                if is_shared:
                    break
            self.queued -= calls
            if served:
                level.charge(queue.flow, calls, served)
            if calls:
                level.count_out(queue, calls, rows, cost)
            if is_full or not lane.active:
                break
            queue = lane.next()
        self.queued_bytes -= nbytes
        self._margin = min(self._margin * 1.05, _MAX_MARGIN) if self.late else max(self._margin * 0.995, 1.0)
        return batch

    def _begin_of(self, lane: Lane, now_ns: int) -> int:
        """When the batch that is about to be made begins; 0 where it is not known how long it will take."""
        if lane.line.samples < _MIN_SAMPLES or now_ns - self.flights.last_end_ns > _DOUBT_NS:
            return 0
        return max(self.flights.free_ns, now_ns)

    def peek(self) -> Call | None:
        """A call that would head the next batch, or None."""
        for level in self.levels:
            if level.calls:
                return level.next().head()
        return None


def _admitted(call: Call) -> int:
    return call.admitted_ns


def _time(queue: Queue) -> float:
    return queue.flow.time
