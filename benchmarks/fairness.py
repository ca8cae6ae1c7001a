"""What one client's flood does to another's requests, and interactive load to work in the background."""

import numpy as np

from benchmarks.report import Line, median, percentile
from benchmarks.scheduled import Client, Traffic
from benchmarks.served import Served

_SECONDS = 12.0
_FLOOD = 1000
_EVERY_NS = 100_000_000
#: The flood is under way by then.
_AFTER_NS = 500_000_000
_BATCHES = 2.0

_INTERACTIVE, _BACKGROUND = 1, 3
_INTERACTIVE_IN_FLIGHT = 128
_BACKGROUND_REQUESTS = 20


def _regularly(count: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    return _AFTER_NS + np.arange(count) * _EVERY_NS


def flood(client: Client, model: Served) -> list[Line]:
    """Client A keeps 1,000 requests waiting, client B sends one each 100 ms."""
    frame = client.frame(model.name, model.elements)
    count = int((_SECONDS * 1e9 - _AFTER_NS) / _EVERY_NS) - 5  # so that B ends before A
    a, b = client.send(
        Traffic(frame, window=_FLOOD, seconds=_SECONDS, connections=1),
        Traffic(frame, _regularly(count), connections=1),
    )
    batch = median(b.answered["compute_us"].tolist()) / 1e3
    p99 = percentile(b.latencies_us.tolist(), 0.99) / 1e3
    whole = len(b.answered) == len(b.records)
    refused = ", ".join(f"{count:,} of A {kind}" for kind, count in a.refusals().items()) or "none of A refused"
    return [
        Line(
            "fair",
            f"{model.name}: A queues {_FLOOD:,}, B sends {count}, one each 100 ms: B's p99",
            p99,
            "ms",
            f"<= {_BATCHES:g} batches",
            whole and p99 <= _BATCHES * batch,
            f"batch B met {batch:.1f} ms; B's p50 {median(b.latencies_us.tolist()) / 1e3:.1f} ms; "
            f"A {a.per_second():,.0f}/s, {refused}",
            p99 / batch,
        )
    ]


def background(client: Client, model: Served) -> list[Line]:
    """Interactive requests that alone would saturate the model, and a few in the background."""
    interactive, behind = client.send(
        Traffic(
            client.frame(model.name, model.elements, priority=_INTERACTIVE),
            window=_INTERACTIVE_IN_FLIGHT,
            seconds=_SECONDS,
        ),
        Traffic(
            client.frame(model.name, model.elements, priority=_BACKGROUND),
            _regularly(_BACKGROUND_REQUESTS),
            connections=1,
        ),
    )
    end_ns = interactive.records["sent_ns"][-1]
    finished = int((behind.answered["answered_ns"] <= end_ns).sum())
    return [
        Line(
            "fair",
            f"{model.name}: background requests answered under saturating interactive load",
            100 * finished / _BACKGROUND_REQUESTS,
            "%",
            "100 %",
            finished == _BACKGROUND_REQUESTS,
            f"{_BACKGROUND_REQUESTS} sent; p50 {median(behind.latencies_us.tolist()) / 1e3:,.0f} ms, "
            f"interactive {median(interactive.latencies_us.tolist()) / 1e3:,.0f} ms",
        )
    ]
