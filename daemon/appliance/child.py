"""A short-lived child process: one JSON question on its standard input, lines of JSON as its answer.

Whatever may hang, crash or print (drivers, vendor runtimes, other people's plugins) is asked in such a child, with a
time limit, so that it cannot hang or crash the daemon.
"""

import asyncio
import json
import logging
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any, Final

_log = logging.getLogger("appliance.child")

#: More than this in one line of an answer, or in all of it, is no answer.
MAX_LINE_BYTES: Final = 1 << 20
MAX_ANSWER_BYTES: Final = 1 << 24

#: A killed process that the kernel does not let go of is waited for no longer.
_END_SECONDS: Final = 5.0

#: How often it is looked whether a child that has said everything has ended.
_LOOK_SECONDS: Final = 0.005

#: The end of what a child wrote to its standard error, kept for the message where it died.
_KEPT_STDERR_BYTES: Final = 2000


class ChildFailed(Exception):
    """A child gave no usable answer: it hung, crashed, answered too much or something else than JSON.

    Attributes:
        was_ended: Somebody else ended it, such as the system for want of memory: it may do better another time.
    """

    def __init__(self, message: str, *, was_ended: bool = False) -> None:
        super().__init__(message)
        self.was_ended = was_ended


async def spawn(command: Sequence[str], stderr: int | None = None) -> asyncio.subprocess.Process:
    """Start `command` in a session and process group of its own, with pipes to its standard input and output.

    Args:
        command: The program and its arguments.
        stderr: `asyncio.subprocess.PIPE`, or None to let what it prints join the daemon's.

    Raises:
        ChildFailed: It cannot be started.
    """
    try:
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=stderr,
            limit=MAX_LINE_BYTES,
            start_new_session=True,
        )
    except OSError as error:
        raise ChildFailed(error.strerror or "it cannot be started") from error


class Child:
    """One child and its process group.

    Attributes:
        pid: Its process id, which is its group's too.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._stderr = b""
        self._reader = asyncio.ensure_future(self._keep_stderr())
        self._is_stopped = False
        self.pid = process.pid

    @classmethod
    async def start(cls, command: Sequence[str], question: Any) -> "Child":
        """Start `command` and ask `question`.

        Raises:
            ChildFailed: It cannot be started.
        """
        process = await spawn(command, stderr=asyncio.subprocess.PIPE)
        child = cls(process)
        if process.stdin is not None:
            with suppress(BrokenPipeError, ConnectionResetError):
                process.stdin.write(json.dumps(question).encode())
                await process.stdin.drain()
                process.stdin.close()
        return child

    async def answers(self, seconds: float) -> AsyncIterator[dict[str, Any]]:
        """What the child says, a JSON object a line, until it ends.

        Args:
            seconds: It may take as long, not counting the time it is suspended.

        Raises:
            ChildFailed: As the class says; the child is still to be ended.
        """
        stdout = self._process.stdout
        if stdout is None:
            raise ChildFailed("its process has no pipes")
        total = 0
        left = seconds
        said_anything = False
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            was_stopped = self._is_stopped
            try:
                async with asyncio.timeout(max(min(left, 1.0), 0.01)):
                    line = await stdout.readuntil(b"\n")
            except TimeoutError:
                if not (was_stopped or self._is_stopped):
                    left -= loop.time() - began
                if left <= 0:
                    raise ChildFailed(f"it gave no answer within {seconds:g} s") from None
                continue
            except asyncio.IncompleteReadError as error:
                line = error.partial
            except asyncio.LimitOverrunError:
                raise ChildFailed(f"its answer is longer than {MAX_LINE_BYTES} bytes") from None
            left -= loop.time() - began
            total += len(line)
            if total > MAX_ANSWER_BYTES:
                raise ChildFailed(f"its answer is longer than {MAX_ANSWER_BYTES} bytes")
            if not line:
                await self._check_end(left, said_anything)
                return
            said_anything = True
            yield _parse(line)

    async def _check_end(self, left: float, said_anything: bool) -> None:
        try:
            async with asyncio.timeout(max(left, 0.1)):
                status = await self._status()
        except TimeoutError:
            raise ChildFailed("it closed its answer and did not end") from None
        if status == 0:
            return
        await asyncio.wait({self._reader}, timeout=1.0)
        if status < 0:
            name = signal.Signals(-status).name
            was_ended = -status in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
            raise ChildFailed(f"its process was killed by {name}{self._last_words()}", was_ended=was_ended)
        how = "before it was done" if said_anything else "and no answer"
        raise ChildFailed(f"its process ended with status {status} {how}{self._last_words()}")

    async def _status(self) -> int:
        """How it ended, once it has.

        `asyncio.subprocess.Process.wait` waits for the end of all pipes too, which something that a plugin started and
        left behind may hold open.
        """
        while (status := self._process.returncode) is None:  # noqa: ASYNC110 - there is no event for this alone
            await asyncio.sleep(_LOOK_SECONDS)
        return status

    def _last_words(self) -> str:
        lines = self._stderr.decode("utf-8", "replace").strip().splitlines()
        return f": {lines[-1][:300]}" if lines else ""

    def suspend(self) -> None:
        """Stop the child and all it started, at once; the time does not count against its limit."""
        if not self._is_stopped:
            self._is_stopped = True
            self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        if self._is_stopped:
            self._is_stopped = False
            self._signal(signal.SIGCONT)

    async def end(self) -> None:
        """Kill the child and all it started; does no harm to one that has ended."""
        self._signal(signal.SIGKILL)
        try:
            async with asyncio.timeout(_END_SECONDS):
                await self._process.wait()
        except TimeoutError:  # stuck in a driver, where no signal reaches it
            _log.warning("process %d does not end although it was killed", self.pid)
        self._reader.cancel()
        await asyncio.wait({self._reader})

    def _signal(self, number: signal.Signals) -> None:
        # The whole group, since a plugin may have started processes of its own.
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    async def _keep_stderr(self) -> None:
        """Read standard error for as long as there is any, so that a flood of it blocks nobody, and keep its end."""
        stderr = self._process.stderr
        while stderr is not None and (part := await stderr.read(65536)):
            self._stderr = (self._stderr + part)[-_KEPT_STDERR_BYTES:]


def _parse(line: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        raise ChildFailed("its answer is not JSON") from None
    if not isinstance(answer, dict):
        raise ChildFailed("its answer is not a JSON object")
    return answer


async def ask(command: Sequence[str], question: Any, seconds: float) -> dict[str, Any]:
    """The one JSON object that `command` answers `question` with.

    Raises:
        ChildFailed: It gives none, or more than one, or takes longer than `seconds`.
    """
    child = await Child.start(command, question)
    try:
        answers = [answer async for answer in child.answers(seconds)]
    finally:
        await child.end()
    if len(answers) != 1:
        raise ChildFailed(f"it answered {len(answers)} times and must answer once")
    return answers[0]
