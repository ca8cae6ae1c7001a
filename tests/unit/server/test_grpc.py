"""The gRPC server over a fake engine, spoken to through a plain gRPC channel."""

import asyncio
import contextlib
import logging
import os
import socket
import stat
import struct
from pathlib import Path

import grpc
import pytest
from appliance.config import Config
from appliance.errors import KINDS, ModelNotFound, ModelNotReady
from appliance.server.access import METHOD_ROLE
from appliance.server.grpc import GrpcServer
from appliance.server.grpc_stream import MAX_STREAM_REQUESTS, InferStream
from appliance.server.oip import CALLS
from appliance.server.status import GRPC_STATUS
from appliance.types import InferResult, Peer, Role, Tensor
from appliance.wire import open_inference_pb2 as pb

OIP = "/inference.GRPCInferenceService/"
HEALTH = "/grpc.health.v1.Health/"
DEADLINE_S = 20
#: Refused by every channel of its own, so that each test's connection is new.
OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1))


class FakeEngine:
    """Echoes; a model's name says what else happens."""

    def __init__(self):
        self.requests = []
        self.ready = {"": True, "echo": True}
        self.started = asyncio.Queue()
        self.ended = asyncio.Queue()
        self.release = asyncio.Event()
        self.listeners = []
        self.loaded = []

    async def infer(self, request):
        self.requests.append(request)
        self.started.put_nowait(request)
        if request.model in KINDS:
            raise KINDS[request.model](f"cannot do it: {request.model} \n\x1b\N{SNOWMAN}" + "x" * 10_000)
        if request.model == "bug":
            raise ZeroDivisionError("the secret of the house")
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


class Service:
    """A running server and a channel to its TCP port."""

    def __init__(self, engine, server, unix_path):
        self.engine = engine
        self.server = server
        self.unix_path = unix_path
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.tcp_port}", options=OPTIONS)

    def infer(self, message, channel=None, **options):
        body = message if isinstance(message, bytes) else message.SerializeToString()
        return (channel or self.channel).unary_unary(OIP + "ModelInfer")(body, **options)

    def unix_channel(self):
        return grpc.aio.insecure_channel(f"unix:{self.unix_path}", options=OPTIONS)


@contextlib.asynccontextmanager
async def serving(tmp_path, engine=None, **sections):
    engine = engine or FakeEngine()
    server = GrpcServer(engine, Config.model_validate(sections))
    path = str(tmp_path / "grpc.sock")
    await server.start(path, "127.0.0.1:0")
    service = Service(engine, server, path)
    try:
        yield service
    finally:
        engine.release.set()
        await service.channel.close()
        await server.stop(0)


def within(coroutine):
    """Run a test's coroutine with a deadline."""

    async def bounded():
        async with asyncio.timeout(DEADLINE_S):
            return await coroutine

    return asyncio.run(bounded())


def request(model="echo", content=b"\0\0\x80\x3f", request_id="", **parameters):
    message = pb.ModelInferRequest(model_name=model, id=request_id, raw_input_contents=[content])
    message.inputs.add(name="x", datatype="UINT8", shape=(len(content),))
    for name, value in parameters.items():
        message.parameters[name].int64_param = value
    return message


async def refused(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    kinds = dict(caught.value.trailing_metadata() or ())
    return caught.value.code(), kinds.get("appliance-kind"), caught.value.details()


# ------------------------------------------------------------------ inference


@pytest.mark.parametrize("size", [4, 200_000])
def test_an_inference_comes_back_with_its_id_and_raw_outputs(tmp_path, size):
    async def run():
        async with serving(tmp_path) as service:
            for channel in (service.channel, service.unix_channel()):
                content = os.urandom(size)
                answer = pb.ModelInferResponse.FromString(
                    await service.infer(request(content=content, request_id="r-1"), channel)
                )
                assert (answer.model_name, answer.model_version, answer.id) == ("echo", "1", "r-1")
                assert list(answer.raw_output_contents) == [content]
                assert answer.outputs[0].name == "out_x"
                await channel.close()

    within(run())


def test_the_peer_is_known_by_the_door(tmp_path):
    async def run():
        async with serving(tmp_path, access={"tcp_role": "admin"}) as service:
            await service.infer(request())
            async with service.unix_channel() as channel:
                await service.infer(request(), channel)
            assert [made.peer for made in service.engine.requests] == [
                Peer("grpc", Role.ADMIN),
                Peer("grpc", Role.INFER),
            ]

    within(run())


def test_the_deadline_reaches_the_engine_and_the_timeout_parameter_shortens_it(tmp_path):
    async def run():
        async with serving(tmp_path) as service:
            await service.infer(request())
            await service.infer(request(), timeout=1000)
            await service.infer(request(timeout=7), timeout=1000)
            await service.infer(request(timeout=7))
            none, deadline, both, parameter = [made.timeout_us for made in service.engine.requests]
            assert (none, both, parameter) == (0, 7, 7)
            assert 0 < deadline < 1_100_000_000  # gRPC rounds a time limit up on its way

    within(run())


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_error_kind_has_its_status_and_names_itself(tmp_path, kind):
    async def run():
        async with serving(tmp_path) as service:
            code, told, details = await refused(service.infer(request(kind)))
            assert (code, told) == (GRPC_STATUS[kind], kind)
            assert details.startswith("cannot do it")
            assert "\N{SNOWMAN}" in details
            # and the connection still serves
            await service.infer(request())

    within(run())


def test_an_unexpected_exception_shows_the_client_its_number_only(tmp_path, caplog):
    async def run():
        async with serving(tmp_path) as service:
            return await refused(service.infer(request("bug")))

    with caplog.at_level(logging.ERROR):
        code, kind, details = within(run())
    assert (code, kind) == (grpc.StatusCode.INTERNAL, "internal")
    assert "secret" not in details
    (record,) = caplog.records
    assert record.args[1] in details
    assert "the secret of the house" in caplog.text


@pytest.mark.parametrize("body", [b"\xff\xff", b"not protobuf at all", b"\x0a\xff"])
def test_garbage_is_an_invalid_request(tmp_path, body):
    async def run():
        async with serving(tmp_path) as service:
            code, kind, _ = await refused(service.infer(body))
            assert (code, kind) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid-request")

    within(run())


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_the_size_limit_holds_after_decompression(tmp_path, compression):
    async def run():
        async with serving(tmp_path, limits={"max_request_bytes": 100_000}) as service:
            await service.infer(request(content=bytes(99_000)), compression=compression)
            code, _, _ = await refused(service.infer(request(content=bytes(10_000_000)), compression=compression))
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert len(service.engine.requests) == 1

    within(run())


# ------------------------------------------------------------------ cancelling


def test_a_client_that_cancels_withdraws_its_request(tmp_path):
    async def run():
        async with serving(tmp_path) as service:
            call = service.infer(request("hang"))
            started = await service.engine.started.get()
            call.cancel()
            assert await service.engine.ended.get() is started

    within(run())


def test_a_client_that_goes_away_withdraws_its_requests(tmp_path):
    async def run():
        async with serving(tmp_path) as service:
            channel = service.unix_channel()
            calls = [service.infer(request("hang"), channel) for _ in range(3)]
            for _ in calls:
                await service.engine.started.get()
            await channel.close()
            for _ in calls:
                await service.engine.ended.get()

    within(run())


def test_a_deadline_that_passes_withdraws_the_request(tmp_path):
    async def run():
        async with serving(tmp_path) as service:
            code, _, _ = await refused(service.infer(request("hang"), timeout=0.2))
            assert code is grpc.StatusCode.DEADLINE_EXCEEDED
            await service.engine.ended.get()

    within(run())


# ------------------------------------------------------------------ doors


def registered(method):
    return METHOD_ROLE[method] is Role.INFER


@pytest.mark.parametrize("method", sorted(CALLS))
@pytest.mark.parametrize("door", ["unix", "tcp-infer", "tcp-admin"])
def test_every_method_through_every_door(tmp_path, method, door):
    """The Unix socket does not know admin methods; TCP with the role infer refuses them; with admin it serves them."""

    async def run():
        engine = FakeEngine()
        engine.loaded.append("")
        async with serving(
            tmp_path, engine, access={"tcp_role": door.removeprefix("tcp-")} if door != "unix" else {}
        ) as s:
            channel = s.unix_channel() if door == "unix" else s.channel
            try:
                await channel.unary_unary(OIP + method)(b"")
                code = grpc.StatusCode.OK
            except grpc.aio.AioRpcError as error:
                code = error.code()
            await channel.close()
            if registered(method) or door == "tcp-admin":
                assert code in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)  # the fake describes no model
            elif door == "unix":
                assert code is grpc.StatusCode.UNIMPLEMENTED
            else:
                assert code is grpc.StatusCode.PERMISSION_DENIED
                assert engine.loaded == [""]

    within(run())


def test_methods_of_triton_that_are_not_offered_are_unimplemented(tmp_path):
    async def run():
        async with serving(tmp_path, access={"tcp_role": "admin"}) as service:
            for method in (
                "TraceSetting",
                "LogSettings",
                "SystemSharedMemoryRegister",
                "CudaSharedMemoryStatus",
                "Nope",
            ):
                code, _, _ = await refused(service.channel.unary_unary(OIP + method)(b""))
                assert code is grpc.StatusCode.UNIMPLEMENTED

    within(run())


def mode_of(path):
    return Path(path).stat().st_mode if Path(path).exists() else None


def test_the_socket_has_its_mode_from_birth_and_goes_with_the_server(tmp_path):
    async def run():
        umask = os.umask(0o022)
        try:
            async with serving(tmp_path) as service:
                mode = mode_of(service.unix_path)
                assert stat.S_ISSOCK(mode)
                assert stat.S_IMODE(mode) == 0o660
                assert os.umask(0o022) == 0o022
            assert mode_of(service.unix_path) is None
        finally:
            os.umask(umask)

    within(run())


def test_a_socket_left_behind_by_a_killed_daemon_is_replaced(tmp_path):
    async def run():
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(tmp_path / "grpc.sock"))
        async with serving(tmp_path) as service, service.unix_channel() as channel:
            await service.infer(request(), channel)

    within(run())


# ------------------------------------------------------------------ abuse


def read_to_end(port, opening, timeout=DEADLINE_S):
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        connection.sendall(opening)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                received += part
        return received


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


@pytest.mark.parametrize(
    "opening", [b"", b"PRI", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", bytes(100)]
)
def test_who_does_not_speak_http2_in_time_is_disconnected(tmp_path, opening):
    async def run():
        async with serving(tmp_path, limits={"header_seconds": 0.3}) as service:
            await asyncio.to_thread(read_to_end, service.server.tcp_port, opening)
            await service.infer(request())

    within(run())


def test_a_ping_flood_is_told_to_go_away(tmp_path):
    async def run():
        async with serving(tmp_path) as service:
            ping = bytes((0, 0, 8, 6, 0, 0, 0, 0, 0)) + bytes(8)
            received = await asyncio.to_thread(read_to_end, service.server.tcp_port, PREFACE + ping * 100)
            assert b"too_many_pings" in received
            await service.infer(request())

    within(run())


def test_connections_beyond_the_limit_are_closed_and_the_others_served(tmp_path):
    def connect(port):
        connection = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)
        connection.sendall(PREFACE)
        return connection, connection.recv(9)

    async def run():
        async with serving(tmp_path, limits={"max_connections": 2}) as service:
            await service.infer(request())
            port = service.server.tcp_port
            second, settings = await asyncio.to_thread(connect, port)
            assert settings
            third, nothing = await asyncio.to_thread(connect, port)
            assert nothing == b""
            await service.infer(request())
            second.close()
            third.close()

    within(run())


def test_calls_beyond_the_limit_are_refused_at_once(tmp_path):
    async def run():
        async with serving(tmp_path, limits={"max_connections": 3}) as service:
            calls = [service.infer(request("hang")) for _ in range(3)]
            for _ in calls:
                await service.engine.started.get()
            code, _, _ = await refused(service.infer(request()))
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            service.engine.release.set()
            await asyncio.gather(*calls)

    within(run())


# ------------------------------------------------------------------ streams


def open_stream(service, **options):
    return service.channel.stream_stream(OIP + "ModelStreamInfer")(**options)


async def read_answer(stream):
    body = await stream.read()
    assert body is not grpc.aio.EOF
    return pb.ModelStreamInferResponse.FromString(body)


def test_stream_answers_keep_the_order_of_the_requests_and_are_marked_final(tmp_path):
    async def run():
        async with serving(tmp_path) as service:
            stream = open_stream(service)
            await stream.write(request("hang", b"1", "first").SerializeToString())
            for index in range(5):
                await stream.write(request("echo", bytes((index,)), str(index)).SerializeToString())
            for _ in range(6):
                await service.engine.started.get()  # all run side by side
            service.engine.release.set()
            await stream.done_writing()
            answers = [await read_answer(stream) for _ in range(6)]
            assert [answer.infer_response.id for answer in answers] == ["first", "0", "1", "2", "3", "4"]
            assert all(answer.infer_response.parameters["triton_final_response"].bool_param for answer in answers)
            assert answers[3].infer_response.raw_output_contents[0] == b"\2"
            assert await stream.read() is grpc.aio.EOF
            assert await stream.code() is grpc.StatusCode.OK

    within(run())


def test_a_failing_request_leaves_the_stream_open(tmp_path, caplog):
    async def run():
        async with serving(tmp_path) as service:
            stream = open_stream(service)
            wanted = [
                (request("overloaded", request_id="a").SerializeToString(), "a", "cannot do it"),
                (b"garbage", "", "cannot read the message"),
                (request(request_id="bad\n").SerializeToString(), "", "does not print"),
                (request(request_id="b", timeout=-1).SerializeToString(), "b", "negative"),
                (request("bug", request_id="c").SerializeToString(), "c", "internal error"),
            ]
            for body, request_id, message in wanted:
                await stream.write(body)
                answer = await read_answer(stream)
                assert message in answer.error_message
                assert "secret" not in answer.error_message
                assert answer.infer_response.id == request_id
            await stream.write(request(request_id="good").SerializeToString())
            answer = await read_answer(stream)
            assert (answer.error_message, answer.infer_response.id) == ("", "good")
            stream.cancel()

    within(run())
    assert "ZeroDivisionError" in caplog.text


def test_an_empty_final_response_is_not_sent_since_the_answer_is_final_itself(tmp_path):
    async def run():
        async with serving(tmp_path) as service:
            stream = open_stream(service)
            message = request()
            message.parameters["triton_enable_empty_final_response"].bool_param = True
            await stream.write(message.SerializeToString())
            await stream.done_writing()
            answer = await read_answer(stream)
            assert answer.infer_response.outputs
            assert answer.infer_response.parameters["triton_final_response"].bool_param
            assert await stream.read() is grpc.aio.EOF

    within(run())


def test_a_stream_has_so_many_requests_in_flight_and_no_more(tmp_path):
    async def run():
        async with serving(tmp_path) as service:
            stream = open_stream(service)

            async def write():
                for _ in range(MAX_STREAM_REQUESTS + 10):
                    await stream.write(request("hang").SerializeToString())
                await stream.done_writing()

            writing = asyncio.create_task(write())
            for _ in range(MAX_STREAM_REQUESTS):
                await service.engine.started.get()
            # a round trip on another call: had the stream read on, the engine would have seen it by now
            await service.infer(request("echo"))
            assert (await service.engine.started.get()).model == "echo"
            assert service.engine.started.empty()
            service.engine.release.set()
            answers = [await read_answer(stream) for _ in range(MAX_STREAM_REQUESTS + 10)]
            assert not any(answer.error_message for answer in answers)
            await writing

    within(run())


def test_a_stream_holds_so_many_bytes_of_requests_and_no_more(tmp_path):
    async def run():
        async with serving(tmp_path, limits={"max_request_bytes": 10_000}) as service:
            stream = open_stream(service)
            for _ in range(3):
                await stream.write(request("hang", bytes(4_500)).SerializeToString())
            for _ in range(2):
                await service.engine.started.get()
            await service.infer(request("echo"))
            assert (await service.engine.started.get()).model == "echo"
            assert service.engine.started.empty()
            service.engine.release.set()
            for _ in range(3):
                await read_answer(stream)
            stream.cancel()

    within(run())


@pytest.mark.parametrize("how", ["cancel", "disconnect"])
def test_a_stream_that_ends_early_withdraws_all_its_requests(tmp_path, how):
    async def run():
        async with serving(tmp_path) as service:
            stream = open_stream(service)
            for _ in range(5):
                await stream.write(request("hang").SerializeToString())
            for _ in range(5):
                await service.engine.started.get()
            if how == "cancel":
                stream.cancel()
            else:
                await service.channel.close()
            for _ in range(5):
                await service.engine.ended.get()

    within(run())


def test_a_stream_whose_answers_are_not_read_is_ended():
    class Stalled:
        """A call whose client sends and never reads."""

        def __init__(self):
            self.aborted = None

        async def read(self):
            return request().SerializeToString()

        async def write(self, message):
            await asyncio.Event().wait()

        async def abort(self, code, details, trailing_metadata):
            self.aborted = code
            raise grpc.aio.AbortError

    async def run():
        context = Stalled()
        stream = InferStream(FakeEngine(), Peer("grpc", Role.INFER), context, lambda _: 0, 1 << 20, stall_seconds=0.05)
        with pytest.raises(grpc.aio.AbortError):
            await stream.run()
        assert context.aborted is grpc.StatusCode.RESOURCE_EXHAUSTED

    within(run())


# ------------------------------------------------------------------ health


def health(service, name):
    return service.channel.unary_unary(HEALTH + "Check")(pb.HealthCheckRequest(service=name).SerializeToString())


async def status(call):
    return pb.HealthCheckResponse.ServingStatus.Name(pb.HealthCheckResponse.FromString(await call).status)


def test_check_tells_of_the_server_and_of_each_model(tmp_path):
    async def run():
        async with serving(tmp_path) as service:
            assert await status(health(service, "")) == "SERVING"
            assert await status(health(service, "inference.GRPCInferenceService")) == "SERVING"
            assert await status(health(service, "echo")) == "SERVING"
            service.engine.ready["echo"] = False
            assert await status(health(service, "echo")) == "NOT_SERVING"
            code, _, _ = await refused(health(service, "nobody"))
            assert code is grpc.StatusCode.NOT_FOUND
            code, _, _ = await refused(service.channel.unary_unary(HEALTH + "Check")(b"\xff"))
            assert code is grpc.StatusCode.INVALID_ARGUMENT

    within(run())


def watch(service, name):
    stream = service.channel.unary_stream(HEALTH + "Watch")(pb.HealthCheckRequest(service=name).SerializeToString())

    async def read():
        return await status(stream.read())

    return stream, read


def test_watch_tells_of_each_change_and_of_models_yet_unknown(tmp_path):
    async def run():
        async with serving(tmp_path) as service:
            stream, read = watch(service, "new")
            assert await read() == "SERVICE_UNKNOWN"
            service.engine.tell("new", False)
            assert await read() == "NOT_SERVING"
            service.engine.tell("other", True)  # no news for this watcher
            service.engine.tell("new", True)
            assert await read() == "SERVING"
            stream.cancel()

    within(run())


def test_a_watcher_that_leaves_is_forgotten(tmp_path):
    async def run():
        engine = FakeEngine()
        gone = asyncio.Event()
        remove = engine.watch

        def watched(listener):
            end = remove(listener)
            return lambda: (end(), gone.set())

        engine.watch = watched
        async with serving(tmp_path, engine) as service:
            stream, read = watch(service, "")
            assert await read() == "SERVING"
            stream.cancel()
            await gone.wait()
            assert engine.listeners == []

    within(run())


# ------------------------------------------------------------------ stopping


def test_stop_tells_watchers_first_lets_calls_finish_and_refuses_new_ones(tmp_path):
    async def run():
        async with serving(tmp_path) as service:
            _, read = watch(service, "")
            assert await read() == "SERVING"
            running = service.infer(request("hang", request_id="last"))
            await service.engine.started.get()
            stopping = asyncio.create_task(service.server.stop(DEADLINE_S))
            assert await read() == "NOT_SERVING"
            service.engine.release.set()
            assert pb.ModelInferResponse.FromString(await running).id == "last"
            await stopping
            code, _, _ = await refused(service.infer(request()))
            assert code is grpc.StatusCode.UNAVAILABLE

    within(run())


def test_what_outlives_the_grace_ends_unavailable(tmp_path):
    async def run():
        async with serving(tmp_path) as service:
            running = service.infer(request("hang"))
            await service.engine.started.get()
            stopping = asyncio.create_task(service.server.stop(0.1))
            code, _, _ = await refused(running)
            assert code is grpc.StatusCode.UNAVAILABLE
            await stopping
            await service.engine.ended.get()

    within(run())


def test_typed_contents_reach_the_engine_raw(tmp_path):
    async def run():
        async with serving(tmp_path) as service:
            message = pb.ModelInferRequest(model_name="echo")
            message.inputs.add(name="x", datatype="FP32", shape=(2,)).contents.fp32_contents.extend([1.0, 2.0])
            answer = pb.ModelInferResponse.FromString(await service.infer(message))
            assert list(answer.raw_output_contents) == [struct.pack("<2f", 1.0, 2.0)]

    within(run())
