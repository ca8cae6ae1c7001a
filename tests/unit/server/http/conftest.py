"""An engine of plain values, and an HTTP server on it that answers over a real Unix socket."""

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import uvloop

from appliance.clients import Clients
from appliance.config import ClientsSection, Config
from appliance.errors import ModelNotFound
from appliance.inventory import Device, Inventory
from appliance.manifest import BatchSection, Manifest
from appliance.metrics import ModelStatistics
from appliance.plugins import BackendRecord, PluginStatus
from appliance.server.http import HttpServer
from appliance.types import InferResult, ModelDescription, ModelState, ModelStatus, TensorSpec, Timings


@dataclass
class FakeHardware:
    """A machine with a CPU."""

    inventory: Inventory = field(default_factory=lambda: Inventory((Device("cpu", "cpu", "A CPU", 1024),), 2, 1024))

    async def climbed(self):
        return self.inventory


@dataclass
class FakeEngine:
    """Echoes inputs as outputs; `before_answer` may wait or raise instead."""

    accepting: bool = True
    ready: bool = True
    hardware: FakeHardware = field(default_factory=FakeHardware)
    before_answer: Callable | None = None
    requests: list = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)
    arrived: threading.Event = field(default_factory=threading.Event)
    model_states: dict = field(default_factory=lambda: {"echo": ModelState.READY, "idle": ModelState.UNLOADED})
    counters: ModelStatistics = field(default_factory=ModelStatistics)
    batch: BatchSection = field(default_factory=BatchSection)
    clients: Clients = field(default_factory=lambda: Clients(ClientsSection()))

    def _status(self, name, version=""):
        if name not in self.model_states or version not in ("", "1"):
            raise ModelNotFound(f"cannot find model {name!r}")
        return ModelStatus(name=name, version="1", state=self.model_states[name], backend="onnxruntime", device="cpu")

    def is_ready(self):
        return self.ready

    def model_is_ready(self, name, version=""):
        return self._status(name, version).state is ModelState.READY

    def describe(self, name, version=""):
        status = self._status(name, version)
        specs = (TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("y", "BYTES", (-1,)),)
        manifest = Manifest(name=name, artifacts=[{"path": "1/model.onnx", "format": "onnx"}], batch=self.batch)
        return ModelDescription(name, "1", ("1",), "onnxruntime_onnx", *specs, 8, status, manifest)

    def statuses(self):
        return [self._status(name) for name in sorted(self.model_states)]

    def statistics(self, name="", version=""):
        names = [name] if name else sorted(self.model_states)
        return [(self._status(name, version), self.counters) for name in names]

    async def backends(self):
        return {"echoes": BackendRecord("echoes", PluginStatus.AVAILABLE)}

    async def load(self, name):
        self._status(name)
        self.model_states[name] = ModelState.READY

    async def unload(self, name):
        self._status(name)
        self.model_states[name] = ModelState.UNLOADED

    async def infer(self, request):
        self._status(request.model, request.version)
        self.requests.append(request)
        self.arrived.set()
        try:
            if self.before_answer is not None:
                await self.before_answer()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        outputs = [replace(tensor, content=bytes(tensor.content)) for tensor in request.inputs]
        return InferResult(request.model, "1", outputs, Timings(queue_ns=5000, compute_ns=7000, batch_rows=1))


class UnixConnection(http.client.HTTPConnection):
    """http.client over a Unix socket."""

    def __init__(self, path):
        super().__init__("localhost", timeout=10)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(self.path)


class Served:
    """A server on its own loop and thread, and ways to talk to it."""

    def __init__(self, engine, config, directory):
        self.engine = engine
        self.path = str(directory / "http.sock")
        self.loop = uvloop.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.open_connections = []
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(self.path)
        tcp = socket.socket()
        tcp.bind(("127.0.0.1", 0))
        self.port = tcp.getsockname()[1]

        async def make():
            self.server = HttpServer(engine, config)
            await self.server.start(unix, tcp)

        self.run(make())

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(10)

    def raw(self):
        """A connected Unix socket."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(10)
        sock.connect(self.path)
        self.open_connections.append(sock)
        return sock

    def connect(self, tcp=False):
        """An http.client connection."""
        connection = (
            http.client.HTTPConnection("127.0.0.1", self.port, timeout=10) if tcp else UnixConnection(self.path)
        )
        self.open_connections.append(connection)
        return connection

    def ask(self, method, path, body=None, headers=None, tcp=False):
        """One exchange on a connection of its own: status, headers, raw body and the parsed JSON if it is any."""
        connection = self.connect(tcp)
        if isinstance(body, (dict, list)):
            body = json.dumps(body)
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        raw = response.read()
        is_json = response.headers.get("content-type") == "application/json" and raw
        connection.close()
        return SimpleNamespace(
            status=response.status, headers=response.headers, raw=raw, json=json.loads(raw) if is_json else None
        )

    def stop(self, grace_s=0.0):
        self.run(self.server.stop(grace_s))

    def close(self):
        for connection in self.open_connections:
            connection.close()
        self.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def serve(engine, tmp_path):
    """Start a server with parts of the configuration; closed in the end."""
    started = []

    def start(**sections):
        directory = tmp_path / str(len(started))
        directory.mkdir()
        started.append(Served(engine, Config.model_validate(sections), directory))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture
def server(serve):
    return serve()
