"""LoadGen's figures, read from its log.

The log has a JSON object a line behind a marker; keys are those of LoadGen's ``results.cc`` (mlcommons/inference).
"""

import json
from pathlib import Path
from typing import Any, Final

_NAME: Final = "mlperf_log_detail.txt"
_MARK: Final = ":::MLLOG "

_PERCENTILES: Final = {"p50_ms": "50.00", "p90_ms": "90.00", "p99_ms": "99.00", "p99_9_ms": "99.90"}

#: What LoadGen asks of a run, and what to say where it was not met.
_CONDITIONS: Final = {
    "result_perf_constraints_met": "the 99th percentile is over the target latency",
    "result_min_duration_met": "it ended before its time",
    "result_min_queries_met": "too few queries were sent",
    "early_stopping_met": "too few queries for LoadGen's confidence in the percentile",
}


def read_result(directory: Path, scenario: str, samples_per_query: int) -> dict[str, Any]:
    """Figures of one run: validity with reasons, queries, samples a second, percentiles of the latency in ms.

    Of ``multi-stream`` the latency is that of a query with all its samples; ``offline`` has none.
    """
    found, errors = _entries((directory / _NAME).read_text(encoding="utf-8"))
    reasons = [text for key, text in _CONDITIONS.items() if found.get(key) is False]
    return {
        "valid": found["result_validity"] == "VALID",
        "reasons": reasons + errors,
        "queries": found["result_query_count"],
        "samples_per_s": round(_rate(found, scenario, samples_per_query), 1),
        **_latencies(found, scenario),
    }


def _entries(log: str) -> tuple[dict[str, Any], list[str]]:
    """Values by key, and the errors."""
    found: dict[str, Any] = {}
    errors = []
    for line in log.splitlines():
        if not line.startswith(_MARK):
            continue
        entry = json.loads(line.removeprefix(_MARK))
        found[entry["key"]] = entry["value"]
        if entry["metadata"]["is_error"]:
            errors.append(f"LoadGen says: {entry['value']}")
    return found, errors


def _rate(found: dict[str, Any], scenario: str, samples_per_query: int) -> float:
    if scenario == "single-stream":
        return float(found["result_qps_with_loadgen_overhead"])
    if scenario == "multi-stream":
        return samples_per_query * 1e9 / float(found["result_mean_query_latency_ns"])
    if scenario == "server":
        return float(found["result_completed_samples_per_sec"])
    return float(found["result_samples_per_second"])


def _latencies(found: dict[str, Any], scenario: str) -> dict[str, float | None]:
    if scenario == "offline":
        return dict.fromkeys(_PERCENTILES)
    what = "per_query_latency" if scenario == "multi-stream" else "latency"
    return {
        name: round(found[f"result_{percent}_percentile_{what}_ns"] / 1e6, 4) for name, percent in _PERCENTILES.items()
    }
