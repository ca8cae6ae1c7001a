"""Measures loaded models by itself while the machine has nothing better to do."""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Final

from appliance.activity import Activity
from appliance.config import TuningSection
from appliance.errors import ApplianceError
from appliance.jobs import Job, Jobs, JobState
from appliance.models import Model
from appliance.tuner import Tuner

_log = logging.getLogger("appliance.idler")

#: How often it looks whether the machine is idle.
_LOOK_SECONDS: Final = 5.0


class Idler:
    """Finds idle time and a model that something is not known of yet.

    Args:
        tuner: Measures.
        jobs: Nothing is begun while one is under way.
        activity: Tells of requests.
        is_busy: True while requests wait or run.
        ready: Models that serve, in order of names.
        settings: What counts as idle.
    """

    def __init__(
        self,
        tuner: Tuner,
        jobs: Jobs,
        activity: Activity,
        is_busy: Callable[[], bool],
        ready: Callable[[], Sequence[Model]],
        settings: TuningSection,
    ) -> None:
        self._tuner = tuner
        self._jobs = jobs
        self._activity = activity
        self._is_busy = is_busy
        self._ready = ready
        self._settings = settings
        self._settled: set[str] = set()
        self._generation = self._begun_in = 0
        self._job: Job | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin looking, where the configuration allows it."""
        if self._settings.enabled:
            self._task = asyncio.ensure_future(self._watch())

    def stop(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def look_again(self) -> None:
        """Models, backends or the hardware changed: what was settled may not be any more."""
        self._settled.clear()
        self._generation += 1

    async def _watch(self) -> None:
        since = time.monotonic_ns()
        while True:
            await asyncio.sleep(min(_LOOK_SECONDS, self._settings.idle_seconds))
            quiet_ns = time.monotonic_ns() - max(self._activity.last_ns, since)
            if self._jobs.is_idle and quiet_ns >= self._settings.idle_seconds * 1e9 and not self._is_busy():
                self._note_end()
                if os.getloadavg()[0] <= self._settings.max_load * (os.cpu_count() or 1):
                    try:
                        await self._begin()
                    except Exception:
                        _log.exception("idle time could not be used")

    def _note_end(self) -> None:
        """A job that ended, well or not, settles its model, unless it gave way or something changed meanwhile."""
        job = self._job
        is_settled = job is not None and not job.gave_way and (job.state is not JobState.DONE or job.result["complete"])
        if job is not None and is_settled and self._generation == self._begun_in:
            self._settled.add(job.model)
        self._job = None

    async def _begin(self) -> None:
        for model in self._ready():
            if model.name in self._settled:
                continue
            try:
                options = await self._tuner.options(model.name)
                if self._tuner.is_unsettled(options):
                    self._begun_in = self._generation
                    self._job = await self._tuner.tune(model.name, by_itself=True)
                    return
            except ApplianceError as error:
                _log.info("%s is not measured: %s", model.name, error)
            self._settled.add(model.name)
