"""``appliancectl instances`` as people and programs see it."""

import json

import pytest

PATH = "/admin/models/echo/instances"


def split(streams, threads, verdict, latency_us=None, rows_per_second=None, *, disturbed=False):
    options = f"/streams={streams}/threads={threads}" if streams > 1 else ""
    return {
        "variant": f"onnxruntime/cpu/FP32{options}", "streams": streams, "threads": threads, "verdict": verdict,
        "latency_us": latency_us, "rows_per_second": rows_per_second, "disturbed": disturbed,
    }  # fmt: skip


ONE = {
    "model": "echo", "version": "1", "state": "ready", "variant": "onnxruntime/cpu/FP32", "chosen_by": "measured",
    "device": "cpu", "cores": 2, "streams": 1, "threads": 2, "weight": 1.0,
    "manifest": {"streams": None, "threads": None},
    "splits": [split(1, 2, "chosen", 4000.0, 260.4), split(2, 1, "slower", 7500.0, 290.6, disturbed=True)],
}  # fmt: skip
TWO = ONE | {
    "variant": "onnxruntime/cpu/FP32/streams=2/threads=1", "chosen_by": "pinned", "streams": 2, "threads": 1
}  # fmt: skip


@pytest.fixture
def ctl(run, socket_dir, answers):
    """Runs the command against the canned daemon."""
    answers[("GET", PATH)] = (200, ONE)
    answers[("POST", PATH)] = (200, TWO)
    return lambda *arguments: run("instances", "echo", *arguments, "--socket-dir", socket_dir)


def test_without_options_the_present_plan_is_shown_beside_the_others(ctl):
    shown = ctl()
    assert shown.code == 0
    lines = shown.out.splitlines()
    assert lines[0] == "echo on cpu runs one batch at a time, on 2 cores, by measurement"
    assert [line.split() for line in lines[2:]] == [
        ["streams", "threads", "one", "row", "rows", "candidate"],
        ["*", "1", "2", "4", "ms", "260/s", "onnxruntime/cpu/FP32"],
        ["2", "1", "~7.5", "ms", "~291/s", "onnxruntime/cpu/FP32/streams=2/threads=1"],
    ]


def test_more_threads_than_cores_are_pointed_out(ctl, answers):
    answers[("GET", PATH)] = (200, TWO | {"streams": 3, "threads": 9})
    shown = ctl()
    assert "that is more than the 2 cores there are" in shown.out
    answers[("GET", PATH)] = (200, TWO)
    assert "more than" not in ctl().out


@pytest.mark.parametrize(
    ("options", "body"),
    [
        (("--streams", "2"), {"streams": 2}),
        (("--threads", "1"), {"threads": 1}),
        (("--streams", "2", "--threads", "1"), {"streams": 2, "threads": 1}),
        (("--auto",), {"auto": True}),
    ],
)
def test_what_is_asked_for_reaches_the_daemon_and_what_serves_then_is_shown(ctl, asked, options, body):
    shown = ctl(*options)
    assert shown.out.splitlines()[0] == (
        "echo on cpu runs 2 batches at a time, each on 1 core, since an administrator pinned it"
    )
    assert asked[-1] == ("POST", PATH, body)


def test_what_the_manifest_says_is_told(ctl, answers):
    answers[("GET", PATH)] = (200, ONE | {"weight": 2.5, "manifest": {"streams": 1, "threads": None}})
    assert ctl().out.splitlines()[1:3] == [
        "its manifest says streams = 1",
        "its weight beside other models of cpu is 2.5",
    ]


def test_a_model_that_does_not_serve_has_its_state_shown(ctl, answers):
    answers[("GET", PATH)] = (200, ONE | {"variant": "", "chosen_by": "", "state": "failed", "splits": []})
    assert ctl().out == "echo version 1 is failed\n"


def test_a_device_without_threads_has_streams_alone(ctl, answers):
    answers[("GET", PATH)] = (200, ONE | {"device": "nvidia0", "threads": 0, "splits": [split(1, 0, "chosen")]})
    lines = ctl().out.splitlines()
    assert lines[0] == "echo on nvidia0 runs one batch at a time, by measurement"
    assert lines[-1].split() == ["*", "1", "-", "-", "-", "onnxruntime/cpu/FP32"]


def test_programs_get_everything(ctl):
    assert json.loads(ctl("--json").out) == ONE
    assert json.loads(ctl("--streams", "2", "--json").out) == TWO


@pytest.mark.parametrize(
    "options", [("--auto", "--streams", "2"), ("--auto", "--threads", "1"), ("--streams", "0"), ("--streams", "65")]
)
def test_options_that_do_not_go_together_are_wrong_usage(ctl, options):
    assert ctl(*options).code == 2


def test_a_refusal_is_told(ctl, answers):
    message = "cannot run model 'echo' as x: [instances] of its manifest says streams = 1"
    answers[("POST", PATH)] = (400, {"error": message, "kind": "invalid-request"})
    shown = ctl("--streams", "2")
    assert (shown.code, shown.out) == (1, "")
    assert message in shown.err
