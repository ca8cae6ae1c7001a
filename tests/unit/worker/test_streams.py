"""A worker whose session takes several runs at a time: what answers when, and that nothing gets mixed up."""

import os
import signal
import struct
import subprocess
import threading
import time

import numpy as np
import pytest
import worker_harness as harness

from appliance.backend import MAX_STREAMS
from appliance.manifest import read_manifest
from appliance.types import TensorSpec
from appliance.wire import worker as wire
from appliance.wire import worker_pb2
from appliance.worker.recording import Recorder

ROW = np.arange(16, dtype=np.float32).reshape(1, 16)
MODELS = harness.MODELS
#: One stream more than the sessions have.
SLOTS = 3


@pytest.fixture(autouse=True)
def _fakes(monkeypatch):
    monkeypatch.syspath_prepend(str(harness.FAKES))


@pytest.fixture
def streaming(start, tmp_path):
    """A worker of the fake backend with two streams, three slots and a gate that its runs can be told to wait for."""

    def load(manifest=None, **behaviour):
        worker = start(stderr=subprocess.DEVNULL)
        artifact = harness.write_fake(tmp_path, **{"streams": 2, "run_gate": str(tmp_path / "gate"), **behaviour})
        worker.loaded = worker.load(tmp_path, artifact, "fake", manifest, artifact_format="fake")
        assert isinstance(worker.loaded, worker_pb2.Loaded), worker.loaded
        for slot in range(SLOTS):
            worker.give_slab(slot)
        return worker

    return load


def commanding(word):
    from fake_backend import MAGIC

    row = ROW.copy()
    row[0, 0] = MAGIC[word]
    return row


def send(worker, slot, array, batch):
    layout = worker.place([(0, "FP32", array.shape, array.tobytes())], slot)
    worker.send_run(layout, len(array), batch, slot=slot)


# ---------------------------------------------------------------- who waits for whom


def test_a_batch_that_takes_long_holds_up_no_other(streaming, tmp_path):
    worker = streaming()
    assert worker.loaded.streams == 2
    waiting = commanding("wait")
    send(worker, 0, waiting, 1)
    for number in range(2, 30):
        send(worker, 1 + number % 2, ROW * number, number)
        answer = worker.answer()
        assert (answer.batch, answer.slot) == (number, 1 + number % 2)
        np.testing.assert_array_equal(answer.array(0), ROW * number)
    (tmp_path / "gate").touch()
    answer = worker.answer()
    assert (answer.batch, answer.slot) == (1, 0)
    np.testing.assert_array_equal(answer.array(0), waiting)


def test_the_heartbeat_is_answered_while_a_batch_runs(streaming, tmp_path):
    worker = streaming()
    send(worker, 0, commanding("wait"), 1)
    worker.socket.send(bytes([wire.Kind.PING]))
    assert worker.receive()[0] == bytes([wire.Kind.PONG])
    (tmp_path / "gate").touch()
    assert worker.answer().batch == 1


def test_as_many_batches_run_at_a_time_as_there_are_streams_and_no_more(streaming, tmp_path):
    """The third is not even received while both streams are busy, or it would be answered first."""
    worker = streaming()
    send(worker, 0, commanding("wait"), 0)
    send(worker, 1, commanding("wait"), 1)
    send(worker, 2, ROW, 2)
    (tmp_path / "gate").touch()
    answers = [worker.answer().batch for _ in range(SLOTS)]
    assert sorted(answers) == list(range(SLOTS))
    assert answers[0] != 2


@pytest.mark.parametrize("word", ["raise", "memory", "missing"])
def test_what_goes_wrong_in_one_stream_leaves_the_other_alone(streaming, tmp_path, word):
    worker = streaming()
    waiting = commanding("wait")
    send(worker, 0, waiting, 1)
    for number in range(2, 6):
        send(worker, 1, commanding(word), number)
        answer = worker.answer()
        assert isinstance(answer, harness.Fault)
        assert (answer.batch, answer.slot) == (number, 1)
    (tmp_path / "gate").touch()
    np.testing.assert_array_equal(worker.answer().array(0), waiting)


def test_packets_that_lie_are_faults_while_a_batch_runs(streaming, tmp_path):
    worker = streaming()
    send(worker, 0, commanding("wait"), 1)
    worker.send_run([wire.TensorLayout(0, "FP32", (1, 16), 7, 0, 64)], 1, 2, slot=1)
    fault = worker.answer()
    assert (fault.batch, fault.slot) == (2, 1)
    assert "region 7" in fault.text
    (tmp_path / "gate").touch()
    assert worker.answer().batch == 1


@pytest.mark.parametrize(("command", "status"), [("crash", -signal.SIGSEGV), ("exit", 3)])
def test_a_crash_in_any_stream_ends_the_process(streaming, command, status):
    worker = streaming()
    send(worker, 0, commanding("wait"), 1)
    send(worker, 1, commanding(command), 2)
    assert worker.receive()[0] == b""
    assert worker.wait() == status


def test_a_front_end_that_breaks_the_protocol_ends_the_worker_whoever_receives(streaming):
    for busy in range(2):
        worker = streaming()
        if busy:
            send(worker, 0, commanding("wait"), 1)
        worker.socket.send(b"\xee")
        assert worker.wait() == 1


def test_end_of_file_ends_the_worker_once_its_batch_has_ended(streaming, tmp_path):
    worker = streaming()
    send(worker, 0, commanding("wait"), 1)
    worker.socket.close()
    (tmp_path / "gate").touch()
    assert worker.wait() == 0


@pytest.mark.parametrize("streams", [0, -1, MAX_STREAMS + 1, True, "2", 2.0, None])
def test_a_number_of_streams_that_cannot_be_breaks_the_contract(start, tmp_path, streams):
    worker = start()
    artifact = harness.write_fake(tmp_path, streams=streams)
    failed = worker.load(tmp_path, artifact, "fake", artifact_format="fake")
    assert failed.kind == "backend-error"
    assert "broke its contract" in failed.message


def test_a_session_that_says_nothing_has_one_stream(start, tmp_path):
    worker = start()
    loaded = worker.load(tmp_path, harness.write_fake(tmp_path), "fake", artifact_format="fake")
    assert loaded.streams == 1


# ---------------------------------------------------------------- memory


def test_memory_that_is_taken_away_or_replaced_stays_with_the_batch_that_runs_on_it(streaming, tmp_path):
    worker = streaming()
    tensor = wire.TensorLayout(0, "FP32", (1, 16), 3, 0, 64)
    old, new = commanding("wait"), ROW * 5
    fd = harness.memfd(old.tobytes(), 64)
    worker.map_region(3, fd, 64)
    worker.send_run([tensor], 1, 1, slot=0)
    worker.unmap_region(3)
    worker.send_run([tensor], 1, 2, slot=1)
    assert "region 3" in worker.answer().text, "the other stream has it no more"
    other = harness.memfd(new.tobytes(), 64)
    worker.map_region(3, other, 64)
    worker.give_slab(1)
    worker.send_run([tensor], 1, 3, slot=1)
    np.testing.assert_array_equal(worker.answer().array(0), new)
    os.pwrite(fd, struct.pack("<f", 7.0), 60)  # seen by the batch that runs, since its memory is not copied
    (tmp_path / "gate").touch()
    answer = worker.answer()
    assert answer.batch == 1
    np.testing.assert_array_equal(answer.array(0)[0, :-1], old[0, :-1])
    assert answer.array(0)[0, -1] == 7.0
    for each in (fd, other):
        os.close(each)


def test_a_region_given_back_is_unmapped_once_its_batch_has_ended(streaming, tmp_path):
    worker = streaming()
    size = 123 << 12
    fd = harness.memfd(commanding("wait").tobytes(), size)
    worker.map_region(3, fd, size)
    os.close(fd)

    def is_mapped():
        with open(f"/proc/{worker.process.pid}/maps") as maps:
            spans = [line.split()[0].split("-") for line in maps if "memfd:test" in line]
        return any(int(end, 16) - int(begin, 16) == size for begin, end in spans)

    worker.send_run([wire.TensorLayout(0, "FP32", (1, 16), 3, 0, 64)], 1, 1, slot=0)
    worker.unmap_region(3)
    send(worker, 1, ROW, 2)
    assert worker.answer().batch == 2
    assert is_mapped()
    (tmp_path / "gate").touch()
    assert worker.answer().batch == 1
    deadline = time.monotonic() + harness.PATIENCE
    while is_mapped():  # the answer goes out before the thread has let go
        assert time.monotonic() < deadline, "it stays mapped"


def test_rows_that_several_threads_record_at_once_are_counted_once(tmp_path):
    recorder = Recorder(tmp_path / "r", 500, is_batched=True)
    batch = np.ones((3, 4), np.float32)
    threads = [threading.Thread(target=lambda: [recorder.take({"x": batch}, 3) for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.close()
    kept = 0
    for path in (tmp_path / "r").glob("*.npz"):
        with np.load(path) as archive:
            kept += len(archive["x"])
    assert kept == 500


# ---------------------------------------------------------------- real runtimes


def load_sample(start, name, backend, **options):
    """A worker with a sample model and `SLOTS` slots."""
    directory = MODELS / name
    worker = start()
    worker.loaded = worker.load(
        directory,
        directory / "1" / "model.onnx",
        backend,
        manifest_json=read_manifest(directory).model_dump_json(by_alias=True),
        options=options,
    )
    assert isinstance(worker.loaded, worker_pb2.Loaded), worker.loaded
    for slot in range(SLOTS):
        worker.give_slab(slot, 1 << 18, 1 << 18)
    return worker


def batch_of(specs: list[TensorSpec], rows: int, random) -> list[np.ndarray]:
    arrays = []
    for spec in specs:
        shape = (rows, *(int(random.integers(8, 64)) if size < 0 else size for size in spec.shape[1:]))
        if spec.datatype == "INT64":
            shape = (rows, 32)
            arrays.append(random.integers(1, 100, shape))
        else:
            arrays.append(random.random(shape, np.float32))
    return arrays


def post(worker, specs, arrays, slot, number, wanted):
    contents = [
        (place, spec.datatype, array.shape, array.tobytes())
        for place, (spec, array) in enumerate(zip(specs, arrays, strict=True))
    ]
    worker.send_run(worker.place(contents, slot), len(arrays[0]), number, wanted, slot)


@pytest.mark.parametrize("name", ["digits", "language-id"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_interleaved_batches_of_all_sizes_are_answered_as_by_one_stream(start, backend, name):
    one = load_sample(start, name, backend, threads="1")
    two = load_sample(start, name, backend, streams="2", threads="1")
    assert (one.loaded.streams, two.loaded.streams) == (1, min(2, os.cpu_count() or 1))
    specs, outputs = one.loaded.inputs, len(one.loaded.outputs) + len(one.loaded.edge_outputs)
    random = np.random.default_rng(11)
    batches = [batch_of(specs, int(random.integers(1, 17)), random) for _ in range(120)]
    wanted = (1 << outputs) - 1
    expected = []
    for number, arrays in enumerate(batches):
        post(one, specs, arrays, 0, number, wanted)
        expected.append(one.answer())
    waiting = list(range(len(batches)))
    free, answered = list(range(SLOTS)), set()
    while len(answered) < len(batches):
        while free and waiting:
            number = waiting.pop(0)
            post(two, specs, batches[number], free.pop(), number, wanted)
        answer = two.answer()
        assert isinstance(answer, harness.Done), answer.text
        assert answer.batch not in answered
        answered.add(answer.batch)
        free.append(answer.slot)
        right = expected[answer.batch]
        assert [tensor[:3] for tensor in answer.tensors] == [tensor[:3] for tensor in right.tensors]
        for tensor in right.tensors:
            if tensor.datatype == "BYTES":
                assert answer.rows(tensor.place) == right.rows(tensor.place)
            else:
                np.testing.assert_allclose(answer.array(tensor.place), right.array(tensor.place), rtol=1e-4, atol=1e-5)
