"""The Open Inference Protocol and grpc.health.v1 over gRPC, on a Unix socket and on TCP.

The server is our own, on `appliance.server.h2`: it knows by SO_PEERCRED who is on the other end of a Unix socket, which
gRPC's own cannot tell (grpc/grpc#28755), and it costs a fraction of its time.
"""

import asyncio
import contextlib
import os
import socket
from typing import TYPE_CHECKING, Final

from appliance.config import Config
from appliance.server.access import address_of, peer_of
from appliance.server.budget import BodyBudget
from appliance.server.grpc_connection import GrpcConnection
from appliance.server.grpc_heads import InferHeads
from appliance.server.grpc_health import HealthService
from appliance.server.h2.connection import Connection
from appliance.server.oip_wire import MAX_HEAD_BYTES
from appliance.types import Peer

if TYPE_CHECKING:
    from appliance.engine import Engine

_BACKLOG: Final = 1024
#: Unfinished messages of all connections together, in requests of the largest size.
_BUDGET_REQUESTS: Final = 4
#: Between two looks at all connections, at most.
_SWEEP_SECONDS: Final = 1.0
#: How long what is written may take to leave when the server stops.
_FLUSH_SECONDS: Final = 1.0


class GrpcServer:
    """Serves an engine over gRPC.

    Attributes:
        engine: Who answers.
        budget: Bytes that unfinished messages may hold together.
        health: What answers grpc.health.v1.
        heads: Validated heads of requests.
        max_request_bytes: Bytes of one request's tensors.
        max_message_bytes: Bytes of one message.
        max_streams: Calls of one connection that are not answered.
        max_unsent_bytes: Answers a connection may leave unread before it is closed.
    """

    def __init__(self, engine: "Engine", config: Config) -> None:
        limits = config.limits
        self.engine = engine
        self.budget = BodyBudget(_BUDGET_REQUESTS * limits.max_request_bytes)
        self.health = HealthService(engine)
        self.heads = InferHeads(engine)
        self.max_request_bytes = limits.max_request_bytes
        self.max_message_bytes = limits.max_request_bytes + MAX_HEAD_BYTES
        self.max_streams = limits.max_requests_in_flight
        self.max_unsent_bytes = limits.max_unsent_bytes
        self._max_connections = limits.max_connections
        self._header_seconds = limits.header_seconds
        self._period = min(_SWEEP_SECONDS, limits.header_seconds / 4)
        self._tcp_role = config.access.tcp_role
        self._admin_uids = frozenset((0, os.geteuid(), *config.access.admin_uids))
        self._servers: list[asyncio.AbstractServer] = []
        self._connections: dict[Connection, GrpcConnection] = {}
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self._is_stopping = False
        self._sweeper: asyncio.TimerHandle | None = None

    async def start(self, unix_socket: socket.socket | None, tcp_socket: socket.socket | None) -> None:
        """Serve on bound sockets; either may be absent."""
        loop = asyncio.get_running_loop()
        if unix_socket is not None:
            server = await loop.create_unix_server(lambda: Connection(self), sock=unix_socket, backlog=_BACKLOG)
            self._servers.append(server)
        if tcp_socket is not None:
            server = await loop.create_server(lambda: Connection(self), sock=tcp_socket, backlog=_BACKLOG)
            self._servers.append(server)

    def admit(self, connection: Connection, transport: asyncio.Transport) -> GrpcConnection | None:
        """What answers a new connection; None where there are too many, or the daemon stops."""
        sock: socket.socket | None = transport.get_extra_info("socket")
        if sock is None or self._is_stopping or len(self._connections) >= self._max_connections:
            return None
        if sock.family == socket.AF_UNIX:
            try:
                peer, address = peer_of(sock, "grpc", self._admin_uids), ""
            except OSError:
                return None
        else:
            peer, address = Peer("grpc", self._tcp_role), address_of(sock)
        answering = self._connections[connection] = GrpcConnection(self, connection, peer, address)
        self._is_empty.clear()
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(self._period, self._sweep)
        return answering

    def left(self, connection: Connection) -> None:
        """A connection is gone (called by it)."""
        self._connections.pop(connection, None)
        if not self._connections:
            self._is_empty.set()

    def _sweep(self) -> None:
        """Look at every connection for what is owed; with none left, no longer."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in tuple(self._connections):
            connection.sweep(now, self._header_seconds)
        self._sweeper = loop.call_later(self._period, self._sweep) if self._connections else None

    async def stop(self, grace_s: float) -> None:
        """Take no new call, let calls in flight finish within `grace_s`, end the rest with UNAVAILABLE, close."""
        self._is_stopping = True
        for server in self._servers:
            server.close()
        self.health.close()
        for connection in tuple(self._connections):
            connection.drain()
        if not await self._emptied(grace_s):
            for answering in tuple(self._connections.values()):
                answering.give_up()
            await self._emptied(_FLUSH_SECONDS)
        for connection in tuple(self._connections):
            connection.abort()
        await self._emptied(_FLUSH_SECONDS)
        if self._sweeper is not None:
            self._sweeper.cancel()
        for server in self._servers:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FLUSH_SECONDS):
                    await server.wait_closed()
        self._servers.clear()

    async def _emptied(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._is_empty.wait()
        return not self._connections
