"""Worker tasks: measuring, comparing and quantising in child processes that yield to requests.

From the moment a batch is to be sent until requests have stayed away for a while the child is suspended (SIGSTOP), so
that it takes no core from them; a sample that was interrupted so is thrown away by the child itself.
"""

import asyncio
import base64
import sys
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, Final

from appliance.activity import Activity
from appliance.child import Child, ChildFailed
from appliance.errors import KINDS, ApplianceError, BackendError, WorkerLost
from appliance.jobs import Job, JobState
from appliance.placement import Placement

#: How often a suspended child is looked after.
_LOOK_SECONDS: Final = 0.2


class Errands:
    """Runs one task at a time.

    Args:
        activity: Tells of requests.
        is_busy: True while requests wait or run.
        resume_seconds: Requests must have stayed away for this long before a suspended task goes on.
    """

    def __init__(self, activity: Activity, is_busy: Callable[[], bool], resume_seconds: float) -> None:
        self._activity = activity
        self._is_busy = is_busy
        self._resume_seconds = resume_seconds

    async def run(
        self, job: Job, placement: Placement, question: Mapping[str, Any], seconds: float
    ) -> AsyncGenerator[dict[str, Any], None]:
        """What the task says; close the iterator to end the task.

        Args:
            job: Is shown as paused while the task is suspended.
            placement: What the task loads.
            question: The task's, without ``load``.
            seconds: It may take as long, suspensions not counted.

        Raises:
            WorkerLost: Somebody ended it.
            ApplianceError: The task failed; of the kind it said, or `BackendError` where it hung or crashed.
        """
        load = base64.b64encode(placement.load.SerializeToString()).decode("ascii")
        python = placement.python or sys.executable
        try:
            # -P: the working directory is nobody's place to import from.
            child = await Child.start((python, "-P", "-m", "appliance.worker.task"), {**question, "load": load})
        except ChildFailed as error:
            raise _failed(question, error) from error

        has_begun = False

        def give_way() -> None:
            # Not before its first word: only then does it die with the daemon, even while it is suspended.
            if has_begun and job.state is not JobState.PAUSED:
                child.suspend()
                job.yield_now()

        self._activity.listener = give_way
        watch = asyncio.ensure_future(self._look_after(child, job))
        try:
            async for answer in child.answers(seconds):
                if not has_begun:
                    has_begun = True
                    if self._is_busy():
                        give_way()
                if failed := answer.get("failed"):
                    raise KINDS.get(str(failed.get("kind")), BackendError)(str(failed.get("message")))
                yield answer
        except ChildFailed as error:
            raise _failed(question, error) from error
        finally:
            self._activity.listener = None
            watch.cancel()
            await child.end()
            job.go_on()

    async def _look_after(self, child: Child, job: Job) -> None:
        """Let the child go on once requests have stayed away."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            quiet_ns = time.monotonic_ns() - self._activity.last_ns
            if job.state is JobState.PAUSED and not self._is_busy() and quiet_ns > self._resume_seconds * 1e9:
                child.resume()
                job.go_on()


def _failed(question: Mapping[str, Any], error: ChildFailed) -> ApplianceError:
    kind = WorkerLost if error.was_ended else BackendError
    return kind(f"cannot {question['task']}: {error}")
