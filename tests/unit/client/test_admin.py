"""The administrative client, against a real HTTP server on a Unix socket."""

import json
import socketserver
import threading
from http.server import BaseHTTPRequestHandler

import pytest

from appliance_client import (
    AdminClient,
    ApplianceError,
    ConnectionLost,
    DaemonUnreachable,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotReady,
    ProtocolError,
)


class Server(socketserver.ThreadingUnixStreamServer):
    """Answers every request with what the test says."""

    daemon_threads = True
    reply = (200, "application/json", b"{}")
    raw: bytes | None = None
    silent = False
    released = threading.Event()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def address_string(self):
        return "unix"

    def log_message(self, *_):
        """Silent."""

    def do_GET(self):
        self.do_POST()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append((self.command, self.path, dict(self.headers), body))
        if self.server.silent:
            self.server.released.wait(20)
            return
        if self.server.raw is not None:
            self.wfile.write(self.server.raw)
            self.close_connection = True
            return
        status, content_type, content = self.server.reply
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server(tmp_path):
    with Server(str(tmp_path / "http.sock"), Handler) as running:
        running.seen = []
        running.released = threading.Event()
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.released.set()
        running.shutdown()
        thread.join()


@pytest.fixture
def admin(server):
    return AdminClient(server.server_address)


def test_get_gives_the_json_value(server, admin):
    server.reply = (200, "application/json; charset=utf-8", json.dumps({"models": ["ä"]}).encode())
    assert admin.get("/admin/models?ready=1") == {"models": ["ä"]}
    ((method, path, headers, body),) = server.seen
    assert (method, path, body) == ("GET", "/admin/models?ready=1", b"")
    assert headers["Host"] == "localhost"
    assert headers["Accept"] == "application/json"


def test_get_gives_text_where_it_is_no_json(server, admin):
    server.reply = (200, "text/plain; version=0.0.4", b"up 1\n")
    assert admin.get("/metrics") == "up 1\n"


def test_an_empty_reply_is_none(server, admin):
    server.reply = (200, "application/json", b"")
    assert admin.get("/v2/health/ready") is None


def test_post_sends_json(server, admin):
    admin.post("/x", {"a": [1, "ä"]})
    admin.post("/y")
    (_, _, headers, body), (_, _, _, empty) = server.seen
    assert json.loads(body) == {"a": [1, "ä"]}
    assert headers["Content-Type"] == "application/json"
    assert empty == b""


def test_errors_are_the_same_classes_as_on_the_native_socket(server, admin):
    server.reply = (503, "application/json", b'{"error": "cannot use m: it loads", "kind": "model-not-ready"}')
    with pytest.raises(ModelNotReady, match=r"^cannot use m: it loads$") as caught:
        admin.get("/x")
    assert caught.value.is_retryable


@pytest.mark.parametrize(
    ("content_type", "body", "reason"),
    [
        ("application/json", b'{"error": "unknown path"}', "unknown path"),
        ("application/json", b'{"error": {"message": "bad", "type": "x"}}', "bad"),
        ("application/json", b"[]", "cannot GET /x: the daemon answered with status 404"),
        ("text/html", b"<h1>gone</h1>", "cannot GET /x: the daemon answered with status 404"),
    ],
)
def test_an_error_without_kind_is_the_base_class(server, admin, content_type, body, reason):
    server.reply = (404, content_type, body)
    with pytest.raises(ApplianceError, match=reason) as caught:
        admin.get("/x")
    assert type(caught.value) is ApplianceError


def test_a_kind_decides_whatever_the_status(server, admin):
    server.reply = (400, "application/json", b'{"error": "no", "kind": "invalid-request"}')
    with pytest.raises(InvalidRequest):
        admin.post("/x", 1)


def test_json_that_is_none_is_refused(server, admin):
    server.reply = (200, "application/json", b"{")
    with pytest.raises(ProtocolError, match="not the JSON it claims to be"):
        admin.get("/x")


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"", ConnectionLost),
        (b"garbage\r\n\r\n", ProtocolError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", ConnectionLost),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc", ConnectionLost),
    ],
)
def test_a_broken_reply_is_an_error(server, admin, raw, error):
    server.raw = raw
    with pytest.raises(error):
        admin.get("/x")


def test_a_daemon_that_does_not_answer_is_given_up(server, admin):
    server.silent = True
    with pytest.raises(DeadlineExceeded, match="GET /x"):
        admin.get("/x", timeout=0.05)


def test_a_missing_socket_tells_how_to_start_the_daemon(tmp_path):
    with pytest.raises(DaemonUnreachable, match="applianced"):
        AdminClient(tmp_path / "none.sock").get("/x")


def test_requests_leave_no_descriptor_open(server, admin, open_descriptors):
    admin.get("/x")
    before = open_descriptors()
    for _ in range(5):
        admin.get("/x")
    assert open_descriptors() <= before + 1  # the server's side of the last one may still be closing
