"""Who may ask at all, and what a slow or hostile client can hold."""

import contextlib
import json
import socket

import pytest

LIVE = "/v2/health/live"


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1", "[::1]:80", "LOCALHOST"])
@pytest.mark.parametrize("tcp", [False, True])
def test_local_hosts_are_served(server, host, tcp):
    assert server.ask("GET", LIVE, headers={"Host": host}, tcp=tcp).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "localhost:x", "127.0.0.1:80:80", "xlocalhost", "10.0.0.1", "*"]
)
@pytest.mark.parametrize("tcp", [False, True])
def test_foreign_hosts_are_refused_on_every_address(server, host, tcp):
    answer = server.ask("GET", LIVE, headers={"Host": host}, tcp=tcp)
    assert (answer.status, answer.json["kind"]) == (403, "permission-denied")


@pytest.mark.parametrize("tcp", [False, True])
def test_origin_must_be_local_too(server, tcp):
    for origin in ("https://evil.example", "null", "http://localhost.evil.example", "file://localhost", ""):
        assert server.ask("GET", LIVE, headers={"Origin": origin}, tcp=tcp).status == 403
    assert server.ask("GET", LIVE, headers={"Origin": "http://localhost:3000"}, tcp=tcp).status == 200


def test_configured_hosts_are_served(serve):
    server = serve(access={"hosts": ["box.example"]})
    assert server.ask("GET", LIVE, headers={"Host": "box.example:8000"}, tcp=True).status == 200
    assert server.ask("GET", LIVE, headers={"Host": "boxxexample"}, tcp=True).status == 403
    assert server.ask("GET", LIVE, headers={"Origin": "https://box.example"}, tcp=True).status == 200


def until_hung_up(sock):
    """Everything received until the other end closes, politely or not."""
    received = b""
    try:
        while chunk := sock.recv(65536):
            received += chunk
    except ConnectionError:
        pass
    return received


def exchange(sock, request):
    sock.sendall(request)
    return until_hung_up(sock)


def test_no_host_is_served_on_the_unix_socket_only(server):
    request = b"GET /v2/health/live HTTP/1.0\r\n\r\n"
    assert exchange(server.raw(), request).startswith(b"HTTP/1.1 200")
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as tcp:
        assert exchange(tcp, request).startswith(b"HTTP/1.1 403")


def test_two_hosts_are_refused(server):
    request = b"GET /v2/health/live HTTP/1.1\r\nhost: localhost\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    assert exchange(server.raw(), request).startswith(b"HTTP/1.1 403")


def test_garbage_is_answered_with_400_and_not_logged(server, caplog):
    for garbage in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"IAP1\x01\x00\x00\x00",
        b"GET  / HTTP/9.9\r\n\r\n",
    ):
        answer = exchange(server.raw(), garbage)
        assert answer.startswith(b"HTTP/1.1 400")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["kind"] == "invalid-request"
    assert caplog.text == ""


@pytest.mark.parametrize(
    "request_head",
    [
        b"GET /v2 HTTP/1.1\r\nhost: localhost\r\nconnection: close, upgrade\r\nupgrade: websocket\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nhost: localhost\r\nconnection: close, upgrade\r\nupgrade: h2c\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
        b"CONNECT localhost:80 HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_upgrades_and_odd_methods_get_an_answer(server, request_head):
    assert exchange(server.raw(), request_head).startswith(b"HTTP/1.1 ")
    assert server.ask("GET", LIVE).status == 200


@pytest.mark.parametrize("piece", [b"x-filler: " + b"y" * 1000 + b"\r\n", b"z" * 1000])
def test_endless_headers_are_cut_off(server, piece):
    """Whether in many headers or in one that never ends."""
    sock = server.raw()
    sock.sendall(b"GET /v2 HTTP/1.1\r\nhost: localhost\r\nx-long: ")
    with contextlib.suppress(ConnectionError):
        for _ in range(10_000):
            sock.sendall(piece)
        pytest.fail("ten megabytes of headers were taken")
    assert server.ask("GET", LIVE).status == 200


def test_headers_too_large_are_answered(server):
    answer = server.ask("GET", "/v2", headers={"x-filler": "y" * 70_000})
    assert (answer.status, answer.json["kind"]) == (400, "invalid-request")
    assert "65536" in answer.json["error"]


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"GET /v2 HTTP/1.1\r\nhost: loc",
        b"POST /v2/repository/index HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n\r\n{",
    ],
)
def test_a_request_that_does_not_arrive_is_given_up(serve, start):
    """A connection that says nothing, half a header or half a body is closed after `header_seconds`."""
    sock = serve(limits={"header_seconds": 0.2}).raw()
    sock.sendall(start)
    assert until_hung_up(sock) == b""


def test_a_trickle_does_not_keep_a_connection(serve):
    """Bytes that keep coming do not extend the time headers have."""
    sock = serve(limits={"header_seconds": 0.2}).raw()
    sock.settimeout(0.02)
    sock.sendall(b"GET /v2 HTTP/1.1\r\nx: ")

    def is_closed():
        try:
            sock.sendall(b"y")
            return sock.recv(1) == b""
        except TimeoutError:
            return False
        except ConnectionError:
            return True

    assert any(is_closed() for _ in range(1000))


def test_an_idle_connection_that_was_served_is_kept(serve):
    """Deadlines are for requests under way, not for the pause between two."""
    server = serve(limits={"header_seconds": 0.05})
    connection = server.connect()
    connection.request("GET", LIVE)
    connection.getresponse().read()
    kept = connection.sock
    waiting = server.connect()
    waiting.connect()
    assert waiting.sock.recv(1) == b""  # a silent connection's end shows that several deadlines have passed
    connection.request("GET", LIVE)
    assert connection.getresponse().status == 200
    assert connection.sock is kept


def test_connections_over_the_bound_are_refused(serve):
    server = serve(limits={"max_connections": 2})
    held = [server.connect() for _ in range(2)]
    for connection in held:
        connection.request("GET", LIVE)
        connection.getresponse().read()
    answer = server.ask("GET", LIVE)
    assert (answer.status, answer.json["kind"], answer.headers["connection"]) == (429, "overloaded", "close")
    held[0].request("GET", LIVE)
    assert held[0].getresponse().status == 200


def test_far_over_the_bound_connections_are_hung_up(serve):
    server = serve(limits={"max_connections": 1})
    held = [server.raw() for _ in range(2)]
    assert until_hung_up(server.raw()) == b""
    assert len(held) == 2


def test_only_one_of_the_sockets_may_be_served(serve, tmp_path):
    server = serve()
    server.run(server.server.start(None, None))
    assert server.ask("GET", LIVE).status == 200
