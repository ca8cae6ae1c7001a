"""Removes the sockets of a daemon that was killed.

A socket's file outlives the process that listened on it, and SIGKILL leaves nobody a moment to remove it. So the daemon
has a second, tiny process wait for its end, which shows as end of file on a pipe that only the daemon holds open, and
remove what the daemon entrusted to it, unless another daemon has the directory by then. systemd does as much for the
``RuntimeDirectory`` of a unit; this is for every other way to run.

As a script, ``python -I -S guardian.py DIRECTORY LOCK`` with the pipe as standard input, it imports next to nothing.
"""

import fcntl
import os
import signal
import sys
import time
from contextlib import suppress
from typing import NoReturn

_TRIES = 100
_PAUSE_SECONDS = 0.01


class Guardian:
    """The guardian of files in one directory; start it before there are threads.

    Args:
        directory: Absolute path.
        lock: Name of the file in it that a running daemon holds locked (flock(2)).
    """

    def __init__(self, directory: str, lock: str) -> None:
        reading, self._writing = os.pipe()
        with suppress(OSError):  # no process to be had; the next start removes what is left then
            child = os.fork()
            if child == 0:
                _become(reading, directory, lock)
            os.waitpid(child, 0)
        os.close(reading)

    def entrust(self, name: str) -> None:
        """Have the file `name` removed once this process has ended, however it ends."""
        with suppress(OSError):  # a guardian that was killed guards nothing, and the daemon serves all the same
            os.write(self._writing, name.encode() + b"\n")


def _become(reading: int, directory: str, lock: str) -> NoReturn:
    """In the child: leave the daemon's session and family, so that no signal meant for it arrives; run the script."""
    try:
        os.setsid()
        if os.fork() == 0:
            nothing = os.open(os.devnull, os.O_RDWR)
            for source, target in ((reading, 0), (nothing, 1), (nothing, 2)):
                os.dup2(source, target)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            os.chdir("/")
            os.execv(sys.executable, [sys.executable, "-I", "-S", __file__, directory, lock])  # noqa: S606 no shell
    finally:
        os._exit(0)


def _take(lock: int) -> None:
    """Lock the file; a daemon that ends may let go of the pipe a moment before the lock.

    Raises:
        OSError: A daemon holds it and goes on doing so.
    """
    for _ in range(_TRIES):
        with suppress(OSError):
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(_PAUSE_SECONDS)
    raise OSError("the lock is taken")


def _wait_and_remove(directory: str, lock: str) -> None:
    entrusted = b""
    while part := os.read(0, 4096):
        entrusted += part
    _take(os.open(os.path.join(directory, lock), os.O_RDWR))
    for name in entrusted.decode().splitlines():
        with suppress(OSError):
            os.unlink(os.path.join(directory, name))


if __name__ == "__main__":
    with suppress(OSError):  # another daemon has the directory, or nobody has it any more
        _wait_and_remove(sys.argv[1], sys.argv[2])
