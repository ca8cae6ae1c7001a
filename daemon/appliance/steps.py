"""The sequences of an instance between its queue and its worker: steps are let through when their turn comes.

`appliance.sequences` decides; here is what that takes: the queue, the clock, and a timer for sequences that idle.
"""

import asyncio
import time
from collections.abc import Callable, Container, Sequence

from appliance.batcher import Batcher
from appliance.call import FINISHED, QUEUED, RUNNING, Call
from appliance.clients import Client
from appliance.errors import ApplianceError
from appliance.manifest import SequenceSection
from appliance.poison import Suspects
from appliance.sequences import Sequences


class Steps:
    """Calls of a model that keeps state between requests.

    Attributes:
        sequences: The bookkeeping.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        section: SequenceSection,
        batcher: Batcher,
        suspects: Suspects,
        fail: Callable[[list[Call], ApplianceError], None],
        wake: Callable[[], None],
    ) -> None:
        """Make one.

        Args:
            loop: The event loop.
            section: The manifest's.
            batcher: Takes calls whose turn has come.
            suspects: Calls that a worker may have died of.
            fail: Answers calls that will not run.
            wake: Called where calls were queued or have failed.
        """
        self._loop = loop
        self._batcher = batcher
        self._suspects = suspects
        self._fail = fail
        self._wake = wake
        self._timer: asyncio.TimerHandle | None = None
        self._handle: asyncio.Handle | None = None
        self._is_closed = False
        self.sequences = Sequences(section)

    @property
    def waiting(self) -> int:
        """Calls that are here and not in the queue."""
        sequences = self.sequences
        return sequences.waiting + len(sequences.ready) + len(sequences.failed)

    def enter(self, call: Call) -> bool:
        """Take a call in; False where it waits here, and is queued or fails later.

        Raises:
            ApplianceError: It cannot be taken: as `Sequences.enter` says, or since the queue is full.
        """
        self._batcher.check_room(call.nbytes, self.waiting, self.sequences.waiting_bytes)
        return self.sequences.enter(call)

    def frame(self, calls: list[Call]) -> bytes:
        """What RUN says of the steps of a batch."""
        return self.sequences.frame(calls)

    def ran(self, calls: Sequence[Call], failed: Container[int]) -> None:
        """The worker has answered a batch, rows in `failed` with an error."""
        now = time.monotonic_ns()
        sequences = self.sequences
        for row, call in enumerate(calls):
            if call.state is not RUNNING:
                sequences.fail(call, "its last request was withdrawn, or late, while it ran", now)
            elif row in failed:
                sequences.fail(call, "its last request failed", now)
            else:
                sequences.answer(call, now)
        self._settle()

    def failed(self, calls: Sequence[Call]) -> None:
        """The worker had calls that nobody gets an answer to."""
        now = time.monotonic_ns()
        for call in calls:
            self.sequences.fail(call, "its last request failed", now)
        self._settle()

    def skip(self, calls: Sequence[Call]) -> None:
        """Calls that have gone will never run; others hear of it in a later turn of the loop."""
        now = time.monotonic_ns()
        for call in calls:
            self.sequences.skip(call, now)
        self._settle_soon()

    def lose(self) -> None:
        """The worker is gone, and what it had was failed."""
        self._settle()
        self.sequences.lose("its state was lost with the worker", time.monotonic_ns())
        self._settle()

    def forget(self, client: Client) -> None:
        """A client is gone."""
        self.sequences.forget(client)
        self._settle_soon()

    def fail_all(self, error: ApplianceError) -> None:
        """End every sequence; the steps that wait here fail with `error`, those in the queue are somebody else's."""
        self._fail([call for call in self.sequences.clear() if call.state is not QUEUED], error)

    def close(self, error: ApplianceError) -> None:
        """End every sequence, for good."""
        self._is_closed = True
        self.fail_all(error)
        for handle in (self._timer, self._handle):
            if handle is not None:
                handle.cancel()

    def _settle_soon(self) -> None:
        if self._handle is None and not self._is_closed:
            self._handle = self._loop.call_soon(self._settle)

    def _settle(self) -> None:
        """Queue what is ready, fail what has failed, and see to the timer."""
        self._handle = None
        sequences, batcher = self.sequences, self._batcher
        now = time.monotonic_ns()
        is_changed = False
        while sequences.ready or sequences.failed:
            is_changed = True
            failed, sequences.failed = sequences.failed, []
            for call, error in failed:
                if call.state is QUEUED:
                    batcher.withdraw(call)
                    call.state = RUNNING  # nobody has been told yet
                self._fail([call], error)
            ready, sequences.ready = sequences.ready, []
            for call in ready:
                if call.state is FINISHED:
                    continue
                try:
                    if self._suspects:
                        self._suspects.judge(call, now)
                    batcher.admit(call, now)
                except ApplianceError as error:
                    self._fail([call], error)
                    sequences.skip(call, now)
        if is_changed:
            self._wake()
        if self._timer is None and not self._is_closed and (due_ns := sequences.next_expiry_ns):
            self._timer = self._loop.call_later(max(due_ns - now, 0) / 1e9, self._expire)

    def _expire(self) -> None:
        self._timer = None
        self.sequences.expire(time.monotonic_ns())
        self._settle()
