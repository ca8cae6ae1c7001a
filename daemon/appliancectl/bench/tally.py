"""What a measurement saw, and the numbers made of it."""

from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from appliance_client import ApplianceError, Timings

#: Kinds that end a measurement although they may pass: there is nobody left to measure.
_GONE = ("daemon-unreachable", "connection-lost", "shutting-down")


@dataclass(slots=True)
class Tally:
    """What one step saw.

    Attributes:
        timeout_s: What a request may take to count as good; None where no deadline is set.
        offered: Requests that were due; only an open loop has such.
        elapsed_s: From the first counted request to the last answer, or to the end of the schedule where that is later.
        latencies_s: One for each answer.
        lateness_s: How long after it was due each request was sent.
        in_flight: Most requests that waited for their answers at one time.
        sums: Stage times and batch rows, added up over the answers.
        errors: Requests refused, failed or never answered, by kind.
    """

    timeout_s: float | None = None
    offered: int = 0
    elapsed_s: float = 0.0
    latencies_s: "array[float]" = field(default_factory=lambda: array("d"))
    lateness_s: "array[float]" = field(default_factory=lambda: array("d"))
    in_flight: int = 0
    sums: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)

    def answered(self, latency_s: float, timings: "Timings") -> None:
        """Count an answer."""
        self.latencies_s.append(latency_s)
        for stage, value in zip(timings._fields, timings, strict=True):
            self.sums[stage] += value

    def refused(self, error: "ApplianceError") -> None:
        """Count a request that failed in a way that load explains.

        Raises:
            ApplianceError: The error itself, where all others would fail the same way.
        """
        check_passing(error)
        self.errors[error.kind] += 1

    def row(self) -> dict[str, Any]:
        """Throughput, percentiles by nearest rank, mean stage times."""
        ascending_s = sorted(self.latencies_s)
        count = len(ascending_s)
        good = count if self.timeout_s is None else bisect_right(ascending_s, self.timeout_s)

        def a_second(number: int) -> float:
            return round(number / self.elapsed_s, 1) if self.elapsed_s else 0.0

        return {
            "requests": count,
            "requests_per_s": a_second(count),
            "goodput_per_s": None if self.timeout_s is None else a_second(good),
            "p50_ms": percentile_ms(ascending_s, 50),
            "p90_ms": percentile_ms(ascending_s, 90),
            "p99_ms": percentile_ms(ascending_s, 99),
            "p99_9_ms": percentile_ms(ascending_s, 99.9),
            "mean": {stage: round(total / count, 1) for stage, total in self.sums.items()} if count else {},
            "errors": dict(self.errors),
        }

    def open_row(self, rate: float, duration_s: float) -> dict[str, Any]:
        """As `row`, with what an open loop offered and how late it sent.

        Args:
            rate: Requests a second that were asked for.
            duration_s: Seconds of the schedule that count.
        """
        return {
            "rate": rate,
            "offered": self.offered,
            "offered_per_s": round(self.offered / duration_s, 1),
            **self.row(),
            "elapsed_s": round(self.elapsed_s, 3),
            "late_p99_ms": percentile_ms(sorted(self.lateness_s), 99),
            "in_flight": self.in_flight,
        }


def percentile_ms(ascending_s: Sequence[float], percent: float) -> float | None:
    """A percentile by nearest rank, in milliseconds; None of nothing.

    Args:
        ascending_s: Seconds, sorted.
        percent: To a tenth, so that the rank is exact.
    """
    rank = -(-len(ascending_s) * round(percent * 10) // 1000)
    return round(ascending_s[max(0, rank - 1)] * 1e3, 4) if ascending_s else None


def check_passing(error: "ApplianceError") -> None:
    """Let pass what comes of load: what may succeed when asked again, and deadlines that are not met.

    Raises:
        ApplianceError: The error itself, where it is anything else.
    """
    if error.kind == "deadline-exceeded" or (error.is_retryable and error.kind not in _GONE):
        return
    raise error
