"""The tables of ``bench``."""

from collections.abc import Sequence
from typing import Any, Final

import click

from appliancectl.output import print_table

#: Part of the 99th percentile from which the sender's own lateness is worth a warning.
_LATE: Final = 0.1

#: Columns of `latencies`.
LATENCIES: Final = ["p50 ms", "p90 ms", "p99 ms", "p99.9 ms"]

_Row = dict[str, Any]


def print_closed_loops(rows: Sequence[_Row]) -> None:
    """Steps of a closed loop: throughput, latency, and where the time went."""
    has_deadline = any(row["goodput_per_s"] is not None for row in rows)
    columns = ["at once", "per second", *(["in time"] if has_deadline else []), *LATENCIES]
    columns += ["batch", "queue µs", "compute µs", "other µs"]
    print_table(
        (*(f">{name}" for name in columns), "errors"),
        [
            (
                str(row["concurrency"]),
                cell(row["requests_per_s"], 1),
                *((cell(row["goodput_per_s"], 1),) if has_deadline else ()),
                *latencies(row),
                cell(row["mean"].get("batch_rows"), 1),
                cell(row["mean"].get("queue_us"), 0),
                cell(row["mean"].get("compute_us"), 0),
                cell(_other(row["mean"]), 0),
                _errors(row),
            )
            for row in rows
        ],
        "nothing was measured",
    )


def print_open_loops(rows: Sequence[_Row]) -> None:
    """Steps of an open loop: what was offered, what came of it, and how late the sender was."""
    has_deadline = any(row["goodput_per_s"] is not None for row in rows)
    columns = ["offered", "answered", *(["in time"] if has_deadline else []), *LATENCIES, "late p99", "batch"]
    print_table(
        (*(f">{name}" for name in columns), "errors"),
        [
            (
                cell(row["offered_per_s"], 1),
                cell(row["requests_per_s"], 1),
                *((cell(row["goodput_per_s"], 1),) if has_deadline else ()),
                *latencies(row),
                cell(row["late_p99_ms"]),
                cell(row["mean"].get("batch_rows"), 1),
                _errors(row),
            )
            for row in rows
        ],
        "nothing was measured",
    )
    for row in rows:
        late, latency = row["late_p99_ms"], row["p99_ms"]
        if late is not None and latency is not None and late > _LATE * latency:
            click.echo(
                f"at {row['rate']:g} a second this program itself sent late: the 99th percentile of its lateness, "
                f"{late:.2f} ms, is {late / latency:.0%} of the latency's; part of that latency is not the daemon's",
                err=True,
            )


def latencies(row: _Row, digits: int = 2) -> tuple[str, ...]:
    """Cells of the columns of percentiles."""
    return tuple(cell(row[name], digits) for name in ("p50_ms", "p90_ms", "p99_ms", "p99_9_ms"))


def cell(value: float | None, digits: int = 2) -> str:
    """A number, or a dash for none."""
    return "-" if value is None else f"{value:.{digits}f}"


def _errors(row: _Row) -> str:
    return " ".join(f"{kind}: {count}" for kind, count in row["errors"].items()) or "-"


def _other(mean: dict[str, float]) -> float | None:
    """Decoding, tokenising, copying and post-processing together."""
    stages = ("decode_us", "tokenise_us", "copy_us", "postprocess_us")
    return sum(mean[stage] for stage in stages) if mean else None
