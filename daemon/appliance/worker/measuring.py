"""Task ``measure``: how long runs of a variant take, by number of rows, on the code path that serves."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from appliance.backend import Session
from appliance.errors import ApplianceError, BackendError, InvalidRequest
from appliance.measurement import MIN_SAMPLES, Point
from appliance.wire import worker_pb2
from appliance.worker.disturbance import Suspensions, Window
from appliance.worker.energy import Counter, counter_of
from appliance.worker.inputs import MeasuringInputs
from appliance.worker.loading import inventory_of, load, manifest_of
from appliance.worker.messages import presentable
from appliance.worker.model import ContractBroken, ServedModel
from appliance.worker.question import Say, counts_of, load_of, path_of
from appliance.worker.runner import is_out_of_memory
from appliance.worker.streams import Streams

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Runs that are enough once `_MIN_POINT_NS` have passed too.
_MAX_SAMPLES: Final = 200

#: A point lasts as long at least, since the kernel counts the cores' work in steps of 10 ms.
_MIN_POINT_NS: Final = 250_000_000

#: Share of the cores' time that others may use.
MAX_FOREIGN_SHARE: Final = 0.15

_ATTEMPTS: Final = 3

#: Larger batches are not tried once a run takes as long.
_SLOW_RUN_US: Final = 2e6

#: Runs and time that warming up takes at most; the first run of a shape may compile.
_WARMUP_RUNS: Final = 3
_WARMUP_NS: Final = 500_000_000

#: A session that compiles in the background for what it runs is given as long; what is measured then is what there is.
_SETTLING_NS: Final = 30_000_000_000


def measure(question: Mapping[str, Any], say: Say) -> None:
    """Load the variant of `question`, say how that went, and measure it at every number of rows it asks for.

    A session of several streams is measured with all of them busy, and with the smallest batch also with one.
    Numbers of rows beyond the model's `max_batch_size` are left out; a model without batch dimension is measured once,
    with rows 0. Where memory runs out, what was measured with fewer rows stands and larger batches are not tried.

    Raises:
        ApplianceError: The variant cannot be loaded or run, or the sample is of no use.
    """
    suspensions = Suspensions()
    message = load_of(question)
    seconds = question.get("seconds", 1.0)
    if not isinstance(seconds, (int, float)) or not 0 <= seconds <= 3600:
        raise InvalidRequest(f"cannot do the task: 'seconds' must be a number up to 3600, not {seconds!r}")
    rows, done = counts_of(question, "rows"), counts_of(question, "done")

    say({"progress": {"step": "loading", "done": 0, "total": 1}})
    model, loaded = _load(message, suspensions)
    inputs = MeasuringInputs(model, manifest_of(message), Path(message.directory), path_of(question, "sample"))
    say({"loaded": _described(loaded, inputs.tokens, inputs.units)})

    wanted = sorted(set(rows)) if model.max_batch_size else [0]
    left = [n for n in wanted if n not in done and (0 < n <= model.max_batch_size or not model.max_batch_size)]
    stopwatch = _Stopwatch(model, suspensions, _counter(message, loaded), int(seconds * 1e9))
    for place, n in enumerate(left):
        say({"progress": {"step": "measuring", "done": place, "total": len(left)}})
        try:
            point = stopwatch.point(n, inputs.batch(n), is_smallest=n == wanted[0])
        except (_OutOfMemory, MemoryError) as error:
            if not any(smaller < n for smaller in (*done, *left[:place])):
                raise
            print(f"{presentable(error)}; larger batches are not tried", file=sys.stderr)  # noqa: T201
            break
        say({"point": asdict(point)})
        if point.median_us > _SLOW_RUN_US:
            break
    say({"progress": {"step": "measuring", "done": len(left), "total": len(left)}})
    say({"result": {"peak_bytes": peak_bytes(Path("/proc/self/status").read_text())}})


def _load(message: worker_pb2.Load, suspensions: Suspensions) -> tuple[ServedModel, worker_pb2.Loaded]:
    """Load, once more where the process was suspended meanwhile: the time it took says nothing then."""
    for _ in range(_ATTEMPTS - 1):
        before = suspensions.count
        model, loaded = load(message)
        if suspensions.count == before:
            return model, loaded
        model.session.close()
    return load(message)


def _described(loaded: worker_pb2.Loaded, tokens: int, units: int) -> dict[str, Any]:
    execution = loaded.execution
    return {
        "load_ms": (loaded.load_ns + loaded.warmup_ns) / 1e6,
        "device": execution.device,
        "provider": execution.provider,
        "precision": execution.precision,
        "reason": execution.reason,
        "runtime": loaded.runtime,
        "max_batch_size": loaded.max_batch_size,
        "tokens": tokens,
        "units": units,
        "streams": loaded.streams,
    }


def _counter(message: worker_pb2.Load, loaded: worker_pb2.Loaded) -> Counter:
    devices: Sequence[Any] = inventory_of(message).devices
    return counter_of(next((one for one in devices if one.id == loaded.execution.device), None))


def peak_bytes(status: str) -> int:
    """Peak resident memory by the text of /proc/self/status; 0 where it does not say."""
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            number = value.split()[0] if value.split() else ""
            return int(number) * 1024 if number.isdecimal() else 0
    return 0


@dataclass(slots=True)
class _Attempt:
    """What one attempt at a point has gathered so far, stretches with a suspension left out."""

    samples_ns: list[int] = field(default_factory=list)
    runs: int = 0
    elapsed_ns: int = 0
    foreign: float = 0.0
    whole: float = 0.0
    microjoules: int | None = 0

    @property
    def foreign_share(self) -> float:
        return self.foreign / self.whole if self.whole else 0.0

    @property
    def median_us(self) -> float:
        return statistics.median(self.samples_ns) / 1e3

    def point(self, rows: int) -> Point:
        median = statistics.median(self.samples_ns)
        deviation = statistics.median(abs(sample - median) for sample in self.samples_ns)
        return Point(
            rows=rows,
            median_us=median / 1e3,
            spread_us=1.4826 * deviation / 1e3,
            samples=len(self.samples_ns),
            is_disturbed=self.foreign_share > MAX_FOREIGN_SHARE,
            energy_mj=self.microjoules / 1e3 / self.runs if self.microjoules is not None else None,
        )


#: Runs for so many ns, once at least; returns what each run took and how many there were, those not timed included.
_Run = Callable[[int], tuple[list[int], int]]


class _OutOfMemory(BackendError):
    """A run failed since memory ran out."""


class _Stopwatch:
    """Measures one model."""

    def __init__(self, model: ServedModel, suspensions: Suspensions, counter: Counter, aim_ns: int) -> None:
        self._model = model
        self._session: Session = model.session
        self._streams = Streams(model) if model.streams > 1 else None
        self._names = [spec.name for spec in model.outputs]
        self._suspensions = suspensions
        self._counter = counter
        self._aim_ns = aim_ns

    def point(self, rows: int, feeds: "Mapping[str, NDArray[Any]]", *, is_smallest: bool) -> Point:
        """Warm up and measure; where others kept the cores busy again, and then the least disturbed attempt counts.

        Args:
            rows: Rows of the batch, 0 without batch dimension.
            feeds: The batch.
            is_smallest: True where a run alone is asked for too.

        Raises:
            BackendError: A run failed; `_OutOfMemory` where memory was too little for it.
        """
        try:
            self._warm_up(rows, feeds)
            self._settle(feeds)
            if self._streams is None:
                return self._least_disturbed(partial(self._run_alone, feeds)).point(rows)
            self._streams.run_for(feeds, 0)
            alone = self._least_disturbed(partial(self._run_alone, feeds)) if is_smallest else None
            busy = self._least_disturbed(partial(self._streams.run_for, feeds))
        except ContractBroken as error:
            raise BackendError(f"cannot measure {rows} rows: the backend broke its contract: {error}") from error
        except ApplianceError:
            raise
        except Exception as error:  # whatever the runtime raises
            kind = _OutOfMemory if is_out_of_memory(error) else BackendError
            raise kind(f"cannot measure {rows} rows: {presentable(error)}") from error
        point = busy.point(rows)
        if alone is None:
            return point
        return replace(
            point,
            is_disturbed=point.is_disturbed or alone.foreign_share > MAX_FOREIGN_SHARE,
            alone_us=alone.median_us,
        )

    def _least_disturbed(self, run: _Run) -> _Attempt:
        attempts = []
        for _ in range(_ATTEMPTS):
            attempts.append(self._attempt(run))
            if attempts[-1].foreign_share <= MAX_FOREIGN_SHARE:
                break
        return min(attempts, key=lambda attempt: attempt.foreign_share)

    def _warm_up(self, rows: int, feeds: "Mapping[str, NDArray[Any]]") -> None:
        began = time.monotonic_ns()
        for _ in range(_WARMUP_RUNS):
            results = self._session.run(feeds, self._names)
            for spec in self._model.outputs:
                self._model.check_output(spec, results.get(spec.name), rows)
            if time.monotonic_ns() - began > _WARMUP_NS:
                return

    def _settle(self, feeds: "Mapping[str, NDArray[Any]]") -> None:
        """Run on while the session may become faster of itself; see `appliance.backend.Session`."""
        deadline = time.monotonic_ns() + _SETTLING_NS
        while not getattr(self._session, "is_settled", True) and time.monotonic_ns() < deadline:
            self._session.run(feeds, self._names)

    def _attempt(self, run: _Run) -> _Attempt:
        """Gather stretches until there are enough runs and enough time has passed."""
        attempt = _Attempt()
        shortest = min(self._aim_ns, _MIN_POINT_NS)
        while (
            len(attempt.samples_ns) < MIN_SAMPLES
            or attempt.elapsed_ns < shortest
            or (attempt.elapsed_ns < self._aim_ns and len(attempt.samples_ns) < _MAX_SAMPLES)
        ):
            self._stretch(run, attempt, shortest)
        return attempt

    def _stretch(self, run: _Run, attempt: _Attempt, length_ns: int) -> None:
        """Time runs for `length_ns`, one at least, and count them unless the process was suspended meanwhile."""
        suspended = self._suspensions.count
        self._counter.microjoules()
        window = Window()
        samples, runs = run(length_ns)
        elapsed = window.elapsed_ns
        foreign, whole = window.core_seconds()
        energy = self._counter.microjoules()
        if self._suspensions.count != suspended:
            return
        attempt.samples_ns += samples
        attempt.runs += runs
        attempt.elapsed_ns += elapsed
        attempt.foreign += foreign
        attempt.whole += whole
        attempt.microjoules = (
            attempt.microjoules + energy if attempt.microjoules is not None and energy is not None else None
        )

    def _run_alone(self, feeds: "Mapping[str, NDArray[Any]]", length_ns: int) -> tuple[list[int], int]:
        """In this thread, nothing beside it; given up once the process was suspended."""
        suspended = self._suspensions.count
        run, names, clock = self._session.run, self._names, time.monotonic_ns
        samples: list[int] = []
        end_ns = clock() + length_ns
        while not samples or clock() < end_ns:
            began = clock()
            run(feeds, names)
            samples.append(clock() - began)
            if self._suspensions.count != suspended:
                break
        return samples, len(samples)
