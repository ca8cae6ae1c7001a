"""A frame larger than one read, as it arrives."""

import socket
from typing import Final

from appliance.errors import Overloaded
from appliance.server.budget import BodyBudget
from appliance.types import Buffer
from appliance.wire.native import HEADER

_READ_BYTES: Final = 262144


class LargeFrame:
    """Receives one frame into memory that grows as the frame arrives: what a header promises costs nothing.

    A frame that finds the budget spent is received all the same, since its bytes stand before the next frame, and
    dropped.

    Attributes:
        header: The frame's header.
        refusal: Why the frame is dropped; None for one that is kept.
    """

    __slots__ = ("_budget", "_content", "_missing", "_taken", "header", "refusal")

    def __init__(self, begun: Buffer, size: int, budget: BodyBudget) -> None:
        self.header: tuple[int, ...] = HEADER.unpack_from(begun)
        self.refusal: Overloaded | None = None
        self._budget = budget
        self._content = bytearray()
        self._taken = 0
        self._missing = size
        self._keep(begun)

    def receive(self, connection: socket.socket) -> bool:
        """Take what the socket holds of the frame; True once the frame is complete.

        Raises:
            BlockingIOError: The socket holds nothing.
            OSError: The connection is broken, or was closed in the middle of the frame.
        """
        part = connection.recv(min(self._missing, _READ_BYTES))
        if not part:
            raise ConnectionResetError
        self._keep(part)
        return self._missing == 0

    def body(self) -> memoryview:
        """What follows the header."""
        return memoryview(self._content)[HEADER.size :]

    def release(self) -> None:
        """Give the budget back: the frame goes on as a request, or nowhere."""
        self._budget.give(self._taken)
        self._taken = 0

    def _keep(self, part: Buffer) -> None:
        self._missing -= len(part)
        if self.refusal is not None:
            return
        try:
            self._budget.take(len(part))
        except Overloaded as error:
            self.refusal = error
            self._content = bytearray()
            self.release()
        else:
            self._taken += len(part)
            self._content += part
