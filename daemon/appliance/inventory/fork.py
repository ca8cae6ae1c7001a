"""A question asked in a forked process, since drivers, vendors' libraries and file servers may hang or crash.

For short-lived children with one thread only; the daemon itself never forks.
"""

import json
import os
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

#: More than this is no answer.
MAX_ANSWER_BYTES: Final = 1 << 20

#: More descriptors than a short-lived child has.
_DESCRIPTORS: Final = 1024

#: How often a process that has answered is asked whether it has ended.
_LOOK_SECONDS: Final = 0.002


class NoAnswer(Exception):
    """The question was not answered; the message says why: ``"it ..."``."""


class Fork:
    """One process that computes one answer.

    Args:
        work: Runs in the process; returns a JSON value.
        at_start: Runs in the process before that.

    Attributes:
        pid: The process's id.
    """

    def __init__(self, work: Callable[[], Any], at_start: Callable[[], None]) -> None:
        self._ours, theirs = os.pipe()
        self._began = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            _serve(work, at_start, theirs)
        os.close(theirs)

    def answer(self, deadline: float) -> Any:
        """Wait for the answer; the process is killed where there is none by `deadline`. To be called once.

        Args:
            deadline: On the monotonic clock.

        Raises:
            NoAnswer: It hung, crashed or said something else than JSON.
        """
        try:
            said = self._read(deadline)
            signal_number = self._end(deadline)
        finally:
            os.close(self._ours)
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        if signal_number:
            raise NoAnswer(f"its process was killed by {signal.Signals(signal_number).name}")
        try:
            document = json.loads(said)
        except ValueError:
            raise NoAnswer("its process ended without an answer") from None
        if "failed" in document:
            raise NoAnswer(str(document["failed"]))
        return document["answer"]

    def _read(self, deadline: float) -> bytes:
        said = b""
        while True:
            # What is already there counts, however late it is.
            ready, _, _ = select.select([self._ours], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                raise NoAnswer(f"it gave no answer within {time.monotonic() - self._began:.1f} s")
            part = os.read(self._ours, 65536)
            said += part
            if len(said) > MAX_ANSWER_BYTES:
                raise NoAnswer(f"its answer is longer than {MAX_ANSWER_BYTES} bytes")
            if not part or part.endswith(b"\n"):
                return said

    def _end(self, deadline: float) -> int:
        """The signal that ended the process, or 0. Never waits for good: a driver may hang as its files are closed."""
        while True:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            if time.monotonic() >= deadline:
                return 0
            time.sleep(_LOOK_SECONDS)


def _let_go(kept: int) -> None:
    """Close all that was inherited but `kept`.

    A process stuck in a driver cannot be killed: what it holds open stays so, and whoever reads the parent's output to
    its end would wait for good.
    """
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nothing, standard)
    os.closerange(3, kept)
    os.closerange(kept + 1, _DESCRIPTORS)


def _serve(work: Callable[[], Any], at_start: Callable[[], None], answer_fd: int) -> None:
    """The process's life. Whatever happens it ends here: the parent's code above is not its to return to."""
    try:
        _let_go(answer_fd)
        at_start()
        try:
            document = {"answer": work()}
        except Exception as error:
            said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            document = {"failed": f"it failed with {type(error).__name__}: {said[:300]}"}
        with open(answer_fd, "w", encoding="utf-8") as answer:
            answer.write(json.dumps(document) + "\n")
    finally:
        os._exit(0)
