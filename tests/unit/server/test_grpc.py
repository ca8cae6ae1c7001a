"""The gRPC server over a fake engine, spoken to through a plain gRPC channel."""

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import struct
import sys
from pathlib import Path

import grpc
import pytest
import uvloop

from appliance.call import OutputTable
from appliance.clients import NOBODY
from appliance.config import Config
from appliance.errors import KINDS, Overloaded
from appliance.manifest import BatchSection
from appliance.server import listen
from appliance.server.access import METHOD_ROLE
from appliance.server.grpc import GrpcServer
from appliance.server.grpc_stream import MAX_STREAM_REQUESTS, InferStream
from appliance.server.oip import CALLS
from appliance.server.status import GRPC_STATUS
from appliance.types import Peer, Role, SequenceStep
from appliance.wire import open_inference_pb2 as pb

sys.path.insert(0, str(Path(__file__).parents[2]))

from support import echo_engine
from support.echo_engine import SECRET, EchoEngine

OIP = "/inference.GRPCInferenceService/"
HEALTH = "/grpc.health.v1.Health/"
DEADLINE_S = 20
#: Refused by every channel of its own, so that each test's connection is new.
OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1))


class Service:
    """A running server and a channel to its TCP port."""

    def __init__(self, engine, server, unix_path, port):
        self.engine = engine
        self.server = server
        self.unix_path = unix_path
        self.port = port
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS)

    def infer(self, message, channel=None, **options):
        body = message if isinstance(message, bytes) else message.SerializeToString()
        return (channel or self.channel).unary_unary(OIP + "ModelInfer")(body, **options)

    def unix_channel(self):
        return grpc.aio.insecure_channel(f"unix:{self.unix_path}", options=OPTIONS)


@contextlib.asynccontextmanager
async def serving(tmp_path, engine=None, **sections):
    engine = engine or EchoEngine()
    server = GrpcServer(engine, Config.model_validate(sections))
    path = tmp_path / "grpc.sock"
    tcp = listen.tcp_socket("127.0.0.1:0")
    await server.start(listen.unix_socket(path), tcp)
    service = Service(engine, server, path, tcp.getsockname()[1])
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

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # the daemon's loop
        return runner.run(bounded())


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


def test_answers_whose_shapes_follow_content_do_not_pile_up_their_heads(tmp_path, monkeypatch):
    class Shifting(EchoEngine):
        def submit(self, name, call):
            self.heads = call.plan.heads
            self.heads["names"] = ["out_x"]
            super().submit(name, call)

    tables = itertools.count()
    monkeypatch.setattr(echo_engine, "OutputTable", lambda _, *rest: OutputTable((next(tables),), *rest))

    async def run():
        async with serving(tmp_path, Shifting()) as service:
            for _ in range(200):
                await service.infer(request())
            assert service.engine.plans == 1
            assert len(service.engine.heads) <= 65

    within(run())


def test_the_deadline_reaches_the_engine_and_the_timeout_parameter_shortens_it(tmp_path):
    async def run():
        async with serving(tmp_path) as service:
            await service.infer(request())
            await service.infer(request(), timeout=1000)
            await service.infer(request(timeout=7), timeout=1000)
            await service.infer(request(timeout=7))
            none, deadline, both, parameter = [made.timeout_us for made in service.engine.requests]
            assert (none, both < 8, parameter < 8) == (0, True, True)
            assert 0 < deadline < 1_100_000_000  # gRPC rounds a time limit up on its way

    within(run())


def test_parameters_reach_the_engine_whether_their_head_is_known_or_not(tmp_path):
    async def run():
        async with serving(tmp_path) as service:
            for _ in range(2):
                await service.infer(request(priority=3))
                await service.infer(request())
                await service.infer(request(priority=1, timeout=60_000_000))
            asked = [(made.priority, made.timeout_us > 0) for made in service.engine.requests]
            assert asked == 2 * [(3, False), (0, False), (1, True)]
            assert service.engine.plans == 3

    within(run())


def test_requests_of_sequences_drive_no_other_head_out(tmp_path):
    async def run():
        async with serving(tmp_path) as service:
            service.engine.takes_sequences = True
            await service.infer(request())
            for number in range(1, 21):
                await service.infer(request(sequence_id=number))
            await service.infer(request())
            steps = [made.sequence for made in service.engine.requests]
            assert steps == [None, *map(SequenceStep, range(1, 21)), None]
            assert service.engine.plans == 21

    within(run())


def test_a_sequence_is_refused_where_the_model_keeps_no_state(tmp_path):
    async def run():
        async with serving(tmp_path) as service:
            code, kind, message = await refused(service.infer(request(sequence_id=4)))
            assert (code, kind) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid-request")
            assert "not stateful" in message
            assert service.engine.requests == []

    within(run())


def test_a_level_may_ignore_the_timeout_parameter_and_never_the_calls_own(tmp_path):
    async def run():
        async with serving(tmp_path) as service:
            levels = {3: {"default_timeout_ms": 60_000}}
            section = BatchSection(allow_timeout_override=False, priority_queue_policy=levels)
            service.engine.policies = section.policies()
            await service.infer(request(timeout=7))
            await service.infer(request(timeout=7), timeout=600)
            await service.infer(request(timeout=7, priority=3))
            ignored, call, level = [made.timeout_us for made in service.engine.requests]
            assert ignored == 0
            assert 60_000_000 < call < 700_000_000
            assert 7 < level <= 60_000_000

    within(run())


def test_who_asks_over_tcp_has_an_account_for_each_connection_and_on_the_socket_one(tmp_path):
    async def run():
        async with serving(tmp_path) as service:
            engine = service.engine
            others = [
                grpc.aio.insecure_channel(f"127.0.0.1:{service.port}", options=OPTIONS),
                service.unix_channel(),
                service.unix_channel(),
            ]
            for channel in (service.channel, *others):
                await service.infer(request(), channel)
                stream = channel.stream_stream(OIP + "ModelStreamInfer")()
                await stream.write(request().SerializeToString())
                await stream.done_writing()
                await read_answer(stream)
                assert await stream.read() is grpc.aio.EOF
            accounts = [made.client for made in engine.requests]
            assert accounts[0::2] == accounts[1::2]  # a stream's requests go on it as well
            first, second, third, fourth = accounts[0::2]
            assert len({first, second, third}) == 3
            assert third is fourth
            assert (third.key, len(engine.clients)) == ((os.geteuid(), os.getpid()), 3)
            for channel in others:
                await channel.close()

    within(run())


def test_the_account_goes_with_the_last_connection(tmp_path):
    async def run():
        async with serving(tmp_path) as service:
            accounts = service.engine.clients

            async def come_to(count):
                while len(accounts) != count:  # noqa: ASYNC110 the server tells nobody who comes and goes
                    await asyncio.sleep(0.01)

            _, over_tcp = await asyncio.open_connection("127.0.0.1", service.port)
            await come_to(1)
            _, first = await asyncio.open_unix_connection(service.unix_path)
            await come_to(2)
            _, second = await asyncio.open_unix_connection(service.unix_path)
            over_tcp.close()
            await come_to(1)
            first.close()
            mine = accounts.enter(Peer("grpc", Role.INFER, os.geteuid(), pid=os.getpid()))
            while mine.connections != 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            accounts.leave(mine)
            second.close()
            await come_to(0)

    within(run())


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_error_kind_has_its_status_and_names_itself(tmp_path, kind):
    async def run():
        async with serving(tmp_path) as service:
            code, told, details = await refused(service.infer(request(kind)))
            assert (code.name, told) == (GRPC_STATUS[kind].name, kind)
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
    assert SECRET in caplog.text


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
            await service.engine.started.get()
            call.cancel()
            assert await service.engine.ended.get() == "hang"

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


@pytest.mark.parametrize("method", sorted(CALLS))
@pytest.mark.parametrize("door", ["unix", "tcp-infer", "tcp-admin"])
def test_every_method_through_every_door(tmp_path, method, door):
    """TCP with the role infer is refused admin methods; with admin, and on our own Unix socket, they are served."""

    async def run():
        engine = EchoEngine()
        engine.loaded.append("")
        access = {"tcp_role": door.removeprefix("tcp-")} if door != "unix" else {}
        async with serving(tmp_path, engine, access=access) as service:
            channel = service.unix_channel() if door == "unix" else service.channel
            try:
                await channel.unary_unary(OIP + method)(b"")
                code = grpc.StatusCode.OK
            except grpc.aio.AioRpcError as error:
                code = error.code()
            await channel.close()
            if METHOD_ROLE[method] is Role.INFER or door != "tcp-infer":
                assert code in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)  # the fake describes no model
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
            await asyncio.to_thread(read_to_end, service.port, opening)
            await service.infer(request())

    within(run())


def test_a_ping_flood_is_told_to_go_away(tmp_path):
    async def run():
        async with serving(tmp_path) as service:
            ping = bytes((0, 0, 8, 6, 0, 0, 0, 0, 0)) + bytes(8)
            received = await asyncio.to_thread(read_to_end, service.port, PREFACE + ping * 100)
            assert b"too_many_pings" in received
            await service.infer(request())

    within(run())


def test_connections_beyond_the_limit_are_closed_and_the_others_served(tmp_path):
    def connect(port):
        connection = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)
        try:
            connection.sendall(PREFACE)
            return connection, connection.recv(9)
        except ConnectionError:
            return connection, b""

    async def run():
        async with serving(tmp_path, limits={"max_connections": 2}) as service:
            await service.infer(request())
            second, settings = await asyncio.to_thread(connect, service.port)
            assert settings
            third, nothing = await asyncio.to_thread(connect, service.port)
            assert nothing == b""
            await service.infer(request())
            second.close()
            third.close()

    within(run())


def test_calls_beyond_the_limit_of_a_connection_wait_at_the_client(tmp_path):
    async def run():
        async with serving(tmp_path, limits={"max_requests_in_flight": 3}) as service:
            calls = [service.infer(request("hang")) for _ in range(4)]
            for _ in range(3):
                await service.engine.started.get()
            async with service.unix_channel() as channel:
                await service.infer(request(), channel)
            assert (await service.engine.started.get()).model == "echo"
            assert service.engine.started.empty()
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

        async def read(self):
            return request().SerializeToString()

        async def write(self, message):
            await asyncio.Event().wait()

        def remaining_us(self):
            return 0

    async def run():
        stream = InferStream(EchoEngine(), Peer("grpc", Role.INFER), NOBODY, Stalled(), 1 << 20, stall_seconds=0.05)
        with pytest.raises(Overloaded, match="does not read"):
            await stream.run()

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
        engine = EchoEngine()
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


# ------------------------------------------------------------------ what only gRPC has


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@pytest.mark.parametrize("model", ["echo", "hang"])
def test_compressed_requests_are_understood_and_a_bomb_is_not_unpacked(tmp_path, encoding, model):
    async def run():
        async with serving(tmp_path, limits={"max_request_bytes": 1_000_000}) as service:
            service.engine.release.set()
            compression = getattr(grpc.Compression, encoding.title())
            content = bytes(900_000)
            answer = await service.infer(request(model, content), compression=compression)
            assert pb.ModelInferResponse.FromString(answer).raw_output_contents[0] == content
            code, _, details = await refused(service.infer(request(model, bytes(50_000_000)), compression=compression))
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "decompressed" in details
            stream = service.channel.stream_stream(OIP + "ModelStreamInfer")(compression=compression)
            await stream.write(request(model, content).SerializeToString())
            assert (await read_answer(stream)).infer_response.raw_output_contents[0] == content
            stream.cancel()

    within(run())


def test_twenty_megabytes_go_both_ways(tmp_path):
    async def run():
        async with serving(tmp_path) as service:
            contents = [os.urandom(20_000_000) for _ in range(4)]
            answers = await asyncio.gather(*(service.infer(request(content=content)) for content in contents))
            for content, answer in zip(contents, answers, strict=True):
                assert pb.ModelInferResponse.FromString(answer).raw_output_contents[0] == content
            with grpc.insecure_channel(f"unix:{service.unix_path}", options=OPTIONS) as channel:
                call = channel.unary_unary(OIP + "ModelInfer")
                answer = await asyncio.to_thread(call, request(content=contents[0]).SerializeToString())
                assert pb.ModelInferResponse.FromString(answer).raw_output_contents[0] == contents[0]

    within(run())


def test_a_thousand_calls_at_a_time_each_get_their_own_answer(tmp_path):
    async def run():
        async with serving(tmp_path) as service:
            contents = [struct.pack("<I", number) * (1 + number % 50) for number in range(1000)]
            answers = await asyncio.gather(
                *(service.infer(request(content=each, request_id=str(n))) for n, each in enumerate(contents))
            )
            for number, answer in enumerate(answers):
                message = pb.ModelInferResponse.FromString(answer)
                assert (message.id, message.raw_output_contents[0]) == (str(number), contents[number])

    within(run())


def test_a_thousand_calls_withdrawn_at_a_time_leave_the_connection_working(tmp_path):
    async def run():
        async with serving(tmp_path) as service:
            calls = [service.infer(request("hang")) for _ in range(1000)]
            for _ in calls:
                await service.engine.started.get()
            for call in calls:
                call.cancel()
            for _ in calls:
                assert await service.engine.ended.get() == "hang"
            await service.infer(request())

    within(run())


def test_requests_that_look_alike_are_planned_once_whatever_their_ids_and_contents(tmp_path):
    async def run():
        async with serving(tmp_path) as service:
            for number in range(5):
                content = bytes((number,)) * 8
                answer = await service.infer(request(content=content, request_id="r" * number))
                message = pb.ModelInferResponse.FromString(answer)
                assert (message.id, message.raw_output_contents[0]) == ("r" * number, content)
            assert service.engine.plans == 1
            await service.infer(request(content=bytes(9)))  # another shape
            await service.infer(request(content=bytes(8)))
            assert service.engine.plans == 2

    within(run())


@pytest.mark.parametrize(
    "tail", [b"\x3a\x02ab", b"\x3a\x04ab", b"\x3a", b"\x3a\xff\xff\xff\xff\xff\xff", b"\x1a\x01z", b"x"]
)
def test_what_follows_a_known_head_is_still_checked(tmp_path, tail):
    async def run():
        async with serving(tmp_path) as service:
            good = request(content=b"1234").SerializeToString()
            await service.infer(good)
            head = good[: -len(b"\x3a\x041234")]
            for body in (head + tail, good + tail, head):
                if (body, tail) == (good + tail, b"\x1a\x01z"):
                    answer = pb.ModelInferResponse.FromString(await service.infer(body))
                    assert answer.id == "z"  # an id may stand anywhere
                    continue
                code, kind, _ = await refused(service.infer(body))
                assert (code, kind) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid-request")
            assert service.engine.requests[-1].model == "echo"

    within(run())


def test_answers_carry_the_timings_of_the_request_in_microseconds(tmp_path):
    async def run():
        async with serving(tmp_path) as service:
            answer = pb.ModelInferResponse.FromString(await service.infer(request()))
            assert {key: value.int64_param for key, value in answer.parameters.items()} == {
                "decode_us": 1, "tokenise_us": 0, "queue_us": 0, "copy_us": 2, "compute_us": 300,
                "postprocess_us": 5_000_000, "batch_rows": 7,
            }  # fmt: skip
            assert all(each.WhichOneof("parameter_choice") == "int64_param" for each in answer.parameters.values())

    within(run())


def test_texts_of_any_length_share_a_head_and_are_walked(tmp_path):
    async def run():
        async with serving(tmp_path) as service:
            for text in (b"a", b"b" * 300, b""):
                message = pb.ModelInferRequest(model_name="echo")
                message.inputs.add(name="t", datatype="BYTES", shape=(1,))
                message.raw_input_contents.append(struct.pack("<I", len(text)) + text)
                answer = pb.ModelInferResponse.FromString(await service.infer(message))
                assert answer.raw_output_contents[0] == message.raw_input_contents[0]
            message.raw_input_contents[0] = b"\5\0\0\0abc"
            code, _, _ = await refused(service.infer(message))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert service.engine.plans == 1

    within(run())


def test_a_plan_whose_instance_is_gone_is_made_anew(tmp_path):
    async def run():
        async with serving(tmp_path) as service:
            plans = []
            plan = service.engine.plan
            service.engine.plan = lambda *head: plans.append(plan(*head)) or plans[-1]
            await service.infer(request())
            plans[0].instance.accepts = False
            await service.infer(request())
            await service.infer(request())
            assert len(plans) == 2

    within(run())


def test_frequent_keepalives_of_a_waiting_client_are_borne(tmp_path):
    async def run():
        async with serving(tmp_path) as service:
            options = (*OPTIONS, ("grpc.keepalive_time_ms", 100), ("grpc.http2.max_pings_without_data", 0))
            async with grpc.aio.insecure_channel(f"127.0.0.1:{service.port}", options=options) as channel:
                call = service.infer(request("hang"), channel)
                await service.engine.started.get()
                stream = channel.stream_stream(OIP + "ModelStreamInfer")()
                for _ in range(20):
                    await stream.write(request().SerializeToString())
                    await read_answer(stream)
                stream.cancel()
                service.engine.release.set()
                await call

    within(run())


def test_a_deadline_ends_a_stream_and_a_watch(tmp_path):
    async def run():
        async with serving(tmp_path) as service:
            stream = service.channel.stream_stream(OIP + "ModelStreamInfer")(timeout=0.2)
            assert await stream.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            watch = service.channel.unary_stream(HEALTH + "Watch")(b"", timeout=0.2)
            assert await watch.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    within(run())


def test_a_stream_whose_message_is_too_large_is_ended(tmp_path):
    async def run():
        async with serving(tmp_path, limits={"max_request_bytes": 100_000}) as service:
            stream = open_stream(service)
            await stream.write(bytes(200_000))
            assert await stream.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            await service.infer(request())

    within(run())
