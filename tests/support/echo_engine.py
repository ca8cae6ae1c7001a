"""An engine without workers: it answers with what it got; a model's name says what else happens."""

import asyncio
import time
from types import SimpleNamespace

from appliance.call import FINISHED, QUEUED, OutputTable, Plan, PlannedTensor
from appliance.clients import Clients
from appliance.config import ClientsSection
from appliance.errors import KINDS, DeadlineExceeded, ModelNotFound, ModelNotReady
from appliance.manifest import BatchSection
from appliance.types import ITEM_BYTES, InferResult, Tensor, Timings
from appliance.wire.worker import TensorLayout

SECRET = "the secret of the house"


class EchoInstance:
    """The instance of every plan."""

    def __init__(self, engine, name):
        self.accepts = True
        self.policies = engine.policies
        self.default_timeout_us = self.policies[0].default_timeout_us
        self.takes_sequences = engine.takes_sequences
        self.placement = SimpleNamespace(load=SimpleNamespace(model=name, version="1"))
        self._engine = engine

    def cancel(self, call):
        call.state = FINISHED
        self._engine.ended.put_nowait(call.plan.instance.placement.load.model)


class EchoEngine:
    """Notes what was asked (`requests`: model, time limit and the like), what began and what was withdrawn.

    The model ``hang`` answers after `release`, ``bug`` raises, one named like an error kind raises that error.
    """

    def __init__(self):
        self.clients = Clients(ClientsSection())
        self.policies = BatchSection().policies()
        self.takes_sequences = False
        self.requests = []
        self.plans = 0
        self.ready = {"": True, "echo": True}
        self.started = asyncio.Queue()
        self.ended = asyncio.Queue()
        self.release = asyncio.Event()
        self.listeners = []
        self.loaded = []
        self.output_bytes = 0
        self._tasks = set()

    def _refuse(self, model):
        if model in KINDS:
            raise KINDS[model](f"cannot do it: {model} \n\x1b\N{SNOWMAN}" + "x" * 10_000)
        if model == "bug":
            raise ZeroDivisionError(SECRET)

    def plan(self, name, version, inputs, outputs):
        self.plans += 1
        self._refuse(name)
        tensors = []
        for place, (_, datatype, shape) in enumerate(inputs):
            elements = 1
            for length in shape:
                elements *= length
            size = elements * ITEM_BYTES[datatype] if ITEM_BYTES[datatype] else -1
            tensors.append(PlannedTensor(place, datatype, shape, size, elements))
        plan = Plan(
            EchoInstance(self, name), 1, tuple(tensors), tuple(range(len(tensors))), 0, (),
            sum(max(tensor.byte_length, 0) for tensor in tensors), any(tensor.byte_length < 0 for tensor in tensors),
        )  # fmt: skip
        plan.heads["names"] = [f"out_{name}" for name, _, _ in inputs]
        return plan

    def submit(self, name, call):
        limit = (call.deadline_ns - time.monotonic_ns()) // 1000 if call.deadline_ns else 0
        self.requests.append(
            SimpleNamespace(
                model=name, timeout_us=limit, priority=call.priority, sequence=call.sequence, client=call.client
            )
        )
        self.started.put_nowait(SimpleNamespace(model=name))
        call.state = QUEUED
        task = asyncio.create_task(self._run(name, call, limit))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, name, call, limit):
        try:
            async with asyncio.timeout(limit / 1e6 if limit else None):
                if name == "hang":
                    await self.release.wait()
        except TimeoutError:
            if call.state is QUEUED:
                call.state = FINISHED
                self.ended.put_nowait(name)
                call.sink.fail(call, DeadlineExceeded("cannot run the request: its deadline has passed"))
                call.sink.flush()
            return
        if call.state is not QUEUED:
            return
        memory = bytearray()
        layouts = {}
        for place, (tensor, content) in enumerate(zip(call.plan.tensors, call.contents, strict=True)):
            content = bytes(content)
            if tensor.datatype == "BYTES":  # a table of offsets goes before the elements
                content = (0).to_bytes(8, "little") + len(content).to_bytes(8, "little") + content
            layouts[place] = TensorLayout(place, tensor.datatype, tensor.row_shape, 0, len(memory), len(content))
            memory += content
        table = OutputTable((), layouts, call.plan.heads["names"], False)
        call.state = FINISHED
        view = memoryview(memory)
        call.sink.deliver(call, table, view, 0, Timings(1000, 0, 0, 2_000, 300_000, 5_000_000_000, 7))
        call.sink.flush()
        view.release()  # what a sink keeps of it breaks now
        memory[:] = bytes(len(memory))

    async def infer(self, request):
        self.requests.append(request)
        self.started.put_nowait(request)
        self._refuse(request.model)
        if request.model == "hang":
            try:
                await self.release.wait()
            finally:
                self.ended.put_nowait(request)
        outputs = [Tensor(f"out_{t.name}", t.datatype, t.shape, bytes(t.content)) for t in request.inputs]
        return InferResult(request.model, "1", outputs)

    def is_ready(self):
        return self.ready[""]

    def model_is_ready(self, name, version=""):
        if name not in self.ready:
            raise ModelNotFound("cannot find the model")
        return self.ready[name]

    def describe(self, name, version=""):
        raise ModelNotReady("cannot describe the model: it was never loaded")

    def statuses(self):
        return []

    def statistics(self, name="", version=""):
        return []

    async def load(self, name):
        self.loaded.append(name)

    async def unload(self, name):
        self.loaded.remove(name)

    def watch(self, listener):
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener)

    def tell(self, name, is_ready):
        self.ready[name] = is_ready
        for listener in tuple(self.listeners):
            listener(name, is_ready)
