"""Workers without processes: to an `Instance` they are `WorkerLink`s, and a test makes them answer, fail or die."""

import asyncio
import itertools
import time

from appliance.call import Call
from appliance.config import WorkersSection
from appliance.deadline import Deadlines
from appliance.instance import Instance, Placement
from appliance.manifest import ArtifactEntry, BatchSection, Manifest
from appliance.metrics import ModelStatistics
from appliance.planner import make_plan
from appliance.wire import worker as frames
from appliance.wire import worker_pb2
from appliance.wire.worker import TensorLayout
from appliance.worker_link import Slot


def specs(*entries) -> list[worker_pb2.TensorSpec]:
    """Tensor specs of (name, datatype, shape)."""
    return [worker_pb2.TensorSpec(name=name, datatype=datatype, shape=shape) for name, datatype, shape in entries]


def echo_model(width: int = 4, rows: int = 8) -> worker_pb2.Loaded:
    """What a worker says of a model that gives its one input back."""
    return worker_pb2.Loaded(
        inputs=specs(("x", "FP32", (-1, width))), outputs=specs(("y", "FP32", (-1, width))), max_batch_size=rows
    )


class Run:
    """A batch a worker was asked to run."""

    def __init__(self, packet: bytes) -> None:
        header = frames.RUN_HEADER.unpack_from(packet)
        _, self.slot, self.count, self.rows, self.batch, self.wanted = header
        self.tensors, end = frames.unpack_layout(packet, frames.RUN_HEADER.size, self.count)
        self.steps = list(frames.STEP.iter_unpack(packet[end:]))


class ScriptedWorker:
    """One worker: `runs` are the batches it has and has not answered."""

    _pids = itertools.count(1000)

    def __init__(self, crew: "Crew", listener) -> None:
        self._crew = crew
        self._listener = listener
        self.pid = next(self._pids)
        self.last_heard_ns = time.monotonic_ns()
        self.runs: list[Run] = []
        self.sent: list[bytes] = []
        self.slots: list[Slot] = []
        self.is_lost = False
        self.was_killed = False
        self.was_closed = False

    async def start(self, python, load, timeout_seconds) -> worker_pb2.Loaded:
        return await self._crew.load()

    def make_slot(self, number, input_bytes, output_bytes) -> Slot:
        slot = Slot(number, input_bytes, output_bytes)
        self.slots.append(slot)
        return slot

    def map_region(self, region, slab) -> None:
        self.sent.append(b"map")

    def unmap_region(self, region) -> None:
        self.sent.append(b"unmap")

    def send(self, packet, descriptors=()) -> None:
        self.sent.append(packet)
        if packet[0] == frames.Kind.RUN:
            self.runs.append(Run(packet))

    def kill(self) -> None:
        self.was_killed = True

    async def close(self) -> None:
        self.was_closed = True

    def answer(self, run: Run | None = None, row_errors: dict[int, str] | None = None) -> None:
        """Give the oldest batch, or `run`, its first input back."""
        run = run or self.runs[0]
        self.runs.remove(run)
        tensor = run.tensors[0]
        slot = self.slots[run.slot]
        source = slot.spill if slot.spill is not None else slot.input
        slot.output.memory[: tensor.byte_length] = source.memory[tensor.offset : tensor.offset + tensor.byte_length]
        layout = frames.pack_layout([TensorLayout(0, tensor.datatype, tensor.shape, 0, 0, tensor.byte_length)])
        errors = b"".join(
            frames.ROW_ERROR.pack(row, len(text)) + text.encode() for row, text in (row_errors or {}).items()
        )
        header = frames.DONE_HEADER.pack(
            frames.Kind.DONE, run.slot, 1, len(row_errors or {}), run.batch, 0, 0, 1000, 0, 0
        )
        self.last_heard_ns = time.monotonic_ns()
        self._listener.on_done(memoryview(header + layout + errors), None)

    def fault(self, message: str = "it went wrong", is_out_of_memory: bool = False) -> None:
        """Fail the oldest batch as a whole."""
        run = self.runs.pop(0)
        self.last_heard_ns = time.monotonic_ns()
        self._listener.on_fault(run.slot, run.batch, message, is_out_of_memory)

    def die(self, reason: str = "was ended by SIGKILL") -> None:
        """Be gone."""
        self.is_lost = True
        self._listener.on_lost(reason)


class Crew:
    """Makes an instance's workers. `load` says what loading gives: an async function of no arguments."""

    def __init__(self, loaded: worker_pb2.Loaded | None = None) -> None:
        self.made: list[ScriptedWorker] = []
        self.loaded = loaded or echo_model()

    async def load(self) -> worker_pb2.Loaded:
        return self.loaded

    def __call__(self, loop, listener, label) -> ScriptedWorker:
        worker = ScriptedWorker(self, listener)
        self.made.append(worker)
        return worker

    @property
    def worker(self) -> ScriptedWorker:
        """The one made last."""
        return self.made[-1]


class Ledger:
    """A sink that keeps what it is told: answers as (id, bytes of output 0), errors as (id, error)."""

    def __init__(self) -> None:
        self.answers: dict[int, bytes] = {}
        self.errors: dict[int, Exception] = {}
        self.flushes = 0
        self.on_flush = None

    def deliver(self, call, table, memory, row, timings) -> None:
        assert call.id not in self.answers, "answered twice"
        self.answers[call.id] = bytes(table.view(0, memory, row, call.plan.rows)[1])

    def fail(self, call, error) -> None:
        assert call.id not in self.errors, "failed twice"
        self.errors[call.id] = error

    def flush(self) -> None:
        self.flushes += 1
        if self.on_flush is not None:
            self.on_flush()


def make_instance(
    crew: Crew, on_change=lambda: None, batch: dict | None = None, sequence: dict | None = None, **settings
) -> Instance:
    """An instance whose workers come from `crew`, and whose batches are as large as can be; call within a loop."""
    loop = asyncio.get_running_loop()
    manifest = Manifest(
        name="model",
        artifacts=[ArtifactEntry(path="1/model.onnx", format="onnx")],
        batch=BatchSection(**{"preferred_batch_sizes": [65536], **(batch or {})}),
        sequence=sequence,
    )
    placement = Placement("fake", "", worker_pb2.Load(model="model", version="1"))
    deadlines = Deadlines(loop, lambda call: call.plan.instance.expire(call))
    workers = WorkersSection(**{"backoff_seconds": 0.001, **settings})
    return Instance(loop, manifest, placement, workers, ModelStatistics(), deadlines, on_change, crew)


def make_call(instance: Instance, ledger: Ledger, number: int, rows: int = 1, fill: int | None = None, width: int = 4):
    """A call whose bytes are all `fill`, by default its number."""
    plan = make_plan(instance, instance.signature, [("x", "FP32", (rows, width))], [])
    content = bytes([(number if fill is None else fill) % 256]) * (4 * width * rows)
    return Call(plan, [content], ledger, number)


async def turns(count: int = 5) -> None:
    """Let the loop run what is due."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition, seconds: float = 30) -> None:
    """Let the loop run until `condition` holds; fails the test when that takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition never held"
        await asyncio.sleep(0.001)
