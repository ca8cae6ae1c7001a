"""appliancectl against a real daemon, as a program."""

import json
import subprocess
import sys

import numpy as np
import pytest

from appliancectl.inputs import grey_png


@pytest.fixture
def appliancectl(daemon):
    """Run the program: the finished process, its output as text."""

    def run(*arguments, stdin=None):
        program = [sys.executable, "-c", "from appliancectl.cli import main; main()", *map(str, arguments)]
        return subprocess.run(
            [*program, "--socket-dir", daemon.socket_dir],
            input=stdin,
            capture_output=True,
            timeout=50,
            check=False,
            text=True,
        )

    return run


def json_of(ended):
    assert ended.returncode == 0, (ended.stdout, ended.stderr)
    return json.loads(ended.stdout)


def test_status(appliancectl, daemon):
    shown = appliancectl("status")
    assert shown.returncode == 0, shown.stderr
    assert "language-id" in shown.stdout
    status = json_of(appliancectl("status", "--json"))
    assert (status["pid"], status["ready"]) == (daemon.pid, True)


def test_lists(appliancectl):
    assert json_of(appliancectl("hardware", "--json"))["devices"][0]["id"] == "cpu"
    assert {"onnxruntime", "openvino"} <= {b["name"] for b in json_of(appliancectl("backends", "--json"))["backends"]}
    assert "onnxruntime" in appliancectl("backends").stdout
    assert {"digits", "identity"} <= {m["name"] for m in json_of(appliancectl("models", "--json"))["models"]}
    assert "image-classification" in appliancectl("models", "digits").stdout
    assert json_of(appliancectl("version", "--json"))["applianced"]


def test_unload_and_load(appliancectl):
    assert appliancectl("unload", "identity").stdout == "identity is unloaded\n"
    refused = appliancectl("infer", "identity", "--input", "[1]")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "appliancectl load" in refused.stderr
    assert appliancectl("load", "identity").stdout.startswith("identity version 1 is ready: ")


def test_text_gets_a_label(appliancectl, tmp_path):
    text = "Können Sie mir bitte sagen, wo der Bahnhof ist?"
    shown = appliancectl("infer", "language-id", "--input", text)
    assert shown.returncode == 0, shown.stderr
    assert " de " in shown.stdout
    assert "compute" in shown.stderr
    file = tmp_path / "text"
    file.write_text(text)
    assert appliancectl("infer", "language-id", "--input", file).stdout == shown.stdout
    assert appliancectl("infer", "language-id", "--input", "-", stdin=text).stdout == shown.stdout
    answer = json_of(appliancectl("infer", "language-id", "-i", text, "-i", "Where is the station, please?", "--json"))
    labels = next(output for output in answer["outputs"] if output["name"] == "label")
    assert np.array(labels["data"]).reshape(-1).tolist() == ["de", "en"]


def test_a_picture_gets_a_label(appliancectl, tmp_path):
    picture = tmp_path / "picture.png"
    picture.write_bytes(grey_png(28, 28))
    answer = json_of(appliancectl("infer", "digits", "--input", picture, "--json"))
    assert {"label", "score"} <= {output["name"] for output in answer["outputs"]}
    missing = appliancectl("infer", "digits", "--input", tmp_path / "missing.png")
    assert (missing.returncode, "no such file" in missing.stderr) == (1, True)


def test_tensors_from_and_to_files(appliancectl, tmp_path):
    rows = np.arange(32, dtype=np.float32).reshape(2, 16)
    np.save(tmp_path / "in.npy", rows)
    ended = appliancectl("infer", "identity", "-i", tmp_path / "in.npy", "--output-file", tmp_path / "out.npy")
    assert ended.returncode == 0, ended.stderr
    assert np.array_equal(np.load(tmp_path / "out.npy"), rows)
    several = appliancectl("infer", "language-id", "-i", "hello", "--output-file", tmp_path / "out.npz")
    assert several.returncode == 0, several.stderr
    with np.load(tmp_path / "out.npz") as outputs:
        assert outputs["label"].dtype.kind == "U"


def test_priorities_and_sequences(appliancectl):
    row = json.dumps([0.5] * 16)
    for priority in ("1", "background", "18446744073709551615"):
        assert appliancectl("infer", "identity", "-i", row, "--priority", priority).returncode == 0
    for options, says in (
        (("--priority", "urgent"), "none of interactive"),
        (("--priority", "9" * 5000), "none of interactive"),
        (("--priority=-1",), "must not be negative"),
        (("--sequence", "7", "--start"), "not stateful"),
        (("--sequence", "a word", "--end"), "not stateful"),
        (("--start",), "sequence_id must name it"),
    ):
        refused = appliancectl("infer", "identity", "-i", row, *options)
        assert (refused.returncode, says in refused.stderr) == (1, True), refused.stderr


def test_refusals_of_the_daemon(appliancectl):
    wrong = appliancectl("infer", "identity", "-i", "[1, 2]")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("cannot ")
    unknown = appliancectl("load", "no-such-model", "--json")
    assert (unknown.returncode, json.loads(unknown.stdout)["kind"]) == (1, "model-not-found")


@pytest.mark.parametrize("model", ["identity", "digits", "language-id"])
def test_bench_needs_no_input(appliancectl, model):
    steps = json_of(appliancectl("bench", model, "--duration", "0.3", "--concurrency", "1,4", "--json"))["steps"]
    assert [step["concurrency"] for step in steps] == [1, 4]
    for step in steps:
        assert step["requests"] > 0
        assert step["p50_ms"] <= step["p90_ms"] <= step["p99_ms"]
        assert step["mean"]["compute_us"] > 0


def test_bench_for_people(appliancectl):
    shown = appliancectl("bench", "identity", "--duration", "0.2", "--concurrency", "2", "-i", json.dumps([0.5] * 16))
    assert shown.returncode == 0, shown.stderr
    assert "per second" in shown.stdout
    refused = appliancectl("bench", "no-such-model")
    assert (refused.returncode, refused.stdout) == (1, "")
