"""Equal requests of one model: answered from the cache, or by one run for all that are in flight.

A call that is looked up in vain does not go to the queue itself. A call of its own goes there in its place, and whoever
asked waits for its answer, as do all that ask the same until then. So no one's withdrawal or deadline is felt by the
others: the run goes on while anybody waits for it.

A call that would have been served earlier than the one it could wait for (it is more urgent, is due earlier, or comes
from a client with less in flight) gets a place of its own in the queue as well. The first place that is served answers
everybody, and the others are given up.
"""

import time
from collections.abc import Callable, Iterator
from typing import Final

from appliance.cache import Answer, ResponseCache
from appliance.call import FINISHED, NEW, QUEUED, RUNNING, Call, OutputTable, Sink
from appliance.errors import ApplianceError, DeadlineExceeded, Overloaded
from appliance.metrics import ModelStatistics
from appliance.types import CacheStatus, Timings

#: Places that equal calls may have in the queue.
_MAX_PLACES: Final = 4
#: What an answer from the cache took in the worker: nothing, in a batch of no rows.
_NO_TIMINGS: Final = Timings()


class Joint:
    """Equal calls in flight.

    Attributes:
        key: The digest of what they ask.
        places: Calls in the queue or in the worker, any of which answers them; the most urgent last.
        waiting: Calls that wait for the answer, in the order they came.
    """

    __slots__ = ("key", "places", "waiting")

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.places: list[Call] = []
        self.waiting: dict[Call, None] = {}


class SingleFlight:
    """What one model has in flight, and the cache before it. To the queue it is the calls' sink."""

    def __init__(
        self,
        cache: ResponseCache,
        statistics: ModelStatistics,
        max_request_bytes: int,
        max_waiting: int,
        level_of: Callable[[int], int],
        withdraw: Callable[[Call], None],
        soon: Callable[[Callable[[], None]], object],
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Make one.

        Args:
            cache: Where answers are kept.
            statistics: What happens is counted here.
            max_request_bytes: Calls with more bytes are left alone.
            max_waiting: Calls that may wait without a place in the queue.
            level_of: The level of a priority; 1 is the most urgent.
            withdraw: Takes a call out of the queue or the worker, silently.
            soon: Calls a function in a later turn of the loop.
            clock: CLOCK_MONOTONIC nanoseconds.
        """
        self.cache = cache
        self._statistics = statistics
        self._max_request_bytes = max_request_bytes
        self._max_waiting = max_waiting
        self._level_of = level_of
        self._withdraw = withdraw
        self._soon = soon
        self._clock = clock
        self._joints: dict[bytes, Joint] = {}
        self._asked: dict[Call, Joint] = {}  # by place
        self._waiting: dict[Call, Joint] = {}
        self._hits: list[tuple[Call, Answer]] = []
        self._unflushed: dict[Sink, None] = {}

    def status(self) -> CacheStatus:
        """How the cache fares."""
        counts = self._statistics
        spared = counts.cache_hit.count + counts.cache_joined
        looked_up = spared + counts.cache_miss.count
        return CacheStatus(len(self.cache), self.cache.nbytes, spared / looked_up if looked_up else 0.0)

    # ---------------------------------------------------------------- calls come and go

    def enter(self, call: Call) -> Call | None:
        """Answer `call` from the cache, let it wait for an equal one, or say what is to be queued for it.

        Returns:
            None where nothing is; `call` itself where it is too large to be looked up; else a new call, whose answer
            `call` waits for. Where that is refused, `give_up` says what becomes of `call`.

        Raises:
            DeadlineExceeded: Its deadline has passed.
            Overloaded: As many wait for others' answers as may.
        """
        if call.nbytes > self._max_request_bytes:
            return call
        began = self._clock()
        if call.deadline_ns and call.deadline_ns <= began:
            self._statistics.refuse(DeadlineExceeded.kind)
            raise DeadlineExceeded("cannot run the request: its deadline has passed")
        if call.region_views:
            # A client could change a region between the digest and the run, and so make others get a wrong answer.
            call.contents = [bytes(content) for content in call.contents]
        key = self.cache.key(call)
        answer = self.cache.get(key, began)
        if answer is not None:
            call.admitted_ns = began
            call.let_go()
            if not self._hits:
                self._soon(self._answer_hits)
            self._hits.append((call, answer))
            self._statistics.cache_hit.add(self._clock() - began)
            return None
        joint = self._joints.get(key)
        place = None
        if joint is None:
            joint = self._joints[key] = Joint(key)
            place = self._place(call, joint)
            self._statistics.cache_miss.add(self._clock() - began)
        else:
            others = len(self._waiting) - len(self._asked)
            if others >= self._max_waiting:
                self._statistics.refuse(Overloaded.kind)
                raise Overloaded(
                    f"cannot queue the request: {others} wait for equal ones already and max_queue_size is "
                    f"{self._max_waiting}"
                )
            if self._is_ahead(call, joint):
                place = self._place(call, joint)
            else:
                call.let_go()
                call.nbytes = 0
                call.charge()  # it still counts among its client's requests, without bytes
            self._extend(joint, call.deadline_ns)
            self._statistics.cache_joined += 1
        call.admitted_ns = began
        joint.waiting[call] = None
        self._waiting[call] = joint
        return place

    def _place(self, call: Call, joint: Joint) -> Call:
        """A call that carries the tensors of `call`, and goes on its client's account in its stead."""
        place = Call(call.plan, call.contents, self, 0, call.deadline_ns, call.client)
        place.nbytes = call.nbytes
        place.priority = call.priority
        call.let_go()
        place.charge()
        joint.places.append(place)
        self._asked[place] = joint
        return place

    def _is_ahead(self, call: Call, joint: Joint) -> bool:
        """True where `call` would be served before the places its equals have."""
        places = joint.places
        last = places[-1]
        if len(places) >= _MAX_PLACES or any(place.state is RUNNING for place in places):
            return False
        level, other = self._level_of(call.priority), self._level_of(last.priority)
        if level != other:
            return level < other
        if call.client is not last.client:
            return call.client.requests < last.client.requests
        return call.deadline_ns > 0 and (not last.deadline_ns or call.deadline_ns < last.deadline_ns)

    @staticmethod
    def _extend(joint: Joint, deadline_ns: int) -> None:
        """Let no place be dropped while somebody who waits has time left."""
        for place in joint.places:
            if place.deadline_ns and (not deadline_ns or deadline_ns > place.deadline_ns):
                place.deadline_ns = deadline_ns

    def leave(self, call: Call) -> None:
        """`call` waits no more: it was withdrawn, or its deadline has passed."""
        joint = self._waiting.pop(call, None)
        if joint is None:
            return
        del joint.waiting[call]
        if not joint.waiting:
            self._forget(joint)

    def forgive(self, call: Call) -> list[Call]:
        """Let `call` wait on past its deadline; returns places in the queue that nobody with time left waits for."""
        call.deadline_ns = 0
        joint = self._waiting.get(call)
        if joint is None:
            return []
        self._extend(joint, 0)
        if any(each.deadline_ns for each in joint.waiting):
            return []
        return [place for place in joint.places if place.state is QUEUED]

    def give_up(self, place: Call, call: Call) -> bool:
        """`place`, which `enter` gave for `call`, was refused; returns False where `call` still gets an answer."""
        place.let_go()
        joint = self._asked.pop(place)
        joint.places.remove(place)
        if joint.places:
            call.nbytes = 0
            call.charge()
            return False
        del self._joints[joint.key]
        del self._waiting[call]
        call.state = FINISHED
        return True

    def _forget(self, joint: Joint) -> None:
        """Take equal calls out of flight, and their places with them."""
        del self._joints[joint.key]
        for place in joint.places:
            del self._asked[place]
            if place.state is not FINISHED:
                self._withdraw(place)

    def begin(self, batch: list[Call]) -> list[Call]:
        """A batch goes to the worker; returns it without places whose equals it holds already."""
        given_up: set[Call] = set()
        for call in batch:
            joint = self._asked.get(call)
            if joint is not None and len(joint.places) > 1:
                others = [place for place in joint.places if place is not call]
                joint.places = [call]
                for place in others:
                    del self._asked[place]
                    self._withdraw(place)
                    place.let_go()
                given_up.update(others)
                for each in joint.waiting:
                    self._extend(joint, each.deadline_ns)
        return [call for call in batch if call not in given_up] if given_up else batch

    # ---------------------------------------------------------------- answers

    def deliver(self, place: Call, table: OutputTable, memory: memoryview, row: int, timings: Timings) -> None:
        """Give the answer to all that wait for it, and keep it."""
        joint = self._asked[place]
        self._forget(joint)
        now = self._clock()
        self.cache.put(joint.key, Answer.copy(place.plan, table, memory, row), now)
        began = place.admitted_ns + place.queue_ns
        statistics = self._statistics
        for number, call in enumerate(self._take_waiting(joint)):
            call.queue_ns = max(began - call.admitted_ns, 0)
            call.tokenise_ns = place.tokenise_ns
            call.sink.deliver(call, table, memory, row, timings)
            if number:  # the first is counted as the place
                statistics.success.add(now - call.admitted_ns)
                statistics.queue.add(call.queue_ns)

    def fail(self, place: Call, error: ApplianceError) -> None:
        """Give the error to all that wait for the answer, unless it was too late for one place alone."""
        joint = self._asked[place]
        if isinstance(error, DeadlineExceeded) and len(joint.places) > 1:
            joint.places.remove(place)
            del self._asked[place]
            return
        self._forget(joint)
        now = self._clock()
        for number, call in enumerate(self._take_waiting(joint)):
            call.sink.fail(call, error)
            if number:
                self._statistics.fail.add(now - call.admitted_ns)

    def flush(self) -> None:
        """Flush those who were told something."""
        sinks, self._unflushed = self._unflushed, {}
        for sink in sinks:
            sink.flush()

    def _take_waiting(self, joint: Joint) -> Iterator[Call]:
        """The calls that wait for an answer, each as finished; their sinks are flushed with the next `flush`."""
        for call in joint.waiting:
            del self._waiting[call]
        for call in joint.waiting:
            if call.state is NEW:  # none was withdrawn by what another's sink did
                call.state = FINISHED
                call.let_go()
                self._unflushed[call.sink] = None
                yield call

    def _answer_hits(self) -> None:
        hits, self._hits = self._hits, []
        now = self._clock()
        statistics = self._statistics
        for call, answer in hits:
            if call.state is NEW:
                call.state = FINISHED
                self._unflushed[call.sink] = None
                call.sink.deliver(call, answer.table, answer.memory, 0, _NO_TIMINGS)
                statistics.success.add(now - call.admitted_ns)
                statistics.queue.add(0)
        self.flush()
