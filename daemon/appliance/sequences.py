"""The sequences of one model: who has which seat, and whose step is next.

The steps of a sequence run one at a time, in the order they came; those of different sequences may share a batch. A
sequence keeps its seat, the place of its state in the worker, from its first step until it ends, and a first step that
finds every seat taken waits for one. What always holds: the state of a sequence that lives is the one after its last
answered step. So a step that never ran changes nothing, and one that may have run but was not answered ends its
sequence.

The module knows no clock and no loop: whoever calls says what time it is, and takes `Sequences.ready` and
`Sequences.failed` away.
"""

from collections import deque
from heapq import heappop, heappush
from typing import Final

from appliance.call import QUEUED, Call
from appliance.clients import Client
from appliance.errors import ApplianceError, Conflict, InvalidRequest
from appliance.manifest import SequenceSection
from appliance.wire.worker import STEP, STEP_END, STEP_START

#: Sequences of one client that it is remembered of why they ended.
_MAX_ENDED: Final = 64
_NO_SEAT: Final = -1


class Sequence:
    """One sequence.

    Attributes:
        client: Whose it is.
        id: What the client calls it.
        seat: Where its state is kept; `_NO_SEAT` while it waits for one.
        current: Its step that is queued or with the worker, or None.
        waiting: Steps behind that one, in order.
        is_open: True where the step that came last leaves it open to others.
        is_left: True once its client is gone.
        idle_ns: Since when it has no step.
    """

    __slots__ = ("client", "current", "id", "idle_ns", "is_left", "is_open", "seat", "waiting")

    def __init__(self, client: Client, id: int | str) -> None:
        self.client = client
        self.id = id
        self.seat = _NO_SEAT
        self.current: Call | None = None
        self.waiting: deque[Call] = deque()
        self.is_open = True
        self.is_left = False
        self.idle_ns = 0


class _Holdings:
    """What a client has: sequences that live, and why others ended, both by id."""

    __slots__ = ("ended", "live")

    def __init__(self) -> None:
        self.live: dict[int | str, Sequence] = {}
        self.ended: dict[int | str, str] = {}


class Sequences:
    """All sequences of one model. An id means nothing without its client, so nobody reaches another's state.

    Attributes:
        ready: Calls whose turn has come.
        failed: Calls that will not run, with the reason. One may stand in the queue.
        waiting: Calls that wait here.
        waiting_bytes: Bytes of their tensors.
        seats: Seats that nobody has.
    """

    def __init__(self, section: SequenceSection) -> None:
        self._idle_ns = int(section.idle_seconds * 1e9)
        self._takes_words = not section.controls.correlation_id
        self._max_sequences = section.max_sequences
        self.seats = list(range(section.max_sequences))  # a heap, since low seats make direct batches low
        self._clients: dict[Client, _Holdings] = {}
        self._backlog: dict[Sequence, None] = {}  # those without a seat, in order
        self._idle: dict[Sequence, None] = {}  # those without a step, longest first
        self.ready: list[Call] = []
        self.failed: list[tuple[Call, ApplianceError]] = []
        self.waiting = 0
        self.waiting_bytes = 0

    @property
    def live(self) -> int:
        """Sequences that have a seat."""
        return self._max_sequences - len(self.seats)

    @property
    def next_expiry_ns(self) -> int:
        """When the sequence that is idle for longest ends; 0 where none is idle."""
        return next(iter(self._idle)).idle_ns + self._idle_ns if self._idle else 0

    # ---------------------------------------------------------------- steps come

    def enter(self, call: Call) -> bool:
        """Take a step in.

        Returns:
            True where the call may be queued; False where it waits here until it is `ready` or has `failed`.

        Raises:
            InvalidRequest: It is no step of a sequence that its client has, nor the start of one.
            Conflict: Its sequence has ended otherwise than by the client's wish; it must be started again.
        """
        step = call.sequence
        if step is None:
            raise InvalidRequest(
                "cannot run the request: the model keeps state between requests, so sequence_id must say to which "
                "sequence it belongs"
            )
        if call.plan.rows != 1:
            raise InvalidRequest(
                f"cannot run the request: it has {call.plan.rows} rows, and a sequence takes one a time"
            )
        if not self._takes_words and isinstance(step.id, str):
            raise InvalidRequest("cannot run the request: the model is told its sequence_id, which must be a number")
        holdings = self._clients.get(call.client)
        sequence = holdings.live.get(step.id) if holdings is not None else None
        if not step.is_start and (sequence is None or not sequence.is_open):
            raise self._no_sequence(holdings, step.id)
        if holdings is None:
            holdings = self._clients[call.client] = _Holdings()
        if sequence is None:
            holdings.ended.pop(step.id, None)
            sequence = holdings.live[step.id] = Sequence(call.client, step.id)
            if self.seats:
                sequence.seat = heappop(self.seats)
            else:
                self._backlog[sequence] = None
        sequence.is_open = not step.is_end
        if sequence.seat == _NO_SEAT or sequence.current is not None:
            sequence.waiting.append(call)
            self.waiting += 1
            self.waiting_bytes += call.nbytes
            return False
        self._idle.pop(sequence, None)
        sequence.current = call
        return True

    def _no_sequence(self, holdings: _Holdings | None, id: int | str) -> ApplianceError:
        reason = holdings.ended.get(id) if holdings is not None else None
        if reason:
            return _over(reason)
        return InvalidRequest(
            "cannot go on with the sequence: this client has none with that sequence_id; the first request of one must "
            "have sequence_start"
        )

    def frame(self, calls: list[Call]) -> bytes:
        """What RUN says of the steps of a batch."""
        parts = []
        for call in calls:
            step = call.sequence
            sequence = self._of(call)
            if step is None or sequence is None:
                raise ValueError("cannot frame a call that is no step of a sequence that lives")
            flags = (STEP_START if step.is_start else 0) | (STEP_END if step.is_end else 0)
            parts.append(STEP.pack(sequence.seat, flags, step.id if isinstance(step.id, int) else 0))
        return b"".join(parts)

    def _of(self, call: Call) -> Sequence | None:
        """The sequence that `call` is a step of."""
        holdings = self._clients.get(call.client)
        return holdings.live.get(call.sequence.id) if holdings is not None and call.sequence is not None else None

    # ---------------------------------------------------------------- steps go

    def answer(self, call: Call, now_ns: int) -> None:
        """The worker has run a step, and it is being answered."""
        sequence = self._of(call)
        if sequence is not None and sequence.current is call:
            self._advance(sequence, now_ns)

    def skip(self, call: Call, now_ns: int) -> None:
        """A step will never run: steps that came behind it fail too, up to where the sequence starts anew.

        Where it is a start itself, there is no sequence. Calls that are no steps are passed over.
        """
        sequence = self._of(call)
        if sequence is None or call.sequence is None:
            return
        waiting, ahead = sequence.waiting, 0
        if sequence.current is not call:
            if call not in waiting:
                return
            ahead = waiting.index(call)
            del waiting[ahead]
            self._count_out(call)
        error = Conflict("cannot run the request: the one before it in its sequence did not run")
        if not self._drop_behind(sequence, ahead, error):
            sequence.is_open = not (call.sequence.is_start or sequence.is_left)
        if sequence.current is call:
            self._advance(sequence, now_ns)
        elif not waiting and sequence.current is None:
            self._end(sequence)

    def fail(self, call: Call, reason: str, now_ns: int) -> None:
        """The worker had a step, and nobody gets its answer: the sequence ends."""
        sequence = self._of(call)
        if sequence is not None and sequence.current is call:
            self._break(sequence, reason, now_ns)

    def lose(self, reason: str, now_ns: int) -> None:
        """The worker is gone with all states: nothing is left but starts that still wait."""
        seated = [one for holdings in self._clients.values() for one in holdings.live.values() if one.seat != _NO_SEAT]
        for sequence in seated:
            current = sequence.current
            if current is not None and current.state is QUEUED and current.sequence is not None:
                if current.sequence.is_start:
                    continue
                self.failed.append((current, _over(reason)))
            self._break(sequence, reason, now_ns)

    def forget(self, client: Client) -> None:
        """A client is gone: its sequences end as soon as nothing of them runs."""
        holdings = self._clients.get(client)
        if holdings is None:
            return
        holdings.ended.clear()
        for sequence in list(holdings.live.values()):
            sequence.is_left = True
            sequence.is_open = False
            if sequence.current is None and not sequence.waiting:
                self._end(sequence)
        if not holdings.live:
            self._clients.pop(client, None)

    def expire(self, now_ns: int) -> None:
        """End the sequences that are idle for too long."""
        while self._idle:
            sequence = next(iter(self._idle))
            if sequence.idle_ns + self._idle_ns > now_ns:
                return
            self._end(sequence, f"it had no request for {self._idle_ns / 1e9:g} s")

    def clear(self) -> list[Call]:
        """End everything; returns the steps that waited here."""
        sequences = [sequence for holdings in self._clients.values() for sequence in holdings.live.values()]
        waiting = [call for sequence in sequences for call in sequence.waiting]
        waiting += [call for call, _ in self.failed]
        waiting += self.ready
        self.seats = list(range(self._max_sequences))
        self._clients.clear()
        self._backlog.clear()
        self._idle.clear()
        self.ready, self.failed = [], []
        self.waiting = self.waiting_bytes = 0
        return waiting

    def inherit(self, other: "Sequences", reason: str) -> None:
        """Remember the sequences of `other`, in whose place this one comes, as ended."""
        for client, theirs in other._clients.items():
            holdings = self._clients.setdefault(client, _Holdings())
            for id, why in theirs.ended.items():
                _note(holdings.ended, id, why)
            for id, sequence in theirs.live.items():
                if sequence.is_open:
                    _note(holdings.ended, id, reason)

    # ---------------------------------------------------------------- what follows

    def _advance(self, sequence: Sequence, now_ns: int) -> None:
        """The step that ran or was dropped is over: the next is ready, or the sequence idle or at its end."""
        sequence.current = None
        if sequence.waiting:
            self._call_up(sequence)
        elif sequence.is_open:
            sequence.idle_ns = now_ns
            self._idle[sequence] = None
        else:
            self._end(sequence)

    def _break(self, sequence: Sequence, reason: str, now_ns: int) -> None:
        """The state is of no use: fail what builds on it."""
        if self._drop_behind(sequence, 0, _over(reason)):
            self._advance(sequence, now_ns)
        else:
            sequence.current = None
            self._end(sequence, reason)

    def _drop_behind(self, sequence: Sequence, ahead: int, error: ApplianceError) -> bool:
        """Fail the waiting steps behind the first `ahead`, up to a start; returns whether there is one."""
        waiting = sequence.waiting
        kept = [waiting.popleft() for _ in range(ahead)]
        while waiting:
            first = waiting[0]
            if first.sequence is not None and first.sequence.is_start:
                break
            self._count_out(waiting.popleft())
            self.failed.append((first, error))
        found = bool(waiting)
        waiting.extendleft(reversed(kept))
        return found

    def _end(self, sequence: Sequence, reason: str = "") -> None:
        """Take a sequence without steps away; its seat goes to whoever waits for one the longest."""
        holdings = self._clients[sequence.client]
        del holdings.live[sequence.id]
        self._idle.pop(sequence, None)
        if reason and not sequence.is_left:
            _note(holdings.ended, sequence.id, reason)
        elif not holdings.live and not holdings.ended:
            del self._clients[sequence.client]
        if sequence.seat == _NO_SEAT:
            del self._backlog[sequence]
        elif self._backlog:
            heir = next(iter(self._backlog))
            del self._backlog[heir]
            heir.seat = sequence.seat
            self._call_up(heir)
        else:
            heappush(self.seats, sequence.seat)

    def _call_up(self, sequence: Sequence) -> None:
        """The first step that waits is ready."""
        call = sequence.current = sequence.waiting.popleft()
        self._count_out(call)
        self.ready.append(call)

    def _count_out(self, call: Call) -> None:
        self.waiting -= 1
        self.waiting_bytes -= call.nbytes


def _over(reason: str) -> Conflict:
    return Conflict(f"cannot go on with the sequence: {reason}; start it again")


def _note(ended: dict[int | str, str], id: int | str, reason: str) -> None:
    ended.pop(id, None)
    ended[id] = reason
    if len(ended) > _MAX_ENDED:
        del ended[next(iter(ended))]
