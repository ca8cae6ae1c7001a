"""Sockets to listen on: whose place they take, whose they leave, and who may connect."""

import fcntl
import os
import socket
import stat
from pathlib import Path

import pytest

from appliance.errors import ConfigError
from appliance.server import listen


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.sock"


@pytest.fixture
def umask():
    """Sets the umask for a test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def test_a_socket_listens_and_does_not_block(path):
    with listen.unix_socket(path) as listener, socket.socket(socket.AF_UNIX) as client:
        assert listener.getblocking() is False
        assert not listener.get_inheritable()
        client.connect(str(path))
        listener.accept()[0].close()


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o777])
@pytest.mark.parametrize("mode", [0o660, 0o600, 0o666])
def test_a_sockets_mode_is_the_one_asked_for_whatever_the_umask(path, umask, mask, mode):
    umask(mask)
    with listen.unix_socket(path, mode):
        assert stat.S_IMODE(path.lstat().st_mode) == mode
    assert os.umask(mask) == mask, "the umask is as it was"


def test_a_socket_has_its_mode_from_birth(path, umask, monkeypatch):
    """Between bind and listen nobody sees another mode."""
    umask(0)
    seen = []
    bind = socket.socket.bind

    class Watched(socket.socket):
        def bind(self, address):
            bind(self, address)
            seen.append(stat.S_IMODE(os.lstat(address).st_mode))

    monkeypatch.setattr(listen.socket, "socket", Watched)
    listen.unix_socket(path).close()
    assert seen == [0o660]


def dead_socket(path: Path, kind=socket.SOCK_STREAM) -> None:
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.bind(str(path))


def test_a_socket_nobody_listens_on_is_replaced(path):
    dead_socket(path)
    before = path.lstat().st_ino
    with listen.unix_socket(path):
        assert path.lstat().st_ino != before or stat.S_ISSOCK(path.lstat().st_mode)


def test_a_socket_somebody_listens_on_is_left(path):
    with listen.unix_socket(path):
        before = path.lstat().st_ino
        with pytest.raises(ConfigError, match="another process listens there"):
            listen.unix_socket(path)
        assert path.lstat().st_ino == before


def test_a_listener_too_busy_to_accept_is_somebody_and_holds_nobody_up(path):
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(str(path))
        busy.listen(0)
        clients = []
        for _ in range(10):
            client = socket.socket(socket.AF_UNIX)
            client.setblocking(False)
            clients.append(client)
            try:
                client.connect(str(path))
            except BlockingIOError:
                break
        with pytest.raises(ConfigError, match="cannot listen"):
            listen.unix_socket(path)
        for client in clients:
            client.close()
    assert path.exists()


def link_to_live_socket(path: Path) -> None:
    dead_socket(path.with_name("target"))
    path.symlink_to(path.with_name("target"))


OTHERS = {
    "a file": lambda path: path.write_text("mine"),
    "an empty file": lambda path: path.touch(),
    "a directory": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "a link to a file": lambda path: (path.with_name("t").write_text("mine"), path.symlink_to(path.with_name("t"))),
    "a link to nothing": lambda path: path.symlink_to(path.with_name("nothing")),
    "a link to a dead socket": link_to_live_socket,
    "a link to itself": lambda path: path.symlink_to(path),
    "a datagram socket": lambda path: dead_socket(path, socket.SOCK_DGRAM),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_no_stale_socket_stays_and_nothing_is_listened_on(path, what):
    OTHERS[what](path)
    before = {entry.name: entry.lstat().st_ino for entry in path.parent.iterdir()}
    if what == "a datagram socket":  # dead like a stale one, whatever it was
        listen.unix_socket(path).close()
        return
    with pytest.raises(ConfigError, match=r"^cannot listen on "):
        listen.unix_socket(path)
    assert {entry.name: entry.lstat().st_ino for entry in path.parent.iterdir()} == before


def test_a_path_too_long_for_a_socket_is_an_error_of_the_configuration(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot listen on .*too long"):
        listen.unix_socket(tmp_path / ("x" * 120))


def test_a_missing_directory_is_an_error_of_the_configuration(tmp_path):
    with pytest.raises(ConfigError, match="cannot listen on "):
        listen.unix_socket(tmp_path / "missing" / "x.sock")


# ---------------------------------------------------------------- the directory


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_a_directory_is_made_for_the_user_and_the_group(tmp_path, umask, mask):
    umask(mask)
    directory = tmp_path / "s"
    listen.prepare_directory(directory)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o750


def test_a_directory_that_is_there_is_taken_as_it_is(tmp_path):
    directory = tmp_path / "s"
    directory.mkdir(0o700)
    listen.prepare_directory(directory)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_a_directory_that_cannot_be_made_is_an_error_of_the_configuration(tmp_path):
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "s"):
        with pytest.raises(ConfigError, match="cannot make the socket directory"):
            listen.prepare_directory(directory)


def test_one_daemon_has_the_directory_at_a_time(tmp_path):
    lock = listen.lock_directory(tmp_path)
    with pytest.raises(ConfigError, match="another daemon is using it"):
        listen.lock_directory(tmp_path)
    os.close(lock)
    lock = listen.lock_directory(tmp_path)
    assert stat.S_IMODE((tmp_path / listen.LOCK_NAME).stat().st_mode) == 0o600
    os.close(lock)


def test_a_lock_cannot_be_laid_elsewhere_by_a_link(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / listen.LOCK_NAME).symlink_to(tmp_path / "precious")
    with pytest.raises(ConfigError, match="cannot use the socket directory"):
        listen.lock_directory(tmp_path)
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_directory_without_room_for_a_lock_is_an_error_of_the_configuration(tmp_path):
    with pytest.raises(ConfigError, match="cannot use the socket directory"):
        listen.lock_directory(tmp_path / "missing")
    (tmp_path / listen.LOCK_NAME).mkdir()
    with pytest.raises(ConfigError, match="cannot use the socket directory"):
        listen.lock_directory(tmp_path)


def test_a_lock_is_not_inherited(tmp_path):
    lock = listen.lock_directory(tmp_path)
    assert fcntl.fcntl(lock, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    os.close(lock)


# ---------------------------------------------------------------- TCP


@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:0", "localhost:0"])
def test_tcp_takes_any_free_port_of_loopback(address):
    if "::1" in address and not Path("/proc/net/if_inet6").exists():
        with pytest.raises(ConfigError):
            listen.tcp_socket(address)
        return
    with listen.tcp_socket(address) as listener:
        assert listener.getsockname()[1] > 0
        assert listener.getblocking() is False


def test_a_port_that_is_taken_is_an_error_of_the_configuration():
    with listen.tcp_socket("127.0.0.1:0") as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            listen.tcp_socket(f"127.0.0.1:{port}")


def test_removing_what_is_gone_is_no_error(path):
    listen.remove(path)
    dead_socket(path)
    listen.remove(path)
    assert not path.exists()
