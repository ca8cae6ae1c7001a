"""A client of the native protocol that says whatever a test wants, right or wrong, byte by byte."""

import array
import contextlib
import fcntl
import mmap
import os
import socket
from typing import NamedTuple

from appliance.wire import native
from appliance.wire.native import Frame
from appliance.wire.open_inference_pb2 import ModelInferRequest, ModelInferResponse
from support.daemon import PATIENCE_SECONDS

HELLO = native.HEADER.pack(8, Frame.HELLO, 0, 0, 0, 0, 0) + native.HELLO.pack(native.MAGIC, native.VERSION, 0)
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class Answer(NamedTuple):
    """One frame from the daemon."""

    kind: int
    id: int
    head: int
    body: bytes

    @property
    def error(self) -> tuple[str, str]:
        """Kind and message of an ERROR frame."""
        assert self.kind == Frame.ERROR, self
        kind, message, _ = native.unpack_error(self.body)
        return kind, message

    @property
    def response(self) -> ModelInferResponse:
        assert self.kind == Frame.RESULT, self
        start = native.TIMINGS.size
        return ModelInferResponse.FromString(self.body[start : start + self.head])

    @property
    def tail(self) -> bytes:
        assert self.kind == Frame.RESULT, self
        return self.body[native.TIMINGS.size + self.head :]


def frame(kind: int, number: int = 0, body: bytes = b"", head: int = 0, timeout_us: int = 0, **fields: int) -> bytes:
    """A frame; `length`, `flags` and `descriptors` may be lies."""
    length = fields.get("length", len(body))
    header = native.HEADER.pack(
        length, kind, fields.get("flags", 0), fields.get("descriptors", 0), number, head, timeout_us
    )
    return header + body


def infer_frame(number: int, message: ModelInferRequest, tail: bytes = b"", timeout_us: int = 0) -> bytes:
    head = message.SerializeToString()
    return frame(Frame.INFER, number, head + tail, len(head), timeout_us)


def request(model: str, *inputs: tuple, outputs: tuple = (), version: str = "") -> ModelInferRequest:
    """A head; each input is (name, datatype, shape) and, for one in a region, (region, offset, size)."""
    message = ModelInferRequest(model_name=model, model_version=version)
    for name, datatype, shape, *place in inputs:
        tensor = message.inputs.add(name=name, datatype=datatype, shape=shape)
        if place:
            for key, value in zip(("region", "offset", "byte_size"), place[0], strict=True):
                tensor.parameters[f"shared_memory_{key}"].int64_param = value
    for name in outputs:
        message.outputs.add(name=name)
    return message


class Native:
    """A connection. Sends bytes as they are given, and reads frames."""

    def __init__(self, path: str, hello: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE_SECONDS)
        self.socket.connect(path)
        if hello:
            try:
                self.socket.sendall(HELLO)
                assert self.read().kind == Frame.WELCOME
            except BaseException:
                self.socket.close()
                raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        self.socket.close()

    def send(self, content: bytes) -> None:
        self.socket.sendall(content)

    def send_descriptors(self, content: bytes, descriptors: list[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        sent = self.socket.sendmsg([content], rights)
        if sent < len(content):
            self.socket.sendall(content[sent:])

    def _exactly(self, size: int) -> bytes:
        content = bytearray()
        while len(content) < size:
            part = self.socket.recv(size - len(content))
            if not part:
                raise EOFError
            content += part
        return bytes(content)

    def read(self) -> Answer:
        """The next frame; raises EOFError where the daemon has closed."""
        length, kind, _, _, number, head, _ = native.HEADER.unpack(self._exactly(native.HEADER.size))
        return Answer(kind, number, head, self._exactly(length))

    def read_to_end(self) -> list[Answer]:
        """Every frame until the daemon closes."""
        answers = []
        with contextlib.suppress(EOFError, ConnectionResetError):
            while True:
                answers.append(self.read())
        return answers

    def infer(self, number: int, message: ModelInferRequest, tail: bytes = b"", timeout_us: int = 0) -> Answer:
        """Send a request and wait for its answer; no other may be due."""
        self.send(infer_frame(number, message, tail, timeout_us))
        answer = self.read()
        assert answer.id == number
        return answer

    def call(self, number: int, method: str, body: bytes = b"") -> Answer:
        self.send(frame(Frame.CALL, number, bytes((len(method),)) + method.encode() + body))
        answer = self.read()
        assert answer.id == number
        return answer

    def register(self, number: int, descriptor: int, size: int) -> Answer:
        """Offer a region and wait for the verdict."""
        body = native.REGION_SIZE.pack(size)
        self.send_descriptors(frame(Frame.REGION, number, body, descriptors=1), [descriptor])
        answer = self.read()
        assert answer.id == number
        return answer


class Memory:
    """A memfd, mapped; sealed against shrinking and growing unless a test wants otherwise."""

    def __init__(self, size: int, seals: int = SEALS) -> None:
        self.fd = os.memfd_create("test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        if seals:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)
        self.size = size
        self.map = mmap.mmap(self.fd, size) if size and not seals & fcntl.F_SEAL_WRITE else None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.map is not None:
            self.map.close()
        os.close(self.fd)
