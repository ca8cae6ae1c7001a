"""A peer that speaks the native protocol with the daemon's own codec: every test also holds the two codecs together."""

import fcntl
import mmap
import os
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from appliance.types import ITEM_BYTES
from appliance.wire import native
from appliance.wire import open_inference_pb2 as pb
from appliance.wire.native import Frame

PATIENCE_SECONDS = 20


@dataclass
class PeerRequest:
    """An INFER frame as the peer understood it; `contents` are each input's bytes, wherever they lay."""

    identifier: int
    head: bytes
    message: pb.ModelInferRequest
    contents: list[bytes]
    timeout_us: int
    regions: list[int]


@dataclass
class Session:
    """One connection of the peer."""

    peer: "Peer"
    socket: socket.socket
    regions: dict[int, mmap.mmap] = field(default_factory=dict)
    outstanding: set[int] = field(default_factory=set)
    lock: threading.RLock = field(default_factory=threading.RLock)
    buffer: bytes = b""
    descriptors: list[int] = field(default_factory=list)

    def send(self, kind: Frame, identifier: int = 0, body: bytes = b"", head: int = 0, flags: int = 0) -> None:
        with self.lock:
            if kind in (Frame.RESULT, Frame.ERROR) and not flags & native.FLAG_MORE:
                self.outstanding.discard(identifier)
            self.socket.sendall(native.HEADER.pack(len(body), kind, flags, 0, identifier, head, 0) + body)

    def error(self, identifier: int, kind: str, message: str = "cannot: because", is_retryable: bool = False) -> None:
        self.send(Frame.ERROR, identifier, native.pack_error(kind, message, is_retryable))

    def withdraw(self, identifier: int) -> None:
        """Answer CANCEL as the daemon does: not at all where the final answer is on its way."""
        with self.lock:
            if identifier in self.outstanding:
                self.error(identifier, "cancelled")

    def result(
        self, identifier: int, outputs: list[tuple[str, str, list[int], bytes]], flags: int = 0, timings=range(1, 8)
    ) -> None:
        head = pb.ModelInferResponse(
            model_name="identity",
            model_version="1",
            outputs=[{"name": name, "datatype": datatype, "shape": shape} for name, datatype, shape, _ in outputs],
        ).SerializeToString()
        tail = b"".join(content for *_, content in outputs)
        self.send(Frame.RESULT, identifier, native.TIMINGS.pack(*timings) + head + tail, len(head), flags)

    def echo(self, request: PeerRequest, flags: int = 0) -> None:
        """Answer with the inputs under their own names."""
        self.result(
            request.identifier,
            [
                (tensor.name, tensor.datatype, list(tensor.shape), content)
                for tensor, content in zip(request.message.inputs, request.contents, strict=True)
            ],
            flags,
        )

    def receive(self, count: int) -> bytes:
        """Exactly `count` bytes; raises EOFError where the client closed first."""
        while len(self.buffer) < count:
            content, descriptors, _, _ = socket.recv_fds(self.socket, 1 << 20, 8)
            self.descriptors += descriptors
            if not content:
                raise EOFError
            self.buffer += content
        content, self.buffer = self.buffer[:count], self.buffer[count:]
        return content

    def run(self) -> None:
        while True:
            length, kind, _, descriptors, identifier, head, timeout_us = native.HEADER.unpack(
                self.receive(native.HEADER.size)
            )
            body = self.receive(length)
            self.peer.record(Frame(kind), identifier, body)
            self.take(Frame(kind), identifier, body, head, timeout_us, descriptors)

    def take(self, kind: Frame, identifier: int, body: bytes, head: int, timeout_us: int, descriptors: int) -> None:
        peer = self.peer
        if kind is Frame.HELLO:
            assert native.HELLO.unpack(body) == (native.MAGIC, native.VERSION, 0)
            limits = (peer.max_frame_bytes, peer.max_requests_in_flight, peer.max_regions, 1, peer.max_region_bytes)
            self.send(Frame.WELCOME, 0, native.WELCOME.pack(native.MAGIC, native.VERSION, 0, *limits) + b"9.9")
        elif kind is Frame.INFER:
            self.outstanding.add(identifier)
            request = self.request(identifier, body, head, timeout_us)
            peer.models.get(request.message.model_name, Session.echo)(self, request)
        elif kind is Frame.REGION:
            assert descriptors == 1
            self.register(identifier, *native.REGION_SIZE.unpack(body))
        elif kind is Frame.RELEASE:
            self.regions.pop(identifier).close()
            self.send(Frame.RELEASED, identifier)
        elif kind is Frame.CALL:
            method, message = body[1 : 1 + body[0]].decode(), body[1 + body[0] :]
            peer.methods[method](self, identifier, message)
        elif kind is Frame.CANCEL:
            peer.on_cancel(self, identifier)

    def register(self, identifier: int, byte_size: int) -> None:
        descriptor = self.descriptors.pop(0)
        try:
            if self.peer.region_error is not None:
                self.error(identifier, *self.peer.region_error)
                return
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
            assert seals & fcntl.F_SEAL_SHRINK
            assert seals & fcntl.F_SEAL_GROW
            assert os.fstat(descriptor).st_size >= byte_size
            assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
            self.regions[identifier] = mmap.mmap(descriptor, byte_size)
        finally:
            os.close(descriptor)
        self.send(Frame.REGION_READY, identifier)

    def request(self, identifier: int, body: bytes, head: int, timeout_us: int) -> PeerRequest:
        message = pb.ModelInferRequest.FromString(body[:head])
        tail, contents, regions = body[head:], [], []
        for tensor in message.inputs:
            if "shared_memory_region" in tensor.parameters:
                region = tensor.parameters["shared_memory_region"].int64_param
                offset = tensor.parameters["shared_memory_offset"].int64_param
                size = tensor.parameters["shared_memory_byte_size"].int64_param
                contents.append(self.regions[region][offset : offset + size])
                regions.append(region)
                continue
            size = self.size(tensor, tail)
            contents.append(tail[:size])
            tail = tail[size:]
        assert not tail
        return PeerRequest(identifier, body[:head], message, contents, timeout_us, regions)

    @staticmethod
    def size(tensor, tail: bytes) -> int:
        count = 1
        for dimension in tensor.shape:
            count *= dimension
        if tensor.datatype != "BYTES":
            return count * ITEM_BYTES[tensor.datatype]
        offset = 0
        for _ in range(count):
            offset += 4 + struct.unpack_from("<I", tail, offset)[0]
        return offset


class Peer:
    """A server for tests: echoes inputs as outputs, or does what a test's function says for a model or method."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.max_frame_bytes = 1 << 26
        self.max_requests_in_flight = 64
        self.max_regions = 4
        self.max_region_bytes = 1 << 28
        self.region_error: tuple[str, str, bool] | None = None
        self.models: dict[str, Callable[[Session, PeerRequest], None]] = {}
        self.methods: dict[str, Callable[[Session, int, bytes], None]] = {}
        self.on_cancel: Callable[[Session, int], None] = Session.withdraw
        self.script: Callable[[socket.socket], None] | None = None
        self.frames: list[tuple[Frame, int, bytes]] = []
        self.sessions: list[Session] = []
        self.problems: list[BaseException] = []
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._start(self._accept)

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            session = Session(self, connection)
            with self._changed:
                self.sessions.append(session)
                self._changed.notify_all()
            self._start(self._serve, session)

    def _serve(self, session: Session) -> None:
        try:
            if self.script is not None:
                self.script(session.socket)
            else:
                session.run()
        except (EOFError, OSError):
            pass
        except BaseException as problem:
            self.problems.append(problem)
        finally:
            session.socket.close()
            for region in session.regions.values():
                region.close()
            for descriptor in session.descriptors:
                os.close(descriptor)

    def record(self, kind: Frame, identifier: int, body: bytes) -> None:
        with self._changed:
            self.frames.append((kind, identifier, body))
            self._changed.notify_all()

    def received(self, kind: Frame) -> list[tuple[int, bytes]]:
        """Id and body of every frame of a type so far."""
        with self._changed:
            return [(identifier, body) for each, identifier, body in self.frames if each is kind]

    def wait_for(self, kind: Frame, count: int = 1) -> list[tuple[int, bytes]]:
        """Wait until `count` frames of a type came."""
        with self._changed:
            assert self._changed.wait_for(
                lambda: sum(each is kind for each, *_ in self.frames) >= count, PATIENCE_SECONDS
            ), f"no {count} frames of {kind!r}: {self.frames}"
        return self.received(kind)

    def hang_up(self) -> None:
        """Close every connection and wait until each is closed."""
        for session in self.sessions:
            try:
                session.socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        for thread in self._threads[1:]:
            thread.join(PATIENCE_SECONDS)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.hang_up()
        self._threads[0].join(PATIENCE_SECONDS)
        assert not self.problems, self.problems


@pytest.fixture
def peer(tmp_path: Path):
    """A peer listening on a socket of its own."""
    running = Peer(tmp_path / "infer.sock")
    yield running
    running.close()


@pytest.fixture
def open_descriptors():
    """Counts this process's open file descriptors."""
    return lambda: len(os.listdir("/proc/self/fd"))
