"""``appliancectl bench``: a closed loop over the native socket."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from appliancectl.completion import complete_model
from appliancectl.output import console, print_json, print_table
from appliancectl.target import Target, common_options

if TYPE_CHECKING:
    from appliance_client import ApplianceError, Tensor, Timings

#: Part of a step's duration that is run before counting begins.
_WARM_UP = 0.1

_METADATA_SECONDS = 10.0

#: Wait after a refusal, which comes too fast to ask again at once.
_PAUSE_SECONDS = 0.001

_MAX_CONCURRENCY = 1024

_COLUMNS = ("at once", "per second", "p50 ms", "p90 ms", "p99 ms", "batch", "queue µs", "compute µs", "other µs")


@dataclass(slots=True)
class Tally:
    """What one step saw.

    Attributes:
        concurrency: Requests in flight.
        elapsed_s: From the first counted request to the last answer.
        latencies_s: One for each answer, sorted by `row`.
        sums: Stage times and batch rows, added up over the answers.
        errors: Requests refused or failed, by kind.
    """

    concurrency: int
    elapsed_s: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    sums: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)

    def answered(self, latency_s: float, timings: "Timings") -> None:
        """Count an answer."""
        self.latencies_s.append(latency_s)
        for stage, value in zip(timings._fields, timings, strict=True):
            self.sums[stage] += value

    def row(self) -> dict[str, Any]:
        """Throughput, percentiles by nearest rank, mean stage times."""
        latencies = sorted(self.latencies_s)
        count = len(latencies)

        def percentile(percent: int) -> float | None:
            return round(latencies[max(0, -(-count * percent // 100) - 1)] * 1e3, 4) if count else None

        return {
            "concurrency": self.concurrency,
            "requests": count,
            "requests_per_s": round(count / self.elapsed_s, 1) if self.elapsed_s else 0.0,
            "p50_ms": percentile(50),
            "p90_ms": percentile(90),
            "p99_ms": percentile(99),
            "mean": {stage: round(total / count, 1) for stage, total in self.sums.items()} if count else {},
            "errors": dict(self.errors),
        }


def _numbers(_context: click.Context, _option: click.Parameter, value: str) -> list[int]:
    parts = value.split(",")
    if not all(part.isdecimal() and 1 <= int(part) <= _MAX_CONCURRENCY for part in parts):
        raise click.BadParameter(f"{value!r} must be numbers from 1 to {_MAX_CONCURRENCY}, separated by commas")
    return [int(part) for part in parts]


@click.command()
@click.argument("model", shell_complete=complete_model)
@click.option("--input", "-i", "given", multiple=True, metavar="[NAME=]VALUE", help="As for infer. [default: made up]")
@click.option(
    "--duration", type=click.FloatRange(0.1, 3600), default=5.0, help="Seconds for each step.", show_default=True
)
@click.option(
    "--concurrency",
    callback=_numbers,
    default="1,4,16",
    help="Requests in flight, one step each.",
    show_default=True,
)
@common_options
def bench(target: Target, model: str, given: tuple[str, ...], duration: float, concurrency: list[int]) -> None:
    """Measure a model: throughput, latency and stage times under so many requests at a time.

    A closed loop from this one process: each request in flight is followed by the next as soon as it is answered. The
    client's own work is part of what is measured.
    """
    with target.client() as client:
        metadata = client.model_metadata(model, timeout=_METADATA_SECONDS)
    task = target.admin(_METADATA_SECONDS).get(f"/admin/models/{metadata.name}")["task"]
    from appliancectl.inputs import gather_inputs, sample_inputs

    is_image = task == "image-classification"
    inputs = gather_inputs(metadata, given, is_image) if given else sample_inputs(metadata, is_image)
    with _progress(len(concurrency) * duration, quiet=target.wants_json) as advance:
        rows = [_step(target, model, inputs, count, duration, advance).row() for count in concurrency]
    if target.wants_json:
        print_json({"model": model, "duration_s": duration, "steps": rows})
    else:
        _print(rows)


def _step(
    target: Target,
    model: str,
    inputs: "dict[str, Tensor]",
    concurrency: int,
    duration_s: float,
    advance: Callable[[float], None],
) -> Tally:
    if concurrency == 1:
        return _alone(target, model, inputs, duration_s, advance)
    import asyncio  # costs as much as everything else a short command loads

    return asyncio.run(_together(target, model, inputs, concurrency, duration_s, advance))


def _count(error: "ApplianceError", tally: Tally) -> None:
    """Count what may pass when asked again; anything else would only repeat itself."""
    if not error.is_retryable or error.kind in ("daemon-unreachable", "connection-lost", "shutting-down"):
        raise error
    tally.errors[error.kind] += 1


def _alone(
    target: Target, model: str, inputs: "dict[str, Tensor]", duration_s: float, advance: Callable[[float], None]
) -> Tally:
    from appliance_client import ApplianceError

    tally = Tally(1)
    with target.client() as client:
        warm_until = time.monotonic() + duration_s * _WARM_UP
        while time.monotonic() < warm_until:
            client.infer(model, inputs)
        start = told = now = time.monotonic()
        while now - start < duration_s:
            try:
                answer = client.infer(model, inputs)
                after = time.monotonic()
                tally.answered(after - now, answer.timings)
            except ApplianceError as error:
                after = time.monotonic()
                _count(error, tally)
                time.sleep(_PAUSE_SECONDS)
            now = after
            if now - told > 0.1:
                advance(now - told)
                told = now
        tally.elapsed_s = now - start
        advance(now - told)
    return tally


async def _together(
    target: Target,
    model: str,
    inputs: "dict[str, Tensor]",
    concurrency: int,
    duration_s: float,
    advance: Callable[[float], None],
) -> Tally:
    import asyncio

    from appliance_client import ApplianceError

    tally = Tally(concurrency)
    async with target.async_client() as client:
        warm_until = time.monotonic() + duration_s * _WARM_UP
        start = told = warm_until
        end = warm_until + duration_s

        async def loop() -> None:
            nonlocal told
            while (before := time.monotonic()) < end:
                try:
                    answer = await client.infer(model, inputs)
                    after = time.monotonic()
                    if before >= warm_until:
                        tally.answered(after - before, answer.timings)
                except ApplianceError as error:
                    after = time.monotonic()
                    _count(error, tally)
                    await asyncio.sleep(_PAUSE_SECONDS)
                if after - told > 0.1:
                    advance(after - told)
                    told = after

        try:
            async with asyncio.TaskGroup() as loops:
                for _ in range(concurrency):
                    loops.create_task(loop())
        except* ApplianceError as group:
            raise group.exceptions[0] from None
        tally.elapsed_s = time.monotonic() - start
    return tally


@contextmanager
def _progress(total_s: float, *, quiet: bool) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal's standard error, told the seconds gone by."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("measuring"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console(is_error=True), transient=True) as progress:
        task = progress.add_task("", total=total_s)
        yield lambda seconds: progress.advance(task, seconds)


def _print(rows: list[dict[str, Any]]) -> None:
    def cell(value: float | None, digits: int = 2) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    print_table(
        (*(f">{name}" for name in _COLUMNS), "errors"),
        [
            (
                str(row["concurrency"]),
                cell(row["requests_per_s"], 1),
                cell(row["p50_ms"]),
                cell(row["p90_ms"]),
                cell(row["p99_ms"]),
                cell(row["mean"].get("batch_rows"), 1),
                cell(row["mean"].get("queue_us"), 0),
                cell(row["mean"].get("compute_us"), 0),
                cell(_other(row["mean"]), 0),
                " ".join(f"{kind}: {count}" for kind, count in row["errors"].items()) or "-",
            )
            for row in rows
        ],
        "nothing was measured",
    )


def _other(mean: dict[str, float]) -> float | None:
    """Decoding, tokenising, copying and post-processing together."""
    stages = ("decode_us", "tokenise_us", "copy_us", "postprocess_us")
    return sum(mean[stage] for stage in stages) if mean else None
