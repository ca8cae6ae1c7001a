"""Task ``evaluate``, in a process of its own."""

import json

import numpy as np
import pytest
import worker_harness as harness

from appliance.manifest import read_manifest
from appliance.quality import Comparison
from appliance.worker import evaluation
from appliance.worker.evaluation import evaluate
from appliance.worker.outputs import Outputs

FLOATS = {"max_batch_size": 8}


@pytest.fixture(autouse=True)
def _fakes(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", harness.environment()["PYTHONPATH"])
    monkeypatch.syspath_prepend(str(harness.FAKES))


def question_of(load, **fields):
    whole = {"task": "evaluate", "load": load, "sample": None, "limit": 1000, "metric": "cosine", **fields}
    return {name: str(value) if name in ("sample", "reference", "save") and value else value
            for name, value in whole.items()}  # fmt: skip


def evaluated(load, **fields):
    """What the task says, run here rather than in a process of its own."""
    answers = []
    evaluate(question_of(load, **fields), answers.append)
    return Comparison(**answers[-1]["result"]["comparison"])


def compared(answers):
    assert not harness.said(answers, "failed")
    (result,) = harness.said(answers, "result")
    return Comparison(**result["comparison"])


def failure(load, **fields):
    answers = harness.run_task(question_of(load, **fields))
    (failed,) = harness.said(answers, "failed")
    return failed["kind"], failed["message"]


def write_rows(path, *rows, labels=()):
    documents = [{"inputs": {"x": row}} for row in rows]
    for document, label in zip(documents, labels, strict=False):
        document["label"] = label
    path.write_text("".join(f"{json.dumps(document)}\n" for document in documents))
    return path


@pytest.fixture(scope="module", params=["digits", "language-id"])
def reference(request, tmp_path_factory):
    """The outputs of a sample model in FP32, and its directory."""
    directory = harness.MODELS / request.param
    path = tmp_path_factory.mktemp("reference") / "reference.npz"
    load = harness.load_of(directory, "onnxruntime")
    sample = directory / "samples/evaluation.jsonl"
    answers = harness.run_task(question_of(load, sample=sample, metric="accuracy", save=path))
    return directory, sample, path, answers


def test_the_reference_has_the_accuracy_that_the_manifest_states(reference):
    directory, _, path, answers = reference
    stated = read_manifest(directory).samples.reference
    found = compared(answers)
    assert round(found.reference, 4) == round(found.value, 4) == stated.accuracy
    assert (found.count, found.worst, found.is_synthetic) == (stated.count, 1.0, False)
    assert len(Outputs.read(path).rows) == stated.count
    last = harness.said(answers, "progress")[-1]
    assert last == {"step": "running", "done": stated.count, "total": stated.count}


@pytest.mark.parametrize(
    ("backend", "precision"), [("onnxruntime", "FP32"), ("openvino", "FP32"), ("openvino", "BF16")]
)
def test_every_variant_of_a_sample_model_keeps_its_accuracy(reference, backend, precision):
    directory, sample, path, _ = reference
    load = harness.load_of(directory, backend, precision=precision)
    found = compared(harness.run_task(question_of(load, sample=sample, metric="accuracy", reference=path)))
    stated = read_manifest(directory).samples.reference
    assert round(found.value, 4) == round(found.reference, 4) == stated.accuracy
    assert found.worst == 1.0
    assert found.not_finite == 0


def test_logits_can_be_judged_by_cosine_too(reference):
    directory, sample, path, _ = reference
    load = harness.load_of(directory, "openvino", precision="BF16")
    found = compared(harness.run_task(question_of(load, sample=sample, metric="cosine", reference=path)))
    assert found.metric == "cosine"
    assert 0.99 < found.worst <= found.value <= 1.0


def test_without_a_sample_the_inputs_are_made_up_and_the_comparison_says_so(reference, tmp_path):
    directory, _, _, _ = reference
    path = tmp_path / "r.npz"
    load = harness.load_of(directory, "onnxruntime")
    first = compared(harness.run_task(question_of(load, metric="accuracy", save=path)))
    assert (first.metric, first.value, first.count, first.is_synthetic) == ("agreement", 1.0, 32, True)
    rows = Outputs.read(path).rows
    assert len({row.tobytes() for row in rows}) == 32, "the rows differ"
    other = harness.load_of(directory, "openvino")
    found = compared(harness.run_task(question_of(other, metric="relative-l2", reference=path)))
    assert (found.count, found.is_synthetic, found.reference) == (32, True, 0.0)
    assert found.value < 0.01


# ---------------------------------------------------------------- what is compared, on the fake backend


def test_a_precision_that_yields_nan_is_reported(tmp_path):
    manifest, behaviour = FLOATS, {"in_precision": {"BF16": "nan"}}
    path = tmp_path / "r.npz"
    good = harness.fake_load(tmp_path, manifest, **behaviour)
    bad = harness.fake_load(tmp_path, manifest, "BF16", **behaviour)
    assert evaluated(good, save=path).not_finite == 0
    for metric, value in (("cosine", 0), ("relative-l2", 1), ("agreement", 0)):
        found = evaluated(bad, metric=metric, reference=path)
        assert (found.not_finite, found.count, found.value) == (32, 32, value)


def test_one_row_is_compared(tmp_path):
    sample = write_rows(tmp_path / "s.jsonl", [0.5] * 16)
    found = evaluated(harness.fake_load(tmp_path, FLOATS), sample=sample)
    assert (found.count, found.is_synthetic) == (1, False)
    assert found.value == pytest.approx(1)


def test_no_more_than_the_limit_is_compared_and_no_more_than_the_reference_has(tmp_path):
    load = harness.fake_load(tmp_path, FLOATS)
    sample = write_rows(tmp_path / "s.jsonl", *([number] * 16 for number in range(1, 9)))
    assert evaluated(load, sample=sample, limit=5, save=tmp_path / "r.npz").count == 5
    assert evaluated(load, sample=sample, reference=tmp_path / "r.npz").count == 5
    assert evaluated(load, sample=sample, limit=3, reference=tmp_path / "r.npz").count == 3
    assert evaluated(load, limit=3).count == 3


def test_rows_of_different_lengths_stand_in_the_order_of_the_sample(tmp_path):
    behaviour = {"inputs": [["x", "FP32", [-1, -1]]], "outputs": [["y", "FP32", [-1, -1]]]}
    load = harness.fake_load(tmp_path, FLOATS, **behaviour)
    rows = [[float(place)] * (1 + place % 3) for place in range(1, 20)]
    sample = write_rows(tmp_path / "s.jsonl", *rows)
    evaluated(load, sample=sample, save=tmp_path / "r.npz")
    assert [row.tolist() for row in Outputs.read(tmp_path / "r.npz").rows] == rows


def test_a_model_without_batch_dimension_is_run_row_by_row(tmp_path):
    behaviour = {"inputs": [["x", "FP32", [2]]], "outputs": [["y", "FP32", [2]]]}
    load = harness.fake_load(tmp_path, {"max_batch_size": 0}, **behaviour)
    sample = write_rows(tmp_path / "s.jsonl", [1, 2], [3, 4], [5, 6])
    assert evaluated(load, sample=sample, save=tmp_path / "r.npz").count == 3
    assert [row.tolist() for row in Outputs.read(tmp_path / "r.npz").rows] == [[1, 2], [3, 4], [5, 6]]
    evaluated(load, save=tmp_path / "r.npz")
    assert len({row.tobytes() for row in Outputs.read(tmp_path / "r.npz").rows}) == 32


def test_every_floating_point_output_counts_and_others_do_not(tmp_path):
    specs = [["a", "BF16", [-1, 1]], ["b", "INT32", [-1, 1]], ["c", "FP64", [-1, 2]], ["d", "FP16", [-1, 1]]]
    behaviour = {"inputs": specs, "outputs": [[name.upper(), *rest] for name, *rest in specs]}
    load = harness.fake_load(tmp_path, FLOATS, **behaviour)
    document = {"inputs": {"a": [1.5], "b": [7], "c": [0.1, 3], "d": [4]}}
    (tmp_path / "s.jsonl").write_text(json.dumps(document))
    evaluated(load, sample=tmp_path / "s.jsonl", save=tmp_path / "r.npz")
    assert [row.tolist() for row in Outputs.read(tmp_path / "r.npz").rows] == [[1.5, 0.1, 3, 4]]


def test_integers_are_compared_where_there_is_nothing_else(tmp_path):
    behaviour = {"inputs": [["x", "INT64", [-1, 2]]], "outputs": [["y", "INT64", [-1, 2]]]}
    sample = write_rows(tmp_path / "s.jsonl", [2**40, 1])
    evaluated(harness.fake_load(tmp_path, FLOATS, **behaviour), sample=sample, save=tmp_path / "r.npz")
    assert Outputs.read(tmp_path / "r.npz").rows[0].tolist() == [2**40, 1]


def classifier(directory, **manifest):
    (directory / "labels.txt").write_text("a\nb\n")
    behaviour = {"inputs": [["x", "FP32", [-1, 2]]], "outputs": [["logits", "FP32", [-1, 2]]]}
    return harness.fake_load(directory, {**FLOATS, "classification": {}, **manifest}, **behaviour)


def test_accuracy_goes_by_the_labels_of_the_manifest(tmp_path):
    sample = write_rows(tmp_path / "s.jsonl", [1, 0], [0, 1], [0, 1], labels=["a", "b", "a"])
    found = evaluated(classifier(tmp_path), sample=sample, metric="accuracy")
    assert (found.metric, found.value, found.reference, found.worst) == ("accuracy", 2 / 3, 2 / 3, 1.0)


def test_accuracy_becomes_agreement_where_a_label_is_missing(tmp_path):
    sample = write_rows(tmp_path / "s.jsonl", [1, 0], [0, 1], labels=["a"])
    assert evaluated(classifier(tmp_path), sample=sample, metric="accuracy").metric == "agreement"


def test_outputs_beyond_the_memory_for_them_are_left_out_of_both(tmp_path, monkeypatch):
    load = harness.fake_load(tmp_path, FLOATS)
    sample = write_rows(tmp_path / "s.jsonl", *([number] * 16 for number in range(1, 65)))
    monkeypatch.setattr(evaluation, "MAX_OUTPUT_BYTES", 1000)
    count = evaluated(load, sample=sample, save=tmp_path / "r.npz").count
    assert 1000 / 64 < count < 64
    assert evaluated(load, sample=sample, reference=tmp_path / "r.npz").count == count


# ---------------------------------------------------------------- what goes wrong


def test_a_reference_of_another_sample_is_refused(tmp_path):
    load = harness.fake_load(tmp_path, FLOATS)
    first = write_rows(tmp_path / "a.jsonl", [1.0] * 16)
    second = write_rows(tmp_path / "b.jsonl", [2.0] * 16)
    evaluated(load, sample=first, save=tmp_path / "r.npz")
    expected = ("invalid-request", "cannot compare with the reference: it was made with other inputs")
    assert failure(load, sample=second, reference=tmp_path / "r.npz") == expected
    assert failure(load, reference=tmp_path / "r.npz") == expected


def test_a_label_that_the_model_does_not_know_is_refused(tmp_path):
    sample = write_rows(tmp_path / "s.jsonl", [1, 0], labels=["c"])
    kind, message = failure(classifier(tmp_path), sample=sample, metric="accuracy")
    assert (kind, message) == (
        "invalid-request", "cannot evaluate the model: label 'c' of row 0 is none of its labels"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"metric": "bleu"}, "'metric' must be one of accuracy, agreement, cosine, relative-l2, not 'bleu'"),
        ({"metric": None}, "'metric' must be one of"),
        ({"limit": 0}, "'limit' must be a number above 0, not 0"),
        ({"limit": None}, "'limit' must be a number above 0"),
        ({"reference": "missing.npz"}, "cannot read the reference 'missing.npz': No such file"),
        ({"save": "/proc/no/such/place.npz"}, "cannot save the reference 'place.npz'"),
        ({"sample": "missing.jsonl"}, "cannot read the sample 'missing.jsonl': No such file"),
    ],
)
def test_a_bad_question_is_refused(tmp_path, fields, expected):
    kind, message = failure(harness.fake_load(tmp_path, FLOATS), **fields)
    assert kind == "invalid-request"
    assert expected in message


def test_a_damaged_reference_is_refused(tmp_path):
    (tmp_path / "r.npz").write_bytes(b"PK\x03\x04")
    load = harness.fake_load(tmp_path, FLOATS)
    assert failure(load, reference=tmp_path / "r.npz")[0] == "artifact-corrupt"


def test_a_model_of_bytes_alone_cannot_be_evaluated(tmp_path):
    behaviour = {"inputs": [["x", "BYTES", [-1, 1]]], "outputs": [["y", "BYTES", [-1, 1]]]}
    _, message = failure(harness.fake_load(tmp_path, FLOATS, **behaviour))
    assert message == "cannot evaluate the model: its outputs are no numbers"


@pytest.mark.parametrize(("word", "expected"), [("raise", "RuntimeError"), ("rows", "broke its contract")])
def test_a_run_that_fails_fails_the_task(tmp_path, word, expected):
    from fake_backend import MAGIC

    sample = write_rows(tmp_path / "s.jsonl", [1] * 16, [MAGIC[word]] * 16)
    load = harness.fake_load(tmp_path, {"max_batch_size": 1})
    kind, message = failure(load, sample=sample)
    assert kind == "backend-error"
    assert message.startswith("cannot evaluate the model: ")
    assert expected in message


def test_an_evaluation_of_many_shapes_keeps_every_row_once(tmp_path):
    behaviour = {"inputs": [["x", "FP32", [-1, -1]]], "outputs": [["y", "FP32", [-1, -1]]]}
    random = np.random.default_rng(5)
    rows = [random.standard_normal(size).round(3).tolist() for size in random.integers(1, 9, 300)]
    sample = write_rows(tmp_path / "s.jsonl", *rows)
    found = evaluated(harness.fake_load(tmp_path, FLOATS, **behaviour), sample=sample, save=tmp_path / "r.npz")
    assert found.count == 300
    for expected, row in zip(rows, Outputs.read(tmp_path / "r.npz").rows, strict=True):
        np.testing.assert_array_equal(np.float32(expected), row)
