"""The native protocol's listener on ``infer.sock``: accepts, counts, times out."""

import asyncio
import contextlib
import errno
import logging
import resource
import socket
import time
from collections import Counter
from collections.abc import Container
from typing import TYPE_CHECKING, Final

from appliance.config import LimitsSection
from appliance.errors import Overloaded
from appliance.server.access import peer_of
from appliance.server.budget import BodyBudget
from appliance.server.native_connection import NativeConnection
from appliance.wire import native

if TYPE_CHECKING:
    from appliance.engine import Engine

_log = logging.getLogger("appliance.native")

#: Connections accepted before other work gets its turn.
_ACCEPT_AT_ONCE: Final = 64
#: Pause in accepting when the process has no descriptor left.
_EXHAUSTED_SECONDS: Final = 0.2
_SWEEP_SECONDS: Final = 1.0
#: How long answers already written may take to leave when the server stops.
_FLUSH_SECONDS: Final = 2.0
#: A region takes two descriptors, and all regions together a quarter of those there are.
_DESCRIPTORS_PER_REGION: Final = 8
#: Frames of the largest size that may be on their way at a time.
_BUDGET_REQUESTS: Final = 4


class NativeServer:
    """Listens on one Unix socket.

    Attributes:
        engine: Who answers.
        limits: Bounds of every connection.
        budget: Bytes that large frames on their way may hold together.
        regions: Regions registered on all connections.
        max_regions: How many there may be.
    """

    def __init__(self, engine: "Engine", limits: LimitsSection, admin_uids: Container[int]) -> None:
        self.engine = engine
        self.limits = limits
        self.budget = BodyBudget(_BUDGET_REQUESTS * limits.max_request_bytes)
        self.regions = 0
        self.max_regions = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _DESCRIPTORS_PER_REGION
        self._admin_uids = admin_uids
        self._loop = asyncio.get_running_loop()
        self._listener: socket.socket | None = None
        self._connections: set[NativeConnection] = set()
        self._per_uid: Counter[int | None] = Counter()
        self._sweeper: asyncio.TimerHandle | None = None

    def start(self, listener: socket.socket) -> None:
        """Accept on a listening, non-blocking socket."""
        self._listener = listener
        self._loop.add_reader(listener, self._accept)

    def _accept(self) -> None:
        listener = self._listener
        if listener is None:
            return
        for _ in range(_ACCEPT_AT_ONCE):
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    _log.warning("not accepting for a moment: %s", error.strerror)
                    self._loop.remove_reader(listener)
                    self._loop.call_later(_EXHAUSTED_SECONDS, self._resume)
                    return
                continue
            self._welcome(connection)

    def _resume(self) -> None:
        if self._listener is not None:
            self._loop.add_reader(self._listener, self._accept)

    def _welcome(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        try:
            peer = peer_of(connection, "native", self._admin_uids)
        except OSError:
            connection.close()
            return
        if (
            len(self._connections) >= self.limits.max_connections
            or self._per_uid[peer.uid] >= self.limits.max_connections_per_uid
        ):
            self._turn_away(connection)
            return
        self._per_uid[peer.uid] += 1
        self._connections.add(NativeConnection(self, connection, peer))
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(_SWEEP_SECONDS, self._sweep)

    @staticmethod
    def _turn_away(connection: socket.socket) -> None:
        error = Overloaded("cannot take the connection: too many are open already")
        body = native.pack_error(error.kind, str(error), error.is_retryable)
        with connection, contextlib.suppress(OSError):
            connection.send(native.HEADER.pack(len(body), native.Frame.ERROR, 0, 0, 0, 0, 0) + body)

    def left(self, connection: NativeConnection) -> None:
        """A connection is closed (called by it)."""
        self._connections.discard(connection)
        self._per_uid[connection.peer.uid] -= 1

    def _sweep(self) -> None:
        """Close what has owed a handshake, the rest of a frame or the reading of its answers for too long."""
        limit = time.monotonic_ns() - int(self.limits.header_seconds * 1e9)
        for connection in tuple(self._connections):
            if connection.is_overdue(limit):
                connection.close()
        self._sweeper = self._loop.call_later(_SWEEP_SECONDS, self._sweep) if self._connections else None

    def stop_accepting(self) -> None:
        """Close the listener and tell every client that the daemon drains."""
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        for connection in tuple(self._connections):
            connection.go_away()

    async def stop(self) -> None:
        """Let answers already written leave, then close every connection."""
        end = self._loop.time() + _FLUSH_SECONDS
        while any(connection.has_unsent for connection in self._connections) and self._loop.time() < end:  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # once in a daemon's life, and no connection has to tell
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in tuple(self._connections):
            connection.close()
