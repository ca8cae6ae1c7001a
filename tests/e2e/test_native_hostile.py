"""Clients that are slow, silent, gone or out to do harm: they lose their connection, and nobody else notices."""

import asyncio
import contextlib
import http.client
import os
import random
import resource
import socket
import struct
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import grpc
import numpy as np
import pytest

from appliance.clients import Clients
from appliance.config import ClientsSection, LimitsSection
from appliance.errors import ModelNotFound
from appliance.server.budget import BodyBudget
from appliance.server.native_connection import NativeConnection
from appliance.types import Peer, Role
from appliance.wire import native
from appliance.wire.elements import join_elements
from appliance.wire.native import Frame
from appliance.wire.open_inference_pb2 import ModelInferRequest
from appliance_client import Client, Overloaded
from support.daemon import FAKE_BACKEND, open_descriptors, resident_bytes, start_daemon, wait_until
from support.errors import check_message
from support.models import Gate, write_fake
from support.native import HELLO, Native, frame, infer_frame, request

MIB = 1 << 20
WAIT = 116.0  # the fake backend's MAGIC for `wait`
ECHO = request("echo", ("x", "FP32", (1, 16)))
# A thousand clients at once are more than many systems let a process have by default.
_, _HARD = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (4096 if _HARD == resource.RLIM_INFINITY else min(4096, _HARD), _HARD))

LIMITS = {
    "header_seconds": 1.0,
    "max_unsent_bytes": 4 * MIB,
    "max_request_bytes": 8 * MIB,
    "max_connections_per_uid": 700,
}


def row(value: float) -> bytes:
    return struct.pack("<16f", *[value] * 16)


class Daemon:
    def __init__(self, running, gate: Gate) -> None:
        self.running = running
        self.gate = gate

    def native(self, hello: bool = True) -> Native:
        return Native(self.running.infer_socket, hello)

    def model(self, name: str = "echo") -> dict:
        return self.running.model(name)

    def answers(self) -> bool:
        """True where a request of somebody else's is answered."""
        with self.native() as client:
            return client.infer(1, ECHO, row(7)).tail == row(7)

    def executions(self, name: str = "echo") -> int:
        (entry,) = self.running.get(f"/v2/models/{name}/stats")["model_stats"]
        return entry["execution_count"]

    def connections(self) -> int:
        """Connections the daemon has on its native socket, as the kernel counts them."""
        lines = Path("/proc/net/unix").read_text().splitlines()
        return sum(line.endswith(self.running.infer_socket) and line.split()[5] == "03" for line in lines)

    def fill(self, client: Native, number: int, name: str = "echo") -> None:
        """Send two requests that occupy both of a worker's places until the gate opens."""
        for count in (1, 2):
            client.send(infer_frame(number + count - 1, request(name, ("x", "FP32", (1, 16))), row(WAIT)))
            wait_until(lambda: self.model(name)["running"] == count, f"{count} requests run")  # noqa: B023


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory):
    models = tmp_path_factory.mktemp("models")
    gate = Gate(tmp_path_factory.mktemp("gate") / "open")
    gate.open()
    write_fake(models / "echo", run_gate=str(gate))
    write_fake(models / "small", batch={"max_queue_size": 3, "max_queue_bytes": 150}, run_gate=str(gate))
    write_fake(models / "hasty", batch={"default_timeout_ms": 300}, run_gate=str(gate))
    write_fake(
        models / "pair",
        inputs=[["a", "UINT8", [-1, -1]], ["b", "UINT8", [-1, -1]]],
        outputs=[["c", "UINT8", [-1, -1]], ["d", "UINT8", [-1, -1]]],
        run_gate=str(gate),
    )
    wide = [-1, 65536]
    write_fake(models / "large", inputs=[["x", "FP32", wide]], outputs=[["y", "FP32", wide]], run_gate=str(gate))
    with start_daemon(tmp_path_factory.mktemp("run"), models, environment=FAKE_BACKEND, limits=LIMITS) as running:
        yield Daemon(running, gate)


@pytest.fixture(autouse=True)
def open_gate(served):
    yield
    served.gate.open()


def is_closed(sock: socket.socket) -> bool:
    """True once the other end has closed, whatever it said before."""
    sock.settimeout(0)
    try:
        return not sock.recv(65536)
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


# ---------------------------------------------------------------- slow


def test_a_thousand_trickling_clients_are_closed_and_the_others_are_served(served):
    """Slow loris on every socket: nothing, half a greeting, half a frame, a byte now and then."""
    before = open_descriptors(served.running.pid)
    half = infer_frame(1, ECHO, row(1))
    beginnings = [
        (served.running.infer_socket, b""),
        (served.running.infer_socket, HELLO[:5]),
        (served.running.infer_socket, HELLO[:30]),
        (served.running.infer_socket, HELLO + half[:1]),
        (served.running.infer_socket, HELLO + half + half[:30]),
        (served.running.infer_socket, HELLO + frame(Frame.INFER, 1, bytes(100), head=10, length=5 * MIB)),
        (served.running.grpc_socket, b""),
        (served.running.grpc_socket, b"PRI * HTTP/2.0\r\n"),
        (served.running.http_socket, b"GET /v2 HTTP/1.1\r\nhost: loc"),
        (
            served.running.http_socket,
            b"POST /v2/models/echo/infer HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n",
        ),
    ]
    loris: list[socket.socket] = []
    answered = 0
    for number in range(1000):
        path, beginning = beginnings[number % len(beginnings)]
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
        sock.sendall(beginning)
        loris.append(sock)
    end = time.monotonic() + 30
    while loris and time.monotonic() < end:
        answered += served.answers()
        for sock in tuple(loris):
            with contextlib.suppress(OSError):
                sock.settimeout(0)
                sock.send(b"\0")
            if is_closed(sock):
                sock.close()
                loris.remove(sock)
    assert not loris
    assert answered > 3
    wait_until(lambda: open_descriptors(served.running.pid) <= before, "their descriptors are closed")


def test_a_client_that_always_has_half_a_frame_on_the_way_is_no_trickling_client(served):
    """Requests that never end at a read's end for longer than header_seconds."""
    stop = time.monotonic() + 2.5 * LIMITS["header_seconds"]
    frames = b"".join(infer_frame(number, ECHO, row(number)) for number in range(1, 9))
    with served.native() as client:
        client.send(frames[:50])
        while time.monotonic() < stop:
            client.send(frames[50:] + frames[:50])
            assert sorted(client.read().id for _ in range(8)) == list(range(1, 9))


def test_an_idle_client_may_stay(served):
    with served.native() as idle, served.native() as other:
        end = time.monotonic() + 1.5 * LIMITS["header_seconds"]
        number = 1
        while time.monotonic() < end:
            number += 1
            assert other.infer(number, ECHO, row(1)).tail == row(1)
        assert idle.infer(1, ECHO, row(2)).tail == row(2)


def test_what_a_header_promises_costs_nothing(served):
    """A hundred clients announce eight megabytes each and send none."""
    before = resident_bytes(served.running.pid)
    clients = [served.native() for _ in range(100)]
    for client in clients:
        client.send(frame(Frame.INFER, 1, bytes(24), head=10, length=8 * MIB))
    assert served.answers()
    assert resident_bytes(served.running.pid) - before < 32 * MIB
    for client in clients:
        client.close()


def test_large_frames_share_a_budget_and_what_exceeds_it_is_refused_in_order(served):
    """Eight clients send seven megabytes each at the same time; the daemon holds 32."""
    content = bytes(7 * MIB)
    begun = frame(Frame.INFER, 1, content, head=10)
    clients = [served.native() for _ in range(8)]
    for client in clients:
        client.socket.settimeout(10)
        client.send(begun[:-MIB])
    for client in clients:
        client.send(begun[-MIB:])
    kinds = [client.read().error[0] for client in clients]
    assert set(kinds) == {"overloaded", "invalid-request"}
    assert kinds.count("invalid-request") >= 4
    for client in clients:
        assert client.infer(2, ECHO, row(3)).tail == row(3)
        client.close()
    with served.native() as client:  # the budget is whole again
        assert client.infer(1, ECHO, content).error[0] == "invalid-request"


def test_a_client_that_reads_nothing_gets_errors_and_then_is_closed(served):
    """Twenty answers of two megabytes, where four may lie unread: memory is bounded and the model serves on."""
    message = request("large", ("x", "FP32", (8, 65536)))
    before = resident_bytes(served.running.pid)
    served.gate.shut()
    with served.native() as client:
        client.send(infer_frame(1, message, struct.pack("<f", WAIT) + bytes(2 * MIB - 4)))
        wait_until(lambda: served.model("large")["running"] == 1, "the first waits for the gate")
        client.send(b"".join(infer_frame(number, message, bytes(2 * MIB)) for number in range(2, 21)))
        wait_until(lambda: served.model("large")["queued"] + served.model("large")["running"] == 20, "all are there")
        served.gate.open()
        wait_until(lambda: served.model("large")["running"] == 0, "all have run")
        assert served.answers()
        wait_until(lambda: not served.connections(), "it is closed")
    assert resident_bytes(served.running.pid) - before < 80 * MIB
    assert served.answers()


def test_a_client_that_reads_too_late_gets_errors_in_the_place_of_answers(served):
    message = request("large", ("x", "FP32", (8, 65536)))
    served.gate.shut()
    with served.native() as client:
        client.send(infer_frame(1, message, struct.pack("<f", WAIT) + bytes(2 * MIB - 4)))
        wait_until(lambda: served.model("large")["running"] == 1, "the first waits for the gate")
        client.send(b"".join(infer_frame(number, message, bytes(2 * MIB)) for number in range(2, 21)))
        wait_until(lambda: served.model("large")["queued"] + served.model("large")["running"] == 20, "all are there")
        served.gate.open()
        answers = {}
        for _ in range(20):
            answer = client.read()
            answers[answer.id] = len(answer.tail) if answer.kind == Frame.RESULT else answer.error[0]
        assert set(answers) == set(range(1, 21))
        assert set(answers.values()) <= {2 * MIB, "overloaded"}
        assert answers[1] == answers[2] == 2 * MIB
        assert client.infer(21, message, bytes(2 * MIB)).tail == bytes(2 * MIB)


def test_an_answer_larger_than_what_may_lie_unread_arrives_whole(served):
    message = request("large", ("x", "FP32", (31, 65536)))
    content = os.urandom(1 << 16) * (31 * 4)
    with served.native() as client:
        assert client.infer(1, message, content[: 31 * 65536 * 4]).tail == content[: 31 * 65536 * 4]


# ---------------------------------------------------------------- gone


def infer_over_grpc(served: Daemon, value: float):
    channel = grpc.insecure_channel(f"unix:{served.running.grpc_socket}")
    call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    message = ModelInferRequest.FromString(ECHO.SerializeToString())
    message.raw_input_contents.append(row(value))
    pending = call.future(message.SerializeToString())
    return lambda: (pending.cancel(), channel.close())


def infer_over_http(served: Daemon, value: float):
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(served.running.http_socket)
    body = '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "data": [%s]}]}'
    connection.request("POST", "/v2/models/echo/infer", body % ", ".join([str(value)] * 16))
    return connection.close


def infer_over_native(served: Daemon, value: float):
    client = served.native()
    client.send(infer_frame(1, ECHO, row(value)))
    return client.close


@pytest.mark.parametrize("ask", [infer_over_native, infer_over_grpc, infer_over_http])
def test_who_disconnects_withdraws_what_waits_and_what_runs(served, ask):
    served.gate.shut()
    with served.native() as client:
        leave_running = ask(served, WAIT)
        wait_until(lambda: served.model()["running"] == 1, "a request runs")
        client.send(infer_frame(1, ECHO, row(WAIT)))
        wait_until(lambda: served.model()["running"] == 2, "another stands behind it")
        leave_waiting = ask(served, 1)
        wait_until(lambda: served.model()["queued"] == 1, "a third waits")
        before = served.executions()
        leave_waiting()
        wait_until(lambda: served.model()["queued"] == 0, "the third is withdrawn")
        leave_running()
        served.gate.open()
        assert client.read().tail == row(WAIT)
    wait_until(lambda: served.model()["running"] == 0, "nothing runs")
    assert served.executions() == before + 2
    assert served.answers()


def test_cancelling_at_every_stage(served):
    """Withdrawn before it runs, while it runs and after its answer; each has exactly one final answer."""
    served.gate.shut()
    with served.native() as client:
        served.fill(client, 1)
        client.send(b"".join(infer_frame(number, ECHO, row(number)) for number in (3, 4, 5)))
        wait_until(lambda: served.model()["queued"] == 3, "three wait")
        before = served.executions()
        client.send(frame(Frame.CANCEL, 4) + frame(Frame.CANCEL, 2) + frame(Frame.CANCEL, 4) + frame(Frame.CANCEL, 99))
        assert [(answer.id, answer.error[0]) for answer in (client.read(), client.read())] == [
            (4, "cancelled"),
            (2, "cancelled"),
        ]
        assert served.model()["queued"] == 2
        served.gate.open()
        answers = {answer.id: answer.tail for answer in (client.read() for _ in range(3))}
        assert answers == {1: row(WAIT), 3: row(3), 5: row(5)}
        client.send(frame(Frame.CANCEL, 3))
        assert client.infer(3, ECHO, row(8)).tail == row(8)
    wait_until(lambda: served.model()["running"] == 0, "nothing runs")
    assert before + 4 <= served.executions() <= before + 5  # two that waited, 3 and 5 in a batch or two, and the last


def test_a_hundred_thousand_withdrawn_and_late_requests_leave_nothing(served):
    """In flight, in the queue, in memory: everything is back where it was."""
    served.gate.shut()
    with served.native() as client:
        served.fill(client, 1)
        tail = row(1)

        def burst(first: int) -> None:
            frames = []
            for number in range(first, first + 500):
                if number % 2:
                    frames += [infer_frame(number, ECHO, tail), frame(Frame.CANCEL, number)]
                else:
                    frames.append(infer_frame(number, ECHO, tail, timeout_us=1 + number % 2000))
            client.send(b"".join(frames))
            kinds = {client.read().error[0] for _ in range(500)}
            assert kinds == {"cancelled", "deadline-exceeded"}

        for first in range(1000, 3000, 500):
            burst(first)
        before = resident_bytes(served.running.pid)
        for first in range(10_000, 110_000, 500):
            burst(first)
        status = served.model()
        assert (status["queued"], status["running"]) == (0, 2)
        assert resident_bytes(served.running.pid) - before < 4 * MIB
        executions = served.executions()
        served.gate.open()
        assert {client.read().id for _ in range(2)} == {1, 2}
        assert client.infer(3, ECHO, row(2)).tail == row(2)
        assert served.executions() == executions + 3


def test_an_id_may_be_used_again_after_its_final_answer_only(served):
    served.gate.shut()
    with served.native() as client:
        client.send(infer_frame(1, ECHO, row(WAIT)) * 2)
        served.gate.open()
        last = client.read_to_end()[-1]
        assert (last.id, last.error[0]) == (0, "invalid-request")
        check_message(last.error[1])
    with served.native() as client:
        client.send(frame(Frame.CALL, 1, b"\x13RepositoryModelLoad\x12\x04echo") + infer_frame(1, ECHO, row(1)))
        assert client.read_to_end()[-1].error[0] == "invalid-request"


def test_a_failure_of_a_withdrawn_text_is_not_told_to_the_next_request_of_that_id(daemon):
    """A text that is refused while it is tokenised, withdrawn just before, its id used again at once."""
    bad = infer_frame(5, request("language-id", ("text", "BYTES", (1, 1))), b"\2\0\0\0\xff\xff")
    good = infer_frame(5, request("identity", ("x", "FP32", (1, 16))), row(3))
    with Native(daemon.infer_socket) as client:
        for _ in range(100):
            client.send(bad + frame(Frame.CANCEL, 5) + good)
            answers = [client.read(), client.read()]
            assert answers[0].kind == Frame.ERROR
            assert answers[0].error[0] in ("cancelled", "invalid-request")
            assert answers[1].tail == row(3)
            client.send(bad)
            client.send(frame(Frame.CANCEL, 5))
            assert client.read().error[0] in ("cancelled", "invalid-request")


# ---------------------------------------------------------------- too much


def test_a_full_queue_refuses_at_once_by_count_and_by_bytes(served):
    served.gate.shut()
    message = request("small", ("x", "FP32", (1, 16)))
    with served.native() as client:
        served.fill(client, 1, "small")
        client.send(b"".join(infer_frame(number, message, row(1)) for number in range(3, 7)))
        refused = [client.read(), client.read()]
        assert [(answer.id, answer.error[0]) for answer in refused] == [(5, "overloaded"), (6, "overloaded")]
        for answer in refused:
            check_message(answer.error[1])
        assert "max_queue_bytes" in refused[0].error[1]
        client.send(frame(Frame.CANCEL, 3))
        assert client.read().id == 3
        client.send(infer_frame(7, message, row(7)))
        served.gate.open()
        assert {client.read().id for _ in range(4)} == {1, 2, 4, 7}


def test_a_deadline_is_kept_while_every_place_is_taken(served):
    """Answered in time, not run; and the model's own limit may be shortened, not lengthened."""
    served.gate.shut()
    with served.native() as client:
        served.fill(client, 1)
        before = served.executions()
        assert client.infer(3, ECHO, row(1), timeout_us=20_000).error[0] == "deadline-exceeded"
        served.gate.open()
        assert {client.read().id for _ in range(2)} == {1, 2}
        assert client.infer(4, ECHO, row(1)).tail == row(1)
        assert served.executions() == before + 3
        served.gate.shut()
        hasty = request("hasty", ("x", "FP32", (1, 16)))
        for number, timeout_us in ((5, 0), (6, 40_000_000), (7, 1000)):
            kind, message = client.infer(number, hasty, row(WAIT), timeout_us).error
            assert kind == "deadline-exceeded"
            check_message(message)


def test_a_connection_has_so_many_requests_in_flight(served):
    served.gate.shut()
    with served.native() as client:
        client.send(b"".join(infer_frame(number, ECHO, row(WAIT)) for number in range(1, 1026)))
        refused = client.read()
        assert (refused.id, refused.error[0]) == (1025, "overloaded")
        check_message(refused.error[1])
        served.gate.open()
        assert {client.read().id for _ in range(1024)} == set(range(1, 1025))


def test_a_batch_may_fill_its_slab_to_the_last_byte(served):
    """Two requests whose tensors are as large as the slab, alignment not counted, on a busy worker."""
    served.gate.shut()
    wait = request("pair", ("a", "UINT8", (1, 1)), ("b", "UINT8", (1, 1)))
    half = request("pair", ("a", "UINT8", (1, MIB // 4 - 1)), ("b", "UINT8", (1, MIB // 4 + 1)))
    contents = {number: bytes([number]) * (MIB // 2) for number in (3, 4)}
    with served.native() as client:
        for number in (1, 2):
            client.send(infer_frame(number, wait, bytes([int(WAIT), 0])))
            wait_until(lambda: served.model("pair")["running"] == number, "it runs")  # noqa: B023
        client.send(b"".join(infer_frame(number, half, content) for number, content in contents.items()))
        wait_until(lambda: served.model("pair")["queued"] == 2, "two wait")
        served.gate.open()
        answers = {answer.id: answer.tail for answer in (client.read() for _ in range(4))}
        assert {number: answers[number] for number in contents} == contents


def test_a_deadline_is_kept_while_texts_before_it_are_tokenised(daemon):
    """The threads that tokenise are busy with long texts; the short one is answered before any of them."""
    message = request("language-id", ("text", "BYTES", (1, 1)))
    with Native(daemon.infer_socket) as client:
        long = join_elements([b"where is the station " * 25_000])
        client.send(b"".join(infer_frame(number, message, long) for number in range(1, 7)))
        client.send(infer_frame(7, message, join_elements([b"hello"]), timeout_us=1000))
        first = client.read()
        assert (first.id, first.error[0]) == (7, "deadline-exceeded")
        client.send(b"".join(frame(Frame.CANCEL, number) for number in range(1, 7)))
        assert {client.read().id for _ in range(6)} == set(range(1, 7))


@pytest.mark.parametrize("extra", [1, 2**32 - 1 - 8 * MIB])
def test_a_frame_over_the_limit_ends_the_connection_and_takes_no_memory(served, extra):
    before = resident_bytes(served.running.pid)
    with served.native() as client:
        client.send(frame(Frame.INFER, 17, bytes(65536), head=10, length=8 * MIB + extra))
        (answer,) = client.read_to_end()
        assert (answer.id, answer.error[0]) == (17, "overloaded")
        check_message(answer.error[1])
    assert resident_bytes(served.running.pid) - before < 8 * MIB


def test_a_message_over_the_limit_is_refused_by_every_transport(served):
    before = resident_bytes(served.running.pid)
    channel = grpc.insecure_channel(f"unix:{served.running.grpc_socket}", [("grpc.max_send_message_length", -1)])
    with pytest.raises(grpc.RpcError) as refusal:
        channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(bytes(9 * MIB))
    assert refusal.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    channel.close()
    status, _, _ = served.running.http("POST", "/v2/models/echo/infer", bytes(9 * MIB))
    assert status == 429
    assert served.answers()
    assert resident_bytes(served.running.pid) - before < 2 * 8 * MIB


def test_a_user_has_so_many_connections_and_one_more_is_told(served):
    wait_until(lambda: not served.connections(), "the connections of other tests are closed")
    clients = [served.native() for _ in range(LIMITS["max_connections_per_uid"])]
    try:
        with served.native(hello=False) as client:
            (answer,) = client.read_to_end()
            assert (answer.id, answer.error[0]) == (0, "overloaded")
            check_message(answer.error[1])
        with Client(served.running.infer_socket, timeout=10) as library, pytest.raises(Overloaded):
            library.infer("echo", {"x": np.ones((1, 16), np.float32)})
        assert clients[7].infer(1, ECHO, row(1)).tail == row(1)
    finally:
        for client in clients:
            client.close()
    wait_until(lambda: not served.connections(), "there is room again")
    assert served.answers()


# ---------------------------------------------------------------- nonsense

TLS_HELLO = bytes.fromhex("160301020001000001fc0303") + bytes(500)
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")
NONSENSE = {
    "an HTTP request": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "the beginning of HTTP/2": HTTP2_PREFACE,
    "a TLS hello": TLS_HELLO,
    "zeros": bytes(100_000),
    "ones": b"\xff" * 100_000,
    "a greeting of another protocol": HELLO.replace(b"IAP1", b"IAP2"),
    "a greeting of another version": HELLO[:28] + b"\x63\0\0\0",
    "a greeting too short": frame(Frame.HELLO, body=b"IAP1"),
    "a greeting of four megabytes": frame(Frame.HELLO, body=b"IAP1\1\0\0\0" + bytes(4 * MIB)),
    "a request before the greeting": infer_frame(1, ECHO, bytes(64)),
    "two greetings": HELLO * 2,
    "a frame only the daemon sends": HELLO + frame(Frame.RESULT),
    "a frame of no kind": HELLO + frame(0),
    "a frame of a kind yet to come": HELLO + frame(255, 1, b"what"),
    "a head longer than its frame": HELLO + frame(Frame.INFER, 1, b"1234", head=5),
    "a line of text": b"hello?\n" * 10,
    "words of an SSH client": b"SSH-2.0-OpenSSH_9.2\r\n" + bytes(100),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_ends_the_connection_on_every_socket_and_floods_no_log(served, what):
    logged = len(served.running.log)
    paths = {
        served.running.infer_socket: "",
        served.running.http_socket: "an HTTP request",
        served.running.grpc_socket: "the beginning of HTTP/2",
    }
    for path, sensible in paths.items():
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            sock.settimeout(0)
            with contextlib.suppress(OSError):
                sock.send(NONSENSE[what])
            if what != sensible:
                wait_until(lambda: is_closed(sock), f"{path} is closed")
    with Native(served.running.infer_socket, hello=False) as client:
        with contextlib.suppress(OSError):
            client.send(NONSENSE[what])
        answers = client.read_to_end()
        assert answers, "the client is told"
        check_message(answers[-1].error[1])
    assert served.answers()
    assert len(served.running.log) - logged < 2000


def random_request(chance: random.Random) -> bytes:
    """An INFER frame, right in one case of two."""
    number, tail, timeout_us = chance.randrange(400), row(chance.randrange(100)), 0
    message = ModelInferRequest.FromString(ECHO.SerializeToString())
    if chance.random() < 0.5:
        change = chance.randrange(7)
        if change == 0:
            message.model_name = chance.choice(["", "echo\0", "\u0435cho", "nobody", "x" * 100])
        elif change == 1:
            message.inputs[0].shape[:] = [chance.choice([-1, 0, 1, 2, 16, 2**62]) for _ in range(chance.randrange(4))]
        elif change == 2:
            tail = chance.randbytes(chance.randrange(200))
        elif change == 3:
            message.inputs[0].parameters["shared_memory_region"].int64_param = chance.randrange(-1, 3)
        elif change == 4:
            message.raw_input_contents.append(tail[: chance.choice([0, 63, 64])])
        elif change == 5:
            timeout_us = chance.randrange(1, 2000)
        else:
            head = bytearray(message.SerializeToString())
            head[chance.randrange(len(head))] = chance.randrange(256)
            return frame(Frame.INFER, number, bytes(head) + tail, len(head))
    return infer_frame(number, message, tail, timeout_us)


def random_frames(chance: random.Random) -> bytes:
    """What a fuzzer would send: frames that are right or almost right, and now and then a byte changed."""
    makers = [
        lambda: random_request(chance),
        lambda: random_request(chance),
        lambda: (first := random_request(chance)) + frame(Frame.CANCEL, native.HEADER.unpack_from(first)[4]),
        lambda: frame(Frame.CANCEL, chance.randrange(400)) + frame(Frame.RELEASE, 1),
        lambda: frame(Frame.CALL, 400 + chance.randrange(400), b"\x0dModelMetadata\x0a\x04echo"),
        lambda: frame(
            Frame.CALL, 400 + chance.randrange(400), b"\x0aServerLive" + chance.randbytes(chance.randrange(3))
        ),
    ]
    rare = [
        lambda: frame(Frame.REGION, 1, bytes(8), descriptors=1),
        lambda: frame(Frame.CALL, 1, chance.randbytes(chance.randrange(20))),
        lambda: frame(chance.randrange(256), 1, chance.randbytes(chance.randrange(99)), chance.randrange(99)),
        lambda: frame(Frame.INFER, 1, b"", length=chance.randrange(2**32)),
    ]
    parts = [chance.choice(rare if chance.random() < 0.02 else makers)() for _ in range(chance.randrange(1, 40))]
    content = bytearray(b"".join(parts))
    if chance.random() < 0.2:
        content[chance.randrange(len(content))] = chance.randrange(256)
    return bytes(content)


def test_a_thousand_random_conversations_over_the_socket(served):
    before = resident_bytes(served.running.pid)
    descriptors = open_descriptors(served.running.pid)
    logged = len(served.running.log)
    seen: Counter[str] = Counter()
    for seed in range(1000):
        chance = random.Random(seed)
        with served.native(hello=False) as client, contextlib.suppress(OSError, EOFError):
            client.send(HELLO * (chance.random() < 0.98) + random_frames(chance))
            if chance.random() < 0.3:
                continue
            client.send(frame(Frame.CALL, 999, b"\x0aServerLive"))
            while (answer := client.read()).id != 999:
                seen[answer.error[0] if answer.kind == Frame.ERROR else str(answer.kind)] += 1
                if answer.kind == Frame.ERROR and answer.error[0] != "cancelled":
                    check_message(answer.error[1])
    assert {str(Frame.RESULT.value), str(Frame.REPLY.value), "invalid-request", "cancelled"} <= set(seen)
    assert served.answers()
    wait_until(lambda: open_descriptors(served.running.pid) <= descriptors, "every descriptor is closed")
    wait_until(lambda: served.model()["queued"] == served.model()["running"] == 0, "nothing is in flight")
    assert resident_bytes(served.running.pid) - before < 16 * MIB
    assert "Traceback" not in served.running.log[logged:]


class _NoModels:
    """An engine without models."""

    accepting = True

    def __init__(self) -> None:
        self.clients = Clients(ClientsSection())

    def plan(self, name, version, inputs, outputs):
        raise ModelNotFound("cannot find the model: there is none")

    def model_is_ready(self, name, version=""):
        return False


@pytest.mark.parametrize("first", range(0, 600, 100))
def test_the_parser_survives_random_bytes_in_random_pieces(first):
    """In process, where an exception that is no refusal would be seen; the frames come in reads of any length."""

    async def converse(seed: int) -> None:
        chance = random.Random(seed)
        loop = asyncio.get_running_loop()
        problems = []
        loop.set_exception_handler(lambda _, context: problems.append(context))
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        with ours, theirs:
            theirs.setblocking(False)
            ours.setblocking(False)
            left = []
            lobby = SimpleNamespace(
                engine=_NoModels(),
                limits=LimitsSection(max_request_bytes=100_000, max_requests_in_flight=4),
                budget=BodyBudget(150_000),
                regions=0,
                max_regions=4,
                left=left.append,
            )
            connection = NativeConnection(lobby, theirs, Peer("native", Role.ADMIN, 0, 0, 0))
            content = HELLO + random_frames(chance) if chance.random() < 0.9 else chance.randbytes(500)
            if chance.random() < 0.2:
                content += frame(Frame.INFER, 9, bytes(90_000), head=chance.randrange(90_001))
            while content and not left:
                size = chance.choice([1, 7, 24, 25, 100, 100_000])
                with contextlib.suppress(BlockingIOError, BrokenPipeError):
                    sent = ours.send(content[:size])
                    content = content[sent:]
                await asyncio.sleep(0)
                with contextlib.suppress(BlockingIOError, ConnectionResetError):
                    ours.recv(1 << 20)
            for _ in range(5):
                await asyncio.sleep(0)
            connection.close()
            assert left == [connection]
            assert len(lobby.engine.clients) == 0
        assert not problems, (seed, problems)

    for seed in range(first, first + 100):
        asyncio.run(converse(seed))


def test_nobody_is_hurt_by_a_pipe_that_breaks(served):
    """SIGPIPE is ignored, and clients that vanish before their answer break nothing."""
    ignored = next(
        line for line in Path(f"/proc/{served.running.pid}/status").read_text().splitlines() if "SigIgn" in line
    )
    assert int(ignored.split()[1], 16) >> 12 & 1
    for _ in range(200):
        with served.native() as client:
            client.send(infer_frame(1, ECHO, row(1)) + frame(Frame.CALL, 2, b"\x0aServerLive"))
    assert served.answers()
