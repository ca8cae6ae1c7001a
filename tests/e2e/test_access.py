"""Who gets in, and what each may do: sockets' modes, roles by method and transport, one daemon to a directory."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from hpack import Decoder, Encoder

from appliance.config import Config
from appliance.server.access import METHOD_ROLE
from appliance.server.http_app import HttpApp
from appliance.server.oip import CALLS
from appliance.types import Role
from appliance.wire import open_inference_pb2 as pb
from support import h2
from support.daemon import FAKE_BACKEND, PATIENCE_SECONDS, RunningDaemon, children, start_daemon
from support.errors import check_message
from support.models import write_fake
from support.native import Native, request

NOBODY = 65534
IS_ROOT = os.geteuid() == 0
SOCKETS = ("infer", "grpc", "http")
ADMIN_METHODS = {method for method, role in METHOD_ROLE.items() if role is Role.ADMIN}
#: Those that gRPC and the native socket carry; the others are HTTP's.
ADMIN_CALLS = ADMIN_METHODS & set(CALLS)
ECHO = request("echo", ("x", "FP32", (1, 16)))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    write_fake(directory / "echo")
    return directory


@pytest.fixture(autouse=True)
def loaded(request: pytest.FixtureRequest):
    """The model is ready again after a test that unloads it."""
    yield
    if "served" in request.fixturenames:
        running = request.getfixturevalue("served")
        assert running.http("POST", "/v2/repository/models/echo/load")[0] == 200


@contextlib.contextmanager
def open_directory():
    """A directory that every user may pass through; pytest's own are the owner's alone."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@pytest.fixture(scope="module")
def served(models: Path):
    """A daemon as it comes: TCP callers may infer."""
    with open_directory() as directory, start_daemon(directory, models, environment=FAKE_BACKEND) as running:
        yield running


def as_user(uid: int, action: Callable[[], Any]) -> Any:
    """What `action` gives in a child process of another user, who is in no group but that of the same number."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            answer = json.dumps(action())
        except BaseException as error:
            answer = json.dumps(f"{type(error).__name__}: {error}")
        with contextlib.suppress(BaseException):
            os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return json.loads(answer)


def connects(path: str) -> str:
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(path)
        except OSError as error:
            return type(error).__name__
        return "connected"


@contextlib.contextmanager
def let_in(running: RunningDaemon):
    """Make another user a member of the sockets' group, as far as the kernel can tell."""
    paths = [running.socket_dir, *(running.socket_dir / f"{name}.sock" for name in SOCKETS)]
    owners = [path.stat().st_gid for path in paths]
    for path in paths:
        os.chown(path, -1, NOBODY)
    yield
    for path, owner in zip(paths, owners, strict=True):
        os.chown(path, -1, owner)


# ---------------------------------------------------------------- the door


def test_sockets_belong_to_the_user_and_the_group_alone(served):
    assert stat.S_IMODE(served.socket_dir.stat().st_mode) == 0o750
    for name in SOCKETS:
        status = (served.socket_dir / f"{name}.sock").lstat()
        assert stat.S_ISSOCK(status.st_mode)
        assert stat.S_IMODE(status.st_mode) == 0o660
    assert stat.S_IMODE((served.socket_dir / "endpoints.json").stat().st_mode) == 0o640


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_modes_do_not_depend_on_the_umask(models, umask):
    with open_directory() as directory:
        before = os.umask(umask)
        try:
            directory.chmod(0o755)
            (directory / "config.toml").touch(0o600)
            (directory / "config.toml").chmod(0o600)
            (directory / "log").touch()
            (directory / "log").chmod(0o600)
            running = start_daemon(directory, models, environment=FAKE_BACKEND, repository={"load": []})
        finally:
            os.umask(before)
        with running:
            test_sockets_belong_to_the_user_and_the_group_alone(running)


def test_a_user_outside_the_group_cannot_connect(served):
    if not IS_ROOT:  # whoever cannot become another user still sees the modes that keep others out
        test_sockets_belong_to_the_user_and_the_group_alone(served)
        return
    for name in SOCKETS:
        path = str(served.socket_dir / f"{name}.sock")
        assert as_user(NOBODY, lambda: connects(path)) == "PermissionError"  # noqa: B023
        os.chown(served.socket_dir, -1, NOBODY)
        try:
            assert as_user(NOBODY, lambda: connects(path)) == "PermissionError", "the socket itself"  # noqa: B023
        finally:
            os.chown(served.socket_dir, -1, 0)


# ---------------------------------------------------------------- roles


def body_of(method: str) -> bytes:
    if method in ADMIN_METHODS:
        return CALLS[method][0](model_name="echo").SerializeToString()
    return CALLS[method][0]().SerializeToString()


def ask_native(running: RunningDaemon) -> dict[str, str]:
    """What each method comes to over infer.sock: an error's kind, or ok."""
    outcomes = {}
    with Native(running.infer_socket) as client:
        for number, method in enumerate(CALLS, 1):
            answer = client.call(number, method, body_of(method))
            outcomes[method] = answer.error[0] if answer.kind == 18 else "ok"
            if answer.kind == 18:
                check_message(answer.error[1])
        answer = client.infer(99, ECHO, bytes(64))
        outcomes["ModelInfer"] = answer.error[0] if answer.kind == 18 else "ok"
    return outcomes


def routes() -> list[tuple[str, str, str]]:
    """Every HTTP route as method, path and the access table's name for it."""
    app = HttpApp(SimpleNamespace(), Config())
    try:
        rows = []
        for row in app._table():
            path = row.template.replace("[/versions/{version}]", "").replace("{model}", "echo")
            rows.append((row.method, path, row.access))
        return rows
    finally:
        app.close()


def ask_http(connect: Callable[[], http.client.HTTPConnection]) -> dict[str, int]:
    """The status of each route, by the method it stands for and its path."""
    outcomes = {}
    for method, path, access in routes():
        connection = connect()
        with contextlib.closing(connection):
            connection.request(method, path, b"")
            response = connection.getresponse()
            content = response.read()
            outcomes[f"{access} {path}"] = response.status
            if response.status == 403:
                check_message(json.loads(content)["error"])
    return outcomes


def over_unix(path: str) -> Callable[[], http.client.HTTPConnection]:
    def connect() -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("localhost", timeout=PATIENCE_SECONDS)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(PATIENCE_SECONDS)
        connection.sock.connect(path)
        return connection

    return connect


def ask_grpc(target: str) -> dict[str, str]:
    """The status of each method over gRPC."""
    outcomes = {}
    with grpc.insecure_channel(target) as channel:
        for method in CALLS:
            try:
                channel.unary_unary(f"/inference.GRPCInferenceService/{method}")(body_of(method), timeout=30)
                outcomes[method] = "OK"
            except grpc.RpcError as error:
                outcomes[method] = error.code().name
    return outcomes


def ask_grpc_bare(path: str) -> dict[str, str]:
    """The same over the Unix socket, spoken byte by byte: the library's threads do not survive a fork."""
    frames = h2.frames
    outcomes = {}
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE_SECONDS)
        sock.connect(path)
        encoder, decoder = Encoder(), Decoder()
        sock.sendall(frames.PREFACE + frames.frame(frames.SETTINGS, 0, 0, b""))
        stream = sock.makefile("rb")
        for number, method in enumerate(CALLS):
            fields = {
                ":method": "POST", ":scheme": "http", ":path": f"/inference.GRPCInferenceService/{method}",
                ":authority": "localhost", "te": "trailers", "content-type": "application/grpc",
            }  # fmt: skip
            head = frames.frame(frames.HEADERS, frames.END_HEADERS, 2 * number + 1, encoder.encode(fields.items()))
            body = h2.data(2 * number + 1, h2.message(body_of(method)), frames.END_STREAM)
            sock.sendall(head + body)
            answer: dict[str, str] = {}
            while "grpc-status" not in answer:
                high, low, kind, _, _ = frames.HEADER.unpack(stream.read(9))
                payload = stream.read(high << 8 | low)
                if kind == frames.HEADERS:
                    answer.update(decoder.decode(payload))
            status = int(answer["grpc-status"])
            outcomes[method] = next(code.name for code in grpc.StatusCode if code.value[0] == status)
        stream.close()
    return outcomes


def denied(outcomes: dict[str, Any], words: tuple) -> set[str]:
    return {method.partition(" ")[0] for method, outcome in outcomes.items() if outcome in words}


def test_every_method_has_a_role_and_every_transport_asks_for_it():
    assert set(CALLS) <= set(METHOD_ROLE)
    assert {access for _, _, access in routes()} <= set(METHOD_ROLE)
    assert {"RepositoryModelLoad", "RepositoryModelUnload"} <= ADMIN_METHODS


def test_a_user_of_the_group_may_infer_and_not_administer(served):
    if not IS_ROOT:
        pytest.xfail("only root can become a user who is no administrator")
    with let_in(served):
        native = as_user(NOBODY, lambda: ask_native(served))
        over_http = as_user(NOBODY, lambda: ask_http(over_unix(served.http_socket)))
        over_grpc = as_user(NOBODY, lambda: ask_grpc_bare(served.grpc_socket))
    assert denied(native, ("permission-denied",)) == ADMIN_CALLS, native
    assert native["ModelInfer"] == native["ServerMetadata"] == "ok"
    assert denied(over_http, (403,)) == ADMIN_METHODS, over_http
    assert denied(over_grpc, ("PERMISSION_DENIED", "UNIMPLEMENTED")) == ADMIN_CALLS, over_grpc


def test_the_daemons_own_user_is_an_administrator(served):
    native = ask_native(served)
    assert denied(native, ("permission-denied",)) == set(), native
    assert native["RepositoryModelLoad"] == native["RepositoryModelUnload"] == "ok"
    over_http = ask_http(over_unix(served.http_socket))
    assert denied(over_http, (403,)) == set(), over_http
    assert set(ask_grpc_bare(served.grpc_socket).values()) & {"PERMISSION_DENIED", "UNIMPLEMENTED"} == set()


@pytest.mark.parametrize("role", ["infer", "admin"])
def test_callers_over_tcp_have_the_role_of_the_configuration(models, served, role):
    with contextlib.ExitStack() as stack:
        running = served
        if role == "admin":
            directory = stack.enter_context(open_directory())
            running = start_daemon(directory, models, environment=FAKE_BACKEND, access={"tcp_role": "admin"})
            stack.enter_context(running)
        over_grpc = ask_grpc(running.grpc_tcp)
        host, _, port = running.http_tcp.rpartition(":")
        over_http = ask_http(lambda: http.client.HTTPConnection(host, int(port), timeout=PATIENCE_SECONDS))
    is_admin = role == "admin"
    assert denied(over_grpc, ("PERMISSION_DENIED", "UNIMPLEMENTED")) == (set() if is_admin else ADMIN_CALLS), over_grpc
    assert denied(over_http, (403,)) == (set() if is_admin else ADMIN_METHODS), over_http


def test_other_spellings_of_an_administrative_path_lead_nowhere(served):
    host, _, port = served.http_tcp.rpartition(":")
    load = "/v2/repository/models/echo/unload"
    for method in ("POST", "PUT", "GET", "HEAD", "DELETE", "PATCH"):
        for path in (
            load, f"{load}/", f"/{load}", load.upper(), load.replace("unload", "%75nload"), f"{load}?x=1", f"/.{load}",
            load.replace("/v2", "/v2/.."), f"/x/..{load}", load.replace("models", "models/"), f"http://localhost{load}",
        ):  # fmt: skip
            connection = http.client.HTTPConnection(host, int(port), timeout=PATIENCE_SECONDS)
            with contextlib.closing(connection):
                connection.putrequest(method, path, skip_host=path.startswith("http:"))
                if path.startswith("http:"):
                    connection.putheader("Host", "localhost")
                connection.putheader("Content-Length", "0")
                connection.endheaders()
                assert connection.getresponse().status in (400, 403, 404, 405), (method, path)
    assert served.model("echo")["state"] == "ready"


def test_users_named_in_the_configuration_are_administrators(models):
    if not IS_ROOT:
        pytest.xfail("only root can become a user who is no administrator")
    with open_directory() as directory:
        access = {"admin_uids": [NOBODY]}
        with start_daemon(directory, models, environment=FAKE_BACKEND, access=access) as running, let_in(running):
            assert denied(as_user(NOBODY, lambda: ask_native(running)), ("permission-denied",)) == set()
            assert as_user(NOBODY, lambda: ask_http(over_unix(running.http_socket)))


# ---------------------------------------------------------------- hosts


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}])
def test_a_foreign_host_or_origin_is_refused_on_every_address(served, headers):
    host, _, port = served.http_tcp.rpartition(":")
    for connect in (over_unix(served.http_socket), lambda: http.client.HTTPConnection(host, int(port), timeout=30)):
        for method, path, _ in routes():
            connection = connect()
            with contextlib.closing(connection):
                connection.request(method, path, b"", headers)
                response = connection.getresponse()
                assert response.status == 403, path
                assert json.loads(response.read())["kind"] == "permission-denied"


# ---------------------------------------------------------------- TCP


def inet_addresses(pid: int) -> set[str]:
    """Local addresses of the TCP sockets of a process, as the kernel writes them."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(entry).removeprefix("socket:[").removesuffix("]"))
    lines = "".join(Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6")).splitlines()
    rows = [line.split() for line in lines if "inode" not in line]
    return {fields[1].partition(":")[0] for fields in rows if fields[9] in inodes}


def test_tcp_is_off_unless_it_is_asked_for_and_then_on_loopback_alone(models, served):
    assert inet_addresses(served.pid) == {"0100007F"}
    with open_directory() as directory:
        listen = {"grpc_tcp": "", "http_tcp": ""}
        with start_daemon(directory, models, environment=FAKE_BACKEND, listen=listen) as running:
            assert inet_addresses(running.pid) == set()
            assert set(running.endpoints) == set(SOCKETS)


def run_daemon(*arguments: str) -> subprocess.CompletedProcess:
    """Run a daemon that is expected to end by itself."""
    command = [sys.executable, "-m", "appliance.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)


@pytest.mark.parametrize("address", ["0.0.0.0:8001", "[::]:8001", "192.168.1.2:8001", "example.com:1", ":8001", "*:1"])
def test_an_address_that_is_not_loopback_is_refused(tmp_path, address):
    config = tmp_path / "config.toml"
    config.write_text(f'[listen]\ndirectory = "{tmp_path}/s"\ngrpc_tcp = "{address}"\nhttp_tcp = "{address}"\n')
    ended = run_daemon("--config", str(config))
    assert ended.returncode == 1
    assert "listen.grpc_tcp" in ended.stderr
    assert "listen.http_tcp" in ended.stderr
    assert ended.stderr.count("loopback") == 2
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "s").exists()


# ---------------------------------------------------------------- one daemon to a directory


def test_a_second_daemon_on_the_same_directory_refuses_and_disturbs_nothing(served):
    before = {name: (served.socket_dir / f"{name}.sock").stat().st_ino for name in SOCKETS}
    ended = run_daemon("--config", str(served.socket_dir.parent / "config.toml"))
    assert ended.returncode == 1
    assert "another daemon" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert {name: (served.socket_dir / f"{name}.sock").stat().st_ino for name in SOCKETS} == before
    assert (served.socket_dir / "endpoints.json").exists()
    with Native(served.infer_socket) as client:
        assert client.infer(1, ECHO, bytes(64)).tail == bytes(64)


def put_file(path: Path) -> None:
    path.write_text("mine")


def put_link(path: Path) -> None:
    (path.parent / "target").write_text("mine")
    path.symlink_to(path.parent / "target")


@pytest.mark.parametrize("name", SOCKETS)
@pytest.mark.parametrize("put", [put_file, put_link])
def test_what_stands_in_a_sockets_place_and_is_none_stays(models, tmp_path, name, put):
    directory = tmp_path / "s"
    directory.mkdir()
    put(directory / f"{name}.sock")
    before = {entry.name: entry.lstat().st_ino for entry in directory.iterdir()}
    ended = run_daemon("--socket-dir", str(directory), "--models", str(tmp_path))
    assert ended.returncode == 1
    assert f"{name}.sock" in ended.stderr
    assert "Traceback" not in ended.stderr
    after = {entry.name: entry.lstat().st_ino for entry in directory.iterdir() if entry.name != "applianced.lock"}
    assert after == before


@pytest.mark.parametrize("name", SOCKETS)
def test_a_socket_somebody_listens_on_stays_theirs(tmp_path, name):
    directory = tmp_path / "s"
    directory.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / f"{name}.sock"))
        listener.listen()
        ended = run_daemon("--socket-dir", str(directory), "--models", str(tmp_path))
        assert ended.returncode == 1
        assert "Traceback" not in ended.stderr
        assert connects(str(directory / f"{name}.sock")) == "connected"


def test_sockets_left_by_a_killed_daemon_are_replaced(models):
    with open_directory() as directory:
        first = start_daemon(directory, models, environment=FAKE_BACKEND)
        first.stop(signal.SIGKILL)
        for name in SOCKETS:
            path = first.socket_dir / f"{name}.sock"
            path.unlink(missing_ok=True)
            with socket.socket(socket.AF_UNIX) as dead:
                dead.bind(str(path))
        with start_daemon(directory, models, environment=FAKE_BACKEND) as second, Native(second.infer_socket) as client:
            assert client.infer(1, ECHO, bytes(64)).tail == bytes(64)
        assert not any((second.socket_dir / f"{name}.sock").exists() for name in SOCKETS)


def test_signals_that_keep_coming_while_it_stops_change_nothing(models):
    with open_directory() as directory:
        running = start_daemon(directory, models, environment=FAKE_BACKEND)
        while running.process.poll() is None:
            running.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.process.wait(0.005)
        assert running.process.returncode == 0


# ---------------------------------------------------------------- workers


def test_a_worker_listens_nowhere_and_has_its_socket_from_its_parent(served):
    """Its sockets are ends of pairs: they have no name, and nobody can connect to them."""
    workers = [pid for pid in children(served.pid) if b"appliance.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert workers
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    of_pairs = {fields[6] for fields in rows if len(fields) == 7 and fields[5] == "03"}
    for pid in workers:
        links = []
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                links.append(os.readlink(entry))
        sockets = {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:")}
        assert sockets <= of_pairs
        assert len(sockets) <= 2, "its control socket, and standard error"
        assert inet_addresses(pid) == set()


def test_messages_of_the_administrative_methods_give_nothing_away(served):
    with Native(served.infer_socket) as client:
        for number, name in enumerate(("nobody", "../etc", "echo\n"), 1):
            message = pb.RepositoryModelLoadRequest(model_name=name)
            check_message(client.call(number, "RepositoryModelLoad", message.SerializeToString()).error[1])
        message = pb.RepositoryModelLoadRequest(model_name="echo", repository_name="/etc/passwd")
        check_message(client.call(9, "RepositoryModelLoad", message.SerializeToString()).error[1])
