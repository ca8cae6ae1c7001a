"""Long work that an administrator asked for or that idle time allows: one at a time, with progress, to be cancelled."""

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from appliance.errors import ApplianceError, Conflict, InvalidRequest

_log = logging.getLogger("appliance.jobs")

#: Finished jobs that are kept for whoever asks how they ended, and jobs that may wait.
_KEPT: Final = 50
_MAX_WAITING: Final = 64


class JobState(StrEnum):
    """Where a job stands. The last three are ends."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(slots=True)
class Job:
    """One piece of work.

    Attributes:
        id: Number, as text.
        kind: ``"tune"`` or ``"quantize"``.
        model: The model it is about.
        by_itself: True where the daemon started it in idle time.
        gave_way: It was ended for one that somebody asked for.
        state: Where it stands; `PAUSED` while it yields to requests.
        step: What it does now, for people.
        done: Parts of the work that are done.
        total: Parts there are; 0 while unknown.
        error: Why it failed, or an empty string.
        kind_of_error: The error's kind, likewise.
        result: What came of it.
        paused_seconds: Time it yielded to requests, all but the pause under way.
        paused_at: When that began, CLOCK_MONOTONIC seconds.
        began: When it began, CLOCK_MONOTONIC seconds; 0 before.
        ended: When it ended, likewise.
    """

    id: str
    kind: str
    model: str
    by_itself: bool = False
    gave_way: bool = False
    state: JobState = JobState.QUEUED
    step: str = ""
    done: int = 0
    total: int = 0
    error: str = ""
    kind_of_error: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    paused_seconds: float = 0.0
    paused_at: float = 0.0
    began: float = 0.0
    ended: float = 0.0

    @property
    def is_over(self) -> bool:
        """True once nothing more will happen."""
        return self.state in (JobState.DONE, JobState.FAILED, JobState.CANCELLED)

    def yield_now(self) -> None:
        """It stands still for requests."""
        self.state, self.paused_at = JobState.PAUSED, time.monotonic()

    def go_on(self) -> None:
        """It need not yield any more."""
        if self.state is JobState.PAUSED:
            self.state = JobState.RUNNING
            self.paused_seconds += time.monotonic() - self.paused_at

    def progress(self, step: str, done: int, total: int) -> None:
        """Say what goes on."""
        self.step, self.done, self.total = step, done, total

    def as_json(self) -> dict[str, Any]:
        """For the administrator."""
        until = self.ended or time.monotonic()
        return {
            "id": self.id,
            "kind": self.kind,
            "model": self.model,
            "by_itself": self.by_itself,
            "state": self.state,
            "step": self.step,
            "done": self.done,
            "total": self.total,
            "error": self.error,
            "error_kind": self.kind_of_error,
            "result": self.result,
            "paused_seconds": round(self.paused_seconds, 3),
            "seconds": round(until - self.began, 3) if self.began else 0.0,
        }


Work = Callable[[Job], Awaitable[dict[str, Any]]]
OnEnd = Callable[[], None]


class Jobs:
    """Runs them one at a time, in the order they came; idle work gives way to what somebody asks for.

    Attributes:
        is_closing: True once the daemon stops.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._waiting: deque[tuple[Job, Work]] = deque()
        self._on_end: dict[str, OnEnd] = {}
        self._current: tuple[Job, asyncio.Task[dict[str, Any]]] | None = None
        self._ended: deque[Job] = deque(maxlen=_KEPT)
        self._runner: asyncio.Task[None] | None = None
        self.is_closing = False

    @property
    def is_idle(self) -> bool:
        """True while nothing runs or waits."""
        return self._current is None and not self._waiting

    def listed(self) -> list[Job]:
        """Ended ones first, oldest at the front."""
        current = [self._current[0]] if self._current is not None else []
        return [*self._ended, *current, *(job for job, _ in self._waiting)]

    def find(self, job_id: str) -> Job:
        """The job of that number.

        Raises:
            InvalidRequest: There is none, or it ended long ago.
        """
        for job in self.listed():
            if job.id == job_id:
                return job
        raise InvalidRequest(f"cannot find job {job_id[:32]!r}: there is none of that number, or it ended long ago")

    def of(self, kind: str, model: str) -> Job | None:
        """The job of a kind on a model that is not over, or None."""
        return next((job for job in self.listed() if (job.kind, job.model) == (kind, model) and not job.is_over), None)

    def submit(self, kind: str, model: str, work: Work, by_itself: bool = False, on_end: OnEnd | None = None) -> Job:
        """Queue `work`; a job of the daemon's own that runs gives way to one somebody asked for.

        Args:
            kind: What is done.
            model: To which model.
            work: Does it.
            by_itself: Nobody asked for it.
            on_end: Called once the job is over, but not where the daemon's end is the reason.

        Raises:
            Conflict: Too many jobs wait.
        """
        if len(self._waiting) >= _MAX_WAITING:
            raise Conflict(f"cannot queue the job: {_MAX_WAITING} are waiting")
        job = Job(str(next(self._numbers)), kind, model, by_itself)
        self._waiting.append((job, work))
        if on_end is not None:
            self._on_end[job.id] = on_end
        if not by_itself and self._current is not None and self._current[0].by_itself:
            self._current[0].gave_way = True
            self._current[1].cancel()
        if self._runner is None or self._runner.done():
            self._runner = asyncio.ensure_future(self._run())
        return job

    def cancel(self, job_id: str) -> Job:
        """End a job; one that is over stays as it is.

        Raises:
            InvalidRequest: There is none of that number.
        """
        job = self.find(job_id)
        for entry in tuple(self._waiting):
            if entry[0] is job:
                self._waiting.remove(entry)
                self._end(job, JobState.CANCELLED)
        if self._current is not None and self._current[0] is job:
            self._current[1].cancel()
        return job

    async def close(self) -> None:
        """Cancel what runs and forget what waits."""
        self.is_closing = True
        self._waiting.clear()
        if self._current is not None:
            self._current[1].cancel()
        if self._runner is not None:
            await asyncio.wait({self._runner})

    async def _run(self) -> None:
        while self._waiting and not self.is_closing:
            job, work = self._waiting.popleft()
            job.state, job.began = JobState.RUNNING, time.monotonic()
            task = asyncio.ensure_future(work(job))
            self._current = (job, task)
            await asyncio.wait({task})
            self._current = None
            self._settle(job, task)

    def _settle(self, job: Job, task: "asyncio.Task[dict[str, Any]]") -> None:
        if task.cancelled():
            self._end(job, JobState.CANCELLED)
            return
        error = task.exception()
        if error is None:
            job.result = task.result()
            self._end(job, JobState.DONE)
            return
        if not isinstance(error, ApplianceError):
            _log.error("job %s (%s %s) failed", job.id, job.kind, job.model, exc_info=error)
            error = ApplianceError(f"cannot {job.kind} model {job.model!r}: an internal error; the log has it")
        job.error, job.kind_of_error = str(error), error.kind
        self._end(job, JobState.FAILED)

    def _end(self, job: Job, state: JobState) -> None:
        job.state, job.ended = state, time.monotonic()
        self._ended.append(job)
        on_end = self._on_end.pop(job.id, None)
        if on_end is not None and not self.is_closing:
            on_end()
