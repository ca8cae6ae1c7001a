"""The Prometheus text."""

import re
from pathlib import Path

from appliance.metrics import ModelStatistics
from appliance.server.exposition import MODEL_METRICS, SERVER_METRICS, expose
from appliance.types import CacheStatus, CostStatus, ModelState, ModelStatus, Timings

LINE = re.compile(r'appliance_[a-z_]+(\{([a-z]+="([^"\\]|\\.)*",?)+\})? -?[0-9.e+-]+')


def text(name="m"):
    statistics = ModelStatistics()
    statistics.ran(4, Timings(compute_ns=1_500_000_000), 0)
    statistics.success.add(2_000_000_000, 3)
    statistics.refuse("overloaded")
    statistics.cache_hit.add(1000, 6)
    statistics.cache_miss.add(1000, 2)
    statistics.cache_joined = 1
    costs = (CostStatus(16, 400.0, 100.0, 0.05, 0.2, 5, 77, 1.25), CostStatus(32, 800.0, 100.0, 0.05, 0.1, 3, 9, None))
    status = ModelStatus(
        name,
        "1",
        ModelState.READY,
        queued=2,
        queued_by_priority=(0, 2),
        queued_bytes=64,
        cache=CacheStatus(3, 4000, 0.5),
        costs=costs,
    )
    return expose([(status, statistics)], True, 1234)


def test_every_line_is_a_sample_or_a_comment():
    for line in text().splitlines():
        assert line.startswith("# ") or LINE.fullmatch(line), line


def test_values_are_in_base_units():
    lines = text().splitlines()
    assert 'appliance_compute_seconds_total{model="m",version="1"} 1.5' in lines
    assert 'appliance_requests_succeeded_total{model="m",version="1"} 3' in lines
    assert 'appliance_requests_refused_total{model="m",version="1",kind="overloaded"} 1' in lines
    assert 'appliance_batches_by_rows_total{model="m",version="1",rows="4"} 1' in lines
    assert 'appliance_requests_queued{model="m",version="1"} 2' in lines
    assert 'appliance_requests_queued_by_priority{model="m",version="1",priority="2"} 2' in lines
    assert 'appliance_queued_bytes{model="m",version="1"} 64' in lines
    assert "appliance_resident_bytes 1234" in lines
    assert 'appliance_cache_hits_total{model="m",version="1"} 6' in lines
    assert 'appliance_cache_misses_total{model="m",version="1"} 2' in lines
    assert 'appliance_cache_joined_total{model="m",version="1"} 1' in lines
    assert 'appliance_cache_answers{model="m",version="1"} 3' in lines
    assert 'appliance_cache_bytes{model="m",version="1"} 4000' in lines


def test_what_batches_cost_is_shown_for_every_length():
    lines = text().splitlines()
    assert 'appliance_cost_slope_seconds{model="m",version="1",units="16"} 0.0004' in lines
    assert 'appliance_cost_slope_seconds{model="m",version="1",units="32"} 0.0008' in lines
    assert 'appliance_cost_intercept_seconds{model="m",version="1",units="16"} 0.0001' in lines
    assert 'appliance_cost_spread_ratio{model="m",version="1",units="32"} 0.05' in lines
    assert [line for line in lines if line.startswith("appliance_cost_scale_ratio")] == [
        'appliance_cost_scale_ratio{model="m",version="1",units="16"} 1.25'
    ]


def test_labels_are_escaped():
    assert r'model="a\"b\\c\nd"' in text('a"b\\c\nd')


def test_every_metric_is_described_once_and_documented():
    documentation = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()
    documented = set(re.findall(r"^\| `(appliance_\w+)`", documentation, re.MULTILINE))
    named = {f"appliance_{metric.name}" for metric in MODEL_METRICS} | {
        f"appliance_{name}" for name, _ in SERVER_METRICS
    }
    assert documented == named
    described = re.findall(r"^# TYPE (\w+)", text(), re.MULTILINE)
    assert sorted(described) == sorted(named)


def test_counters_end_in_total():
    assert all((metric.kind == "counter") == metric.name.endswith("_total") for metric in MODEL_METRICS)
