"""The worker process: loading, running, dying."""

import os
import select
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import worker_harness as harness
from onnx import TensorProto

from appliance.wire import worker as wire
from appliance.wire import worker_pb2

ROW = np.arange(16, dtype=np.float32).reshape(1, 16)


def load_identity(start, tmp_path, backend="onnxruntime", manifest=None, **arguments):
    (tmp_path / "model.onnx").write_bytes(harness.identity_model(**arguments))
    worker = start()
    worker.loaded = worker.load(tmp_path, tmp_path / "model.onnx", backend, manifest)
    assert isinstance(worker.loaded, worker_pb2.Loaded), worker.loaded.message
    worker.give_slab()
    return worker


def load_fake(start, tmp_path, manifest=None, **behaviour):
    artifact = harness.write_fake(tmp_path, **behaviour)
    worker = start()
    return worker.load(tmp_path, artifact, "fake", manifest, artifact_format="fake"), worker


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_real_model_loads_describes_itself_and_answers(start, tmp_path, backend):
    worker = load_identity(start, tmp_path, backend)
    loaded = worker.loaded
    assert [(spec.name, spec.datatype, list(spec.shape)) for spec in loaded.inputs] == [("x", "FP32", [-1, 16])]
    assert [(spec.name, spec.datatype, list(spec.shape)) for spec in loaded.outputs] == [("y", "FP32", [-1, 16])]
    assert loaded.max_batch_size == 64
    assert (loaded.execution.device, loaded.execution.precision) == ("cpu", "FP32")
    assert loaded.runtime.startswith(f"{backend} ")
    assert loaded.resident_bytes > 0
    assert loaded.load_ns > 0
    assert loaded.warmup_ns > 0
    for rows in (1, 3, 1, 64):
        batch = np.random.default_rng(rows).standard_normal((rows, 16), dtype=np.float32)
        done = worker.run_array(batch, batch=rows + 7)
        assert done.batch == rows + 7
        np.testing.assert_array_equal(done.array(0), batch)
        assert done.durations[2] > 0


def test_the_same_layout_sees_new_values_and_nan_passes_through(fake):
    worker = fake()
    for value in (1.0, np.nan, -np.inf, 2.0):
        np.testing.assert_array_equal(worker.run_array(np.full((2, 16), value, np.float32)).array(0)[0, 0], value)


def test_outputs_are_answered_only_where_wanted(fake):
    specs = [["a", "FP32", [-1, 2]], ["b", "INT32", [-1]], ["c", "UINT8", [-1, 3]]]
    worker = fake(inputs=specs, outputs=[[name.upper(), *rest] for name, *rest in specs])
    a, b, c = np.float32([[1, 2]]), np.int32([3]), np.uint8([[4, 5, 6]])
    inputs = [(2, "UINT8", c.shape, c.tobytes()), (0, "FP32", a.shape, a.tobytes()), (1, "INT32", b.shape, b.tobytes())]
    done = worker.run(inputs, rows=1, wanted=0b101)
    assert sorted(done.contents) == [0, 2]
    np.testing.assert_array_equal(done.array(0), a)
    np.testing.assert_array_equal(done.array(2), c)
    done = worker.run(inputs, rows=1, wanted=0b010)
    np.testing.assert_array_equal(done.array(1), b)


def test_outputs_that_do_not_fit_the_slab_come_in_a_sealed_memfd(start, tmp_path):
    worker = load_identity(start, tmp_path, shape=("N", 4096))
    worker.give_slab(0, 65536, 64)
    batch = np.random.default_rng(1).standard_normal((2, 4096), dtype=np.float32)
    for _ in range(3):
        done = worker.run_array(batch)
        assert done.is_attached
        np.testing.assert_array_equal(done.array(0), batch)
    worker.give_slab(0, 65536, 65536)
    done = worker.run_array(batch)
    assert not done.is_attached
    np.testing.assert_array_equal(done.array(0), batch)


def test_no_descriptor_is_left_behind_by_slabs_regions_and_attached_outputs(fake):
    worker = fake(inputs=[["x", "BYTES", [-1]]], outputs=[["y", "BYTES", [-1]]])
    directory = f"/proc/{worker.process.pid}/fd"

    def cycle():
        worker.give_slab(0, 65536, 0)
        done = worker.run([(0, "BYTES", (1,), harness.elements(b"abc"))], rows=1)
        assert done.is_attached
        fd = harness.memfd(bytes(64))
        worker.map_region(5, fd, 64)
        os.close(fd)
        worker.unmap_region(5)
        assert worker.run([(0, "BYTES", (1,), harness.elements(b"abc"))], rows=1).rows(0) == [[b"abc"]]
        # A worker closes what it attached after it has sent it, but before it takes the next packet.
        worker.socket.send(bytes([wire.Kind.PING]))
        assert worker.receive()[0] == bytes([wire.Kind.PONG])
        return len(os.listdir(directory))

    before = cycle()
    assert [cycle() for _ in range(20)][-1] == before


def test_bytes_elements_come_back_with_a_table_of_rows(fake):
    worker = fake(inputs=[["x", "BYTES", [-1, 2]]], outputs=[["y", "BYTES", [-1, 2]]])
    rows = [[b"a\0b\0", b""], [b"\xff\xfe", "grüß".encode()], [b"x" * 300, b"y"]]
    content = harness.elements(*[element for row in rows for element in row])
    done = worker.run([(0, "BYTES", (3, 2), content)], rows=3)
    assert done.rows(0) == rows


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\1\0\0",
        harness.elements(b"abc"),
        harness.elements(b"abc", b"d") + b"\0",
        harness.elements(b"abc", b"d")[:-1],
        b"\xff\xff\xff\xff" * 2,
    ],
)
def test_bytes_lengths_that_lie_are_a_fault_and_the_worker_lives(fake, content):
    worker = fake(inputs=[["x", "BYTES", [-1, 2]]], outputs=[["y", "BYTES", [-1, 2]]])
    assert "cannot read the BYTES tensor" in worker.run([(0, "BYTES", (1, 2), content)], rows=1).text
    assert worker.run([(0, "BYTES", (1, 2), harness.elements(b"k", b"l"))], rows=1).rows(0) == [[b"k", b"l"]]


def test_a_model_without_batch_dimension_takes_its_full_shape(fake):
    worker = fake(manifest={"max_batch_size": 0}, inputs=[["x", "INT64", []]], outputs=[["y", "INT64", []]])
    assert worker.loaded.max_batch_size == 0
    done = worker.run([(0, "INT64", (), np.int64(7).tobytes())], rows=1)
    assert done.tensors[0].shape == ()
    assert done.array(0) == 7


def test_inputs_come_straight_from_a_mapped_region(fake):
    worker = fake()
    fd = harness.memfd(ROW.tobytes(), 4096)
    worker.map_region(3, fd, 4096)
    tensor = wire.TensorLayout(0, "FP32", (1, 16), 3, 0, 64)
    worker.send_run([tensor], 1)
    np.testing.assert_array_equal(worker.answer().array(0), ROW)
    os.pwrite(fd, (ROW * 2).tobytes(), 0)
    worker.send_run([tensor], 1)
    np.testing.assert_array_equal(worker.answer().array(0), ROW * 2)
    unaligned = wire.TensorLayout(0, "FP32", (1, 16), 3, 1001, 64)
    os.pwrite(fd, (ROW * 3).tobytes(), 1001)
    worker.send_run([unaligned], 1)
    np.testing.assert_array_equal(worker.answer().array(0), ROW * 3)
    os.close(fd)
    worker.unmap_region(3)
    worker.send_run([tensor], 1)
    assert "region 3" in worker.answer().text


def test_a_region_sealed_against_writing_can_be_read(fake):
    import fcntl

    worker = fake()
    fd = harness.memfd(ROW.tobytes(), 64)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    worker.map_region(9, fd, 64)
    os.close(fd)
    worker.send_run([wire.TensorLayout(0, "FP32", (1, 16), 9, 0, 64)], 1)
    np.testing.assert_array_equal(worker.answer().array(0), ROW)


def test_a_region_number_used_again_shows_the_new_memory(fake):
    worker = fake()
    for factor in (1, 2):
        fd = harness.memfd((ROW * factor).tobytes(), 64)
        worker.map_region(3, fd, 64)
        os.close(fd)
        worker.send_run([wire.TensorLayout(0, "FP32", (1, 16), 3, 0, 64)], 1)
        np.testing.assert_array_equal(worker.answer().array(0), ROW * factor)


@pytest.mark.parametrize(
    ("tensor", "rows", "wanted"),
    [
        (wire.TensorLayout(0, "FP32", (1, 16), 0, 65530, 64), 1, 1),
        (wire.TensorLayout(0, "FP32", (1, 16), 0, 2**63, 64), 1, 1),
        (wire.TensorLayout(0, "FP32", (1, 16), 0, 0, 60), 1, 1),
        (wire.TensorLayout(0, "FP32", (1, 15), 0, 0, 60), 1, 1),
        (wire.TensorLayout(0, "FP32", (2, 16), 0, 0, 128), 1, 1),
        (wire.TensorLayout(0, "FP32", (-1, 16), 0, 0, 64), 1, 1),
        (wire.TensorLayout(0, "FP32", (16,), 0, 0, 64), 1, 1),
        (wire.TensorLayout(0, "INT32", (1, 16), 0, 0, 64), 1, 1),
        (wire.TensorLayout(1, "FP32", (1, 16), 0, 0, 64), 1, 1),
        (wire.TensorLayout(0, "FP32", (1, 16), 7, 0, 64), 1, 1),
        (wire.TensorLayout(0, "FP32", (1, 16), 0, 0, 64), 1, 0),
        (wire.TensorLayout(0, "FP32", (1, 16), 0, 0, 64), 0, 1),
        (wire.TensorLayout(0, "FP32", (65, 16), 0, 0, 65 * 64), 65, 1),
    ],
)
def test_a_layout_that_suits_neither_model_nor_memory_is_a_fault(fake, tensor, rows, wanted):
    worker = fake()
    worker.send_run([tensor], rows, batch=11, wanted=wanted)
    fault = worker.answer()
    assert fault.batch == 11
    assert fault.text.startswith("cannot ")
    np.testing.assert_array_equal(worker.run_array(ROW).array(0), ROW)


def test_corrupt_packets_are_faults_and_the_worker_lives(fake):
    worker = fake()
    layout = wire.pack_layout(worker.place([(0, "FP32", (1, 16), ROW.tobytes())]))
    random = np.random.default_rng(7)
    for count, body in [
        (1, b""),
        (1, layout[:-1]),
        (1, layout + b"\0"),
        (2, layout),
        (2, layout * 2),
        (65535, layout),
        (0, b""),
        (1, layout[:2] + b"\xff" + layout[3:]),
        (1, layout[:3] + b"\xff" + layout[4:]),
        *[(1, random.bytes(len(layout))) for _ in range(50)],
    ]:
        worker.socket.send(wire.RUN_HEADER.pack(wire.Kind.RUN, 0, count, 1, 5, 1) + body)
        assert isinstance(worker.answer(), harness.Fault)
    np.testing.assert_array_equal(worker.run_array(ROW).array(0), ROW)


def test_a_slot_without_slabs_is_a_fault(fake):
    worker = fake()
    worker.send_run([wire.TensorLayout(0, "FP32", (1, 16), 0, 0, 64)], 1, slot=4)
    assert "slot 4" in worker.answer().text


@pytest.mark.parametrize("command", ["rows", "dtype", "rank", "missing"])
def test_a_backend_that_breaks_its_contract_faults_every_time(fake, command):
    worker = fake()
    batch = np.tile(ROW, (2, 1))
    np.testing.assert_array_equal(worker.run_array(batch).array(0), batch)
    spoilt = batch.copy()
    spoilt[0, 0] = command_number(command)
    for _ in range(2):
        assert "broke its contract" in worker.run_array(spoilt).text
    np.testing.assert_array_equal(worker.run_array(batch).array(0), batch)


def command_number(word):
    sys.path.insert(0, str(harness.FAKES))
    try:
        import fake_backend
    finally:
        sys.path.remove(str(harness.FAKES))
    return fake_backend.MAGIC[word]


def commanded(word):
    row = ROW.copy()
    row[0, 0] = command_number(word)
    return row


def test_what_the_runtime_raises_is_a_fault_without_paths_or_addresses(fake):
    worker = fake()
    assert "RuntimeError: the fake device raised on command" in worker.run_array(commanded("raise")).text
    text = worker.run_array(commanded("big")).text
    assert "/etc" not in text
    assert "0x7f" not in text
    assert len(text) < 700
    assert "MemoryError" in worker.run_array(commanded("memory")).text
    np.testing.assert_array_equal(worker.run_array(ROW).array(0), ROW)


def test_the_leak_command_really_leaks(fake):
    """The positive control of every leak test."""
    worker = fake()

    def resident():
        with open(f"/proc/{worker.process.pid}/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident()
    for _ in range(20):
        worker.run_array(commanded("leak"))
    assert resident() - before > 15 * 2**20


@pytest.mark.parametrize(("command", "status"), [("crash", -signal.SIGSEGV), ("kill", -signal.SIGKILL), ("exit", 3)])
def test_a_crash_ends_the_process_and_the_socket(fake, command, status):
    worker = fake()
    worker.send_run(worker.place([(0, "FP32", (1, 16), commanded(command).tobytes())]), 1)
    assert worker.receive()[0] == b""
    assert worker.wait() == status


def test_ping_is_answered_in_turn(fake):
    worker = fake()
    worker.send_run(worker.place([(0, "FP32", (1, 16), ROW.tobytes())]), 1)
    worker.socket.send(bytes([wire.Kind.PING]))
    assert isinstance(worker.answer(), harness.Done)
    assert worker.receive()[0] == bytes([wire.Kind.PONG])


def test_end_of_file_ends_the_worker_before_and_after_loading(fake, start):
    idle = start()
    idle.socket.close()
    assert idle.wait() == 0
    worker = fake()
    worker.socket.close()
    assert worker.wait() == 0


def test_interrupts_from_the_terminal_are_ignored(fake):
    worker = fake()
    worker.process.send_signal(signal.SIGINT)
    np.testing.assert_array_equal(worker.run_array(ROW).array(0), ROW)


def test_native_output_goes_to_standard_error_and_never_into_the_protocol(start, tmp_path):
    loaded, worker = load_fake(lambda: start(stderr=subprocess.DEVNULL), tmp_path)
    assert isinstance(loaded, worker_pb2.Loaded)
    worker.give_slab()
    assert isinstance(worker.run_array(commanded("print")), harness.Done)


@pytest.mark.parametrize("packet", [bytes([wire.Kind.PING]), b"\xee", bytes([wire.Kind.LOAD]) + b"\xff\xff"])
def test_a_first_packet_that_is_no_load_ends_the_worker(start, packet):
    worker = start(stderr=subprocess.DEVNULL)
    worker.socket.send(packet)
    assert worker.wait() == 1


def test_a_slab_without_its_descriptors_ends_the_worker(start, tmp_path):
    loaded, worker = load_fake(lambda: start(stderr=subprocess.DEVNULL), tmp_path)
    assert isinstance(loaded, worker_pb2.Loaded)
    worker.socket.send(wire.SLAB.pack(wire.Kind.SLAB, 0, 0, 0, 64, 64))
    assert worker.wait() == 1


def test_memory_shorter_than_announced_is_never_mapped(start, tmp_path):
    _, worker = load_fake(lambda: start(stderr=subprocess.DEVNULL), tmp_path)
    fd = harness.memfd(size=4096)
    worker.map_region(1, fd, 8192)
    os.close(fd)
    assert worker.wait() == 1


MIDDLE = """
import os, socket, subprocess, sys
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
# The socket stays open in this child, so that end of file never comes and only the signal can end the worker.
subprocess.Popen(["sleep", "60"], pass_fds=[ours.fileno()])
ours.send(sys.stdin.buffer.read(int(sys.argv[1])))
worker = subprocess.Popen([sys.executable, "-P", "-m", "appliance.worker", "--fd", str(theirs.fileno())],
                          pass_fds=[theirs.fileno()])
print(worker.pid, flush=True)
print(ours.recv(65536)[0], flush=True)
sys.stdin.buffer.read()
"""


@pytest.mark.parametrize("moment", ["starting", "hanging", "serving"])
def test_a_killed_parent_takes_its_worker_along(tmp_path, moment):
    """Parent death is a signal of the kernel's, so it works without the socket and without the interpreter lock."""
    artifact = harness.write_fake(tmp_path, **({"on_load": "hang-gil"} if moment != "serving" else {}))
    message = worker_pb2.Load(
        backend="fake", model="m", version="1", directory=str(tmp_path), artifact_path=str(artifact),
        artifact_format="fake", device="cpu", precision="FP32",
        manifest=harness.Manifest(name="m", artifacts=[{"path": "1/m", "format": "fake"}]).model_dump_json(),
    )  # fmt: skip
    packet = bytes([wire.Kind.LOAD]) + message.SerializeToString()
    with subprocess.Popen(
        [sys.executable, "-c", MIDDLE, str(len(packet))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=harness.environment(),
        start_new_session=True,
    ) as middle:
        middle.stdin.write(packet)
        middle.stdin.flush()
        pidfd = os.pidfd_open(int(middle.stdout.readline()))
        if moment == "hanging":
            assert middle.stderr.readline() == b"hanging\n"
        elif moment == "serving":
            assert int(middle.stdout.readline()) == wire.Kind.LOADED
        middle.kill()
        readable, _, _ = select.select([pidfd], [], [], harness.PATIENCE)
        os.killpg(middle.pid, signal.SIGKILL)
        os.close(pidfd)
        assert readable == [pidfd]


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ({"on_load": "raise"}, "cannot load the model: RuntimeError"),
        ({"on_load": "big"}, "cannot load the model"),
        ({"on_warmup": "raise"}, "cannot warm the model up: RuntimeError"),
        ({"inputs": []}, "it has no inputs"),
        ({"outputs": []}, "it has no outputs"),
        ({"inputs": [["x", "FP32", [-1]], ["x", "FP32", [-1]]]}, "two of its inputs have one name"),
        ({"inputs": [["x", "FP8", [-1]]]}, "unknown datatype"),
        ({"outputs": [["y", "INT32", [-1, 16]]]}, "broke its contract"),
    ],
)
def test_a_model_that_cannot_be_served_fails_with_its_reason_and_status_1(start, tmp_path, behaviour, words):
    failed, worker = load_fake(start, tmp_path, **behaviour)
    assert failed.kind == "backend-error"
    assert words in failed.message
    assert "/etc" not in failed.message
    assert worker.wait() == 1


@pytest.mark.parametrize("command", ["crash", "kill"])
def test_a_crash_while_loading_ends_the_socket(start, tmp_path, command):
    worker = start(stderr=subprocess.DEVNULL)
    worker.send_load(tmp_path, harness.write_fake(tmp_path, on_load=command), "fake", artifact_format="fake")
    assert worker.receive()[0] == b""


@pytest.mark.parametrize(
    ("overrides", "kind", "words"),
    [
        ({"backend": "nonesuch"}, "no-placement", "nonesuch"),
        ({"device": "gpu0"}, "no-placement", "cannot use device 'gpu0'"),
        ({"artifact_format": "onnx"}, "no-placement", "none of its formats"),
        ({"artifact_sha256": "0" * 64}, "artifact-corrupt", "sha256"),
        ({"manifest_json": "{"}, "invalid-manifest", "cannot use the manifest"),
    ],
)
def test_a_load_that_asks_for_the_impossible_says_so(start, tmp_path, overrides, kind, words):
    worker = start()
    fields = {"backend": "fake", "artifact_format": "fake", **overrides}
    failed = worker.load(tmp_path, harness.write_fake(tmp_path), **fields)
    assert failed.kind == kind
    assert words in failed.message
    assert worker.wait() == 1


FP32_X = {"name": "x", "datatype": "FP32", "shape": [16]}


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        ({"inputs": [{**FP32_X, "datatype": "INT32"}]}, "FP32 in the model and INT32 in the manifest"),
        ({"inputs": [{**FP32_X, "name": "z"}]}, "'z' is not one of the model's"),
        ({"inputs": [{**FP32_X, "shape": [17]}]}, "has shape [-1, 16] in the model"),
        (
            {"outputs": [{**FP32_X, "name": "y", "shape": [2, 16]}]},
            "output 'y' has shape",
        ),
        ({"image": {"tensor": "nope", "width": 4, "height": 4}}, "cannot make images into 'nope'"),
        ({"image": {"tensor": "x", "width": 4, "height": 4}}, "cannot make images into 'x'"),
        ({"classification": {"logits": "nope"}}, "cannot classify by 'nope'"),
        ({"classification": {"logits": "y"}}, "no such file"),
    ],
)
def test_a_manifest_that_disagrees_with_the_model_is_refused(start, tmp_path, manifest, words):
    failed, _ = load_fake(start, tmp_path, manifest)
    assert failed.kind == "invalid-manifest"
    assert words in failed.message


def test_a_batch_size_needs_a_dynamic_first_dimension(start, tmp_path):
    fixed = {"inputs": [["x", "FP32", [1, 16]]], "outputs": [["y", "FP32", [1, 16]]]}
    failed, _ = load_fake(start, tmp_path, {"max_batch_size": 8}, **fixed)
    assert failed.kind == "invalid-manifest"
    loaded, _ = load_fake(start, tmp_path, {"max_batch_size": 1}, **fixed)
    assert loaded.max_batch_size == 1


def test_the_manifest_narrows_dynamic_dimensions(start, tmp_path):
    dynamic = {"inputs": [["x", "FP32", [-1, -1]]], "outputs": [["y", "FP32", [-1, -1]]]}
    loaded, _ = load_fake(start, tmp_path, {"inputs": [{**FP32_X, "shape": [5]}]}, **dynamic)
    assert list(loaded.inputs[0].shape) == [-1, 5]
    assert list(loaded.outputs[0].shape) == [-1, -1]
    assert loaded.max_batch_size == 64


def test_rows_that_depend_on_each_other_are_no_batch(start, tmp_path):
    from onnx import helper

    vector = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in ("x", "y")]
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["x", "m"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", vector[:1], vector[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    loaded = start().load(tmp_path, tmp_path / "model.onnx", "onnxruntime")
    assert loaded.max_batch_size == 0


def test_the_worker_is_what_the_kernel_kills_first(fake):
    worker = fake()
    with open(f"/proc/{worker.process.pid}/oom_score_adj") as file:
        assert int(file.read()) >= 500


def test_more_layouts_than_are_kept_are_answered_right(start, tmp_path):
    worker = load_identity(start, tmp_path, shape=("N", "M"))
    for length in range(1, 1200):
        array = np.full((1, length), length, np.float32)
        np.testing.assert_array_equal(worker.run_array(array).array(0), array)


def test_batches_may_be_sent_ahead_and_are_answered_in_order(fake):
    worker = fake()
    layout = worker.place([(0, "FP32", (1, 16), ROW.tobytes())])
    for number in range(20):
        worker.send_run(layout, 1, batch=number)
    assert [worker.answer().batch for _ in range(20)] == list(range(20))
    assert worker.socket.type & 0xF == socket.SOCK_SEQPACKET
