"""`make demo` notices wrong answers and shows right ones in 80 columns; `make serve` says where it listens."""

import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "tools"))

import report  # noqa: E402 - programs beside the packages, found through the line above
import serve  # noqa: E402
import trials  # noqa: E402
from transports import TRANSPORTS  # noqa: E402

STATUS = {"backend": "onnxruntime", "device": "cpu", "precision": "FP32"}
TRUTH = ["a"] * 99 + ["b"]


def trial(reference: float = 1.0, **labels: list[str]) -> trials.Trial:
    """A trial that is right but for the transports named."""
    model = trials.SampleModel("language-id", "text", False, reference, [trials.Sample(b"text", one) for one in TRUTH])
    outcomes = [
        trials.Outcome(name, labels.get(name.replace(" ", "_"), TRUTH), [0.001] * len(TRUTH)) for name in TRANSPORTS
    ]
    return trials.Trial(model, STATUS, outcomes)


def test_right_answers_are_right():
    assert trials.problems_of(trial()) == []


def test_accuracy_may_stay_a_little_below_the_manifest_and_no_more():
    wrong = ["a"] * 100  # one of a hundred, over every transport
    everywhere = {name.replace(" ", "_"): wrong for name in TRANSPORTS}
    assert trials.problems_of(trial(reference=0.994, **everywhere)) == []
    problems = trials.problems_of(trial(reference=1.0, **everywhere))
    assert len(problems) == len(TRANSPORTS)
    assert "accuracy is 0.9900, and the manifest says 1.0000" in problems[0]


def test_transports_that_disagree_are_named_even_where_accuracy_would_do():
    (problem,) = trials.problems_of(trial(reference=0.9, HTTP_Unix=["a"] * 98 + ["b", "b"]))
    assert "disagree on input 99" in problem
    assert "'b' over HTTP Unix" in problem


def test_a_missing_answer_or_transport_is_a_problem():
    assert any("99 answers to 100" in problem for problem in trials.problems_of(trial(native=TRUTH[:-1])))
    complete = trial()
    assert trials.problems_of(trials.Trial(complete.model, STATUS, complete.outcomes[:-1]))


@pytest.mark.parametrize(("percent", "expected"), [(50, 2.0), (75, 3.0), (99, 4.0)])
def test_percentiles_are_by_nearest_rank(percent, expected):
    assert trials.percentile_ms([0.004, 0.001, 0.003, 0.002], percent) == pytest.approx(expected)


def test_the_table_fits_80_columns():
    stream = io.StringIO()
    console = Console(file=stream, width=80)
    console.print(report.table_of([trial()]))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1 + len(TRANSPORTS)
    assert all("100.00%" in line and "1.00" in line for line in lines[1:])


def test_json_says_the_same():
    document = json.loads(json.dumps(report.as_json([trial()], ["something"])))
    assert document["ok"] is False
    first = document["models"][0]["transports"][0]
    assert first == {"transport": "native", "requests": 100, "accuracy": 1.0, "p50_ms": 1.0, "p99_ms": 1.0}


def test_every_sample_model_is_read_whole():
    models = {model.name: model for model in trials.read_models(REPOSITORY / "models")}
    assert set(models) == {"digits", "language-id"}
    assert models["digits"].is_image
    assert models["digits"].samples[0].content.startswith(b"\x89PNG")
    for model in models.values():
        lines = (REPOSITORY / "models" / model.name / "samples/evaluation.jsonl").read_text(encoding="utf-8")
        assert len(model.samples) == len(lines.splitlines())


def test_a_repository_without_samples_has_nothing_to_show(tmp_path):
    assert trials.read_models(tmp_path) == []


def test_pictures_become_shades():
    picture = io.BytesIO()
    Image.frombytes("L", (2, 1), b"\x00\xff").save(picture, "PNG")
    assert report.shaded(picture.getvalue()) == ["  ██"]


def test_serve_chooses_the_directory_where_clients_look(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert serve.socket_directory() == (tmp_path / "appliance", True)


def test_serve_names_the_directory_where_clients_would_not_look(monkeypatch):
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr("os.geteuid", lambda: 1234)
    directory, is_found = serve.socket_directory()
    assert (directory.name, is_found) == ("appliance-1234", False)
    assert f"export APPLIANCE_SOCKET_DIR={directory}" in serve.instructions(directory, is_found, Path("bin"))
