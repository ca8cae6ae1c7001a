"""Makes variants of lower precision beside the original, in a worker task, and has them measured and judged."""

import asyncio
import logging
import os
import shutil
from collections.abc import Callable, Collection
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from appliance.artifacts import companions, contents_digest, resolve_inside
from appliance.candidates import Candidate
from appliance.chooser import Chooser, Options
from appliance.errands import Errands
from appliance.errors import BackendError, InvalidRequest, NoPlacement
from appliance.jobs import Job, Jobs
from appliance.models import Model
from appliance.placement import ChosenBy
from appliance.registry import DerivedVariant, WantedJob
from appliance.tuner import Tuner

_log = logging.getLogger("appliance.quantizer")

#: Methods, and whether they learn from calibration inputs.
METHODS: Final = {
    "int8": True,
    "int8-qdq": True,
    "fp16": False,
    "bf16": False,
    "int8-weights": False,
    "int4-weights": False,
}

#: Rows of calibration inputs used where nobody says otherwise; more make it slower and hardly better.
DEFAULT_ROWS: Final = 300

_TASK_SECONDS: Final = 7200.0


class Quantizer:
    """Quantises models, one at a time.

    Args:
        chooser: Knows a model's artifacts.
        jobs: Where quantisations queue.
        errands: Runs the processes.
        model: A model by name.
        tuner: Measures what comes of it.
    """

    def __init__(
        self, chooser: Chooser, jobs: Jobs, errands: Errands, model: Callable[[str], Model], tuner: Tuner
    ) -> None:
        self._chooser = chooser
        self._registry = chooser.registry
        self._jobs = jobs
        self._errands = errands
        self._model = model
        self._tuner = tuner

    async def quantize(self, name: str, method: str, calibration: str = "", rows: int = DEFAULT_ROWS) -> Job:
        """Queue a quantisation; the variant is measured and judged afterwards, by a tuning of its own.

        Args:
            name: The model; it need not be loaded.
            method: One of `METHODS`.
            calibration: ``"manifest"``, ``"recorded"`` or a path on this machine; empty for the manifest's sample, else
                what was recorded.
            rows: Rows of it to use at most.

        Raises:
            ModelNotFound, InvalidRequest: There is no such model, method or calibration.
            Conflict: Too many jobs wait.
        """
        self._model(name)
        if method not in METHODS:
            raise InvalidRequest(f"cannot quantise by {method[:32]!r}: the methods are {', '.join(METHODS)}")
        if not 1 <= rows <= 1_000_000:
            raise InvalidRequest(f"cannot calibrate with {rows} rows: the rule is 1 to 1000000")
        if calibration and not METHODS[method]:
            raise InvalidRequest(f"cannot use calibration inputs: the method {method!r} needs none")

        async def work(job: Job) -> dict[str, Any]:
            return await self._quantize(job, name, method, calibration, rows)

        question = {"method": method, "calibration": calibration, "rows": rows}
        return await self._tuner.want(WantedJob(name, "quantize", question), work)

    async def remove(self, name: str, variant_id: str) -> None:
        """Delete a derived variant's files and forget it; what serves must not be it.

        Raises:
            InvalidRequest: There is none of that id, or it serves.
        """
        model = self._model(name)
        found = next((one for one in self._registry.variants(name) if one.id == variant_id), None)
        if found is None:
            raise InvalidRequest(f"cannot remove variant {variant_id[:64]!r}: model {name!r} has none of that name")
        if model.variant.endswith(f"@{found.id}"):
            raise InvalidRequest(
                f"cannot remove variant {found.id!r}: it serves; pin another first, or unload the model"
            )
        await self._registry.remove_variant(found)
        await asyncio.to_thread(shutil.rmtree, (self._chooser.state / found.path).parent, ignore_errors=True)
        await self._registry.add_event("variant", name, f"{found.id} was removed")

    async def _quantize(self, job: Job, name: str, method: str, calibration: str, rows: int) -> dict[str, Any]:
        job.progress("looking at the model", 0, 0)
        options = await self._tuner.options(name)
        source = options.candidates.reference
        if source.source.artifact.precision != "FP32":
            raise NoPlacement(f"cannot quantise model {name!r}: it has no FP32 artifact that a backend here can run")
        inputs = await asyncio.to_thread(self._calibration, options, calibration) if METHODS[method] else None
        folder = self._chooser.state / "variants" / name / options.version
        known = {one.id for one in self._registry.variants(name, options.version)}
        await asyncio.to_thread(_sweep, folder, known)
        making = folder / f".{method}-{os.getpid()}-{job.id}"
        await asyncio.to_thread(_fresh_directory, making)
        try:
            result = await self._run(job, options, source, method, inputs, rows, making)
            made = await asyncio.to_thread(self._publish, options, source, method, result, making)
        finally:
            await asyncio.to_thread(shutil.rmtree, making, ignore_errors=True)
        await self._registry.put_variant(made)
        await self._registry.add_event("variant", name, f"{made.id} was made by {method}")
        before = await asyncio.to_thread(_total_bytes, source.source.artifact.path)
        tuning = await self._tuner.tune(name)
        return {
            "variant": made.id,
            "precision": made.precision,
            "format": made.format,
            "bytes": made.bytes,
            "bytes_before": before,
            "rows": made.calibration_rows,
            "tune_job": tuning.id,
        }

    def _calibration(self, options: Options, calibration: str) -> Path:
        """Where the inputs are.

        Raises:
            InvalidRequest: There are none.
        """
        name = options.manifest.name
        recorded = self._chooser.recording(name)
        samples = options.manifest.samples
        if calibration in ("", "manifest") and samples is not None and samples.calibration:
            return resolve_inside(options.directory, samples.calibration)
        if calibration in ("", "recorded") and recorded.is_dir():
            return recorded
        if calibration == "manifest":
            raise InvalidRequest(f"cannot calibrate: the manifest of {name!r} names no inputs (samples.calibration)")
        if calibration == "recorded":
            raise InvalidRequest(
                f"cannot calibrate: nothing was recorded of {name!r}; set samples.record in its manifest, load it "
                "again and send it requests"
            )
        if calibration == "":
            raise InvalidRequest(
                f"cannot calibrate: the manifest of {name!r} names no inputs (samples.calibration) and none were "
                "recorded (samples.record); name a directory of inputs"
            )
        path = Path(calibration)
        if not path.is_absolute() or not path.exists():
            raise InvalidRequest("cannot calibrate: the inputs must be an absolute path that the daemon can read")
        return path

    async def _run(
        self, job: Job, options: Options, source: Candidate, method: str, inputs: Path | None, rows: int, making: Path
    ) -> dict[str, Any]:
        placement = await self._chooser.placement(options, source, ChosenBy.RULE)
        placement.load.record_path = ""
        question = {
            "task": "quantize",
            "method": method,
            "calibration": str(inputs) if inputs is not None else None,
            "limit": rows,
            "output": str(making),
        }
        found: dict[str, Any] | None = None
        async with aclosing(self._errands.run(job, placement, question, _TASK_SECONDS)) as answers:
            async for answer in answers:
                if progress := answer.get("progress"):
                    job.progress(str(progress["step"]), int(progress.get("done", 0)), int(progress.get("total", 0)))
                elif result := answer.get("result"):
                    found = result
        if found is None:
            raise BackendError(f"cannot quantise model {options.manifest.name!r}: the task gave no answer")
        return found

    def _publish(
        self, options: Options, source: Candidate, method: str, result: dict[str, Any], making: Path
    ) -> DerivedVariant:
        """Move what was made to its place, named by its contents: what is published is whole."""
        made = resolve_inside(making, str(result["file"]))
        digest = contents_digest(made)
        variant_id = f"{method}-{digest[:8]}"
        place = making.parent / variant_id
        if not place.exists():  # else the same was made before, and may be serving
            making.rename(place)
        path = place / str(result["file"])
        return DerivedVariant(
            id=variant_id,
            model=options.manifest.name,
            version=options.version,
            source=options.keys[source.name].artifact,
            method=method,
            format=str(result["format"]),
            precision=str(result["precision"]),
            path=str(path.relative_to(self._chooser.state)),
            sha256="" if companions(path) != [path] else digest,
            bytes=_total_bytes(path),
            calibration_rows=int(result.get("rows", 0)),
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def _sweep(folder: Path, known: Collection[str]) -> None:
    """Remove what an interrupted quantisation left: nobody makes anything here now."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name not in known:
            shutil.rmtree(path, ignore_errors=True)


def _fresh_directory(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True, mode=0o700)


def _total_bytes(artifact: Path) -> int:
    return sum(path.stat().st_size for path in companions(artifact))
