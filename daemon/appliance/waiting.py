"""Calls that wait for one model: by level of priority, in a level by client, of a client the most urgent first.

Clients share a level by weighted fair queueing with virtual times (Goyal, Vin, Cheng: start-time fair queueing): a
client's time advances by what its calls cost divided by its weight, and the client whose time is earliest goes next.
Unlike deficit round robin it needs no quantum, which calls of 16 and of 65,536 tokens could not share. A client that
comes back after a pause starts at the time of those being served, so that nobody saves up.

Every choice costs the logarithm of the number of clients or less. Withdrawn calls stay where they stand until they
reach the front or outnumber the rest.
"""

from collections import deque
from heapq import heapify, heappop, heappush, heapreplace
from typing import Final

from appliance.call import QUEUED, Call
from appliance.clients import Client
from appliance.cost_line import Line
from appliance.cost_model import CostModel

#: Clients, and shapes likewise, that a level keeps the bookkeeping of although nothing of theirs waits.
_MAX_KEPT: Final = 1024
#: Withdrawn calls that may stand in a queue beside those that wait.
_MAX_STALE: Final = 64
#: Virtual times go back to zero before the cheapest call of the weightiest client would be lost in their rounding.
_MAX_TIME: Final = 1e12


class Queue:
    """Calls of one client, one level and one shape.

    Attributes:
        flow: The client's part of the level.
        lane: The shape's part of the level.
        live: Calls that wait.
        is_listed: True while the lane's heap holds it.
    """

    __slots__ = ("_in_order", "_others", "_stale", "flow", "is_listed", "lane", "live")

    def __init__(self, flow: "Flow", lane: "Lane") -> None:
        self.flow = flow
        self.lane = lane
        self.live = 0
        self.is_listed = False
        self._in_order: deque[Call] = deque()  # due times ascend, as those of calls with equal time limits do
        self._others: list[tuple[int, int, Call]] = []  # a heap of those that came out of order
        self._stale = 0

    def push(self, call: Call) -> None:
        """Put `call` where its due time says."""
        in_order = self._in_order
        if not in_order or call.due_ns >= in_order[-1].due_ns:
            in_order.append(call)
        else:
            heappush(self._others, (call.due_ns, id(call), call))

    def push_first(self, call: Call) -> None:
        """Put `call` before all others."""
        if self.live:
            call.due_ns = min(call.due_ns, self.head().due_ns)
        self._in_order.appendleft(call)

    def head(self) -> Call:
        """The most urgent call; there must be one."""
        in_order, others = self._in_order, self._others
        while in_order and in_order[0].state is not QUEUED:
            in_order.popleft()
        while others and others[0][2].state is not QUEUED:
            heappop(others)
        if others and (not in_order or others[0][0] < in_order[0].due_ns):
            return others[0][2]
        return in_order[0]

    def pop(self) -> Call:
        """Take the most urgent call out; there must be one."""
        in_order, others = self._in_order, self._others
        if not others:
            while True:
                call = in_order.popleft()
                if call.state is QUEUED:
                    return call
        call = self.head()
        if in_order and in_order[0] is call:
            return in_order.popleft()
        return heappop(others)[2]

    def remove(self, call: Call) -> None:
        """Take out a call that stands here, wherever it does."""
        if call in self._in_order:
            self._in_order.remove(call)
        else:
            self._others = sorted(entry for entry in self._others if entry[2] is not call)

    def share_before(self, due_ns: int) -> float:
        """About what share of the calls that wait goes before one that is due then, 0 to 1."""
        in_order = self._in_order
        if not in_order or due_ns >= in_order[-1].due_ns:
            return 1.0
        first_ns, last_ns = in_order[0].due_ns, in_order[-1].due_ns
        return (due_ns - first_ns) / (last_ns - first_ns) if due_ns > first_ns else 0.0

    def note_withdrawn(self) -> None:
        """One call that stands here waits no more."""
        self._stale += 1
        if self._stale > self.live + _MAX_STALE:
            self._in_order = deque(call for call in self._in_order if call.state is QUEUED)
            self._others = sorted(entry for entry in self._others if entry[2].state is QUEUED)
            self._stale = 0

    def take_all(self) -> list[Call]:
        """Take every call out."""
        calls = [call for call in self._in_order if call.state is QUEUED]
        calls += [entry[2] for entry in self._others if entry[2].state is QUEUED]
        self.clear()
        return calls

    def clear(self) -> None:
        """Drop what waits no more; nothing else may be here."""
        self._in_order.clear()
        self._others.clear()
        self._stale = 0


class Flow:
    """One client's part of a level.

    Attributes:
        client: Whose.
        cost: What its calls that wait will cost, in rows times elements of a row's variable dimensions.
        time: Virtual time: what its calls have cost so far, divided by its weight.
        queues: Those that hold a call.
        is_listed: True while the level's heap holds it.
    """

    __slots__ = ("client", "cost", "is_listed", "queues", "time")

    def __init__(self, client: Client) -> None:
        self.client = client
        self.cost = 0
        self.time = 0.0
        self.queues: list[Queue] = []
        self.is_listed = False

    def first(self) -> Queue:
        """The queue with the most urgent call; there must be one."""
        queues = self.queues
        return queues[0] if len(queues) == 1 else min(queues, key=_due)


def _due(queue: Queue) -> int:
    return queue.head().due_ns


class Lane:
    """One shape's part of a level: calls that may share a batch.

    Attributes:
        signature: The shape.
        line: What its batches cost.
        rows: Rows that wait.
        queues: By client.
        active: Queues that hold a call.
    """

    __slots__ = ("_heap", "_turn", "active", "line", "queues", "rows", "signature")

    def __init__(self, signature: tuple[object, ...], line: Line) -> None:
        self.signature = signature
        self.line = line
        self.rows = 0
        self.queues: dict[Client, Queue] = {}
        self.active = 0
        self._heap: list[tuple[float, int, Queue]] = []
        self._turn = 0

    def list(self, queue: Queue) -> None:
        """Let `queue`, which holds a call now, take part."""
        self._turn += 1
        heappush(self._heap, (queue.flow.time, self._turn, queue))
        queue.is_listed = True

    def next(self) -> Queue:
        """The queue of the client whose turn it is; there must be one. Times that have advanced are looked up late."""
        heap = self._heap
        while True:
            time, _, queue = heap[0]
            if not queue.live:
                heappop(heap)
                queue.is_listed = False
            elif queue.flow.time > time:
                self._turn += 1
                heapreplace(heap, (queue.flow.time, self._turn, queue))
            else:
                return queue

    def relist(self) -> None:
        """Look up all times anew."""
        self._heap = [(queue.flow.time, turn, queue) for _, turn, queue in self._heap]
        heapify(self._heap)

    def forget(self) -> None:
        """Drop queues that hold no call."""
        self.queues = {client: queue for client, queue in self.queues.items() if queue.live}
        self._heap = [entry for entry in self._heap if entry[2].live]
        heapify(self._heap)


class Level:
    """Calls of one priority.

    Attributes:
        number: 1 is the most urgent.
        calls: Calls that wait.
        max_calls: Calls that may.
        cost: What they will cost, in rows times elements of a row's variable dimensions.
        credit: Nanoseconds of the worker's time it has gathered while other levels were served.
        served_ns: When a batch of it was taken last.
        rejects_late: True where deadlines bind; else they say in which order calls go.
        weight: Weights of the clients with waiting calls, together.
        lanes: By shape.
    """

    def __init__(self, number: int, cost_model: CostModel) -> None:
        self.number = number
        self._cost_model = cost_model
        self._flows: dict[Client, Flow] = {}
        self._heap: list[tuple[float, int, Flow]] = []
        self._turn = 0
        self._time = 0.0  # of those being served
        self._max_lanes = self._max_queues = _MAX_KEPT
        self._queues = 0
        self.calls = 0
        self.cost = 0
        self.credit = 0.0
        self.weight = 0.0
        self.served_ns = -(1 << 62)
        self.rejects_late = True
        self.max_calls = 1 << 62
        self.lanes: dict[tuple[object, ...], Lane] = {}

    def queue_for(self, call: Call) -> Queue:
        """Where `call` belongs."""
        lane = self.lanes.get(call.plan.signature)
        if lane is None:
            lane = self._new_lane(call)
        queue = lane.queues.get(call.client)
        if queue is None:
            queue = self._new_queue(lane, call.client)
        return queue

    def _new_lane(self, call: Call) -> Lane:
        if len(self.lanes) >= self._max_lanes:
            self._forget()
        lane = self.lanes[call.plan.signature] = Lane(call.plan.signature, self._cost_model.line(call.plan.units))
        return lane

    def _new_queue(self, lane: Lane, client: Client) -> Queue:
        if self._queues >= self._max_queues:
            self._forget(lane)
        flow = self._flows.get(client)
        if flow is None:
            flow = self._flows[client] = Flow(client)
        queue = lane.queues[client] = Queue(flow, lane)
        self._queues += 1
        return queue

    def _forget(self, wanted: Lane | None = None) -> None:
        """Drop what nothing waits in; the bounds double with what is left, so that it is not searched all the time.

        The lane `wanted` stays, empty or not.
        """
        self.lanes = {signature: lane for signature, lane in self.lanes.items() if lane.active or lane is wanted}
        for lane in self.lanes.values():
            lane.forget()
        self._flows = {client: flow for client, flow in self._flows.items() if flow.queues}
        self._heap = [entry for entry in self._heap if entry[2].queues]
        heapify(self._heap)
        self._queues = sum(len(lane.queues) for lane in self.lanes.values())
        self._max_lanes = max(_MAX_KEPT, 2 * len(self.lanes))
        self._max_queues = max(_MAX_KEPT, 2 * self._queues)

    def count_in(self, queue: Queue, call: Call) -> None:
        """`call` stands in `queue` now."""
        plan = call.plan
        if not queue.live:
            self._wake(queue)
        queue.live += 1
        queue.lane.rows += plan.rows
        queue.flow.cost += plan.cost
        self.calls += 1
        self.cost += plan.cost

    def _wake(self, queue: Queue) -> None:
        """`queue` is about to hold a call."""
        lane, flow = queue.lane, queue.flow
        if not flow.queues:
            if flow.time < self._time:
                flow.time = self._time
            self.weight += flow.client.weight
            if not flow.is_listed:
                self._turn += 1
                heappush(self._heap, (flow.time, self._turn, flow))
                flow.is_listed = True
        flow.queues.append(queue)
        lane.active += 1
        if not queue.is_listed:
            lane.list(queue)

    def count_out(self, queue: Queue, calls: int, rows: int, cost: int) -> None:
        """So many calls, which have so many rows and cost so much, stand in `queue` no more."""
        queue.live -= calls
        queue.lane.rows -= rows
        queue.flow.cost -= cost
        self.calls -= calls
        self.cost -= cost
        if not queue.live:
            flow = queue.flow
            queue.clear()
            queue.lane.active -= 1
            flow.queues.remove(queue)
            if not flow.queues:
                self.weight -= flow.client.weight

    def charge(self, flow: Flow, calls: int, cost: int) -> None:
        """So many calls of `flow`, which cost so much together, are being served: the level is at the last of them."""
        share = cost / flow.client.weight
        self._time = flow.time + share - share / calls
        flow.time += share
        if self._time > _MAX_TIME:
            self._rewind()

    def _rewind(self) -> None:
        """Count virtual times from now on."""
        now, self._time = self._time, 0.0
        self._forget()
        for flow in self._flows.values():
            flow.time -= now
        self._heap = [(flow.time, turn, flow) for _, turn, flow in self._heap]
        heapify(self._heap)
        for lane in self.lanes.values():
            lane.relist()

    def next(self) -> Queue:
        """The queue whose first call is next in turn; there must be one."""
        heap = self._heap
        while True:
            time, _, flow = heap[0]
            if not flow.queues:
                heappop(heap)
                flow.is_listed = False
            elif flow.time > time:
                self._turn += 1
                heapreplace(heap, (flow.time, self._turn, flow))
            else:
                return flow.first()

    def take_all(self) -> list[Call]:
        """Take every call out; the level forgets its clients and shapes."""
        calls = [call for lane in self.lanes.values() for queue in lane.queues.values() for call in queue.take_all()]
        self.lanes.clear()
        self._flows.clear()
        self._heap.clear()
        self._queues = 0
        self.calls = self.cost = 0
        self.weight = self.credit = 0.0
        return calls
