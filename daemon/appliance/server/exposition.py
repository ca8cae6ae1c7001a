"""Counters in Prometheus's text format 0.0.4; docs/metrics.md lists every one.

Written by hand: counters are owned by the engine, and the client library would hold a second copy and 3 MB.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from appliance import __version__
from appliance.metrics import ModelStatistics
from appliance.types import CostStatus, ModelState, ModelStatus

#: A sample: further labels, and the value.
Sample = tuple[dict[str, str], float]


@dataclass(frozen=True, slots=True)
class ModelMetric:
    """One metric of every model: name without the prefix, kind, help, and its samples."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    samples: Callable[[ModelStatus, ModelStatistics], Iterable[Sample]]


def _one(
    value: Callable[[ModelStatus, ModelStatistics], float],
) -> Callable[[ModelStatus, ModelStatistics], Iterable[Sample]]:
    return lambda status, statistics: (({}, value(status, statistics)),)


def _refused(_: ModelStatus, statistics: ModelStatistics) -> Iterator[Sample]:
    for kind, count in sorted(statistics.refused.items()):
        yield {"kind": kind}, count


def _batches(_: ModelStatus, statistics: ModelStatistics) -> Iterator[Sample]:
    for rows in sorted(statistics.batches):
        yield {"rows": str(rows)}, statistics.batches[rows].compute_infer.count


def _queued(status: ModelStatus, _: ModelStatistics) -> Iterator[Sample]:
    for level, count in enumerate(status.queued_by_priority, 1):
        yield {"priority": str(level)}, count


def _cost(value: Callable[[CostStatus], float]) -> Callable[[ModelStatus, ModelStatistics], Iterable[Sample]]:
    return lambda status, _: (({"units": str(cost.units)}, value(cost)) for cost in status.costs)


def _placement(status: ModelStatus, _: ModelStatistics) -> Iterator[Sample]:
    if status.variant:
        labels = ("variant", "chosen_by", "requested_device", "device", "provider", "precision", "runtime")
        yield {label: getattr(status, label) for label in labels}, 1


#: Every metric that carries the labels ``model`` and ``version``.
MODEL_METRICS: Final = (
    ModelMetric(
        "model_ready", "gauge", "1 where the model answers requests", _one(lambda s, _: s.state is ModelState.READY)
    ),
    ModelMetric("placement_info", "gauge", "What serves and where it really runs, in labels; always 1", _placement),
    ModelMetric("requests_queued", "gauge", "Requests waiting", _one(lambda s, _: s.queued)),
    ModelMetric("requests_queued_by_priority", "gauge", "Requests in the queue, by level of priority", _queued),
    ModelMetric("queued_bytes", "gauge", "Bytes of tensors in the queue", _one(lambda s, _: s.queued_bytes)),
    ModelMetric("requests_running", "gauge", "Requests in a worker", _one(lambda s, _: s.running)),
    ModelMetric("worker_resident_bytes", "gauge", "Worker's memory after loading", _one(lambda s, _: s.resident_bytes)),
    ModelMetric(
        "worker_restarts_total", "counter", "Restarts of the worker after a crash", _one(lambda s, _: s.restarts)
    ),
    ModelMetric(
        "fallbacks_total",
        "counter",
        "Loads that ended on another device than the first choice",
        _one(lambda _, c: c.fallbacks),
    ),
    ModelMetric("requests_succeeded_total", "counter", "Requests answered", _one(lambda _, c: c.success.count)),
    ModelMetric("requests_failed_total", "counter", "Requests failed after admission", _one(lambda _, c: c.fail.count)),
    ModelMetric("requests_cancelled_total", "counter", "Requests withdrawn or expired", _one(lambda _, c: c.cancelled)),
    ModelMetric("requests_refused_total", "counter", "Requests not admitted, by error kind", _refused),
    ModelMetric("rows_total", "counter", "Rows run", _one(lambda _, c: c.inference_count)),
    ModelMetric("batches_total", "counter", "Batches run", _one(lambda _, c: c.execution_count)),
    ModelMetric("batches_by_rows_total", "counter", "Batches run, by their number of rows", _batches),
    ModelMetric("request_seconds_total", "counter", "Admission to answer", _one(lambda _, c: c.success.ns / 1e9)),
    ModelMetric("failed_request_seconds_total", "counter", "Admission to failure", _one(lambda _, c: c.fail.ns / 1e9)),
    ModelMetric("queue_seconds_total", "counter", "Waiting for a batch", _one(lambda _, c: c.queue.ns / 1e9)),
    ModelMetric("tokenise_seconds_total", "counter", "Tokenising", _one(lambda _, c: c.tokenise.ns / 1e9)),
    ModelMetric("decode_seconds_total", "counter", "Decoding images, by batch", _one(lambda _, c: c.decode.ns / 1e9)),
    ModelMetric(
        "input_seconds_total", "counter", "Copying and decoding, by batch", _one(lambda _, c: c.compute_input.ns / 1e9)
    ),
    ModelMetric(
        "compute_seconds_total", "counter", "The backend's runs, by batch", _one(lambda _, c: c.compute_infer.ns / 1e9)
    ),
    ModelMetric(
        "output_seconds_total", "counter", "Making the answers, by batch", _one(lambda _, c: c.compute_output.ns / 1e9)
    ),
    ModelMetric(
        "postprocess_seconds_total", "counter", "Labels and scores, by batch", _one(lambda _, c: c.postprocess.ns / 1e9)
    ),
    ModelMetric(
        "cost_slope_seconds", "gauge", "What a row adds to a batch, by units", _cost(lambda c: c.slope_us / 1e6)
    ),
    ModelMetric(
        "cost_intercept_seconds",
        "gauge",
        "What a batch takes whatever its rows, by units",
        _cost(lambda c: c.intercept_us / 1e6),
    ),
    ModelMetric(
        "cost_spread_ratio", "gauge", "Relative standard deviation of batches, by units", _cost(lambda c: c.spread)
    ),
    ModelMetric(
        "cost_scale_ratio",
        "gauge",
        "What batches take now to what was measured, by units",
        lambda s, _: (({"units": str(cost.units)}, cost.scale) for cost in s.costs if cost.scale is not None),
    ),
    ModelMetric(
        "cache_hits_total", "counter", "Requests answered from the cache", _one(lambda _, c: c.cache_hit.count)
    ),
    ModelMetric(
        "cache_misses_total", "counter", "Requests looked up in vain that ran", _one(lambda _, c: c.cache_miss.count)
    ),
    ModelMetric(
        "cache_joined_total",
        "counter",
        "Requests answered with an equal one in flight",
        _one(lambda _, c: c.cache_joined),
    ),
    ModelMetric(
        "cache_evictions_total", "counter", "Answers dropped for room or age", _one(lambda _, c: c.cache_evictions)
    ),
    ModelMetric("cache_answers", "gauge", "Answers in the cache", _one(lambda s, _: s.cache.answers if s.cache else 0)),
    ModelMetric("cache_bytes", "gauge", "Memory of the cache", _one(lambda s, _: s.cache.nbytes if s.cache else 0)),
)

#: Metrics of the daemon itself: name without the prefix, help.
SERVER_METRICS: Final = (
    ("build_info", "Version of the daemon, in a label; always 1"),
    ("ready", "1 where the daemon takes requests for every model it started with"),
    ("resident_bytes", "Resident memory of the front-end process"),
)


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _line(name: str, labels: dict[str, str], value: float) -> str:
    inner = ",".join(f'{key}="{_escape(text)}"' for key, text in labels.items())
    number = repr(value) if isinstance(value, float) else str(int(value))
    return f"appliance_{name}{{{inner}}} {number}\n" if inner else f"appliance_{name} {number}\n"


def _head(name: str, kind: str, text: str) -> str:
    return f"# HELP appliance_{name} {text}\n# TYPE appliance_{name} {kind}\n"


def expose(rows: Sequence[tuple[ModelStatus, ModelStatistics]], is_ready: bool, resident_bytes: int) -> str:
    """The text of ``GET /metrics``."""
    lines: list[str] = []
    values: tuple[Sample, ...] = ({"version": __version__}, 1), ({}, is_ready), ({}, resident_bytes)
    for (name, text), (labels, value) in zip(SERVER_METRICS, values, strict=True):
        lines += _head(name, "gauge", text), _line(name, labels, value)
    for metric in MODEL_METRICS:
        lines.append(_head(metric.name, metric.kind, metric.help))
        for status, statistics in rows:
            model = {"model": status.name, "version": status.version}
            lines += (_line(metric.name, model | labels, value) for labels, value in metric.samples(status, statistics))
    return "".join(lines)
