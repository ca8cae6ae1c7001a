"""Budgets 6 and 7: one request at a time, and Poisson arrivals."""

import numpy as np

from benchmarks.arrivals import ideal_us, poisson
from benchmarks.report import Line, median, median_ratio, percentile
from benchmarks.scheduled import Client, Traffic
from benchmarks.served import Served, service_us

ROUNDS = 3
_SECONDS = 4.5
_UTILISATION = 0.7
_BOUND = 1.15

_LONE = 80
_LONE_EVERY_NS = 20_000_000


def lone(client: Client, model: Served) -> list[Line]:
    """Budget 6: requests far enough apart to find the daemon idle."""
    arrivals = np.arange(_LONE) * _LONE_EVERY_NS
    (outcome,) = client.send(Traffic(client.frame(model.name, model.elements), arrivals))
    answered = outcome.answered
    queue = median(answered["queue_us"].tolist())
    beyond = median((outcome.latencies_us - answered["compute_us"]).tolist())
    service = median(answered["compute_us"].tolist())
    return [
        Line("6", f"{model.name}, lone: time queued, p50", queue, "us", "no batching delay", queue < 50),
        Line(
            "6",
            "the same, all time but the model's own, p50",
            beyond,
            "us",
            "",
            None,
            f"the model's own {service:,.0f} us",
            beyond / service,
        ),
    ]


def poisson_tail(client: Client, model: Served) -> list[Line]:
    """Budget 7: p99 over that of M/D/c at the same arrivals, with the time of single rows measured before each round.

    The load is a share of what single rows allow: batches are the daemon's own affair.
    """
    ours, ideal, late, service = [], [], [], []
    frame = client.frame(model.name, model.elements)
    for round_ in range(ROUNDS):
        service.append(service_us(client, model, 0.6))
        arrivals = poisson(_UTILISATION * model.streams / service[-1] * 1e6, _SECONDS, round_)
        (outcome,) = client.send(Traffic(frame, arrivals))
        if refusals := outcome.refusals():
            raise RuntimeError(f"{model.name}: requests were refused: {dict(refusals)}")
        ours.append(percentile(outcome.latencies_us.tolist(), 0.99) / 1e3)
        ideal.append(percentile(ideal_us(arrivals, service[-1] * 1e3, model.streams).tolist(), 0.99) / 1e3)
        late.append(percentile(outcome.late_us.tolist(), 0.99))
    ratio = median_ratio(ours, ideal)
    return [
        Line(
            "7",
            f"{model.name}, Poisson at {_UTILISATION:.0%} of {model.streams}/{median(service):,.0f} us, p99",
            median(ours),
            "ms",
            f"<= {_BOUND} x",
            ratio <= _BOUND,
            f"ideal M/D/{model.streams} {median(ideal):.1f} ms; client late by {median(late):,.0f} us at p99",
            ratio,
        )
    ]
