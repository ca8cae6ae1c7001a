"""tune, explain, pin, quantize and jobs as people and programs see them."""

import json

import pytest


def candidate(name, verdict, reason, latency_us=None, evidence=None, disturbed=False, energy_mj=None):
    found = latency_us and {
        "latency_us": latency_us, "rows_per_second": 1e6 / latency_us, "best_rows": 8, "slope_us": 1.0,
        "intercept_us": 2.0, "spread_us": 1.0, "load_ms": 120.0, "peak_bytes": 2**26,
        "energy_mj": energy_mj, "tokens": 0,
        "disturbed": disturbed, "measured_at": "2026-11-21T00:00:00+00:00",
        "points": [
            {
                "rows": 1, "median_us": latency_us, "spread_us": 1.0, "samples": 50, "disturbed": disturbed,
                "energy_mj": energy_mj,
            }
        ],
    }  # fmt: skip
    split = {"streams": 2 if "streams=2" in name else 1, "threads": 1 if "/cpu/" in name else 0}
    return {"name": name, "verdict": verdict, "reason": reason, "measurement": found, "evidence": evidence, **split}


PROOF = {"metric": "cosine", "value": 0.99512, "reference": 1.0, "worst": 0.98, "count": 400, "bound": 0.01}
EXPLANATION = {
    "model": "echo",
    "version": "1",
    "objective": "balanced",
    "judged_by": "latency and throughput alike",
    "metric": "cosine",
    "bound": 0.01,
    "has_sample": True,
    "reference": "onnxruntime/cpu/FP32",
    "serving": {
        "state": "ready", "variant": "openvino/cpu/BF16", "chosen_by": "measured", "requested_device": "cpu",
        "device": "cpu", "provider": "CPU", "precision": "BF16", "runtime": "openvino 1", "fallback": "",
        "costs": [
            {
                "units": 16, "slope_us": 400.0, "intercept_us": 100.0, "spread": 0.051, "setup_share": 0.2,
                "efficient_rows": 5, "samples": 77, "scale": 1.25,
            }
        ],
    },
    "winner": "openvino/cpu/BF16",
    "candidates": [
        candidate("openvino/cpu/BF16", "chosen", "best by latency and throughput alike", 512.0, PROOF),
        candidate("onnxruntime/cpu/FP32", "slower", "2.00 times the cost of openvino/cpu/BF16", 1024.0, disturbed=True),
        candidate("openvino/cpu/FP32", "unmeasured", "not measured yet"),
    ],
    "barred": [{"name": "intel-npu0", "reason": "driver failed: no driver is bound; sudo modprobe intel_vpu"}],
    "jobs": [],
}  # fmt: skip
JOB = {
    "id": "3", "kind": "tune", "model": "echo", "by_itself": False, "state": "done", "step": "measuring", "done": 2,
    "total": 2, "error": "", "error_kind": "", "seconds": 12.5,
    "result": {"measured": ["a", "b"], "reused": 1, "complete": True, "checked": [], "chosen": "x", "swapped": True},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _answers(answers):
    answers[("GET", "/admin/models/echo/explain")] = (200, EXPLANATION)
    answers[("POST", "/admin/models/echo/tune")] = (200, JOB | {"state": "queued"})
    answers[("GET", "/admin/jobs/3")] = (200, JOB)
    answers[("GET", "/admin/jobs")] = (200, {"jobs": [JOB]})
    answers[("POST", "/admin/models/echo/pin")] = (200, EXPLANATION)
    answers[("POST", "/admin/models/echo/unpin")] = (200, EXPLANATION)
    answers[("POST", "/admin/jobs/3/cancel")] = (200, JOB | {"state": "cancelled"})


@pytest.fixture
def ctl(run, socket_dir):
    """Runs a command against the canned daemon."""
    return lambda *arguments: run(*arguments, "--socket-dir", socket_dir)


def test_explain_shows_what_serves_every_candidate_with_numbers_and_what_is_out_of_the_question(ctl):
    shown = ctl("explain", "echo")
    assert shown.code == 0
    lines = shown.out.splitlines()
    assert lines[0] == "echo version 1 runs as openvino/cpu/BF16, by measurement, for balanced"
    assert "cosine at most 1.00% worse than onnxruntime/cpu/FP32, on the evaluation sample" in shown.out
    (chosen,) = [line for line in lines if line.startswith("*")]
    assert chosen.split()[1:6] == ["openvino/cpu/BF16", "chosen", "1x1", "0.512", "ms"]
    assert "cosine 0.9951" in chosen
    assert "~1.02 ms" in shown.out
    assert "intel-npu0  driver failed: no driver is bound; sudo modprobe intel_vpu" in shown.out
    assert "1 not measured or checked: `appliancectl tune echo`" in shown.out


def test_explain_shows_what_batches_are_expected_to_cost_below_what_was_measured(ctl, answers):
    rows = [line.split() for line in ctl("explain", "echo").out.splitlines()]
    assert ["measured", "-", "0.001", "ms", "0.002", "ms", "-", "-", "-", "-", "-"] in rows
    assert ["expected", "16", "0.4", "ms", "0.1", "ms", "20%", "5%", "5", "77", "1.25"] in rows
    unknown = EXPLANATION["serving"] | {"costs": []}
    answers[("GET", "/admin/models/echo/explain")] = (200, EXPLANATION | {"serving": unknown})
    assert "expected" not in ctl("explain", "echo").out


def test_explain_with_points_adds_latency_by_batch_size(ctl):
    rows = [line.split() for line in ctl("explain", "echo", "--points").out.splitlines()]
    assert ["candidate", "rows", "median", "spread", "runs"] in rows
    assert ["onnxruntime/cpu/FP32", "1", "~1.02", "ms", "0.001", "ms", "50"] in rows


def test_points_have_energy_where_the_machine_counts_it(ctl, answers):
    counted = [
        candidate("a/gpu/FP32", "chosen", "best", 512.0, energy_mj=12.5),
        candidate("b/cpu/FP32", "slower", "", 2.0),
    ]
    answers[("GET", "/admin/models/echo/explain")] = (200, EXPLANATION | {"candidates": counted})
    rows = [line.split() for line in ctl("explain", "echo", "--points").out.splitlines()]
    assert ["candidate", "rows", "median", "spread", "runs", "energy"] in rows
    assert [row[-2:] for row in rows if row[:2] == ["a/gpu/FP32", "1"]] == [["12.5", "mJ"]]
    assert [row[-1] for row in rows if row[:2] == ["b/cpu/FP32", "1"]] == ["-"]


@pytest.mark.parametrize("command", ["tune", "explain", "quantize", "pin", "unpin"])
def test_help_calls_a_model_what_the_docs_call_it(run, command):
    usage = run(command, "--help").out.splitlines()[0]
    assert "MODEL" in usage
    assert "NAME" not in usage


def test_programs_get_everything(ctl):
    assert json.loads(ctl("explain", "echo", "--json").out) == EXPLANATION
    assert json.loads(ctl("tune", "echo", "--json").out) == {"job": JOB, "explanation": EXPLANATION}


def test_tune_waits_and_says_what_it_did(ctl):
    shown = ctl("tune", "echo")
    assert shown.out.splitlines()[0] == "measured 2, 1 known before, in 12.5 s"


def test_a_budget_that_was_too_short_is_told(ctl, answers):
    short = JOB | {"result": JOB["result"] | {"complete": False}}
    answers[("GET", "/admin/jobs/3")] = (200, short)
    assert "the budget ended before all were measured: tune again" in ctl("tune", "echo").out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": "failed", "error": "cannot place model 'echo': nothing fits"}, "nothing fits"),
        ({"state": "cancelled"}, "job 3 was cancelled"),
    ],
)
def test_a_job_that_comes_to_no_good_end_is_an_error(ctl, answers, changes, message):
    answers[("GET", "/admin/jobs/3")] = (200, JOB | changes)
    shown = ctl("tune", "echo")
    assert (shown.code, shown.out) == (1, "")
    assert message in shown.err


def test_detached_jobs_are_left_alone(ctl):
    assert ctl("tune", "echo", "--detach").out == "job 3 is queued\n"


def test_pin_and_unpin_show_what_serves_then(ctl):
    assert "echo is pinned to openvino/cpu/BF16" in ctl("pin", "echo", "openvino/cpu/BF16").out
    assert "echo is not pinned" in ctl("unpin", "echo").out


def test_jobs_are_listed_and_cancelled(ctl):
    assert ctl("jobs").out.splitlines()[1].split()[:4] == ["3", "tune", "echo", "done"]
    assert ctl("jobs", "--cancel", "3").out == "job 3 is cancelled\n"


def test_quantize_waits_for_the_variant_and_for_its_measurement(ctl, answers):
    made = JOB | {
        "id": "2",
        "kind": "quantize",
        "result": {
            "variant": "int8-01234567", "precision": "INT8", "format": "openvino-ir", "bytes": 2**20,
            "bytes_before": 2**22, "rows": 200, "tune_job": "3",
        },
    }  # fmt: skip
    answers[("POST", "/admin/models/echo/quantize")] = (200, made | {"state": "queued"})
    answers[("GET", "/admin/jobs/2")] = (200, made)
    shown = ctl("quantize", "echo")
    assert shown.out.splitlines()[0] == "made int8-01234567: 1.0 MiB, the original has 4.0 MiB; 200 calibration inputs"
    assert "runs as openvino/cpu/BF16" in shown.out
