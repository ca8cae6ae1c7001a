"""Models of sequences in a worker: what they keep, what they are told, and what a manifest may ask of them."""

import io
import re
import subprocess

import numpy as np
import pytest
import worker_harness as harness
from PIL import Image

from appliance.manifest import read_manifest
from appliance.wire import worker as wire
from appliance.wire import worker_pb2
from support.models import write_accumulator

START, END = wire.STEP_START, wire.STEP_END
SEATS = 8
Y, STATE, SEEN = 0b001, 0b010, 0b100


@pytest.fixture(autouse=True)
def _fakes(monkeypatch):
    monkeypatch.syspath_prepend(str(harness.FAKES))


@pytest.fixture
def accumulator(start, tmp_path):
    """A worker that has loaded an accumulator with 8 seats; arguments as `write_accumulator`'s."""

    def load(backend="onnxruntime", sequence="", manifest="max_batch_size = 8", options=None, **arguments):
        directory = tmp_path / "m"
        write_accumulator(directory, manifest, f"max_sequences = {SEATS}\n{sequence}", **arguments)
        worker = start()
        document = read_manifest(directory).model_dump_json(by_alias=True)
        artifact = directory / "1/model.onnx"
        worker.loaded = worker.load(directory, artifact, backend, manifest_json=document, options=options or {})
        if isinstance(worker.loaded, worker_pb2.Loaded):
            worker.give_slab()
        return worker

    return load


def run(worker, rows, steps, wanted=Y):
    """Run a batch of `rows`, each a number that stands for four, and return the answer."""
    array = np.repeat(np.array(rows, np.float32)[:, np.newaxis], 4, axis=1)
    worker.send_run(worker.place([(0, "FP32", array.shape, array.tobytes())]), len(rows), 1, wanted, steps=steps)
    return worker.answer()


def numbers(answer, place=0):
    """One number for each row of an answer."""
    return answer.array(place)[:, 0].tolist()


# ---------------------------------------------------------------- states


@pytest.mark.parametrize("strategy", ["oldest", "direct"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_interleaved_sequences_each_give_what_they_give_alone(accumulator, backend, strategy):
    worker = accumulator(backend, f'strategy = "{strategy}"')
    random = np.random.default_rng(7)
    expected: dict[int, np.ndarray] = {}  # the state of the sequence in each seat
    steps_run = batches_of_many = 0
    for number in range(200):
        seats = random.permutation(SEATS)[: random.integers(1, SEATS + 1)].tolist()
        rows = random.standard_normal((len(seats), 4)).astype(np.float32)
        steps, wanted_rows = [], []
        for seat, row in zip(seats, rows, strict=True):
            is_start = seat not in expected or random.random() < 0.1
            is_end = random.random() < 0.1
            before = np.zeros(4, np.float32) if is_start else expected[seat]
            after = before * np.float32(0.5) + row
            wanted_rows.append(after)
            if is_end:
                expected.pop(seat, None)
            else:
                expected[seat] = after
            steps.append((seat, (START if is_start else 0) | (END if is_end else 0), seat + 1))
        layout = worker.place([(0, "FP32", rows.shape, rows.tobytes())])
        worker.send_run(layout, len(rows), number, Y, steps=steps)
        answer = worker.answer()
        np.testing.assert_array_equal(answer.array(0), np.array(wanted_rows))
        steps_run += len(seats)
        batches_of_many += len(seats) > 1
    assert steps_run > 500
    assert batches_of_many > 100


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_batches_that_run_at_the_same_time_keep_their_sequences_apart(accumulator, backend):
    worker = accumulator(backend, options={"streams": "2", "threads": "1"})
    assert worker.loaded.streams == 2
    groups = {0: [0, 3, 6], 1: [7, 1], 2: [2, 5, 4]}  # seats by slot
    for slot in (1, 2):
        worker.give_slab(slot)
    expected = dict.fromkeys(range(SEATS), np.float32(0))
    random = np.random.default_rng(3)
    sent = {}

    def send(slot, number):
        rows = random.standard_normal((len(groups[slot]), 4)).astype(np.float32)
        sent[slot] = rows
        steps = [(seat, 0 if number else START, 1) for seat in groups[slot]]
        layout = worker.place([(0, "FP32", rows.shape, rows.tobytes())], slot)
        worker.send_run(layout, len(rows), number, Y, slot, steps)

    for slot in groups:
        send(slot, 0)
    for _ in range(300):
        answer = worker.answer()
        for seat, row, given in zip(groups[answer.slot], sent[answer.slot], answer.array(0), strict=True):
            expected[seat] = expected[seat] * np.float32(0.5) + row
            np.testing.assert_array_equal(given, expected[seat])
        send(answer.slot, answer.batch + 1)


def test_a_state_is_given_where_it_is_wanted(accumulator):
    worker = accumulator()
    run(worker, [1, 2], [(0, START, 1), (1, START, 1)])
    answer = run(worker, [1, 2], [(1, 0, 1), (0, 0, 1)], Y | STATE)
    assert numbers(answer, 0) == numbers(answer, 1) == [2.0, 2.5]


def test_a_sequence_starts_with_the_manifests_numbers(accumulator, tmp_path):
    directory = write_accumulator(tmp_path / "m", "max_batch_size = 8", "max_sequences = 8")
    manifest = directory / "model.toml"
    for initial, wanted in (("8", [4.0] * 4), ("[2, 4, 6, 8.5]", [1.0, 2.0, 3.0, 4.25]), ("-inf", [-np.inf] * 4)):
        manifest.write_text(manifest.read_text().partition("\ninitial")[0] + f"\ninitial = {initial}\n")
        worker = harness.Worker()
        try:
            document = read_manifest(directory).model_dump_json(by_alias=True)
            loaded = worker.load(directory, directory / "1/model.onnx", "onnxruntime", manifest_json=document)
            assert isinstance(loaded, worker_pb2.Loaded), loaded.message
            worker.give_slab()
            for seat in (3, 3, 5):  # a seat that was used before makes no difference
                assert run(worker, [0], [(seat, START, 1)]).array(0).tolist() == [wanted]
        finally:
            worker.close()


def test_a_model_without_batch_dimension_keeps_states_too(accumulator):
    worker = accumulator(manifest="max_batch_size = 0", batch_dimension=False)
    assert worker.loaded.max_batch_size == 0
    for x, seat, flags, wanted in (
        (1, 0, START, 1),
        (5, 7, START, 5),
        (1, 0, 0, 1.5),
        (1, 7, END, 3.5),
        (0, 0, 0, 0.75),
    ):
        assert numbers(run(worker, [x], [(seat, flags, 9)])) == [wanted]


def test_states_take_memory_when_they_are_used(start, tmp_path):
    """A gigabyte of seats costs nothing until sequences sit there."""
    behaviour = {
        "inputs": [["x", "FP32", [-1, 4]], ["before", "FP32", [-1, 4096]]],
        "outputs": [["y", "FP32", [-1, 4]], ["after", "FP32", [-1, 4096]]],
    }
    worker = start(stderr=subprocess.DEVNULL)
    sequence = {"max_sequences": 65536, "state": [{"input": "before", "output": "after"}]}
    loaded = worker.load(
        tmp_path, harness.write_fake(tmp_path, **behaviour), "fake", {"sequence": sequence}, artifact_format="fake"
    )
    assert isinstance(loaded, worker_pb2.Loaded), loaded.message
    assert loaded.resident_bytes < 300 << 20 < 65536 * 4096 * 4


# ---------------------------------------------------------------- controls


def test_the_model_is_told_of_start_end_ready_and_id(accumulator):
    worker = accumulator()
    answer = run(worker, [1, 2, 3], [(2, START, 7), (0, START | END, 2**63), (1, START, 1)], SEEN)
    assert answer.array(2).tolist() == [[1, 0, 1, 7], [1, 1, 1, -(2.0**63)], [1, 0, 1, 1]]
    assert run(worker, [1], [(1, END, 1)], SEEN).array(2).tolist() == [[0, 1, 1, 1]]


def test_in_direct_batches_each_sequence_has_its_row_and_the_rest_are_zeros(start, tmp_path):
    """The fake session gives what it was fed a step ago; told to give a row too few, its batch's height shows."""
    behaviour = {
        "inputs": [["x", "FP32", [-1, 4]], ["before", "FP32", [-1, 4]]],
        "outputs": [["after", "FP32", [-1, 4]], ["y", "FP32", [-1, 4]]],
    }
    worker = start(stderr=subprocess.DEVNULL)
    sequence = {"strategy": "direct", "max_sequences": 8, "state": [{"input": "before", "output": "after"}]}
    artifact = harness.write_fake(tmp_path, **behaviour)
    loaded = worker.load(
        tmp_path, artifact, "fake", {"sequence": sequence, "max_batch_size": 8}, artifact_format="fake"
    )
    assert isinstance(loaded, worker_pb2.Loaded), loaded.message
    worker.give_slab()
    assert numbers(run(worker, [5, 2], [(5, START, 1), (2, START, 1)], 0b10), 1) == [0, 0]
    assert numbers(run(worker, [9], [(5, 0, 1)], 0b11), 1) == [5]
    answer = run(worker, [1, command("rows")], [(5, 0, 1), (0, START, 1)])
    assert "has shape [5, 4]" in answer.text  # six rows for seats 0 to 5, less one
    assert numbers(run(worker, [0, 0], [(2, 0, 1), (5, 0, 1)], 0b10), 1) == [2, 9]


def command(word):
    """What the fake session obeys where it is the first element of its first input."""
    from fake_backend import MAGIC

    return MAGIC[word]


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize("word", ["raise", "missing", "rows", "dtype", "memory"])
def test_a_batch_that_fails_leaves_every_state_as_it_was(start, tmp_path, word):
    """The model gives what it was fed a step ago."""
    behaviour = {
        "inputs": [["x", "FP32", [-1, 4]], ["before", "FP32", [-1, 4]]],
        "outputs": [["after", "FP32", [-1, 4]], ["y", "FP32", [-1, 4]]],
    }
    worker = start(stderr=subprocess.DEVNULL)
    sequence = {"max_sequences": 4, "state": [{"input": "before", "output": "after"}]}
    artifact = harness.write_fake(tmp_path, **behaviour)
    loaded = worker.load(tmp_path, artifact, "fake", {"sequence": sequence}, artifact_format="fake")
    assert isinstance(loaded, worker_pb2.Loaded), loaded.message
    worker.give_slab()
    run(worker, [1, 2, 3], [(0, START, 1), (1, START, 1), (2, START, 1)], 0b10)
    failed = run(worker, [command(word), 7, 8, 9], [(0, 0, 1), (1, END, 1), (2, START, 1), (3, START, 1)], 0b10)
    assert isinstance(failed, harness.Fault)
    assert numbers(run(worker, [4, 5, 6], [(2, 0, 1), (0, 0, 1), (1, 0, 1)], 0b10), 1) == [3, 1, 2]
    refused = run(worker, [9], [(3, 0, 1)], 0b10)  # its start never ran
    assert "goes on with a sequence that nothing was kept of" in refused.text


def png(value):
    with io.BytesIO() as file:
        Image.new("L", (4, 4), value).save(file, "PNG")
        return file.getvalue()


def test_a_picture_that_cannot_be_decoded_moves_the_states_of_its_batch_mates_alone(start, tmp_path):
    """The model gives the picture of the step before."""
    shape = [-1, 1, 4, 4]
    behaviour = {
        "inputs": [["pixels", "FP32", shape], ["before", "FP32", shape]],
        "outputs": [["after", "FP32", shape], ["y", "FP32", shape]],
    }
    manifest = {
        "sequence": {"max_sequences": 4, "state": [{"input": "before", "output": "after"}]},
        "image": {"tensor": "pixels", "width": 4, "height": 4, "channels": 1, "scale": 1.0},
    }
    worker = start(stderr=subprocess.DEVNULL)
    loaded = worker.load(tmp_path, harness.write_fake(tmp_path, **behaviour), "fake", manifest, artifact_format="fake")
    assert isinstance(loaded, worker_pb2.Loaded), loaded.message
    worker.give_slab()

    def show(pictures, steps):
        content = harness.elements(*pictures)
        layout = worker.place([(2, "BYTES", (len(pictures), 1), content)])
        worker.send_run(layout, len(pictures), 1, 0b10, steps=steps)
        return worker.answer()

    answer = show([png(7), b"no picture", png(9)], [(0, START, 1), (1, START, 1), (2, START, 1)])
    assert list(answer.row_errors) == [1]
    answer = show([png(1), b"no picture"], [(2, 0, 1), (0, 0, 1)])
    assert answer.array(1)[:, 0, 0, 0].tolist() == [9, 7]
    assert show([png(1), png(1)], [(0, 0, 1), (2, 0, 1)]).array(1)[:, 0, 0, 0].tolist() == [7, 1]
    assert "nothing was kept of" in show([png(1)], [(1, 0, 1)]).text


def test_steps_that_make_no_sense_are_refused_and_the_worker_lives(accumulator):
    worker = accumulator()
    for rows, steps, says in (
        ([1], [], "truncated"),
        ([1, 2], [(0, START, 1)], "seats of its own|truncated"),
        ([1], [(SEATS, START, 1)], "seats of its own"),
        ([1, 2], [(1, START, 1), (1, START, 1)], "seats of its own"),
        ([1], [(4, 0, 1)], "nothing was kept of"),
    ):
        refused = run(worker, rows, steps)
        assert re.search(says, refused.text), refused.text
    assert numbers(run(worker, [3], [(0, START, 1)])) == [3]


def test_what_the_daemon_fills_cannot_be_sent(accumulator):
    worker = accumulator()
    row = np.ones((1, 4), np.float32).tobytes()
    layout = worker.place([(0, "FP32", (1, 4), row), (1, "FP32", (1, 4), row)])
    worker.send_run(layout, 1, steps=[(0, START, 1)])
    assert "'state_in' comes twice" in worker.answer().text


# ---------------------------------------------------------------- the manifest


def load_fake(start, tmp_path, sequence, takes, gives, **manifest):
    artifact = harness.write_fake(tmp_path, inputs=takes, outputs=gives)
    worker = start(stderr=subprocess.DEVNULL)
    return worker.load(tmp_path, artifact, "fake", {"sequence": sequence, **manifest}, artifact_format="fake")


X, Y_OUT = ["x", "FP32", [-1, 4]], ["y", "FP32", [-1, 4]]


@pytest.mark.parametrize(
    ("inputs", "outputs", "sequence", "says"),
    [
        ([X], [Y_OUT], {}, "state input 'a' is not one of the model's: x"),
        ([X, ["a", "FP32", [-1, 2]]], [Y_OUT], {}, "state output 'b' is not one of the model's: y"),
        (
            [X, ["a", "FP32", [-1, 2]]],
            [Y_OUT, ["b", "FP16", [-1, 2]]],
            {},
            "state input 'a' is FP32 [-1, 2] and its output 'b' is FP16 [-1, 2]",
        ),
        (
            [X, ["a", "FP32", [-1, -1]]],
            [Y_OUT, ["b", "FP32", [-1, 2]]],
            {},
            "state 'a' has shape [-1, -1], and but for the batch dimension all must be fixed",
        ),
        ([X, ["a", "BYTES", [-1, 1]]], [Y_OUT, ["b", "BYTES", [-1, 1]]], {}, "state 'a' must hold numbers"),
        (
            [X, ["a", "INT8", [-1, 2]]],
            [Y_OUT, ["b", "INT8", [-1, 2]]],
            {"initial": 300},
            "input 'a' has a value that does not fit INT8",
        ),
        (
            [X, ["a", "FP32", [-1, 2]]],
            [Y_OUT, ["b", "FP32", [-1, 2]]],
            {"initial": [1, 2, 3]},
            "has shape [3] and must have [2]",
        ),
        (
            [X, ["a", "FP32", [-1, 2]]],
            [Y_OUT, ["b", "FP32", [-1, 2]]],
            {"controls": {"start": "s", "end": "x"}},
            "control start 's' is not one of the model's inputs: x, a; control end 'x' has shape [-1, 4]",
        ),
        (
            [X, ["a", "FP32", [-1, 2]], ["id", "FP32", [-1, 1]]],
            [Y_OUT, ["b", "FP32", [-1, 2]], ["z", "FP32", [-1, 1]]],
            {"controls": {"correlation_id": "id"}},
            "control correlation_id 'id' is FP32 and must be one of INT32, INT64, UINT32, UINT64",
        ),
        (
            [X, ["a", "FP32", [-1, 2]]],
            [Y_OUT, ["b", "FP32", [-1, 2]]],
            {"strategy": "direct", "max_sequences": 9},
            "max_sequences (9) must not exceed max_batch_size (8)",
        ),
        ([["a", "FP32", [-1, 2]]], [["b", "FP32", [-1, 2]]], {}, "no input is left that a client could send"),
    ],
)
def test_a_section_that_does_not_fit_the_model_is_refused(start, tmp_path, inputs, outputs, sequence, says):
    initial = sequence.pop("initial", 0)
    section = {"state": [{"input": "a", "output": "b", "initial": initial}], **sequence}
    failed = load_fake(start, tmp_path, section, inputs, outputs, max_batch_size=8)
    assert isinstance(failed, worker_pb2.Failed)
    assert failed.kind == "invalid-manifest"
    assert says in failed.message


def test_the_manifest_fixes_lengths_that_a_state_leaves_open(start, tmp_path):
    section = {"state": [{"input": "a", "output": "b"}]}
    inputs, outputs = [X, ["a", "FP32", [-1, -1]]], [Y_OUT, ["b", "FP32", [-1, -1]]]
    listed = [{"name": "x", "datatype": "FP32", "shape": [4]}, {"name": "a", "datatype": "FP32", "shape": [3]}]
    state = [{"name": "b", "datatype": "FP32", "shape": [3]}]
    loaded = load_fake(start, tmp_path, section, inputs, outputs, inputs=listed, outputs=state, max_batch_size=8)
    assert isinstance(loaded, worker_pb2.Loaded), loaded.message


# ---------------------------------------------------------------- tasks


def test_a_model_of_sequences_is_measured_and_judged(tmp_path):
    """Rows of a sample are first steps, unless they bring the states themselves."""
    directory = write_accumulator(tmp_path / "m", "max_batch_size = 8", "max_sequences = 8")
    load = harness.load_of(directory, "onnxruntime")
    sample = tmp_path / "sample.jsonl"
    sample.write_text('{"inputs": {"x": [1, 2, 3, 4]}}\n{"inputs": {"x": [1, 2, 3, 4], "state_in": [2, 2, 2, 2]}}\n')
    for path in (None, str(sample)):
        answers = harness.run_task(
            {"task": "measure", "load": load, "rows": [1, 4], "done": [], "seconds": 0, "sample": path}
        )
        assert [point["rows"] for point in harness.said(answers, "point")] == [1, 4], answers
        kept = tmp_path / "reference.npz"
        answers = harness.run_task(
            {
                "task": "evaluate", "load": load, "sample": path, "limit": 32, "metric": "relative-l2",
                "reference": None, "save": str(kept),
            }
        )  # fmt: skip
        (result,) = harness.said(answers, "result")
        assert result["comparison"]["count"] == (2 if path else 32)
    with np.load(kept) as outputs:  # y, state_out and seen of both rows
        first, second = outputs["values"].reshape(2, 12)
    assert first.tolist() == [1, 2, 3, 4, 1, 2, 3, 4, 1, 0, 1, 1]
    assert second.tolist() == [2, 3, 4, 5, 2, 3, 4, 5, 1, 0, 1, 1]
