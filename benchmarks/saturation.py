"""Budget 5: saturated throughput."""

from pathlib import Path

from benchmarks.bare_loop import BareLoop
from benchmarks.report import Line, median, median_ratio
from benchmarks.scheduled import Client, Traffic
from benchmarks.served import Served

ROUNDS = 5
_SHARE = 0.95
_SECONDS = 1.3
_TRIED_SECONDS = 0.2

#: Requests of one row in flight: enough for a full batch that runs, one behind it, and one in the queue.
IN_FLIGHT = 128


def saturate(client: Client, model: Served, seconds: float) -> float:
    """Rows a second of a closed loop with more in flight than batches hold."""
    (outcome,) = client.send(Traffic(client.frame(model.name, model.elements), window=IN_FLIGHT, seconds=seconds))
    if refusals := outcome.refusals():
        raise RuntimeError(f"{model.name}: requests were refused: {dict(refusals)}")
    return outcome.per_second()


def real(client: Client, model: Served, artifact: Path) -> list[Line]:
    """As the daemon chose to run it, against the same runtime alone, as fast as a grid of settings makes it."""
    backend = model.variant.partition("/")[0]
    ours, bare = [], []
    with BareLoop(backend, artifact) as loop:
        best = loop.best(_TRIED_SECONDS)
        saturate(client, model, 0.5)
        for _ in range(ROUNDS):
            ours.append(saturate(client, model, _SECONDS))
            bare.append(loop.rows_per_second(best, _SECONDS))
    return [
        _line(
            f"{model.name} as {model.variant}, saturated",
            median(ours),
            f"bare {backend}, {best}: {median(bare):,.0f}/s",
            median_ratio(ours, bare),
        )
    ]


def synthetic(client: Client, model: Served) -> list[Line]:
    """Against what the device gives at most."""
    rate = median([saturate(client, model, _SECONDS) for _ in range(3)])
    best = model.best_per_second
    return [_line(f"{model.name}, saturated", rate, f"device at its largest batch {best:,.1f}/s", rate / best)]


def _line(what: str, rate: float, against: str, ratio: float) -> Line:
    return Line("5", what, rate, "/s", f">= {_SHARE:.0%}", ratio >= _SHARE, against, ratio)
