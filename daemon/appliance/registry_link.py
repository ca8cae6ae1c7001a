"""The front-end's end of the registrar: a process that is there while it is needed."""

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from appliance.child import ChildFailed
from appliance.conversation import Conversation, NoAnswerInTime
from appliance.errors import KINDS, ApplianceError

#: Longer than the registrar waits for a lock, and than a slow disk takes.
_ANSWER_SECONDS: Final = 30.0
#: Putting the log back into the database and closing it.
_END_SECONDS: Final = 10.0

_Part = Callable[[dict[str, Any]], None]


class RegistryFailed(Exception):
    """The registrar cannot do what it was asked.

    Attributes:
        kind: Of an `ApplianceError`.
        index: Place of the change that can never be made; None where that is not the reason.
    """

    def __init__(self, kind: str, message: str, index: int | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.index = index

    @property
    def error(self) -> ApplianceError:
        """As a client may be told."""
        return KINDS.get(self.kind, ApplianceError)(str(self))


def registrar_command(path: Path, busy_seconds: float = 5.0) -> list[str]:
    """Starts a registrar for the database at `path` that waits for a lock as long as that."""
    return [sys.executable, "-P", "-m", "appliance.registrar", "--busy-seconds", f"{busy_seconds:g}", str(path)]


class RegistryLink:
    """Starts the registrar when there is a question, and ends it when there has been none for a while.

    Args:
        command: Starts it.
        idle_seconds: It ends after as long without a question.
    """

    def __init__(self, command: Sequence[str], idle_seconds: float) -> None:
        self._command = command
        self._idle_seconds = idle_seconds
        self._conversation: Conversation | None = None
        # Starting takes a while, in which others may ask; one of them starts and the rest wait for it.
        self._starting = asyncio.Lock()
        self._asking = 0
        self._idle: asyncio.TimerHandle | None = None
        self._ending: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The registrar's process id while there is one."""
        return self._conversation.pid if self._conversation is not None else None

    async def ask(self, question: Mapping[str, Any], take_part: _Part | None = None) -> dict[str, Any]:
        """The registrar's answer.

        A registrar that dies is started once more and asked again: all of its verbs may be repeated.

        Raises:
            RegistryFailed: As the class says, or because there is no registrar.
        """
        self._asking += 1
        self._stay()
        try:
            try:
                answer = await self._ask_once(question, take_part)
            except NoAnswerInTime:
                raise
            except ChildFailed:
                answer = await self._ask_once(question, take_part)
        except ChildFailed as error:
            raise RegistryFailed("internal", f"cannot use the registry: {error}") from error
        finally:
            self._asking -= 1
            self._leave_later()
        if (failed := answer.get("failed")) is not None:
            raise RegistryFailed(failed["kind"], failed["message"], failed.get("index"))
        return answer

    async def end(self) -> None:
        """Let the registrar finish and end."""
        self._stay()
        async with self._starting:
            self._leave()
            if self._ending is not None:
                await asyncio.wait({self._ending})

    async def _ask_once(self, question: Mapping[str, Any], take_part: _Part | None) -> dict[str, Any]:
        conversation = await self._started()
        try:
            return await conversation.ask(question, _ANSWER_SECONDS, take_part)
        except ChildFailed:
            if self._conversation is conversation:
                self._conversation = None
            await conversation.kill()
            raise

    async def _started(self) -> Conversation:
        async with self._starting:
            if self._ending is not None:
                await asyncio.wait({self._ending})
                self._ending = None
            if self._conversation is None:
                self._conversation = await Conversation.start(self._command)
            return self._conversation

    def _stay(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def _leave_later(self) -> None:
        if self._asking == 0 and self._conversation is not None:
            self._stay()
            self._idle = asyncio.get_running_loop().call_later(self._idle_seconds, self._leave)

    def _leave(self) -> None:
        conversation, self._conversation = self._conversation, None
        if conversation is not None:
            self._ending = asyncio.ensure_future(conversation.end(_END_SECONDS))
