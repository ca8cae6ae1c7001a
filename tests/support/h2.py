"""HTTP/2 spoken frame by frame to the gRPC server, in the same process and without a socket."""

import asyncio
import socket
from types import SimpleNamespace

from hpack import Decoder, Encoder

from appliance.config import Config
from appliance.server.grpc import GrpcServer
from appliance.server.h2 import frames
from appliance.server.h2.connection import Connection
from support.echo_engine import EchoEngine

OIP = "/inference.GRPCInferenceService/"


class Transport:
    """Keeps what is written; a test says how much of it the client has taken."""

    def __init__(self):
        self.written = bytearray()
        self.unread = 0
        self.is_closed = False
        self.is_aborted = False
        self.is_reading = True

    def get_extra_info(self, name):
        return SimpleNamespace(family=socket.AF_INET, getpeername=lambda: ("127.0.0.1", 40000 + id(self) % 20000))

    def set_write_buffer_limits(self, high):
        self.high = high

    def write(self, content):
        assert not self.is_closed
        self.written += content

    def writelines(self, parts):
        self.write(b"".join(parts))

    def get_write_buffer_size(self):
        return self.unread

    def pause_reading(self):
        self.is_reading = False

    def resume_reading(self):
        self.is_reading = True

    def is_closing(self):
        return self.is_closed

    def close(self):
        self.is_closed = True

    def abort(self):
        self.is_closed = self.is_aborted = True


class Frame(SimpleNamespace):
    """kind, flags, stream, payload."""


class Client:
    """One connection to a server of its own, or to `server`."""

    def __init__(self, server=None, greet=True, settings=b"", **sections):
        self.server = server or GrpcServer(EchoEngine(), Config.model_validate(sections))
        self.engine = self.server.engine
        self.encoder = Encoder()
        self.decoder = Decoder()
        self.transport = Transport()
        self.connection = Connection(self.server)
        self.connection.connection_made(self.transport)
        if greet:
            self.send(frames.PREFACE, frames.frame(frames.SETTINGS, 0, 0, settings))
            self.greeting = self.read()

    def send(self, *parts):
        self.connection.data_received(b"".join(parts))

    def read(self):
        """The frames written since the last time."""
        content, self.transport.written = bytes(self.transport.written), bytearray()
        found = []
        position = 0
        while position < len(content):
            high, low, kind, flags, number = frames.HEADER.unpack_from(content, position)
            length = high << 8 | low
            position += 9
            found.append(Frame(kind=kind, flags=flags, stream=number, payload=content[position : position + length]))
            position += length
        assert position == len(content)
        return found

    def block(self, method="ModelInfer", **changes):
        fields = {
            ":method": "POST", ":scheme": "http", ":path": method if method.startswith("/") else OIP + method,
            ":authority": "localhost", "te": "trailers", "content-type": "application/grpc",
        }  # fmt: skip
        fields |= {name.replace("_", "-"): value for name, value in changes.items()}
        return self.encoder.encode([(name, value) for name, value in fields.items() if value is not None])

    def headers(self, stream, flags=frames.END_HEADERS, method="ModelInfer", **changes):
        return frames.frame(frames.HEADERS, flags, stream, self.block(method, **changes))

    def call(self, stream, body, method="ModelInfer", **changes):
        """A whole unary call."""
        return self.headers(stream, method=method, **changes) + data(stream, message(body), frames.END_STREAM)

    def fields(self, frame):
        assert frame.kind == frames.HEADERS, frame
        return dict(self.decoder.decode(frame.payload))

    def close(self):
        self.connection.connection_lost(None)


def data(stream, content, flags=0):
    return frames.frame(frames.DATA, flags, stream, content)


def message(body, is_compressed=False):
    return bytes((is_compressed,)) + len(body).to_bytes(4, "big") + body


async def turn():
    """Let tasks that can run do so."""
    for _ in range(10):
        await asyncio.sleep(0)


def goaway(frame):
    """Last stream, code, debug data."""
    assert frame.kind == frames.GOAWAY, frame
    return (
        int.from_bytes(frame.payload[:4], "big"),
        frames.Code(int.from_bytes(frame.payload[4:8], "big")),
        frame.payload[8:].decode(),
    )
