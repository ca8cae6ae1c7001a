"""ModelStreamInfer: many requests over one call, answered in order, as Triton does where a request has one answer.

A request that fails gets an ``error_message`` and the stream stays open. Every answer is the last of its request, so it
carries ``triton_final_response``, and the empty final response a client may ask for never comes: Triton sends it only
after answers that were not marked final.
"""

import asyncio
from typing import TYPE_CHECKING, Final, Protocol

from appliance.clients import Client
from appliance.errors import ApplianceError, Overloaded
from appliance.server.grpc_errors import log_unexpected
from appliance.server.grpc_message import CallRefused
from appliance.server.oip import (
    check_request_id,
    message_from_result,
    parse_infer,
    request_from_message,
    serialise_result,
)
from appliance.server.oip_wire import varint
from appliance.types import Buffer, Peer
from appliance.wire.open_inference_pb2 import ModelInferResponse, ModelStreamInferResponse

if TYPE_CHECKING:
    from appliance.engine import Engine

#: Requests of one stream that are running or whose answers wait to be read.
MAX_STREAM_REQUESTS: Final = 64
#: How long a client may leave an answer unread before the stream is ended.
STALL_SECONDS: Final = 30.0

_RESPONSE_TAG: Final = b"\x12"


class Messages(Protocol):
    """The two ways of the call."""

    async def read(self) -> Buffer | None:
        """The next request; None behind the last."""
        ...

    async def write(self, message: bytes) -> None:
        """Send an answer, and wait until the client has taken it."""
        ...

    def remaining_us(self) -> int:
        """The time limit of a request that arrives now, 0 for none."""
        ...


class InferStream:
    """One ModelStreamInfer call.

    Args:
        engine: What answers.
        peer: Who asks.
        client: Whose account the requests go on.
        call: Where requests come from and answers go.
        max_bytes: Bytes of requests in flight beyond which no more is read.
        stall_seconds: How long one answer may stay unread.
    """

    def __init__(
        self,
        engine: "Engine",
        peer: Peer,
        client: Client,
        call: Messages,
        max_bytes: int,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self._engine = engine
        self._peer = peer
        self._client = client
        self._call = call
        self._max_bytes = max_bytes
        self._stall_seconds = stall_seconds
        self._answers: asyncio.Queue[tuple[asyncio.Task[bytes], int] | None] = asyncio.Queue()
        self._has_room = asyncio.Event()
        self._requests = 0
        self._bytes = 0

    async def run(self) -> None:
        """Serve until the client has sent its last request and read its last answer. Cancelling withdraws all.

        Raises:
            Overloaded: The client does not read its answers.
            CallRefused: Its messages cannot be read.
        """
        failure: Exception | None = None
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._write_answers())
                while (body := await self._call.read()) is not None:
                    await self._wait_for_room(len(body))
                    self._answers.put_nowait((group.create_task(self._answer(body)), len(body)))
                self._answers.put_nowait(None)
        except* TimeoutError:
            failure = Overloaded("cannot go on with the stream: the client does not read its answers")
        except* CallRefused as refusals:
            (failure,) = [each for each in refusals.exceptions if isinstance(each, CallRefused)]
        if failure is not None:
            raise failure

    async def _wait_for_room(self, size: int) -> None:
        while self._requests >= MAX_STREAM_REQUESTS or (self._requests and self._bytes + size > self._max_bytes):
            self._has_room.clear()
            await self._has_room.wait()
        self._requests += 1
        self._bytes += size

    async def _write_answers(self) -> None:
        while (entry := await self._answers.get()) is not None:
            answer, size = entry
            response = await answer
            async with asyncio.timeout(self._stall_seconds):
                await self._call.write(response)
            self._requests -= 1
            self._bytes -= size
            self._has_room.set()

    async def _answer(self, body: Buffer) -> bytes:
        request_id = ""
        try:
            message, raw = parse_infer(body)
            check_request_id(message.id)
            request_id = message.id
            request = request_from_message(message, self._peer, self._call.remaining_us(), raw, self._client)
            result = await self._engine.infer(request)
            response = message_from_result(result, request_id, with_content=False)
            response.parameters["triton_final_response"].bool_param = True
            content = serialise_result(response, result)
            return b"".join((_RESPONSE_TAG, varint(len(content)), content))
        except ApplianceError as error:
            return _failure(request_id, str(error))
        except Exception:
            return _failure(request_id, log_unexpected("ModelStreamInfer"))


def _failure(request_id: str, message: str) -> bytes:
    response = ModelInferResponse(id=request_id)
    response.parameters["triton_final_response"].bool_param = True
    return ModelStreamInferResponse(error_message=message, infer_response=response).SerializeToString()
