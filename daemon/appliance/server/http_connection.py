"""One HTTP connection: uvicorn's parser with an identity, deadlines and bounds.

uvicorn bounds neither a request's headers nor the time they take, so a client that sends a byte a second would hold
its connection for ever. `Connection` counts what arrives, and the server's sweep looks at it now and then.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, cast

import orjson
from uvicorn.config import Config as UvicornConfig
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from appliance.clients import NOBODY, Clients
from appliance.config import Config
from appliance.server.access import address_of, peer_of
from appliance.types import Buffer, Peer

#: Bytes of a request's line and headers together.
MAX_HEADER_BYTES: Final = 65536

#: A body must arrive at this rate, after the time a request's headers have.
MIN_BYTES_PER_SECOND: Final = 65536

#: A client that reads nothing of its answer for this long is cut off.
STALL_SECONDS: Final = 30.0

#: Bodies up to this size are copied behind their head.
_JOINED_BYTES: Final = 65536

# Any local process can send garbage at will; the client is told, the log is not.
_QUIET = logging.getLogger("appliance.http.parser")
_QUIET.setLevel(logging.ERROR)


class _JoiningTransport:
    """Passes everything on, but has an answer's head wait for its body: one packet and one wake-up, not two."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._is_head_next = False
        self._head = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def expect_head(self) -> None:
        """The next write is an answer's head, and its body follows."""
        self._is_head_next = True

    def write(self, content: Buffer) -> None:
        """Write, or keep a head for the next write."""
        if self._is_head_next:
            self._head, self._is_head_next = bytes(content), False
        elif self._head:
            head, self._head = self._head, b""
            self._transport.write(head + content if len(content) <= _JOINED_BYTES else head)
            if len(content) > _JOINED_BYTES:
                self._transport.write(content)
        else:
            self._transport.write(content)


class Connection(HttpToolsProtocol):
    """One client's connection.

    Attributes:
        peer: Who is on the other end, from SO_PEERCRED on the Unix socket.
        account: The client its requests are counted for.
        is_unix: True on the Unix socket.
        is_over_cap: True where the server already had all the connections it may have; its requests are refused.
    """

    def __init__(
        self,
        uvicorn: UvicornConfig,
        state: ServerState,
        config: Config,
        clients: Clients,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        super().__init__(uvicorn, state, {}, loop)
        self.logger = _QUIET
        self.access_log = False
        self.peer = Peer(transport="http", role=config.access.tcp_role)
        self.account = NOBODY
        self.is_unix = False
        self.is_over_cap = False
        self._clients = clients
        self._settings = config
        self._admin_uids = frozenset((0, os.geteuid(), *config.access.admin_uids))
        self._header_bytes = 0
        self._unparsed_bytes = 0
        self._body_bytes = 0
        self._in_headers = False
        self._waiting_since: float | None = None  # since when the client owes the rest of a request
        self._unsent_bytes = 0
        self._unsent_since = 0.0
        self._inference: asyncio.Task[Any] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Learn who connected; far beyond the bound on connections, hang up."""
        super().connection_made(transport)
        self._joining = _JoiningTransport(transport)
        self.transport = cast(asyncio.Transport, self._joining)
        cap = self._settings.limits.max_connections
        self.is_over_cap = len(self.connections) > cap
        sock: socket.socket | None = transport.get_extra_info("socket")
        if sock is None or len(self.connections) > 2 * cap:
            transport.abort()
            return
        if sock.family == socket.AF_UNIX:
            self.is_unix = True
            try:
                self.peer = peer_of(sock, "http", self._admin_uids)
            except OSError:
                transport.abort()
                return
        self.account = self._clients.enter(self.peer, "" if self.is_unix else address_of(sock))
        self._waiting_since = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        """Withdraw the inference that nobody waits for any more."""
        super().connection_lost(exc)
        if self._inference is not None:
            self._inference.cancel()
        if self.account is not NOBODY:
            self._clients.leave(self.account)

    @contextmanager
    def withdrawn_on_loss(self) -> Iterator[None]:
        """Cancel the current task when the client hangs up within the block; reading goes on so that it is seen."""
        self._inference = asyncio.current_task()
        if not self.pipeline:
            self.flow.resume_reading()
        try:
            yield
        finally:
            self._inference = None

    def expect_answer(self) -> None:
        """An answer with a body is sent next."""
        self._joining.expect_head()

    def data_received(self, data: bytes) -> None:
        """Parse; refuse a request whose headers outgrow the bound before they are complete."""
        is_idle = self.cycle is None or self.cycle.response_complete
        if self._waiting_since is None and is_idle:
            self._waiting_since = self.loop.time()
        was_in_headers = self._in_headers
        super().data_received(data)
        if was_in_headers and self._in_headers:
            self._unparsed_bytes += len(data)
        if max(self._header_bytes, self._unparsed_bytes) > MAX_HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response(f"its line and headers exceed {MAX_HEADER_BYTES} bytes")

    def send_400_response(self, msg: str) -> None:
        """Answer what cannot be parsed, and hang up."""
        reason = "it is not HTTP/1" if msg.startswith("Invalid HTTP") else msg
        body = orjson.dumps({"error": f"cannot read the request: {reason}", "kind": "invalid-request"})
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()

    def on_message_begin(self) -> None:
        """A request's first byte: its deadline begins."""
        super().on_message_begin()
        self.scope["state"]["connection"] = self
        self._in_headers = True
        self._header_bytes = self._unparsed_bytes = self._body_bytes = 0
        self._waiting_since = self.loop.time()

    def on_url(self, url: bytes) -> None:
        """Count the request line."""
        self._header_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header, or a trailer after the body; past the bound none is kept."""
        self._header_bytes += len(name) + len(value) + 4
        if self._header_bytes <= MAX_HEADER_BYTES:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start the request, unless its headers are refused."""
        self._in_headers = False
        if self._header_bytes <= MAX_HEADER_BYTES:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Count the body; what follows a refused request is read to its end, up to a bound, and then cut off."""
        self._body_bytes += len(body)
        if self.cycle is None or self._header_bytes > MAX_HEADER_BYTES:
            return
        if self._body_bytes > 2 * self._settings.limits.max_request_bytes:
            self.transport.abort()
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The whole request is here: the client owes nothing, or the next one if this was answered before its end."""
        is_answered = self.cycle is None or self.cycle.response_complete
        self._waiting_since = self.loop.time() if is_answered else None
        if self.cycle is not None:
            super().on_message_complete()

    def enforce_deadlines(self, now: float) -> None:
        """Cut the client off where it stopped sending its request or reading its answer."""
        since = self._waiting_since
        if since is not None:
            allowed = self._settings.limits.header_seconds + self._body_bytes / MIN_BYTES_PER_SECOND
            if self.flow.read_paused:
                self._waiting_since = now  # it is the server that does not read
            elif now - since > allowed:
                self.transport.abort()
                return
        unsent = self.transport.get_write_buffer_size()
        if unsent == 0 or unsent != self._unsent_bytes:
            self._unsent_bytes, self._unsent_since = unsent, now
        elif now - self._unsent_since > STALL_SECONDS:
            self.transport.abort()
