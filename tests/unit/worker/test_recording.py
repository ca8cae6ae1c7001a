"""Live inputs that are kept as calibration inputs."""

import json
import stat

import numpy as np
import pytest
import worker_harness as harness

from appliance.manifest import Manifest
from appliance.types import TensorSpec
from appliance.worker import recording
from appliance.worker.recording import Recorder, recorder_of
from appliance.worker.samples import SampleReader

SPECS = [TensorSpec("x", "FP32", (-1, 4))]


def rows(count, start=0, width=4):
    return np.arange(start * width, (start + count) * width, dtype=np.float32).reshape(count, width)


def recorded(directory):
    """Every row in the directory, shard by shard."""
    found = []
    for path in sorted(directory.glob("*.npz")):
        with np.load(path, allow_pickle=False) as archive:
            found.append({name: archive[name] for name in archive.files})
    return found


def count_of(directory):
    return sum(len(next(iter(shard.values()))) for shard in recorded(directory))


def record(directory, batches, limit=100, is_batched=True):
    recorder = Recorder(directory, limit, is_batched=is_batched)
    for batch in batches:
        recorder.take({"x": batch}, len(batch))
    recorder.close()


def test_rows_come_back_as_the_sample_reader_reads_them(tmp_path):
    record(tmp_path / "r", [rows(3), rows(2, start=3)])
    manifest = harness.read_as_workers_do(Manifest(name="m", artifacts=[{"path": "1/m.onnx", "format": "onnx"}]))
    reader = SampleReader(SPECS, manifest, tmp_path, is_batched=True)
    found = np.concatenate([row.feeds["x"] for row in reader.rows(tmp_path / "r")])
    np.testing.assert_array_equal(found, rows(5))


def test_what_was_taken_is_a_copy(tmp_path):
    shared = rows(2)
    recorder = Recorder(tmp_path / "r", 10, is_batched=True)
    recorder.take({"x": shared}, 2)
    shared[...] = -1
    recorder.close()
    np.testing.assert_array_equal(recorded(tmp_path / "r")[0]["x"], rows(2))


def test_it_stops_at_the_limit_in_the_middle_of_a_batch(tmp_path):
    record(tmp_path / "r", [rows(6), rows(6)], limit=8)
    assert count_of(tmp_path / "r") == 8


def test_a_later_worker_counts_what_is_there(tmp_path):
    record(tmp_path / "r", [rows(6)], limit=8)
    record(tmp_path / "r", [rows(6, start=6)], limit=8)
    assert count_of(tmp_path / "r") == 8
    record(tmp_path / "r", [rows(6)], limit=8)
    assert count_of(tmp_path / "r") == 8


def test_two_workers_beside_each_other_write_no_more_than_one(tmp_path):
    first, second = (Recorder(tmp_path / "r", 8, is_batched=True) for _ in range(2))
    for recorder in (first, second):
        recorder.take({"x": rows(6)}, 6)
    first.close()
    second.close()
    assert count_of(tmp_path / "r") == 8


def test_rows_of_unequal_shapes_go_into_files_of_their_own(tmp_path):
    record(tmp_path / "r", [rows(2), rows(1, width=7), rows(2, start=2)])
    assert sorted(shard["x"].shape for shard in recorded(tmp_path / "r")) == [(1, 7), (4, 4)]


def test_a_model_without_batch_dimension_gives_one_row_a_run(tmp_path):
    record(tmp_path / "r", [rows(2), rows(2, start=2)], is_batched=False)
    (shard,) = recorded(tmp_path / "r")
    assert shard["x"].shape == (2, 2, 4)


def test_full_files_are_written_before_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "SHARD_ROWS", 4)
    record(tmp_path / "r", [rows(2, start=start) for start in range(0, 20, 2)])
    assert len(recorded(tmp_path / "r")) == 5
    np.testing.assert_array_equal(np.concatenate([shard["x"] for shard in recorded(tmp_path / "r")]), rows(20))


def test_the_files_are_the_daemons_alone(tmp_path):
    record(tmp_path / "r", [rows(2)])
    assert stat.S_IMODE((tmp_path / "r").stat().st_mode) == 0o700
    (path,) = (tmp_path / "r").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_directory_does_not_grow_beyond_its_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "SHARD_ROWS", 4)
    monkeypatch.setattr(recording, "MAX_BYTES", 1000)
    record(tmp_path / "r", [rows(4) for _ in range(20)])
    assert 0 < sum(path.stat().st_size for path in (tmp_path / "r").iterdir()) <= 1000


def test_a_disk_that_takes_no_more_ends_the_recording_and_nothing_else(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recording.os, "fsync", full)
    recorder = Recorder(tmp_path / "r", 10, is_batched=True)
    recorder.take({"x": rows(2)}, 2)
    recorder.close()
    recorder.take({"x": rows(2)}, 2)
    assert list((tmp_path / "r").iterdir()) == []
    assert "No space left on device" in capsys.readouterr().err


def test_rows_beyond_what_may_wait_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "_MAX_WAITING_BYTES", 100)
    record(tmp_path / "r", [rows(100)])
    assert recorded(tmp_path / "r") == []


@pytest.mark.parametrize(
    ("path", "record", "datatype"),
    [("", 5, "FP32"), ("r", 0, "FP32"), ("r", 5, "BYTES")],
    ids=["path", "limit", "text"],
)
def test_nothing_is_recorded_unless_asked_for_and_of_use(tmp_path, path, record, datatype):
    document = Manifest(
        name="m", artifacts=[{"path": "1/m.onnx", "format": "onnx"}], samples={"record": record} if record else None
    )
    model = harness.SimpleNamespace(inputs=[TensorSpec("x", datatype, (-1, 1))], max_batch_size=8)
    where = str(tmp_path / path) if path else ""
    assert recorder_of(where, harness.read_as_workers_do(document), model) is None
    assert list(tmp_path.iterdir()) == []


def test_a_worker_records_what_ran_and_no_more(start, tmp_path):
    """In a real worker: the batches that ran, up to the limit, and all of it on disk once the front-end lets go."""
    artifact = tmp_path / "model.onnx"
    artifact.write_bytes(harness.identity_model(shape=("N", 4)))
    worker = start()
    manifest = {"max_batch_size": 8, "samples": {"record": 5}}
    worker.load(tmp_path, artifact, "onnxruntime", manifest, record_path=str(tmp_path / "r"))
    worker.give_slab()
    for first in (0, 3, 6):
        worker.run_array(rows(3, start=first))
    worker.socket.close()
    assert worker.wait() == 0
    np.testing.assert_array_equal(np.concatenate([shard["x"] for shard in recorded(tmp_path / "r")]), rows(5))


def test_a_batch_with_an_undecodable_picture_is_not_recorded(start, tmp_path):
    digits = harness.MODELS / "digits"
    manifest = harness.read_manifest(digits)
    document = json.loads(manifest.model_dump_json(by_alias=True))
    document["samples"]["record"] = 5
    worker = start()
    worker.load(
        digits, digits / "1/model.onnx", "onnxruntime", None,
        manifest_json=json.dumps(document), record_path=str(tmp_path / "r"),
    )  # fmt: skip
    worker.give_slab()
    good = (digits / "samples/evaluation.jsonl").read_text().splitlines()[0]
    picture = harness.base64.b64decode(json.loads(good)["inputs"]["image"]["base64"])
    for contents in ((picture, b"no picture"), (picture,)):
        content = harness.elements(*contents)
        worker.run([(1, "BYTES", (len(contents), 1), content)], len(contents), wanted=1)
    worker.socket.close()
    assert worker.wait() == 0
    assert [shard["pixels"].shape for shard in recorded(tmp_path / "r")] == [(1, 1, 8, 8)]
