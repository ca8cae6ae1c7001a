"""Errors of the daemon and of the wire, as the callers of both clients meet them."""

import asyncio
import pickle
import socket
import threading

import numpy as np
import pytest

import appliance_client
from appliance import errors as daemon_errors
from appliance.wire import native
from appliance.wire.native import Frame
from appliance_client import (
    ApplianceError,
    AsyncClient,
    Client,
    ConnectionLost,
    DaemonUnreachable,
    DeadlineExceeded,
    ModelNotFound,
    Overloaded,
    PermissionDenied,
    ProtocolError,
)
from appliance_client.errors import KINDS

X = {"x": np.ones(4, np.float32)}


def blocking(path, **options):
    with Client(path, **options) as client:
        return client.infer("m", X)


def concurrent(path, **options):
    async def run():
        async with AsyncClient(path, **options) as client:
            return await client.infer("m", X)

    return asyncio.run(run())


both = pytest.mark.parametrize("infer", [blocking, concurrent])


def test_the_client_has_a_class_for_every_kind_of_the_daemon_and_agrees_on_retrying():
    assert set(KINDS) == set(daemon_errors.KINDS)
    for kind, theirs in daemon_errors.KINDS.items():
        ours = KINDS[kind]
        assert ours.__name__ == theirs.__name__
        assert ours.is_retryable == theirs.is_retryable
        assert getattr(appliance_client, ours.__name__) is ours


@both
@pytest.mark.parametrize("kind", sorted(daemon_errors.KINDS))
def test_every_kind_arrives_as_its_class(peer, infer, kind):
    peer.models["m"] = lambda session, request: session.error(request.identifier, kind, "cannot: ä", is_retryable=True)
    with pytest.raises(ApplianceError, match=r"^cannot: ä$") as caught:
        infer(peer.path)
    assert type(caught.value) is KINDS[kind]
    assert caught.value.kind == kind
    assert caught.value.is_retryable


@both
def test_a_kind_of_a_later_daemon_arrives_as_the_base_class_with_its_word(peer, infer):
    peer.models["m"] = lambda session, request: session.error(request.identifier, "moon-phase", "cannot: new moon")
    with pytest.raises(ApplianceError) as caught:
        infer(peer.path)
    assert type(caught.value) is ApplianceError
    assert (caught.value.kind, caught.value.is_retryable) == ("moon-phase", False)


def test_after_an_error_the_same_connection_serves_the_next_request(peer):
    peer.models["bad"] = lambda session, request: session.error(request.identifier, "model-not-found")
    with Client(peer.path) as client:
        with pytest.raises(ModelNotFound):
            client.infer("bad", X)
        client.infer("good", X)
    assert len(peer.sessions) == 1


def test_lost_connections_and_deadlines_are_pythons_errors_too():
    assert issubclass(ConnectionLost, ConnectionError)
    assert issubclass(DaemonUnreachable, ConnectionError)
    assert issubclass(DeadlineExceeded, TimeoutError)


def test_errors_survive_pickling_for_a_callers_process_pool():
    for error in (Overloaded("cannot: full", is_retryable=False), ApplianceError("a", kind="b"), DeadlineExceeded("c")):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), copy.kind, copy.is_retryable) == (
            type(error),
            str(error),
            error.kind,
            error.is_retryable,
        )


@both
def test_a_missing_socket_tells_how_to_start_the_daemon(tmp_path, infer):
    with pytest.raises(DaemonUnreachable, match="no such socket; start the service with `systemctl start") as caught:
        infer(tmp_path / "none.sock")
    assert caught.value.is_retryable


@both
def test_a_socket_nobody_listens_on_is_unreachable(tmp_path, infer):
    with socket.socket(socket.AF_UNIX) as unheard:
        unheard.bind(str(tmp_path / "infer.sock"))
        with pytest.raises(DaemonUnreachable, match="connection refused"):
            infer(tmp_path / "infer.sock")


@both
def test_a_socket_of_another_group_says_so(tmp_path, infer, monkeypatch):
    def refuse(self, address):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(DaemonUnreachable, match="ask to be added to the group"):
        infer(tmp_path / "infer.sock")


def frame(kind, identifier=1, body=b"", *, length=None, head=0, descriptors=0, flags=0):
    return (
        native.HEADER.pack(len(body) if length is None else length, kind, flags, descriptors, identifier, head, 0)
        + body
    )


WELCOME = frame(Frame.WELCOME, 0, native.WELCOME.pack(native.MAGIC, 1, 0, 1 << 20, 64, 4, 1, 1 << 20) + b"9")


@both
@pytest.mark.parametrize(
    ("content", "error", "reason"),
    [
        (b"", ConnectionLost, "it was closed"),
        (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", ProtocolError, "is not in this protocol"),
        (bytes(range(256)) * 40, ProtocolError, "is not in this protocol"),
        (WELCOME[:10], ConnectionLost, "in the middle of a frame"),
        (WELCOME[:40], ConnectionLost, "in the middle of a frame"),
        (frame(Frame.WELCOME, 0, b"IAP1"), ProtocolError, "4 bytes of at least 32"),
        (WELCOME.replace(b"IAP1", b"XXXX"), ProtocolError, "begins with b'XXXX'"),
        (WELCOME.replace(b"IAP1\1", b"IAP1\7"), ProtocolError, "it chose version 7"),
        (frame(Frame.WELCOME, 0, length=1 << 20), ProtocolError, "announces 1048576 bytes, at most 4096"),
        (frame(Frame.RESULT, 0, bytes(28)), ProtocolError, "was not due|answers hello with"),
        (frame(Frame.ERROR, 0, native.pack_error("overloaded", "too many", True)), Overloaded, "too many"),
        (frame(Frame.ERROR, 0, b"\0"), ProtocolError, "truncated"),
    ],
)
def test_a_broken_handshake_is_an_error_and_no_hang(peer, infer, content, error, reason):
    peer.script = lambda connection: connection.recv(1 << 16) and connection.sendall(content)
    with pytest.raises(error, match=reason):
        infer(peer.path)


@both
@pytest.mark.parametrize(
    ("content", "error", "reason"),
    [
        (b"", ConnectionLost, "it was closed"),
        (b"\0" * 23, ConnectionLost, "in the middle of a frame"),
        (b"\xff" * 24, ProtocolError, "is not in this protocol"),
        (frame(Frame.INFER), ProtocolError, "type 2 is not in this protocol"),
        (frame(Frame.RESULT, length=100), ConnectionLost, "in the middle of a frame"),
        (frame(Frame.RESULT, length=500_000), ConnectionLost, "in the middle of a frame"),
        (frame(Frame.RESULT, length=2_000_000), ProtocolError, "announces 2000000 bytes, at most 1000000"),
        (frame(Frame.RESULT, body=bytes(40), head=41), ProtocolError, "its head has 41 bytes, its body 40"),
        (frame(Frame.RESULT, body=bytes(28), descriptors=1), ProtocolError, "announces 1 descriptors"),
        (frame(Frame.RESULT, body=bytes(27)), ProtocolError, "27 bytes of at least 28"),
        (frame(Frame.RESULT, body=bytes(28) + b"\xff\xff", head=2), ProtocolError, "no ModelInferResponse"),
        (frame(Frame.RESULT, body=bytes(28) + b"tail"), ProtocolError, "4 bytes are left"),
        (frame(Frame.RESULT, 77, bytes(28)), ProtocolError, "id 77 was not asked for"),
        (frame(Frame.REPLY, 1), ProtocolError, "was not due|not asked for"),
        (frame(Frame.WELCOME, 0), ProtocolError, "was not due"),
        (frame(Frame.ERROR, 1, b"\0\xffab"), ProtocolError, "truncated"),
        (
            frame(Frame.ERROR, 0, native.pack_error("invalid-request", "no", False)),
            appliance_client.InvalidRequest,
            "no",
        ),
    ],
)
def test_a_broken_answer_is_an_error_and_no_hang(peer, infer, content, error, reason):
    def script(connection):
        connection.recv(1 << 16)
        connection.sendall(WELCOME)
        connection.recv(1 << 16)
        connection.sendall(content)

    peer.script = script
    with pytest.raises(error, match=reason):
        infer(peer.path, max_answer_bytes=1_000_000)


def outputs(*declared):
    from appliance.wire import open_inference_pb2 as pb

    return pb.ModelInferResponse(
        outputs=[{"name": "y", "datatype": datatype, "shape": shape} for datatype, shape in declared]
    ).SerializeToString()


@both
@pytest.mark.parametrize(
    ("head", "tail", "reason"),
    [
        (outputs(("FP32", [2])), bytes(7), "needs 8 bytes, 7 are left"),
        (outputs(("FP32", [2])), bytes(9), "1 bytes are left after its outputs"),
        (outputs(("FP32", [-1])), b"", "has a negative dimension"),
        (outputs(("FP32", [1 << 40, 1 << 40])), b"", "0 are left"),
        (outputs(("FP32", [0, 1 << 62, 1 << 62])), b"", "cannot read output 'y'"),
        (outputs(("FP32", [1] * 65)), bytes(4), "65 dimensions"),
        (outputs(("FP8", [1])), b"\0", "'FP8' is no datatype"),
        (outputs(("BYTES", [1 << 40])), bytes(8), "8 are left"),
        (outputs(("BYTES", [2])), b"\4\0\0\0abcd\0", "cannot read output 'y'"),
        (outputs(("BYTES", [1])), b"\5\0\0\0abcd", "needs 5 bytes, 4 are left"),
    ],
)
def test_an_answer_whose_tail_does_not_fit_its_outputs_is_refused(peer, infer, head, tail, reason):
    body = native.TIMINGS.pack(*range(7)) + head + tail
    peer.models["m"] = lambda session, request: session.send(Frame.RESULT, request.identifier, body, len(head))
    with pytest.raises(ProtocolError, match=reason):
        infer(peer.path)


def test_frames_cut_at_every_byte_arrive_whole(peer):
    """The peer sends two answers in pieces that end at every place once."""
    pieces = []

    def respond(session, request):
        session.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        sending = session.socket

        class Cut:
            def sendall(self, content):
                for begin in range(0, len(content), len(pieces) + 1):
                    sending.sendall(content[begin : begin + len(pieces) + 1])

            def shutdown(self, how):  # the fixture may hang up before the socket stands in its place again
                sending.shutdown(how)

        session.socket = Cut()
        session.echo(request)
        session.socket = sending
        pieces.append(1)

    peer.models["m"] = respond
    with Client(peer.path) as client:
        for length in range(1, 40):
            value = np.arange(length, dtype=np.float32)
            assert (client.infer("m", {"x": value})["x"] == value).all()


def test_after_the_daemon_restarted_the_next_call_connects_anew(peer):
    with Client(peer.path) as client:
        client.infer("m", X)
        peer.hang_up()
        client.infer("m", X)
    assert len(peer.sessions) == 2


def test_after_the_daemon_restarted_the_next_concurrent_call_connects_anew(peer):
    async def run():
        async with AsyncClient(peer.path) as client:
            await client.infer("m", X)
            await asyncio.to_thread(peer.hang_up)
            await client.infer("m", X)

    asyncio.run(run())
    assert len(peer.sessions) == 2


def test_a_connection_lost_after_the_request_was_sent_is_reported_not_repeated(peer):
    peer.models["m"] = lambda session, request: session.socket.shutdown(socket.SHUT_RDWR)
    with Client(peer.path) as client, pytest.raises(ConnectionLost):
        client.infer("m", X)
    assert len(peer.received(Frame.INFER)) == 1


@both
def test_retries_repeat_what_is_retryable(peer, infer):
    def respond(session, request):
        if len(peer.received(Frame.INFER)) < 3:
            session.error(request.identifier, "overloaded", is_retryable=True)
        else:
            session.echo(request)

    peer.models["m"] = respond
    infer(peer.path, retries=3)
    assert len(peer.received(Frame.INFER)) == 3


@both
def test_retries_reach_over_a_lost_connection(peer, infer):
    def respond(session, request):
        if len(peer.received(Frame.INFER)) == 1:
            session.socket.shutdown(socket.SHUT_RDWR)
        else:
            session.echo(request)

    peer.models["m"] = respond
    infer(peer.path, retries=1)
    assert len(peer.sessions) == 2


@both
@pytest.mark.parametrize(("retryable", "retries", "count"), [(False, 5, 1), (True, 2, 3), (True, 0, 1)])
def test_retries_end(peer, infer, retryable, retries, count):
    peer.models["m"] = lambda session, request: session.error(request.identifier, "overloaded", is_retryable=retryable)
    with pytest.raises(Overloaded):
        infer(peer.path, retries=retries)
    assert len(peer.received(Frame.INFER)) == count


@both
def test_no_retry_starts_that_the_timeout_would_not_let_finish(peer, infer):
    peer.models["m"] = lambda session, request: session.error(request.identifier, "overloaded", is_retryable=True)
    with pytest.raises(Overloaded):
        infer(peer.path, retries=1000, timeout=0.2)
    assert len(peer.received(Frame.INFER)) < 10


@both
def test_a_daemon_that_does_not_answer_is_given_up_after_the_timeout(peer, infer):
    peer.models["m"] = lambda session, request: None
    with pytest.raises(DeadlineExceeded, match="did not answer within the timeout"):
        infer(peer.path, timeout=0.05)


@both
def test_a_daemon_that_trickles_is_given_up_after_the_timeout(peer, infer):
    stop = threading.Event()

    def respond(session, request):
        session.socket.sendall(frame(Frame.RESULT, request.identifier, length=60_000))
        while not stop.wait(0.02):
            session.socket.sendall(b"\0")

    peer.models["m"] = respond
    with pytest.raises(DeadlineExceeded):
        infer(peer.path, timeout=0.1)
    stop.set()


@both
def test_a_daemon_that_does_not_shake_hands_is_given_up(peer, infer):
    peer.script = lambda connection: connection.recv(1 << 16) and connection.recv(1)
    with pytest.raises(DeadlineExceeded):
        infer(peer.path, connect_timeout=0.05)


@both
@pytest.mark.parametrize("timeout", [0, -1.0])
def test_a_timeout_that_has_passed_sends_nothing(peer, infer, timeout):
    with pytest.raises(DeadlineExceeded, match="before it could be sent"):
        infer(peer.path, timeout=timeout)
    assert not peer.received(Frame.INFER)


@both
def test_the_timeout_reaches_the_daemon_in_microseconds(peer, infer):
    seen = []
    peer.models["m"] = lambda session, request: (seen.append(request.timeout_us), session.echo(request))
    infer(peer.path, timeout=30)
    infer(peer.path)
    assert 20_000_000 < seen[0] <= 30_000_000
    assert seen[1] == 0


@both
def test_a_timeout_too_long_for_the_header_travels_in_the_message(peer, infer):
    seen = []

    def respond(session, request):
        seen.append((request.timeout_us, request.message.parameters["timeout"].int64_param))
        session.echo(request)

    peer.models["m"] = respond
    infer(peer.path, timeout=7200)
    ((in_header, in_message),) = seen
    assert in_header == 0
    assert 7_100_000_000 < in_message <= 7_200_000_000


def test_a_draining_daemon_is_left_after_the_answer(peer):
    def respond(session, request):
        session.send(Frame.GOAWAY)
        session.echo(request)

    peer.models["m"] = respond
    with Client(peer.path) as client:
        client.infer("m", X)
        client.infer("m", X)
    assert len(peer.sessions) == 2


def test_a_draining_daemon_is_left_after_the_answers_to_concurrent_calls(peer):
    late = []

    def respond(session, request):
        late.append(lambda: session.echo(request))
        if len(late) == 2:
            session.send(Frame.GOAWAY)
            for answer in late:
                answer()

    peer.models["m"] = respond

    async def run():
        async with AsyncClient(peer.path) as client:
            await asyncio.gather(client.infer("m", X), client.infer("m", X))
            await client.infer("other", X)

    asyncio.run(run())
    assert len(peer.sessions) == 2


@both
def test_a_role_too_low_is_said(peer, infer):
    peer.models["m"] = lambda session, request: session.error(request.identifier, "permission-denied", "cannot: role")
    with pytest.raises(PermissionDenied, match="role"):
        infer(peer.path)


def test_failures_leave_no_descriptor_open(peer, open_descriptors):
    peer.models["m"] = lambda session, request: session.socket.shutdown(socket.SHUT_RDWR)

    def fail():
        for infer in (blocking, concurrent):
            with pytest.raises(ConnectionLost):
                infer(peer.path)
        peer.hang_up()

    fail()
    before = open_descriptors()
    for _ in range(10):
        fail()
    assert open_descriptors() == before


def test_a_closed_client_says_so(peer):
    client = Client(peer.path)
    client.infer("m", X)
    client.close()
    client.close()
    with pytest.raises(ConnectionLost, match="the client is closed"):
        client.infer("m", X)


def test_a_closed_concurrent_client_says_so(peer):
    async def run():
        client = AsyncClient(peer.path)
        await client.infer("m", X)
        await client.close()
        with pytest.raises(ConnectionLost, match="the client is closed"):
            await client.infer("m", X)

    asyncio.run(run())
