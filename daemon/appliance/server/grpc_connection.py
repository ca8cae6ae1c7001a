"""One gRPC client: streams in, calls to the engine, answers out.

ModelInfer takes a way without tasks and futures: its answers come back through the `Sink` methods, and those of one
batch leave in one write. Everything else is a task that works on a `GrpcCall`.
"""

import asyncio
from typing import TYPE_CHECKING, Any, Final, Protocol

from appliance.call import Call, OutputTable
from appliance.errors import ApplianceError, ShuttingDown
from appliance.server.access import authorise, may
from appliance.server.budget import BodyBudget
from appliance.server.grpc_answer import RAW_OUTPUT_TAG, TimingParameters, frame_answer
from appliance.server.grpc_call import GrpcCall
from appliance.server.grpc_errors import log_unexpected
from appliance.server.grpc_heads import InferHeads
from appliance.server.grpc_health import HealthService
from appliance.server.grpc_message import PREFIX, CallRefused
from appliance.server.grpc_request import ANSWER_BLOCK, OK_BLOCK, GrpcRequest, error_block, read_request
from appliance.server.grpc_stream import InferStream
from appliance.server.h2.connection import Connection
from appliance.server.h2.fields import Fields
from appliance.server.h2.inflow import Inflow
from appliance.server.h2.stream import Stream
from appliance.server.native_head import MAX_ANSWER_HEADS, encode_answer_head
from appliance.server.oip import dispatch_unary
from appliance.server.oip_wire import varint
from appliance.server.status import GRPC_STATUS, GrpcStatus
from appliance.types import NO_OPTIONS, Buffer, Peer, Timings

if TYPE_CHECKING:
    from appliance.engine import Engine

#: Windows lent to unfinished messages of one connection, in messages of the largest size.
_LENT_MESSAGES: Final = 2


class Service(Protocol):
    """What the connections of a server have in common."""

    engine: "Engine"
    budget: BodyBudget
    health: HealthService
    heads: InferHeads
    max_message_bytes: int
    max_request_bytes: int


class GrpcConnection:
    """What answers the streams of one connection.

    Attributes:
        peer: Who it is.
    """

    def __init__(self, service: Service, connection: Connection, peer: Peer, address: str = "") -> None:
        self.peer = peer
        self._service = service
        self._engine = service.engine
        self._client = service.engine.clients.enter(peer, address)
        self._heads = service.heads
        self._max_bytes = service.max_message_bytes
        self._connection = connection
        self._inflow = Inflow(_LENT_MESSAGES * self._max_bytes, connection.give_window)
        self._loop = asyncio.get_running_loop()
        self._may_infer = may(peer.role, "ModelInfer")
        self._calls: dict[int, Call] = {}
        self._timings = TimingParameters()

    # ---------------------------------------------------------------- requests

    def interpret(self, fields: Fields) -> GrpcRequest | None:
        """What a request's fields ask for."""
        return read_request(fields)

    def opened(self, stream: Stream) -> None:
        """A request began."""
        request: GrpcRequest = stream.request
        if request.refusal:
            self._connection.outflow.send_headers(stream, request.refusal, ends=True)
        elif request.method == "ModelStreamInfer":
            stream.work = call = self._new_call(stream)
            self._start(call)
        elif stream.is_received:
            self.received(stream, b"")

    def received(self, stream: Stream, content: Buffer) -> None:
        """Content came."""
        work = stream.work
        if work is None:
            request: GrpcRequest = stream.request
            if request.is_infer and stream.is_received and len(content) >= PREFIX.size:
                flag, length = PREFIX.unpack_from(content)
                if not flag and length == len(content) - PREFIX.size <= self._max_bytes:
                    self._infer(stream, content[PREFIX.size :], request.timeout_us)
                    return
            work = stream.work = self._new_call(stream)
        elif type(work) is not GrpcCall:
            return
        try:
            work.feed(content)
            if stream.is_received and work.task is None:
                self._received_all(stream, work)
        except CallRefused as refusal:
            self._cancel(work)
            work.finish(refusal.status, str(refusal))
        except ApplianceError as error:
            self._cancel(work)
            work.finish(GRPC_STATUS[error.kind], str(error), error.kind)

    def _new_call(self, stream: Stream) -> GrpcCall:
        return GrpcCall(self._connection, self._inflow, self._service.budget, stream, self._max_bytes)

    def _received_all(self, stream: Stream, call: GrpcCall) -> None:
        taken = call.take_only()
        if stream.request.is_infer and not taken[0]:
            self._infer(stream, taken[1], call.remaining_us())
        else:
            self._start(call, taken)

    def _infer(self, stream: Stream, body: Buffer, timeout_us: int) -> None:
        number = stream.id
        try:
            if not self._may_infer:
                authorise(self.peer, "ModelInfer")
            head, call, stream.work = self._heads.read(body, self.peer, self._client, self, number)
            if head.options is not NO_OPTIONS:
                call.ask(head.options, timeout_us)
            elif timeout_us or head.plan.instance.default_timeout_us:
                call.limit(timeout_us, head.plan.instance.default_timeout_us)
            self._calls[number] = call
            self._engine.submit(head.model, call)
        except ApplianceError as error:
            self._calls.pop(number, None)
            self._refuse(stream, error)
        except Exception:
            self._calls.pop(number, None)
            self._refuse(stream, ApplianceError(log_unexpected("ModelInfer")))

    # ---------------------------------------------------------------- calls that are tasks

    def _start(self, call: GrpcCall, taken: tuple[bool, Buffer] | None = None) -> None:
        call.task = self._loop.create_task(self._run(call, taken))

    async def _run(self, call: GrpcCall, taken: tuple[bool, Buffer] | None) -> None:
        request: GrpcRequest = call.stream.request
        limit_us = call.remaining_us()
        try:
            async with asyncio.timeout(limit_us / 1e6 if limit_us else None):
                if taken is None:
                    authorise(self.peer, request.method)
                    max_bytes = self._service.max_request_bytes
                    await InferStream(self._engine, self.peer, self._client, call, max_bytes).run()
                else:
                    await self._answer(request, call, await call.inflate(taken))
        except CallRefused as refusal:
            call.finish(refusal.status, str(refusal))
        except ApplianceError as error:
            call.finish(GRPC_STATUS[error.kind], str(error), error.kind)
        except TimeoutError:
            call.finish(GrpcStatus.DEADLINE_EXCEEDED, "cannot answer the call in time: its deadline has passed")
        except Exception:
            call.finish(GrpcStatus.INTERNAL, log_unexpected(request.method), ApplianceError.kind)
        else:
            if call.stream.work is call:
                call.finish()

    async def _answer(self, request: GrpcRequest, call: GrpcCall, body: Buffer) -> None:
        if request.is_infer:
            if call.stream.is_open:
                self._infer(call.stream, body, call.remaining_us())
                self._connection.flush()
        elif request.method == "Check":
            call.send(self._service.health.check(bytes(body)))
        elif request.method == "Watch":
            await self._service.health.watch(bytes(body), call)
        else:
            call.send(await dispatch_unary(self._engine, self.peer, request.method, bytes(body)))

    def _cancel(self, work: Any) -> None:
        if type(work) is GrpcCall:
            work.let_go()
            if work.task is not None:
                work.task.cancel()

    # ---------------------------------------------------------------- answers

    def deliver(self, call: Call, table: OutputTable, memory: memoryview, row: int, timings: Timings) -> None:
        """Frame an answer; it goes out at the next `flush`."""
        number = call.id
        if self._calls.pop(number, None) is None:
            return
        stream = self._connection.streams[number]
        plan = call.plan
        head = plan.heads.get(table.signature)
        if head is None:
            if len(plan.heads) >= MAX_ANSWER_HEADS:
                plan.heads.clear()
            head = plan.heads[table.signature] = encode_answer_head(plan, table)
        message: list[Buffer] = [head, stream.work, self._timings.encode(timings, call.tokenise_ns, call.queue_ns)]
        for index in plan.outputs:
            content = table.view(index, memory, row, plan.rows)[1]
            message += (RAW_OUTPUT_TAG, varint(len(content)), content)
        length = sum(map(len, message))
        outflow = self._connection.outflow
        if length + PREFIX.size <= outflow.room(stream):
            outflow.send_framed(stream, frame_answer(number, message, length), length + PREFIX.size)
        elif length > 0xFFFFFFFF:
            self._refuse(stream, ApplianceError("cannot send the answer: it is larger than a message can be"))
        else:
            outflow.send_headers(stream, ANSWER_BLOCK)
            outflow.send_content(stream, b"".join((PREFIX.pack(0, length), *message)))
            outflow.send_trailers(stream, OK_BLOCK)

    def fail(self, call: Call, error: ApplianceError) -> None:
        """Frame an error; it goes out at the next `flush`."""
        if self._calls.pop(call.id, None) is not None:
            self._refuse(self._connection.streams[call.id], error)

    def flush(self) -> None:
        """Write what is framed."""
        self._connection.flush()

    def _refuse(self, stream: Stream, error: ApplianceError) -> None:
        block = error_block(GRPC_STATUS[error.kind], str(error), error.kind)
        self._connection.outflow.send_headers(stream, block, ends=True)

    # ---------------------------------------------------------------- ending

    def withdrawn(self, stream: Stream) -> None:
        """The client gave a stream up."""
        call = self._calls.pop(stream.id, None)
        if call is not None:
            call.plan.instance.cancel(call)
        self._cancel(stream.work)

    def lost(self) -> None:
        """The connection is gone."""
        for stream in tuple(self._connection.streams.values()):
            self.withdrawn(stream)
        self._engine.clients.leave(self._client)

    def give_up(self) -> None:
        """The daemon stops now: what is still running ends as unavailable."""
        error = ShuttingDown("cannot answer the call: the daemon is stopping")
        for stream in tuple(self._connection.streams.values()):
            work = stream.work
            self.withdrawn(stream)
            if type(work) is GrpcCall:
                work.finish(GRPC_STATUS[error.kind], str(error), error.kind)
            elif stream.is_open and stream.trailers is None:
                self._refuse(stream, error)
        self._connection.flush()
