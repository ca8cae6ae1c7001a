"""A real worker process at the other end of a socketpair, and models for it."""

import asyncio
import base64
import contextlib
import json
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from onnx import TensorProto, helper

from appliance.child import Child
from appliance.manifest import Manifest, read_manifest
from appliance.wire import worker as wire
from appliance.wire import worker_pb2

MODELS = Path(__file__).parents[3] / "models"
FAKES = Path(__file__).parents[2] / "plugins_fake"
#: Seconds after which a worker that says nothing is a failure.
PATIENCE = 30.0

NUMPY = {
    "BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
    "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64,
    "FP16": np.float16, "BF16": np.uint16, "FP32": np.float32, "FP64": np.float64,
}  # fmt: skip


def environment():
    paths = [str(FAKES), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def memfd(content=b"", size=None):
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, len(content) if size is None else size)
    os.pwrite(fd, content, 0)
    return fd


def identity_model(datatype=TensorProto.FLOAT, shape=("N", 16), names=(("x", "y"),)):
    """ONNX bytes of a model that gives back what it gets."""
    nodes = [helper.make_node("Identity", [source], [target]) for source, target in names]
    graph = helper.make_graph(
        nodes,
        "identity",
        [helper.make_tensor_value_info(source, datatype, list(shape)) for source, _ in names],
        [helper.make_tensor_value_info(target, datatype, list(shape)) for _, target in names],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


def elements(*values):
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


class Done:
    """A DONE packet, its outputs read out of the slab or the attached memfd."""

    def __init__(self, packet, fds, output):
        (_, self.slot, count, errors, self.batch, *self.durations) = wire.DONE_HEADER.unpack_from(packet)
        self.tensors, start = wire.unpack_layout(packet, wire.DONE_HEADER.size, count)
        self.row_errors = {}
        for _ in range(errors):
            row, length = wire.ROW_ERROR.unpack_from(packet, start)
            start += wire.ROW_ERROR.size
            self.row_errors[row] = packet[start : start + length].decode()
            start += length
        assert start == len(packet)
        self.is_attached = any(tensor.region == wire.ATTACHED for tensor in self.tensors)
        assert len(fds) == self.is_attached
        source = mmap.mmap(fds[0], 0, mmap.MAP_SHARED, mmap.PROT_READ) if fds else output
        for fd in fds:
            os.close(fd)
        self.contents = {}
        for tensor in self.tensors:
            assert tensor.offset % 64 == 0
            self.contents[tensor.place] = bytes(source[tensor.offset : tensor.offset + tensor.byte_length])

    def array(self, index):
        tensor = next(tensor for tensor in self.tensors if tensor.place == index)
        return np.frombuffer(self.contents[index], NUMPY[tensor.datatype]).reshape(tensor.shape)

    def rows(self, index):
        """Elements of a BYTES output, row by row."""
        tensor = next(tensor for tensor in self.tensors if tensor.place == index)
        content = self.contents[index]
        (end_of_table,) = struct.unpack_from("<Q", content)
        assert end_of_table == 0
        count = tensor.shape[0] if tensor.shape else 1
        table = struct.unpack_from(f"<{count + 1}Q", content)
        body = content[8 * (count + 1) :]
        assert table[-1] == len(body)
        rows = []
        for begin, end in pairwise(table):
            row = []
            while begin < end:
                (length,) = struct.unpack_from("<I", body, begin)
                row.append(body[begin + 4 : begin + 4 + length])
                begin += 4 + length
            rows.append(row)
        return rows


class Fault:
    def __init__(self, packet):
        (_, self.slot, _, _, self.batch) = wire.FAULT_HEADER.unpack_from(packet)
        self.text = packet[wire.FAULT_HEADER.size :].decode()


class Worker:
    """The front-end's side of one worker process."""

    def __init__(self, stderr=None):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(PATIENCE)
        self.socket = ours
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "appliance.worker", "--fd", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stderr=stderr,
        )
        theirs.close()
        self.inputs = self.outputs = None
        self.slabs = {}

    def close(self):
        self.socket.close()
        for area in chain.from_iterable(self.slabs.values()):
            if area is not None:
                area.close()
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        if self.process.stderr:
            self.process.stderr.close()

    def receive(self):
        try:
            packet, fds, _, _ = socket.recv_fds(self.socket, wire.MAX_PACKET_BYTES, 4)
        except ConnectionResetError:  # what end of file looks like when the worker left packets unread
            return b"", []
        return packet, fds

    def send_load(self, directory, artifact, backend, manifest=None, **overrides):
        document = Manifest(
            name="m",
            artifacts=[{"path": "1/model", "format": overrides.get("artifact_format", "onnx")}],
            **(manifest or {}),
        )
        fields = {
            "backend": backend, "model": "m", "version": "1", "directory": str(directory),
            "artifact_path": str(artifact), "artifact_format": "onnx", "artifact_precision": "FP32", "device": "cpu",
            "precision": "FP32", "manifest": document.model_dump_json(by_alias=True),
        }  # fmt: skip
        fields.update(overrides)
        fields["manifest"] = fields.pop("manifest_json", fields["manifest"])
        self.socket.send(bytes([wire.Kind.LOAD]) + worker_pb2.Load(**fields).SerializeToString())

    def load(self, directory, artifact, backend, manifest=None, **overrides):
        """The worker's Loaded or Failed."""
        self.send_load(directory, artifact, backend, manifest, **overrides)
        packet, _ = self.receive()
        if packet[0] == wire.Kind.LOADED:
            return worker_pb2.Loaded.FromString(packet[1:])
        assert packet[0] == wire.Kind.FAILED
        return worker_pb2.Failed.FromString(packet[1:])

    def give_slab(self, slot=0, input_bytes=65536, output_bytes=65536):
        fds = [memfd(size=input_bytes), memfd(size=output_bytes)]
        packet = wire.SLAB.pack(wire.Kind.SLAB, slot, 0, 0, input_bytes, output_bytes)
        socket.send_fds(self.socket, [packet], fds)
        self.inputs = mmap.mmap(fds[0], input_bytes) if input_bytes else None
        self.outputs = mmap.mmap(fds[1], output_bytes) if output_bytes else None
        self.slabs[slot] = self.inputs, self.outputs
        for fd in fds:
            os.close(fd)

    def map_region(self, region, fd, size):
        socket.send_fds(self.socket, [wire.REGION.pack(wire.Kind.MAP, 0, 0, region, size)], [fd])

    def unmap_region(self, region):
        self.socket.send(wire.REGION.pack(wire.Kind.UNMAP, 0, 0, region, 0))

    def send_run(self, tensors, rows, batch=1, wanted=1, slot=0, steps=()):
        """Send RUN; `steps` are (seat, flags, id) of each row, of a model with sequences."""
        header = wire.RUN_HEADER.pack(wire.Kind.RUN, slot, len(tensors), rows, batch, wanted)
        packed = b"".join(wire.STEP.pack(*step) for step in steps)
        self.socket.send(header + wire.pack_layout(tensors) + packed)

    def answer(self):
        packet, fds = self.receive()
        if packet[0] == wire.Kind.DONE:
            _, output = self.slabs.get(packet[1], (None, self.outputs))
            return Done(packet, fds, output)
        assert packet[0] == wire.Kind.FAULT, packet[:1]
        return Fault(packet)

    def place(self, contents, slot=None):
        """Write (index, datatype, shape, bytes) into a slot's input slab, by default the last; returns their layout."""
        inputs = self.inputs if slot is None else self.slabs[slot][0]
        layout, offset = [], 0
        for index, datatype, shape, content in contents:
            inputs[offset : offset + len(content)] = content
            layout.append(wire.TensorLayout(index, datatype, tuple(shape), 0, offset, len(content)))
            offset += -(-len(content) // 64) * 64
        return layout

    def run(self, contents, rows, batch=1, wanted=1):
        self.send_run(self.place(contents), rows, batch, wanted)
        return self.answer()

    def run_array(self, array, datatype="FP32", batch=1, wanted=1):
        return self.run(
            [(0, datatype, array.shape, array.tobytes())], array.shape[0] if array.ndim else 1, batch, wanted
        )

    def wait(self):
        return self.process.wait(PATIENCE)


def write_fake(directory, **behaviour):
    path = Path(directory) / "model.json"
    path.write_text(json.dumps(behaviour))
    return path


def read_as_workers_do(manifest):
    """A manifest without pydantic."""
    return json.loads(manifest.model_dump_json(by_alias=True), object_hook=lambda fields: SimpleNamespace(**fields))


def load_of(directory, backend, manifest=None, **overrides):
    """The field "load" of a task's question; without `manifest` for the model in `directory`."""
    manifest = manifest or read_manifest(Path(directory))
    artifact = manifest.artifacts[0]
    fields = {
        "backend": backend, "model": manifest.name, "version": "1", "directory": str(directory),
        "artifact_path": str(Path(directory) / artifact.path), "artifact_format": artifact.format,
        "artifact_precision": artifact.precision, "device": "cpu", "precision": "FP32",
        "manifest": manifest.model_dump_json(by_alias=True),
    }  # fmt: skip
    return base64.b64encode(worker_pb2.Load(**{**fields, **overrides}).SerializeToString()).decode()


def fake_load(directory, manifest=None, precision="FP32", **behaviour):
    """The same for a model of the fake backend."""
    (Path(directory) / "1").mkdir(exist_ok=True)
    write_fake(Path(directory) / "1", **behaviour)
    document = Manifest(name="m", artifacts=[{"path": "1/model.json", "format": "fake"}], **(manifest or {}))
    return load_of(directory, "fake", document, precision=precision)


async def _converse(question, seconds, meanwhile):
    child = await Child.start([sys.executable, "-P", "-m", "appliance.worker.task"], question)
    answers = []
    other = asyncio.ensure_future(meanwhile(child)) if meanwhile else None
    try:
        async for answer in child.answers(seconds):
            answers.append(answer)
    finally:
        await child.end()
        if other:
            other.cancel()
            await asyncio.wait({other})
    if other and not other.cancelled():
        other.result()
    return answers


async def until(condition):
    """Wait for what another process is about to do."""
    for _ in range(int(PATIENCE / 0.003)):
        if condition():
            return
        await asyncio.sleep(0.003)
    raise AssertionError("it did not happen")


def run_task(question, seconds=PATIENCE, meanwhile=None):
    """Everything a task says; `meanwhile` is a coroutine function that is handed the child."""
    return asyncio.run(_converse(question, seconds, meanwhile))


def said(answers, kind):
    """What the task said under one key, in order."""
    return [answer[kind] for answer in answers if kind in answer]


def state_of(pid):
    """The state of a process in one letter, as proc(5) has it; X for one that is no more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def continue_when_stopped(pid, seconds=PATIENCE):
    """Wait until a process has stopped, and send it SIGCONT."""
    deadline = time.monotonic() + seconds
    while state_of(pid) != "T":
        assert time.monotonic() < deadline, "it did not stop"
        time.sleep(0.005)
    os.kill(pid, signal.SIGCONT)
