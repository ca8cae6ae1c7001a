"""Sockets to listen on: Unix sockets that never steal a live one's place, and loopback TCP."""

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from pathlib import Path

from appliance.config import split_address
from appliance.errors import ConfigError

_BACKLOG = 1024

#: The file in the sockets' directory that a running daemon holds locked.
LOCK_NAME = "applianced.lock"
#: How long the lock is tried for: a killed daemon's guardian holds it while it cleans up.
_LOCK_SECONDS = 0.5


def prepare_directory(directory: Path) -> None:
    """Make the sockets' directory, mode 0750 whatever the umask, if it is missing.

    Raises:
        ConfigError: It cannot be made.
    """
    try:
        if not directory.is_dir():
            directory.mkdir(mode=0o700, parents=True)
            directory.chmod(0o750)
    except OSError as error:
        raise ConfigError(f"cannot make the socket directory {str(directory)!r}: {error.strerror}") from error


def lock_directory(directory: Path) -> int:
    """Take the directory for this daemon; the lock goes with the returned descriptor or the process.

    Raises:
        ConfigError: Another daemon has it, or it cannot be written to.
    """
    try:
        fd = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot use the socket directory {str(directory)!r}: {error.strerror}") from error
    end = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if time.monotonic() < end:
                time.sleep(0.01)
                continue
            os.close(fd)
            raise ConfigError(
                f"cannot use the socket directory {str(directory)!r}: another daemon is using it"
            ) from error
        return fd


def clear_stale_socket(path: Path) -> None:
    """Remove a socket nobody listens on.

    Raises:
        ConfigError: Something else stands there, or somebody listens.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise ConfigError(f"cannot listen on {str(path)!r}: a file that is no socket stands there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a listener that accepts nothing must not hold us up
        try:
            probe.connect(str(path))
        except OSError as error:
            if error.errno not in (errno.ECONNREFUSED, errno.ENOENT):
                raise ConfigError(f"cannot listen on {str(path)!r}: {error.strerror}") from error
        else:
            raise ConfigError(f"cannot listen on {str(path)!r}: another process listens there")
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def unix_socket(path: Path, mode: int = 0o660) -> socket.socket:
    """A non-blocking socket listening on `path`, of mode `mode` from its first moment.

    Raises:
        ConfigError: See `clear_stale_socket`; also where the path is too long for a socket.
    """
    clear_stale_socket(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # fchmod before bind decides the mode the file is born with (unix(7)); no umask race.
    os.fchmod(listener.fileno(), mode)
    previous = os.umask(0o777 & ~mode)
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {str(path)!r}: {error.strerror or error}") from error
    finally:
        os.umask(previous)
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener


def tcp_socket(address: str) -> socket.socket:
    """A non-blocking socket listening on ``host:port``; port 0 takes any free one.

    Raises:
        ConfigError: The address is taken or not this machine's.
    """
    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {address}: {error.strerror or error}") from error
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener


def remove(path: Path) -> None:
    """Remove a socket or file of ours."""
    with contextlib.suppress(OSError):
        path.unlink()
