"""What the HTTP handlers take and give, and how a body is read within its bounds."""

import asyncio
import itertools
import os
import re
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from appliance.errors import ApplianceError, InvalidRequest, Overloaded
from appliance.server.budget import BodyBudget
from appliance.server.http_connection import Connection
from appliance.server.status import http_status
from appliance.types import Buffer

#: Work on more bytes than this leaves the event loop.
INLINE_BYTES: Final = 65536

Receive = Callable[[], Awaitable[Mapping[str, Any]]]

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
_WINDOW_BITS: Final = {b"gzip": 31, b"deflate": 15}
_own_ids = itertools.count(1)
_own_id_prefix = os.urandom(4).hex()


class ClientGoneError(Exception):
    """The client hung up before its request was complete."""


@dataclass(slots=True)
class Request:
    """One HTTP request.

    Attributes:
        method: HTTP method.
        path: Decoded path without the query.
        headers: Values by lower-case name; repeated headers joined with a comma.
        connection: Where it came from.
        receive: ASGI's receive.
        id: The client's ``x-request-id``, or one made here.
        names: Parts of the path that the route names; an absent optional part is empty.
        body: Filled before a handler of a POST runs.
    """

    method: str
    path: str
    headers: dict[bytes, bytes]
    connection: Connection
    receive: Receive
    id: str
    names: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(slots=True)
class Response:
    """One HTTP answer; the body in parts, so that large tensors are not joined."""

    status: int
    parts: Sequence[Buffer] = ()
    content_type: bytes = b"application/json"
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)


def json_response(value: Any, status: int = 200) -> Response:
    """`value` as JSON."""
    return Response(status, (orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS),))


def error_response(error: ApplianceError) -> Response:
    """An error as ``{"error", "kind"}`` with the status of its kind."""
    return json_response({"error": str(error), "kind": error.kind}, http_status(error))


def join_headers(headers: Sequence[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Headers by lower-case name. Repeated ones are joined, so that a second Host can match nothing."""
    joined: dict[bytes, bytes] = {}
    for name, value in headers:
        joined[name] = joined[name] + b", " + value if name in joined else value
    return joined


def request_id(headers: Mapping[bytes, bytes]) -> str:
    """The client's request id if it is up to 64 harmless characters, else a new one."""
    given = headers.get(b"x-request-id")
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given.decode("ascii")
    return f"{_own_id_prefix}-{next(_own_ids):x}"


class Body:
    """Reads one request's body; a context manager that gives the budget back in the end."""

    def __init__(self, request: Request, limit_bytes: int, budget: BodyBudget) -> None:
        self._request = request
        self._limit = limit_bytes
        self._budget = budget
        self._taken = 0

    def __enter__(self) -> "Body":
        return self

    def __exit__(self, *_: object) -> None:
        self._budget.give(self._taken)

    def _take(self, count: int) -> None:
        self._budget.take(count)
        self._taken += count

    async def read(self) -> bytes:
        """The body, decompressed.

        Raises:
            ClientGoneError: The client hung up.
            InvalidRequest: Content-Encoding is unknown, or does not fit the body.
            Overloaded: The body, as sent or decompressed, exceeds the limit, or the budget is spent.
        """
        headers = self._request.headers
        declared = headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > self._limit:
            raise self._too_large()
        encoding = headers.get(b"content-encoding", b"identity").lower()
        if encoding != b"identity" and encoding not in _WINDOW_BITS:
            shown = encoding[:32].decode("ascii", "replace")
            raise InvalidRequest(f"cannot decode the body: Content-Encoding is {shown!r} and must be gzip or deflate")
        chunks: list[bytes] = []
        total = 0
        while True:
            message = await self._request.receive()
            if message["type"] != "http.request":
                raise ClientGoneError
            chunk: bytes = message.get("body", b"")
            if chunk:
                total += len(chunk)
                if total > self._limit:
                    raise self._too_large()
                self._take(len(chunk))
                chunks.append(chunk)
            if not message.get("more_body", False):
                break
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        if encoding == b"identity":
            return body
        if len(body) > INLINE_BYTES // 16:
            body = await asyncio.to_thread(self._inflate, body, _WINDOW_BITS[encoding])
        else:
            body = self._inflate(body, _WINDOW_BITS[encoding])
        self._take(len(body))
        return body

    def _inflate(self, body: bytes, window_bits: int) -> bytes:
        inflater = zlib.decompressobj(window_bits)
        try:
            plain = inflater.decompress(body, self._limit + 1)
        except zlib.error as error:
            raise InvalidRequest("cannot decode the body: it is not what Content-Encoding says") from error
        if len(plain) > self._limit:
            raise self._too_large()
        if not inflater.eof or inflater.unused_data:
            raise InvalidRequest("cannot decode the body: the compressed data is cut short or followed by more")
        return plain

    def _too_large(self) -> Overloaded:
        return Overloaded(f"cannot take the request: its body, decompressed, may hold {self._limit} bytes")
