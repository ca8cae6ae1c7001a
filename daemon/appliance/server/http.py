"""The HTTP server: its sockets, its connections and their end."""

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, Final

from uvicorn.config import Config as UvicornConfig
from uvicorn.server import ServerState

from appliance.config import Config
from appliance.server.http_app import HttpApp
from appliance.server.http_connection import Connection

if TYPE_CHECKING:
    from appliance.engine import Engine

#: How long an idle connection is kept for the client's next request.
KEEP_ALIVE_SECONDS: Final = 60

#: How long answers already written may take to leave when the server stops.
_FLUSH_SECONDS: Final = 1.0

_BACKLOG: Final = 1024


class HttpServer:
    """Serves the Open Inference Protocol's REST, administration and metrics on a Unix socket and a loopback port.

    uvicorn's parser does the protocol. Its `Server` is left out: it takes over signals and wakes ten times a second.
    """

    def __init__(self, engine: "Engine", config: Config) -> None:
        self._config = config
        self._clients = engine.clients
        self._app = HttpApp(engine, config)
        self._state = ServerState()
        self._uvicorn = UvicornConfig(
            self._app,
            http=Connection,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
        )
        self._uvicorn.load()
        self._servers: list[asyncio.AbstractServer] = []
        self._sweep: asyncio.TimerHandle | None = None

    @property
    def endpoints(self) -> dict[str, str]:
        """What ``/admin/status`` shows as listening, by name; other transports add theirs here."""
        return self._app.endpoints

    async def start(self, unix_socket: socket.socket | None, tcp_socket: socket.socket | None) -> None:
        """Serve on bound sockets; either may be absent."""
        loop = asyncio.get_running_loop()

        def connect() -> Connection:
            return Connection(self._uvicorn, self._state, self._config, self._clients, loop)

        if unix_socket is not None:
            self._servers.append(await loop.create_unix_server(connect, sock=unix_socket, backlog=_BACKLOG))
            self.endpoints["http"] = "unix"
        if tcp_socket is not None:
            self._servers.append(await loop.create_server(connect, sock=tcp_socket, backlog=_BACKLOG))
            host, port = tcp_socket.getsockname()[:2]
            self.endpoints["http_tcp"] = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._enforce_deadlines()

    def _enforce_deadlines(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in list(self._state.connections):
            if isinstance(connection, Connection):
                connection.enforce_deadlines(now)
        self._sweep = loop.call_later(self._config.limits.header_seconds / 4, self._enforce_deadlines)

    async def stop(self, grace_s: float) -> None:
        """Accept nothing new, answer what is in flight within `grace_s` seconds, then cut off the rest."""
        for server in self._servers:
            server.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        tasks = set(self._state.tasks)
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=grace_s)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)
        await self._close_connections()
        if self._sweep is not None:
            self._sweep.cancel()
        for server in self._servers:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await server.wait_closed()
        self._servers.clear()
        self._app.close()

    async def _close_connections(self) -> None:
        """Let answers already written leave, then hang up."""
        loop = asyncio.get_running_loop()
        end = loop.time() + _FLUSH_SECONDS
        for connection in list(self._state.connections):
            connection.transport.close()
        while self._state.connections and loop.time() < end:  # noqa: ASYNC110 uvicorn's set tells nobody
            await asyncio.sleep(0.01)
        for connection in list(self._state.connections):
            connection.transport.abort()
