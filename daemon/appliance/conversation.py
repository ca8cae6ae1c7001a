"""A conversation with a child process that stays: many questions, each with its answer, JSON objects a line.

`appliance.child` is for a child that answers one question and ends.
"""

import asyncio
import json
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from appliance.child import MAX_LINE_BYTES, ChildFailed, spawn

#: What one question may take as JSON; the other side refuses a longer line than this and a margin for its id.
MAX_QUESTION_BYTES: Final = MAX_LINE_BYTES - 64

_Part = Callable[[dict[str, Any]], None]


class NoAnswerInTime(ChildFailed):
    """The child is alive, as far as one can tell, and says nothing."""


class Conversation:
    """One child that is asked things until it is ended; what it prints to standard error joins the daemon's.

    A question is sent as ``{"id": n, ...}``. Lines ``{"id": n, "part": {...}}`` may come before the answer
    ``{"id": n, ...}``.

    Attributes:
        pid: The child's process id.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._asked = 0
        self._waiting: dict[int, tuple[asyncio.Future[dict[str, Any]], _Part | None]] = {}
        self._problem = ""
        self._reader = asyncio.ensure_future(self._read())
        self.pid = process.pid

    @classmethod
    async def start(cls, command: Sequence[str]) -> "Conversation":
        """Start `command`.

        Raises:
            ChildFailed: It cannot be started.
        """
        return cls(await spawn(command))

    async def ask(self, question: Mapping[str, Any], seconds: float, take_part: _Part | None = None) -> dict[str, Any]:
        """The answer to `question`, which needs no id.

        Args:
            question: At most `MAX_QUESTION_BYTES` as JSON.
            seconds: How long to wait.
            take_part: Is given each part that comes before the answer; raises nothing.

        Raises:
            ChildFailed: The child has ended, or said something else than JSON; `NoAnswerInTime` as that says.
        """
        if self._problem or self._process.stdin is None:
            raise ChildFailed(self._problem or "its process has no pipes")
        self._asked += 1
        number = self._asked
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer, take_part
        try:
            async with asyncio.timeout(seconds):
                with suppress(BrokenPipeError, ConnectionResetError):  # the reader learns why, and says so
                    self._process.stdin.write(json.dumps({"id": number, **question}).encode() + b"\n")
                    await self._process.stdin.drain()
                return await answer
        except TimeoutError:
            raise NoAnswerInTime(f"it gave no answer within {seconds:g} s") from None
        finally:
            self._waiting.pop(number, None)

    async def end(self, seconds: float) -> None:
        """Ask no more, wait for the child to finish what it does, and kill it if that takes longer than `seconds`."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            async with asyncio.timeout(seconds):
                await self._process.wait()
        except TimeoutError:
            self._kill()
        finally:
            await self.kill()

    async def kill(self) -> None:
        """End the child at once; does no harm to one that has ended."""
        self._kill()
        await asyncio.wait({self._reader})

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()

    async def _read(self) -> None:
        stdout = self._process.stdout
        try:
            while stdout is not None and (line := await stdout.readline()):
                self._take(line)
        except (ValueError, RecursionError):  # too long a line, or no JSON
            self._problem = "it said something that is no answer"
            self._kill()
        if self._process.stdin is not None:
            self._process.stdin.close()
        status = await self._process.wait()
        killed = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        self._problem = self._problem or f"its process {killed}"
        for answer, _ in self._waiting.values():
            if not answer.done():
                answer.set_exception(ChildFailed(self._problem))

    def _take(self, line: bytes) -> None:
        """Hand an answer or a part of one to whoever waits for it, if anybody still does.

        Raises:
            ValueError: It is neither.
        """
        said = json.loads(line)
        if not isinstance(said, dict) or not isinstance(said.get("id"), int):
            raise ValueError("no answer")
        answer, take_part = self._waiting.get(said["id"], (None, None))
        if answer is None or answer.done():
            return
        if "part" not in said:
            answer.set_result(said)
        elif take_part is not None:
            take_part(said["part"])
