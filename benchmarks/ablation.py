"""The daemon's rule for batches beside others', in virtual time: latency by load, and what is left in overload.

``python -m benchmarks.ablation`` prints the tables of docs/batching.md; ``--full`` takes more requests and more loads,
``--plot FILE`` draws them. No clock is read: equal code prints equal figures on every machine.
"""

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_REPOSITORY = Path(__file__).parents[1]
if str(_REPOSITORY / "tests") not in sys.path:
    sys.path.insert(0, str(_REPOSITORY / "tests"))

from rich.box import MARKDOWN  # noqa: E402 - the tests' support package is found through the lines above
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.multiples import Panel, draw  # noqa: E402
from benchmarks.report import Line  # noqa: E402
from support.rules import bentoml, triton  # noqa: E402
from support.simulator import MS, SECOND, Arrival, Outcome, Service, Simulation, bursts, percentile  # noqa: E402

#: What a batch of one row takes; the delays and the ticks of other servers' rules are told in milliseconds.
S_NS: Final = 10 * MS
#: Relative standard deviation of service times.
NOISE: Final = 0.02
MAX_ROWS: Final = 32
#: The part of a batch of one row that no row adds to: c / (a + c).
SHARES: Final = (0.05, 0.2, 0.75)
#: Requests that come at once.
GROUPS: Final = (1, 16)
#: Share of the requests that come before anything is counted.
WARM_UP: Final = 0.05
#: In overload requests have this long.
PATIENCE_NS: Final = 20 * S_NS
#: And servers that know no other bound have a queue of so many.
MAX_QUEUE: Final = 128
OVERLOADS: Final = (1, 2, 10)

_OURS: Final = "this daemon"

Rule = Callable[[list[Arrival], Service], Outcome]

RULES: Final[dict[str, Rule]] = {
    _OURS: lambda arrivals, service: Simulation(service, MAX_ROWS).run(arrivals),
    "one by one": lambda arrivals, service: triton(arrivals, service, 1),
    "eager (Triton)": lambda arrivals, service: triton(arrivals, service, MAX_ROWS),
    "fixed delay 5 ms": lambda arrivals, service: triton(arrivals, service, MAX_ROWS, 5 * MS),
    "fixed delay 10 ms": lambda arrivals, service: triton(arrivals, service, MAX_ROWS, 10 * MS),
    "BentoML": lambda arrivals, service: bentoml(arrivals, service, MAX_ROWS),
}


def _fitted_queue(service: Service) -> int:
    """The longest queue whose last request is done in time: what somebody would set who knew what batches take."""
    return min(int((PATIENCE_NS / 2 / 1.05 - service.intercept_ns) / service.slope_ns), MAX_ROWS)


#: By the names they have above, and one more. Those of Triton have a queue of `MAX_QUEUE` and drop what is too old.
_FITTED: Final = "eager, queue fitted to the deadline"
OVERLOADED_RULES: Final[dict[str, Rule]] = {
    _OURS: lambda arrivals, service: Simulation(service, MAX_ROWS).run(arrivals),
    "eager (Triton)": lambda arrivals, service: triton(arrivals, service, MAX_ROWS, 0, MAX_QUEUE),
    "fixed delay 5 ms": lambda arrivals, service: triton(arrivals, service, MAX_ROWS, 5 * MS, MAX_QUEUE),
    "BentoML": lambda arrivals, service: bentoml(arrivals, service, MAX_ROWS, PATIENCE_NS),
    _FITTED: lambda arrivals, service: triton(arrivals, service, MAX_ROWS, 0, _fitted_queue(service)),
}


@dataclass(frozen=True)
class Size:
    """How much is simulated.

    Attributes:
        requests: At each load.
        grouped: Likewise where they come in groups: of those there have to be more for chance to even out.
        loads: Per cent of what the largest batches sustain.
        seconds: For how long overload lasts.
    """

    requests: int
    grouped: int
    loads: tuple[int, ...]
    seconds: int

    def of(self, group: int) -> int:
        """How many requests come in groups of `group`."""
        return self.requests if group == 1 else self.grouped


SHORT: Final = Size(30_000, 90_000, (30, 50, 70, 80, 90, 95), 10)
FULL: Final = Size(120_000, 360_000, tuple(range(30, 100, 5)), 60)


@dataclass(frozen=True)
class Point:
    """One rule at one load.

    Attributes:
        p99: Divided by what a batch of one row takes.
        mean: Likewise.
    """

    p99: float
    mean: float


@dataclass(frozen=True)
class Overload:
    """One rule under too much load.

    Attributes:
        goodput: Answers in time, divided by what the largest batches sustain.
        p99: Of the answers, divided by the time requests have.
    """

    goodput: float
    p99: float


def service_of(share: float) -> Service:
    """Batches whose first row's cost is by `share` independent of rows."""
    return Service((1 - share) * S_NS, share * S_NS, NOISE)


def latency(share: float, group: int, size: Size, seed: int = 1) -> dict[str, list[Point | None]]:
    """Every rule at every load; None for one that cannot sustain it."""
    table: dict[str, list[Point | None]] = {name: [] for name in RULES}
    for load in size.loads:
        rate = service_of(share).capacity(MAX_ROWS) * load / 100
        arrivals = bursts(random.Random(seed), rate, size.of(group), group)
        for name, rule in RULES.items():
            if name == "one by one" and rate * S_NS >= SECOND:
                table[name].append(None)
                continue
            latencies = rule(arrivals, service_of(share)).latencies_ns(WARM_UP)
            table[name].append(Point(percentile(latencies, 0.99) / S_NS, sum(latencies) / len(latencies) / S_NS))
    return table


def overload(share: float, size: Size, seed: int = 1) -> dict[str, list[Overload]]:
    """Every rule at every multiple of what the largest batches sustain."""
    table: dict[str, list[Overload]] = {name: [] for name in OVERLOADED_RULES}
    capacity = service_of(share).capacity(MAX_ROWS)
    for times in OVERLOADS:
        arrivals = bursts(
            random.Random(seed), capacity * times, int(capacity * times * size.seconds), 1, patience_ns=PATIENCE_NS
        )
        start, end = int(arrivals[-1].at_ns * WARM_UP), arrivals[-1].at_ns - PATIENCE_NS
        for name, rule in OVERLOADED_RULES.items():
            outcome = rule(arrivals, service_of(share))
            latencies = outcome.latencies_ns(WARM_UP)
            table[name].append(
                Overload(outcome.goodput(start, end) / capacity, percentile(latencies, 0.99) / PATIENCE_NS)
            )
    return table


def ratios(table: dict[str, list[Point | None]]) -> list[float]:
    """At each load the daemon's p99 divided by the best other rule's."""
    others = [points for name, points in table.items() if name != _OURS]
    found = []
    for place, ours in enumerate(table[_OURS]):
        best = min(point.p99 for points in others if (point := points[place]) is not None)
        found.append(ours.p99 / best if ours is not None else float("inf"))
    return found


def lines() -> list[Line]:
    """For ``make bench``: the worst load of each kind, and goodput at ten times what can be served."""
    found = []
    for share in SHARES:
        for group in GROUPS:
            table = latency(share, group, SHORT)
            of_each = ratios(table)
            worst = max(of_each)
            load = SHORT.loads[of_each.index(worst)]
            found.append(
                Line(
                    "ablation",
                    f"p99 in virtual time at {load} %, the worst load; c/(a+c) = {share}, {_pattern(group)}",
                    table[_OURS][of_each.index(worst)].p99,  # type: ignore[union-attr] # it sustains every load
                    "S",
                    "≤ the best other rule's, within 3 %",
                    worst <= 1.03,
                    "the best of five other rules there",
                    worst,
                )
            )
        in_overload = overload(share, SHORT)
        best = max(each[-1].goodput for name, each in in_overload.items() if name != _OURS)
        ours = in_overload[_OURS][-1].goodput
        found.append(
            Line(
                "ablation",
                f"goodput in virtual time at 10 × capacity; c/(a+c) = {share}",
                100 * ours,
                "% of capacity",
                "≥ the best other rule's, within 2 %",
                ours >= 0.98 * best,
                "the best of four other rules",
                ours / best,
            )
        )
    return found


# ---------------------------------------------------------------- for people


def _pattern(group: int) -> str:
    return "Poisson" if group == 1 else f"bursts of {group}"


def _show_latency(console: Console, title: str, table: dict[str, list[Point | None]], size: Size) -> None:
    of_each = ratios(table)
    shown = Table("load", *RULES, "ours ÷ best other", "mean: ours ÷ best other", box=MARKDOWN)
    for place, load in enumerate(size.loads):
        points = {name: points[place] for name, points in table.items()}
        means = [point.mean for name, point in points.items() if point is not None and name != _OURS]
        ours = points[_OURS]
        shown.add_row(
            f"{load} %",
            *(f"{point.p99:.2f}" if point is not None else "-" for point in points.values()),
            f"{of_each[place]:.3f}",
            f"{ours.mean / min(means):.3f}" if ours is not None else "-",
        )
    _print(console, title, shown)


def _show_overload(console: Console, title: str, table: dict[str, list[Overload]]) -> None:
    shown = Table("offered", *OVERLOADED_RULES, box=MARKDOWN)
    for place, times in enumerate(OVERLOADS):
        shown.add_row(
            f"{times} ×", *(f"{points[place].goodput:.3f} ({points[place].p99:.2f})" for points in table.values())
        )
    _print(console, title, shown)


def _print(console: Console, title: str, table: Table) -> None:
    console.print(f"\n{title}:", highlight=False)
    console.print(table)


def _latency_panel(share: float, group: int, table: dict[str, list[Point | None]], size: Size) -> Panel:
    ours = table[_OURS]
    relative = {
        name: [
            point.p99 / mine.p99 if point is not None and mine is not None else None
            for point, mine in zip(points, ours, strict=True)
        ]
        for name, points in table.items()
    }
    title = f"c/(a+c) = {share}, {_pattern(group)}"
    return Panel(title, "load, %", "p99 ÷ ours", size.loads, relative, 0.8, 2.0, 0.2)


def _overload_panel(share: float, table: dict[str, list[Overload]]) -> Panel:
    shown = {
        name.replace("eager, queue of 128", "eager (Triton)").replace(
            "fixed delay, queue of 128", "fixed delay 5 ms"
        ): [point.goodput for point in points]
        for name, points in table.items()
    }
    names = [f"{times} ×" for times in OVERLOADS]
    return Panel(f"c/(a+c) = {share}, overload", "offered load", "goodput", names, shown, 0, 1, 0.25, bars=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, and draw them where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__)
    parser.add_argument("--full", action="store_true", help="more requests and more loads (minutes)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw an SVG")
    given = parser.parse_args(arguments)
    size = FULL if given.full else SHORT
    console = Console(width=160)
    console.print(
        f"S = {S_NS // MS} ms for a batch of one row, batches of {MAX_ROWS} at most, service times scatter by "
        f"{NOISE:.0%}, {size.requests:,} requests at each load, {size.grouped:,} where they come in groups, seed 1; "
        "load is a share of what the largest batches sustain. No time is measured here: it is virtual.",
        highlight=False,
    )
    panels: list[list[Panel]] = [[] for _ in range(len(GROUPS) + 1)]
    for share in SHARES:
        for row, group in enumerate(GROUPS):
            table = latency(share, group, size)
            _show_latency(console, f"p99 ÷ S, c/(a+c) = {share}, {_pattern(group)}", table, size)
            panels[row].append(_latency_panel(share, group, table, size))
        in_overload = overload(share, size)
        _show_overload(
            console,
            f"goodput ÷ capacity (p99 of answers ÷ deadline), c/(a+c) = {share}, "
            f"deadline {PATIENCE_NS // S_NS} S, {size.seconds} s",
            in_overload,
        )
        panels[-1].append(_overload_panel(share, in_overload))
    if given.plot is not None:
        given.plot.write_text(draw(panels, [*RULES, _FITTED]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
