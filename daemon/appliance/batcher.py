"""The queue of one model and the choice of the next batch.

Bounded by count and bytes, one queue per shape signature, first come first served among the signatures' oldest calls.
How many rows to take is the policy's choice; `EagerPolicy` takes the largest batch that is there, as Triton does, and
never waits for more. The module knows no model semantics, no sockets and no clock.
"""

from collections import deque
from typing import Final, Protocol

from appliance.call import FINISHED, QUEUED, RUNNING, Call
from appliance.errors import Overloaded

#: Withdrawn calls, beyond as many as wait, that may still stand in the queues before they are swept out.
_MAX_STALE: Final = 1024


class Policy(Protocol):
    """How large the next batch shall be."""

    def rows_to_take(self, waiting_rows: int, max_rows: int, in_flight: int) -> int:
        """Rows of the next batch.

        Args:
            waiting_rows: Rows waiting in all queues, at least 1.
            max_rows: Most rows the session takes.
            in_flight: Batches the worker already has.

        Returns:
            0 to hold the batch back, else a number up to `max_rows`.
        """
        ...


class EagerPolicy:
    """Work-conserving: whatever is there, at once."""

    def rows_to_take(self, waiting_rows: int, max_rows: int, in_flight: int) -> int:
        """All that is waiting, up to `max_rows`."""
        return min(waiting_rows, max_rows)


class Batcher:
    """Calls waiting for one model.

    Attributes:
        queued: Calls waiting.
        queued_bytes: Bytes of their tensors.
        queued_rows: Rows of them.
    """

    def __init__(self, policy: Policy, max_queue_size: int, max_queue_bytes: int) -> None:
        self._policy = policy
        self._max_queue_size = max_queue_size
        self._max_queue_bytes = max_queue_bytes
        self._arrivals: deque[Call] = deque()
        self._queues: dict[tuple[object, ...], deque[Call]] = {}
        self._withdrawn = 0
        self.queued = 0
        self.queued_bytes = 0
        self.queued_rows = 0

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

    def admit(self, call: Call) -> None:
        """Queue `call`.

        Raises:
            Overloaded: See `check_room`.
        """
        if self.queued >= self._max_queue_size or self.queued_bytes + call.nbytes > self._max_queue_bytes:
            self.check_room(call.nbytes)
        self._count_in(call).append(call)
        self._arrivals.append(call)

    def readmit(self, calls: list[Call]) -> None:
        """Queue calls that were admitted once already, whatever the bounds, before all that came after them."""
        for call in reversed(calls):
            self._count_in(call).appendleft(call)
            self._arrivals.appendleft(call)

    def _count_in(self, call: Call) -> deque[Call]:
        """Count `call` as queued; returns the queue it belongs to."""
        call.state = QUEUED
        self.queued += 1
        self.queued_bytes += call.nbytes
        self.queued_rows += call.plan.rows
        signature = call.plan.signature
        queue = self._queues.get(signature)
        if queue is None:
            queue = self._queues[signature] = deque()
        return queue

    def withdraw(self, call: Call) -> None:
        """Take a queued call out; its state becomes FINISHED and no batch will hold it."""
        call.state = FINISHED
        self._count_out(call)
        call.let_go()
        self._withdrawn += 1
        if self._withdrawn > self.queued + _MAX_STALE:
            self.readmit(self.drain())

    def collect(self, max_rows: int, max_bytes: int, in_flight: int) -> list[Call]:
        """Take the next batch: calls of one signature, oldest first; empty where there is none or the policy holds.

        Args:
            max_rows: Most rows the session takes; 1 for a model without batch dimension.
            max_bytes: Bytes of tensors the slab holds. One call alone may be larger.
            in_flight: Batches the worker already has.
        """
        arrivals = self._arrivals
        while arrivals and arrivals[0].state is not QUEUED:
            arrivals.popleft()
        if not arrivals:
            return []
        limit = self._policy.rows_to_take(self.queued_rows, max_rows, in_flight)
        if limit == 0:
            return []
        signature = arrivals[0].plan.signature
        queue = self._queues[signature]
        batch: list[Call] = []
        rows = nbytes = 0
        while queue:
            call = queue[0]
            if call.state is not QUEUED:
                queue.popleft()
                continue
            if batch and (rows + call.plan.rows > limit or nbytes + call.nbytes > max_bytes or call.is_alone):
                break
            queue.popleft()
            call.state = RUNNING
            self._count_out(call)
            batch.append(call)
            rows += call.plan.rows
            nbytes += call.nbytes
            if call.is_alone:
                break
        if not self.queued:
            self._clear()  # withdrawn calls of other signatures would stay for ever
        elif not queue:
            del self._queues[signature]
        return batch

    def peek(self) -> Call | None:
        """The call that would head the next batch, or None."""
        arrivals = self._arrivals
        while arrivals and arrivals[0].state is not QUEUED:
            arrivals.popleft()
        if not arrivals:
            return None
        queue = self._queues[arrivals[0].plan.signature]
        while queue[0].state is not QUEUED:
            queue.popleft()
        return queue[0]

    def drain(self) -> list[Call]:
        """Take every queued call, oldest first, as RUNNING like a batch's, so that nothing withdraws them."""
        # A call that was readmitted stands among the arrivals twice.
        calls = list(dict.fromkeys(call for call in self._arrivals if call.state is QUEUED))
        for call in calls:
            call.state = RUNNING
        self._clear()
        self.queued = self.queued_bytes = self.queued_rows = 0
        return calls

    def _clear(self) -> None:
        self._arrivals.clear()
        self._queues.clear()
        self._withdrawn = 0

    def _count_out(self, call: Call) -> None:
        self.queued -= 1
        self.queued_bytes -= call.nbytes
        self.queued_rows -= call.plan.rows
