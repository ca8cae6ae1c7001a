"""A gRPC call that a task answers: messages in, messages out."""

import asyncio
import time

from appliance.server.budget import BodyBudget
from appliance.server.grpc_message import PREFIX, CallRefused, MessageReader, decompress
from appliance.server.grpc_request import ANSWER_BLOCK, OK_BLOCK, GrpcRequest, error_block
from appliance.server.h2.connection import Connection
from appliance.server.h2.inflow import FIRST_WINDOW, Inflow
from appliance.server.h2.stream import Stream
from appliance.server.status import GrpcStatus
from appliance.types import Buffer


class GrpcCall:
    """One call.

    Attributes:
        stream: Its stream.
        task: What answers it, once it runs.
    """

    __slots__ = (
        "_arrived",
        "_budget",
        "_connection",
        "_deadline_ns",
        "_has_answered",
        "_held",
        "_inflow",
        "_max_bytes",
        "_reader",
        "_request",
        "stream",
        "task",
    )

    def __init__(
        self, connection: Connection, inflow: Inflow, budget: BodyBudget, stream: Stream, max_bytes: int
    ) -> None:
        request: GrpcRequest = stream.request
        self.stream = stream
        self.task: asyncio.Task[None] | None = None
        self._connection = connection
        self._inflow = inflow
        self._budget = budget
        self._held = 0
        self._request = request
        self._max_bytes = max_bytes
        self._deadline_ns = time.monotonic_ns() + request.timeout_us * 1000 if request.timeout_us else 0
        self._reader = MessageReader(max_bytes)
        self._arrived: asyncio.Event | None = None
        self._has_answered = False

    # ---------------------------------------------------------------- messages in

    def feed(self, content: Buffer) -> None:
        """Take content as it comes.

        Raises:
            CallRefused: The next message is too large, or is none.
            Overloaded: Unfinished messages hold too much.
        """
        if self.stream.trailers is not None:
            return  # the call is over, and its answer waits for the client
        self._budget.take(len(content))
        self._held += len(content)
        self._reader.feed(content)
        self._adjust_window()
        if self._arrived is not None:
            self._arrived.set()

    def _adjust_window(self) -> None:
        """Let the client send what the message that has begun still needs, or the next ones where nothing waits."""
        stream, missing = self.stream, self._reader.missing
        if stream.is_received:
            self._inflow.release(stream)
        elif missing > stream.receive_window:
            self._inflow.want(stream, missing - stream.receive_window)
        elif not missing:
            self._inflow.release(stream)
            if self._reader.held == 0 and stream.receive_window < FIRST_WINDOW >> 1:
                self._connection.give_window(stream, FIRST_WINDOW - stream.receive_window)

    def _take(self) -> tuple[bool, Buffer] | None:
        taken = self._reader.take()
        if taken is not None:
            self._budget.give(self._held - self._reader.held)
            self._held = self._reader.held
        return taken

    def let_go(self) -> None:
        """Nothing more is read: drop what has come."""
        self._budget.give(self._held)
        self._held = 0
        self._reader = MessageReader(self._max_bytes)
        self._inflow.release(self.stream)

    def take_only(self) -> tuple[bool, Buffer]:
        """The one message of a call whose client has sent everything, and whether it is compressed.

        Raises:
            CallRefused: There is none, or more than one.
        """
        taken = self._take()
        if taken is None or self._reader.held:
            raise CallRefused(GrpcStatus.UNIMPLEMENTED, "cannot take the request: the method takes exactly one message")
        return taken

    async def inflate(self, taken: tuple[bool, Buffer]) -> Buffer:
        """A message as it was before the client compressed it.

        Raises:
            CallRefused: It cannot be decompressed, or is too large then.
        """
        is_compressed, message = taken
        if not is_compressed:
            return message
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, decompress, message, self._request.encoding, self._max_bytes)

    async def read(self) -> Buffer | None:
        """The next message; None behind the last.

        Raises:
            CallRefused: There is no reading on.
        """
        while (taken := self._take()) is None:
            if self.stream.is_received or not self.stream.is_open:
                if self._reader.held:
                    raise CallRefused(GrpcStatus.INTERNAL, "cannot read the message: it is truncated")
                return None
            self._arrived = self._arrived or asyncio.Event()
            self._arrived.clear()
            await self._arrived.wait()
        self._adjust_window()
        self._connection.flush()
        return await self.inflate(taken)

    def remaining_us(self) -> int:
        """Microseconds until the client's deadline, at least 1; 0 where it set none."""
        return max(1, (self._deadline_ns - time.monotonic_ns()) // 1000) if self._deadline_ns else 0

    # ---------------------------------------------------------------- messages out

    def send(self, message: bytes) -> None:
        """Send a message, or keep it until the client takes it."""
        stream = self.stream
        if not stream.is_open:
            return
        if not self._has_answered:
            self._has_answered = True
            self._connection.outflow.send_headers(stream, ANSWER_BLOCK)
        self._connection.outflow.send_content(stream, PREFIX.pack(0, len(message)) + message)
        self._connection.flush()

    async def write(self, message: bytes) -> None:
        """Send a message and wait until the client has taken it."""
        self.send(message)
        await self._connection.outflow.drained(self.stream)

    def finish(self, status: int = 0, message: str = "", kind: str = "") -> None:
        """End the call."""
        stream = self.stream
        self.let_go()
        if not stream.is_open or stream.trailers is not None:
            return
        outflow = self._connection.outflow
        if status:
            if self._has_answered:
                outflow.send_trailers(stream, error_block(status, message, kind, is_trailer=True))
            else:
                outflow.send_headers(stream, error_block(status, message, kind), ends=True)
        else:
            if not self._has_answered:
                outflow.send_headers(stream, ANSWER_BLOCK)
            outflow.send_trailers(stream, OK_BLOCK)
        self._connection.flush()
