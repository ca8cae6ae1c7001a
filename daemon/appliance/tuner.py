"""Measures what a model can be run as, checks accuracy where it decides, and swaps in what is best.

What is measured is kept point by point, so that a cancelled or interrupted tuning goes on where it stopped.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from appliance.candidates import Candidate
from appliance.choice import Choice, Verdict
from appliance.chooser import Chooser, Options
from appliance.config import TuningSection
from appliance.errands import Errands
from appliance.errors import (
    ApplianceError,
    ArtifactCorrupt,
    BackendError,
    Conflict,
    DeviceLost,
    InvalidRequest,
    ModelNotReady,
    NoPlacement,
    WorkerLost,
)
from appliance.jobs import Job, Jobs, Work
from appliance.manifest import read_manifest
from appliance.measurement import Measurement, Point
from appliance.models import Model
from appliance.placement import ChosenBy
from appliance.quality import Comparison, Evidence
from appliance.registry import StoredPlacement, WantedJob
from appliance.split import refusal, threads_for

_log = logging.getLogger("appliance.tuner")

#: Batch sizes measured; a model's own bound cuts the list.
ROWS: Final = (1, 2, 4, 8, 16, 32)
#: Trouble that says nothing lasting about a variant.
_PASSING: Final = (WorkerLost, DeviceLost)

#: A short budget shortens the time spent on one batch size down to this.
_MIN_POINT_SECONDS: Final = 0.05
#: A variant that takes longer than this to load, or to run through the sample, is out.
_TASK_SECONDS: Final = 600.0
#: A measurement that other programs disturbed is repeated this often before it is taken for what it is.
_ROUNDS: Final = 2


@dataclass(slots=True)
class Tally:
    """What one tuning did.

    Attributes:
        job: The tuning.
        budget: Seconds it may take, not counting those it yields to requests.
        measured: Names of candidates measured now.
        reused: How many measurements were good already.
        checked: Names of candidates whose accuracy was checked now.
        is_complete: False where the budget ended it.
    """

    job: Job
    budget: float
    measured: list[str] = field(default_factory=list)
    reused: int = 0
    checked: list[str] = field(default_factory=list)
    is_complete: bool = True

    @property
    def is_spent(self) -> bool:
        """True once the budget is used up; the tuning is not complete then."""
        if time.monotonic() - self.job.began - self.job.paused_seconds > self.budget:
            self.is_complete = False
        return not self.is_complete


class Tuner:
    """Tunes models, one at a time.

    Args:
        chooser: Knows the candidates and what is known of them.
        jobs: Where tunings queue.
        errands: Runs the measuring processes.
        model: A model by name.
        settings: Budgets.
        cache: Directory for the reference's outputs.
    """

    def __init__(
        self,
        chooser: Chooser,
        jobs: Jobs,
        errands: Errands,
        model: Callable[[str], Model],
        settings: TuningSection,
        cache: Path,
    ) -> None:
        self._chooser = chooser
        self._registry = chooser.registry
        self._jobs = jobs
        self._errands = errands
        self._model = model
        self._settings = settings
        self._cache = cache
        self._tasks: set[asyncio.Task[bool]] = set()
        self._locks: dict[str, asyncio.Lock] = {}

    async def tune(
        self, name: str, budget_seconds: float | None = None, is_fresh: bool = False, by_itself: bool = False
    ) -> Job:
        """Queue a tuning, or join the one under way.

        Args:
            name: The model; it need not be loaded.
            budget_seconds: Measuring time; the configuration's where None.
            is_fresh: Measure and check again what is known.
            by_itself: Idle time allows it, nobody asked.

        Raises:
            ModelNotFound, InvalidRequest: There is no such model.
            Conflict: Too many jobs wait.
        """
        self._model(name)
        running = self._jobs.of("tune", name)
        if running is not None and (by_itself or not running.by_itself):
            return running
        budget = budget_seconds or self._settings.budget_seconds

        async def work(job: Job) -> dict[str, Any]:
            return await self._tune(job, name, budget, is_fresh)

        if by_itself:
            return self._jobs.submit("tune", name, work, by_itself)
        return await self.want(WantedJob(name, "tune", {"budget_seconds": budget, "fresh": is_fresh}), work)

    async def want(self, wanted: WantedJob, work: Work) -> Job:
        """Queue what somebody asked for, so that a daemon that is stopped before takes it up again.

        Raises:
            Conflict: Too many jobs wait.
        """

        def forget() -> None:
            task = asyncio.ensure_future(self._registry.remove_wanted(wanted.model, wanted.kind))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        job = self._jobs.submit(wanted.kind, wanted.model, work, on_end=forget)
        await self._registry.put_wanted(wanted)
        if job.is_over:  # meanwhile
            forget()
        return job

    async def options(self, name: str, asked_for: str | None = None) -> Options:
        """What a model can be run as, loaded or not, with keys; `asked_for` as in `Chooser.options`.

        Raises:
            ApplianceError: Its directory cannot be used, or nothing can run it.
        """
        model = self._model(name)
        manifest = await asyncio.to_thread(read_manifest, model.directory)
        version = model.version if model.variant else manifest.versions[-1]
        return await self._chooser.options(manifest, model.directory, version, asked_for=asked_for)

    def missing(self, options: Options) -> list[Candidate]:
        """Candidates without a measurement that can be relied on."""
        return [
            one
            for one in options.candidates.found
            if (found := self._chooser.measurement(options, one)) is None or found.is_disturbed
        ]

    def is_unsettled(self, options: Options) -> bool:
        """True where measuring or checking would add to what is known."""
        return (
            bool(self.missing(options))
            or self._chooser.decide(options).unchecked is not None
            or bool(self._unproved(options))
        )

    def _unproved(self, options: Options) -> list[Candidate]:
        """Candidates of lower precision that run and were never compared with the reference."""
        return [
            one
            for one in options.candidates.found
            if not one.is_exact
            and one.computation != options.candidates.reference.computation
            and (found := self._chooser.measurement(options, one)) is not None
            and found.points
            and self._chooser.evidence(options, one) is None
        ]

    async def pin(self, name: str, variant: str) -> None:
        """Have one candidate serve whatever the measurements say, until it is unpinned; swaps it in if loaded.

        Raises:
            InvalidRequest: The model has no candidate of that name.
            ApplianceError: It cannot be loaded; nothing is pinned then.
        """
        options = await self.options(name, variant)
        chosen = options.candidates.named(variant)
        if chosen is None:
            names = ", ".join(one.name for one in options.candidates.found)
            raise InvalidRequest(f"cannot pin {variant[:128]!r}: the candidates of model {name!r} are {names}")
        async with self._lock(name):
            await self._move(name, options, chosen, ChosenBy.PINNED)
            key = options.keys[chosen.name].id
            reason = "an administrator pinned it"
            await self._registry.put_placement(
                StoredPlacement(name, options.version, key, chosen.name, "pinned", reason, is_pinned=True)
            )
        await self._registry.add_event("pin", name, f"{chosen.name} was pinned")

    async def split(self, name: str, streams: int | None, threads: int | None) -> None:
        """Have what serves run that many batches at the same time, of that many cores each, until it is unpinned.

        Where one of both is None it is such that all cores are used. What serves now goes on until the other is loaded.

        Raises:
            ModelNotReady: Nothing serves.
            InvalidRequest: The manifest says otherwise, or the device has no threads to count.
            ApplianceError: It cannot be loaded; nothing is changed then.
        """
        options = await self.options(name)
        model = self._model(name)
        serving = options.candidates.named(model.variant)
        if serving is None:
            raise ModelNotReady(f"cannot change the streams of model {name!r}: it is {model.state.value}")
        device = serving.device
        if threads is not None and device.kind != "cpu":
            raise InvalidRequest(f"cannot change the threads of model {name!r}: it runs on {device.id}, which has none")
        if streams is None:
            streams = max(device.cores // threads, 1) if threads else serving.streams
        wished = serving.split(streams, threads_for(streams, device) if threads is None else threads)
        reason = refusal(wished.variant, device, options.manifest)
        if reason:
            raise InvalidRequest(f"cannot run model {name!r} as {wished.name}: {reason}")
        await self.pin(name, wished.name)

    async def unpin(self, name: str) -> None:
        """Leave the choice to the measurements, or the rule, again; swaps in what they say.

        Raises:
            ApplianceError: That cannot be loaded; what was pinned stays so.
        """
        options = await self.options(name, "")
        async with self._lock(name):
            stored = self._registry.placement(name, options.version)
            if stored is None or not stored.is_pinned:
                return
            choice = self._chooser.decide(options)
            if choice.winner is not None:
                await self._take(name, options, choice, choice.winner)
            else:
                await self._move(name, options, options.candidates.first_tries()[0], ChosenBy.RULE)
                await self._registry.remove_placement(name, options.version)
        await self._registry.add_event("pin", name, f"{stored.variant} is not pinned any more")

    async def restore(self, name: str) -> None:
        """Have a model run as it should again, after it had to run elsewhere.

        Raises:
            ApplianceError: That cannot be loaded; what served before still serves.
        """
        model = self._model(name)
        async with self._lock(name):
            manifest = model.manifest
            if manifest is None or not model.is_displaced:
                return
            first, *_ = await self._chooser.placements(manifest, model.directory, model.version)
            if first.variant != model.variant:
                await model.move(first)
                await self._registry.add_event("swap", name, f"{first.variant} serves again")

    def _lock(self, name: str) -> asyncio.Lock:
        """Held by whoever changes what serves a model and what is kept of that; both must be one step."""
        return self._locks.setdefault(name, asyncio.Lock())

    # ---------------------------------------------------------------- one tuning

    async def _tune(self, job: Job, name: str, budget: float, is_fresh: bool) -> dict[str, Any]:
        options = await self.options(name)
        tally = Tally(job, budget)
        wanted = self._wanted(options, is_fresh=is_fresh, is_asked=not job.by_itself)
        tally.reused = len(options.candidates.found) - len(wanted)
        share = max(0.8 * budget / max(len(wanted) * len(ROWS), 1), _MIN_POINT_SECONDS)
        seconds = min(share, self._settings.point_seconds)
        for attempt in range(_ROUNDS):
            for number, one in enumerate(wanted):
                if tally.is_spent:
                    break
                job.progress(f"measuring {one.name}", number, len(wanted))
                await self._measure(job, options, one, seconds, is_fresh or attempt > 0)
                if one.name not in tally.measured:
                    tally.measured.append(one.name)
            measured = [self._chooser.measurement(options, one) for one in wanted]
            wanted = [one for one, result in zip(wanted, measured, strict=True) if result and result.is_disturbed]
            if not wanted or tally.is_spent:
                break
        await self._prove(job, options, tally, is_fresh=is_fresh, is_asked=not job.by_itself)
        choice = self._chooser.decide(options, self._model(name).variant)
        swapped = await self._adopt(name, options, choice)
        return {
            "chosen": choice.winner.name if choice.winner else None,
            "swapped": swapped,
            "measured": tally.measured,
            "reused": tally.reused,
            "checked": tally.checked,
            "complete": tally.is_complete,
        }

    def _wanted(self, options: Options, *, is_fresh: bool, is_asked: bool) -> list[Candidate]:
        """What to measure; where somebody asks, also what could not be run the last time."""
        if is_fresh:
            return list(options.candidates.found)
        failed = [
            one
            for one in options.candidates.found
            if is_asked and (found := self._chooser.measurement(options, one)) is not None and found.problem
        ]
        return [*self.missing(options), *failed]

    async def _prove(self, job: Job, options: Options, tally: Tally, *, is_fresh: bool, is_asked: bool) -> None:
        """Check the accuracy of what decides the choice, then of every other candidate of lower precision."""
        firsts = {one.computation: one for one in reversed(options.candidates.found)}
        proofs = [(one, self._chooser.evidence(options, one)) for one in firsts.values()]
        again = {one.name for one, proof in proofs if proof is not None and (is_fresh or (is_asked and proof.problem))}
        while not tally.is_spent:
            choice = self._chooser.decide(options, self._model(options.manifest.name).variant)
            rest = [one for one in options.candidates.found if one.name in again] or self._unproved(options)
            one = choice.unchecked or (rest[0] if rest else None)
            if one is None:
                return
            job.progress(f"checking the accuracy of {one.name}", len(tally.checked), len(tally.checked) + len(rest))
            again.discard(one.name)
            await self._check(job, options, one)
            tally.checked.append(one.name)

    async def _measure(self, job: Job, options: Options, one: Candidate, seconds: float, is_fresh: bool) -> None:
        """Measure one candidate and keep every point."""
        key = options.keys[one.name]
        kept = None if is_fresh else self._registry.partial(key.id)
        points = list(kept.points) if kept is not None else []
        found = Measurement(key, tuple(points), measured_at=_now())
        placement = await self._chooser.placement(options, one, ChosenBy.RULE)
        placement.load.record_path = ""
        path = options.sample_path
        question = {
            "task": "measure",
            "rows": list(ROWS),
            "done": [point.rows for point in points],
            "seconds": seconds,
            "sample": str(path) if path is not None else None,
        }
        step, number, total = job.step, job.done, job.total
        is_whole = False
        try:
            async with aclosing(self._errands.run(job, placement, question, _TASK_SECONDS)) as answers:
                async for answer in answers:
                    if progress := answer.get("progress"):
                        at = f"{progress['done']} of {progress['total']}" if progress.get("total") else progress["step"]
                        job.progress(f"{step} ({at})", number, total)
                    elif loaded := answer.get("loaded"):
                        found = replace(
                            found,
                            load_ms=float(loaded["load_ms"]),
                            device=str(loaded["device"]),
                            provider=str(loaded["provider"]),
                            tokens=int(loaded["tokens"]),
                            units=int(loaded["units"]),
                            streams=int(loaded["streams"]),
                        )
                        if found.device != one.variant.device:
                            raise NoPlacement(
                                f"asked for {one.variant.device}, it ran on {found.device}: "
                                f"{loaded.get('reason') or 'the runtime gives no reason'}"
                            )
                    elif point := answer.get("point"):
                        points.append(Point(**point))
                        found = replace(found, points=tuple(sorted(points, key=lambda each: each.rows)))
                        if self._registry.measurement(key.id) is None:  # what is whole stays until this is
                            await self._registry.put_measurement(options.manifest.name, options.version, found, False)
                    elif result := answer.get("result"):
                        is_whole = True
                        found = replace(found, peak_bytes=int(result["peak_bytes"]))
            if not (found.points and is_whole):
                raise BackendError("cannot measure: it ended before it was done")
        except _PASSING as error:
            _log.info("%s as %s is not measured: %s", options.manifest.name, one.name, error)
            return
        except ApplianceError as error:
            _log.info("%s as %s: %s", options.manifest.name, one.name, error)
            found = Measurement(key, measured_at=_now(), problem=str(error))
        await self._registry.put_measurement(options.manifest.name, options.version, found, True)

    async def _check(self, job: Job, options: Options, one: Candidate) -> None:
        """Compare a candidate with the reference and keep the verdict.

        Raises:
            ApplianceError: The reference itself cannot be run, which says nothing about the candidate.
        """
        reference = options.candidates.reference
        outputs = await self._reference(job, options, reference)
        comparison, problem = None, ""
        try:
            comparison = await self._compare(job, options, one, outputs, None)
        except _PASSING as error:
            _log.info("%s as %s is not compared: %s", options.manifest.name, one.name, error)
            raise
        except ArtifactCorrupt:  # what was kept of the reference cannot be read
            await asyncio.to_thread(outputs.unlink, missing_ok=True)
            outputs = await self._reference(job, options, reference)
            comparison = await self._compare(job, options, one, outputs, None)
        except ApplianceError as error:
            _log.info("%s as %s: %s", options.manifest.name, one.name, error)
            problem = str(error)
        evidence = Evidence(
            key=options.computation(one),
            reference=options.computation(reference).id,
            sample=options.trial,
            bound=options.manifest.quality.bound,
            comparison=comparison,
            problem=problem,
            judged_at=_now(),
        )
        await self._registry.put_evidence(options.manifest.name, options.version, options.metric, evidence)

    async def _reference(self, job: Job, options: Options, reference: Candidate) -> Path:
        """The reference's outputs, from the last time or made now.

        Raises:
            ApplianceError: It cannot be run.
        """
        key = options.keys[reference.name].id
        path = self._cache / "references" / f"{key}-{options.trial[:16]}-{options.metric}.npz"
        if not path.is_file():
            await asyncio.to_thread(path.parent.mkdir, parents=True, exist_ok=True)
            await self._compare(job, options, reference, None, path)
        return path

    async def _compare(
        self, job: Job, options: Options, one: Candidate, reference: Path | None, save: Path | None
    ) -> Comparison:
        placement = await self._chooser.placement(options, one, ChosenBy.RULE)
        placement.load.record_path = ""
        path = options.sample_path
        question = {
            "task": "evaluate",
            "sample": str(path) if path is not None else None,
            "limit": options.manifest.quality.limit,
            "metric": options.metric,
            "reference": str(reference) if reference is not None else None,
            "save": str(save) if save is not None else None,
        }
        comparison = None
        step = job.step
        async with aclosing(self._errands.run(job, placement, question, _TASK_SECONDS)) as answers:
            async for answer in answers:
                if progress := answer.get("progress"):
                    job.progress(step, int(progress.get("done", 0)), int(progress.get("total", 0)))
                elif result := answer.get("result"):
                    comparison = Comparison(**result["comparison"])
        if comparison is None:
            raise BackendError(f"cannot compare {one.name}: it gave no answer")
        return comparison

    async def _adopt(self, name: str, options: Options, choice: Choice) -> bool:
        """Keep the choice, and swap it in where the model is loaded and nobody pinned another."""
        async with self._lock(name):
            stored = self._registry.placement(name, options.version)
            if choice.winner is None or (stored is not None and stored.is_pinned):
                return False
            return await self._take(name, options, choice, choice.winner)

    async def _take(self, name: str, options: Options, choice: Choice, winner: Candidate) -> bool:
        before = self._model(name).variant
        try:
            swapped = await self._move(name, options, winner, ChosenBy.MEASURED)
        except Conflict as error:  # the next load takes it
            _log.info("%s", error)
            swapped = False
        reason = next(one.reason for one in choice.considered if one.verdict is Verdict.CHOSEN)
        key = options.keys[winner.name].id
        await self._registry.put_placement(StoredPlacement(name, options.version, key, winner.name, "measured", reason))
        if swapped:
            _log.info("%s: %s takes over from %s: %s", name, winner.name, before, reason)
            await self._registry.add_event("swap", name, f"{winner.name} took over from {before}: {reason}")
        return swapped

    async def _move(self, name: str, options: Options, to: Candidate, by: ChosenBy) -> bool:
        """Swap `to` in where the version is loaded and something else serves.

        Raises:
            Conflict: The model's files are others than those that serve.
            ApplianceError: It cannot be loaded; what served before still serves.
        """
        model = self._model(name)
        if not model.variant or model.version != options.version:
            return False
        if model.variant == to.name and not model.is_displaced:
            model.note_choice(by, self._chooser.measurement(options, to))
            return False
        await model.move(await self._chooser.placement(options, to, by))
        return True


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
