"""Budget 8: ten times as many requests as can be answered, each with a timeout."""

import math
from collections import Counter

from benchmarks.arrivals import poisson
from benchmarks.report import Line, median, median_ratio, percentile
from benchmarks.saturation import saturate
from benchmarks.scheduled import Client, Traffic
from benchmarks.served import Served, service_us
from support.daemon import RunningDaemon, resident_bytes

ROUNDS = 3
_PEAK_SECONDS = 1.2
_SECONDS = 2.0
_FACTOR = 10
_SHARE = 0.95
#: How long a client wants to wait, in service times of one row; it gives the daemon less, since the way there and back
#: takes its time too.
_PATIENCE = 20
_WAY_US = 1000
#: Share that the front-end may grow by from the end of the first round to the end of the last.
_GROWTH = 0.05


def tenfold(daemon: RunningDaemon, client: Client, model: Served) -> list[Line]:
    """Goodput over the best saturated throughput, tail of what was answered, and the front-end's memory."""
    objective_us = int(_PATIENCE * service_us(client, model, 0.5))
    frame = client.frame(model.name, model.elements)
    peak, good, p99, memory, cost = [], [], [], [], []
    refusals: Counter[str] = Counter()
    for round_ in range(ROUNDS):
        peak.append(saturate(client, model, _PEAK_SECONDS))
        arrivals = poisson(_FACTOR * peak[-1], _SECONDS, round_)
        (outcome,) = client.send(Traffic(frame, arrivals, timeout_us=objective_us - _WAY_US))
        good.append(outcome.per_second(objective_us))
        p99.append(percentile(outcome.latencies_us.tolist() or [math.inf], 0.99) / 1e3)
        memory.append(resident_bytes(daemon.pid) / 1e6)
        cost.append(outcome.cpu_seconds / _SECONDS)
        refusals.update(outcome.refusals())
    share = median_ratio(good, peak)
    refused = ", ".join(f"{count:,} {kind}" for kind, count in refusals.items())
    return [
        Line(
            "8",
            f"{model.name}, {_FACTOR * median(peak):,.0f}/s for {objective_us / 1e3:.0f} ms each: answers in time",
            median(good),
            "/s",
            f">= {_SHARE:.0%} of peak",
            share >= _SHARE,
            f"saturated {median(peak):,.1f}/s; client took {median(cost):.0%} of a core",
            share,
        ),
        Line(
            "8",
            "the same, p99 of what was answered",
            median(p99),
            "ms",
            "<= objective",
            median(p99) <= objective_us / 1e3,
            f"objective; errors: {refused}",
            median(p99) / objective_us * 1e3,
        ),
        Line(
            "8",
            "the same, front-end resident afterwards",
            memory[-1],
            "MB",
            "flat",
            memory[-1] <= memory[0] * (1 + _GROWTH),
            f"after the first of {ROUNDS} rounds",
            memory[-1] / memory[0],
        ),
    ]
