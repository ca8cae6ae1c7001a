"""The numbers of ``appliancectl bench``, the options that go together, and what it says."""

import json
import sys
from array import array

import pytest

from appliance_client import DeadlineExceeded, InvalidRequest, Overloaded, ShuttingDown
from appliance_client.answer import Timings
from appliancectl.bench.loadgen_log import read_result
from appliancectl.bench.table import print_closed_loops, print_open_loops
from appliancectl.bench.tally import Tally

TIMINGS = Timings(0, 0, 10, 0, 20, 0, 3)


def filled(milliseconds, **fields):
    tally = Tally(**fields)
    for ms in milliseconds:
        tally.answered(ms / 1e3, TIMINGS)
    return tally


def test_percentiles_are_by_nearest_rank():
    row = filled(range(1000, 0, -1), elapsed_s=2.0).row()
    assert (row["p50_ms"], row["p90_ms"], row["p99_ms"], row["p99_9_ms"]) == (500, 900, 990, 999)
    assert (row["requests"], row["requests_per_s"]) == (1000, 500.0)
    assert (row["mean"]["queue_us"], row["mean"]["compute_us"], row["mean"]["batch_rows"]) == (10, 20, 3)


def test_nothing_answered_is_no_number():
    row = Tally().row()
    assert (row["p50_ms"], row["p99_9_ms"], row["requests_per_s"], row["mean"]) == (None, None, 0.0, {})


def test_goodput_is_what_was_answered_within_the_deadline():
    assert filled(range(1, 101), elapsed_s=1.0, timeout_s=0.04).row()["goodput_per_s"] == 40.0
    assert filled(range(1, 101), elapsed_s=1.0).row()["goodput_per_s"] is None


def test_an_open_loop_counts_what_was_offered_and_how_late_it_was_sent():
    row = filled(
        [1, 2], elapsed_s=2.5, offered=4, lateness_s=array("d", [0.001, 0.002, 0.0, 0.003]), in_flight=3
    ).open_row(2, 2.0)
    assert (row["rate"], row["offered"], row["offered_per_s"]) == (2, 4, 2.0)
    assert (row["requests_per_s"], row["elapsed_s"]) == (0.8, 2.5)
    assert (row["late_p99_ms"], row["in_flight"]) == (3.0, 3)


def test_what_load_explains_is_counted_and_anything_else_ends_the_measurement():
    tally = Tally()
    for error in (Overloaded("full"), Overloaded("full"), DeadlineExceeded("late")):
        tally.refused(error)
    assert tally.row()["errors"] == {"overloaded": 2, "deadline-exceeded": 1}
    for error in (InvalidRequest("wrong"), ShuttingDown("gone")):
        with pytest.raises(type(error)):
            tally.refused(error)


def test_lateness_that_matters_is_said(capsys):
    late = filled([10], elapsed_s=1.0, lateness_s=array("d", [0.002])).open_row(50, 1.0)
    on_time = filled([10], elapsed_s=1.0, lateness_s=array("d", [0.0005])).open_row(60, 1.0)
    print_open_loops([late, on_time])
    shown = capsys.readouterr()
    assert shown.err.count("sent late") == 1
    assert shown.err.startswith("at 50 a second this program itself sent late")
    assert "20% of the latency" in shown.err
    assert "late p99" in shown.out


@pytest.mark.parametrize("show", [print_open_loops, print_closed_loops])
def test_goodput_is_a_column_where_there_is_a_deadline(show, capsys):
    for timeout_s in (None, 1.0):
        show([{"concurrency": 1} | filled([1], elapsed_s=1.0, timeout_s=timeout_s).open_row(1, 1.0)])
        assert ("in time" in capsys.readouterr().out) == (timeout_s is not None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rate", "10", "--concurrency", "4"], "cannot use --concurrency here"),
        (["--arrivals", "uniform"], "it belongs to --rate"),
        (["--burst", "4"], "it belongs to --rate"),
        (["--seed", "4"], "it belongs to --rate"),
        (["--rate", "10", "--burst", "4"], "it belongs to --arrivals burst"),
        (["--rate", "0"], "'0' must be numbers above 0 up to 100000"),
        (["--rate", "10,"], "must be numbers"),
        (["--rate", "nan"], "must be numbers"),
        (["--rate", "inf"], "must be numbers"),
        (["--timeout", "0"], "not in the range"),
        (["--clients", "0"], "not in the range"),
        (["--priority", "urgent"], "'urgent' must be a number from 1 or one of interactive, default, background"),
        (["--priority=-1"], "'-1' must be a number from 1"),
        (["--target-qps", "4"], "it belongs to --scenario"),
        (["--target-latency", "4"], "it belongs to --scenario"),
        (["--keep-logs", "here"], "it belongs to --scenario"),
        (["--scenario", "server"], "without --target-qps"),
        (["--scenario", "offline", "--rate", "10"], "cannot use --rate here"),
        (["--scenario", "offline", "--concurrency", "4"], "cannot use --concurrency here"),
        (["--scenario", "offline", "--timeout", "4"], "cannot use --timeout here"),
        (["--scenario", "offline", "--target-latency", "4"], "only scenario server"),
        (["--scenario", "single-stream", "--target-qps", "4"], "as fast as it is answered"),
        (["--scenario", "single-stream", "--clients", "4"], "one request in flight"),
    ],
)
def test_options_that_contradict_one_another_are_refused(run, arguments, said):
    shown = run("bench", "m", *arguments)
    assert (shown.code, shown.out) == (2, "")
    assert said in " ".join(shown.err.split())


def test_without_loadgen_the_extra_that_brings_it_is_named(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    shown = run("bench", "m", "--scenario", "offline", "--socket-dir", tmp_path)
    assert (shown.code, shown.out) == (1, "")
    assert "inference-appliance[bench]" in shown.err


def log_of(directory, *errors, **values):
    entries = [(key, value, False) for key, value in values.items()] + [
        ("error_runtime", text, True) for text in errors
    ]
    lines = [
        ":::MLLOG " + json.dumps({"key": key, "value": value, "metadata": {"is_error": is_error}})
        for key, value, is_error in entries
    ]
    (directory / "mlperf_log_detail.txt").write_text("\n".join(["something else", *lines]))


def test_loadgen_s_verdict_is_told_with_its_reasons(tmp_path):
    met = {"result_min_duration_met": True, "result_min_queries_met": True, "early_stopping_met": True}
    figures = {"result_query_count": 1, "result_samples_per_second": 12.34}
    log_of(tmp_path, result_validity="VALID", **met, **figures)
    read = read_result(tmp_path, "offline", 8)
    assert (read["valid"], read["reasons"], read["samples_per_s"], read["p99_ms"]) == (True, [], 12.3, None)
    log_of(tmp_path, "too many", result_validity="INVALID", **met | {"result_min_duration_met": False}, **figures)
    read = read_result(tmp_path, "offline", 8)
    assert (read["valid"], read["reasons"]) == (False, ["it ended before its time", "LoadGen says: too many"])
