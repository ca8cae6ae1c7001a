"""The Open Inference Protocol and grpc.health.v1 over gRPC, on a Unix socket and on TCP.

The two are separate servers, since what a caller may do follows from the door: gRPC cannot tell who is on the other end
of a Unix socket (grpc/grpc#28755), so that socket is guarded by its mode and has no admin method at all, not even one
that refuses.
"""

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

import grpc

from appliance.config import Config
from appliance.errors import ApplianceError
from appliance.server.access import METHOD_ROLE, authorise
from appliance.server.grpc_errors import abort, abort_unexpected
from appliance.server.grpc_health import HealthService
from appliance.server.grpc_stream import InferStream
from appliance.server.oip import CALLS, dispatch_unary, message_from_result, parse_infer, request_from_message
from appliance.server.oip_infer import serialise_result
from appliance.server.oip_wire import MAX_HEAD_BYTES
from appliance.types import Peer, Role

if TYPE_CHECKING:
    from appliance.engine import Engine

SERVICE: Final = "inference.GRPCInferenceService"
HEALTH: Final = "grpc.health.v1.Health"

#: A client without calls may ping this often; the third ping too early closes its connection (gRFC A8).
_PING_INTERVAL_MS: Final = 10_000
_PING_STRIKES: Final = 2

Handler = Callable[[bytes, Any], Awaitable[bytes]]


class GrpcServer:
    """Serves an engine over gRPC.

    Attributes:
        tcp_port: The port bound on TCP, 0 while there is none.
    """

    def __init__(self, engine: "Engine", config: Config) -> None:
        self.tcp_port = 0
        self._engine = engine
        self._config = config
        self._health = HealthService(engine)
        self._servers: list[Any] = []
        self._unix_path: str | None = None

    async def start(self, unix_path: str | None, tcp: str | None) -> None:
        """Listen.

        Args:
            unix_path: Where the Unix socket goes, in a directory that exists; its mode is 0660. None for none.
            tcp: ``host:port``, checked by the configuration to be loopback. None for none.

        Raises:
            RuntimeError: An address cannot be bound.
        """
        if unix_path:
            server = self._server(Peer("grpc", Role.INFER), has_admin=False)
            before = os.umask(0o117)  # the socket file has its mode from birth
            try:
                server.add_insecure_port(f"unix:{unix_path}")
            finally:
                os.umask(before)
            self._unix_path = unix_path
        if tcp:
            server = self._server(Peer("grpc", self._config.access.tcp_role), has_admin=True)
            self.tcp_port = server.add_insecure_port(tcp)
        for server in self._servers:
            await server.start()

    async def stop(self, grace_s: float) -> None:
        """Take no new call, let calls in flight finish within `grace_s`, end the rest with UNAVAILABLE, close."""
        self._health.close()
        await asyncio.gather(*(server.stop(grace_s) for server in self._servers))
        if self._unix_path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._unix_path)

    def _server(self, peer: Peer, has_admin: bool) -> Any:
        limits = self._config.limits
        server = grpc.aio.server(
            options=(
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", limits.max_request_bytes + MAX_HEAD_BYTES),
                ("grpc.max_send_message_length", -1),  # how large an answer is was decided by the model
                ("grpc.max_allowed_incoming_connections", limits.max_connections),
                ("grpc.max_concurrent_streams", limits.max_requests_in_flight),
                ("grpc.server_handshake_timeout_ms", int(limits.header_seconds * 1000)),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", _PING_INTERVAL_MS),
                ("grpc.http2.max_ping_strikes", _PING_STRIKES),
            ),
            maximum_concurrent_rpcs=limits.max_connections,
        )
        service = InferenceService(self._engine, peer, limits.max_request_bytes)
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(SERVICE, service.handlers(has_admin)),
                grpc.method_handlers_generic_handler(HEALTH, self._health.handlers()),
            )
        )
        self._servers.append(server)
        return server


class InferenceService:
    """The methods of GRPCInferenceService for one door. Messages go in and out serialised."""

    def __init__(self, engine: "Engine", peer: Peer, max_request_bytes: int) -> None:
        self._engine = engine
        self._peer = peer
        self._max_request_bytes = max_request_bytes

    def handlers(self, has_admin: bool) -> dict[str, Any]:
        """Handlers by method; those that need the role admin only where `has_admin`."""
        table = {
            method: grpc.unary_unary_rpc_method_handler(self._call(method))
            for method in CALLS
            if has_admin or METHOD_ROLE[method] is Role.INFER
        }
        table["ModelInfer"] = grpc.unary_unary_rpc_method_handler(self.infer)
        table["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self.stream)
        return table

    async def infer(self, body: bytes, context: Any) -> bytes:
        """ModelInfer. A client that cancels or goes away cancels this task, and so withdraws the request."""
        try:
            authorise(self._peer, "ModelInfer")
            message, raw = parse_infer(body)
            request = request_from_message(message, self._peer, remaining_us(context), raw)
            result = await self._engine.infer(request)
            return serialise_result(message_from_result(result, message.id, with_content=False), result)
        except ApplianceError as error:
            return await abort(context, error)
        except Exception:
            return await abort_unexpected(context, "ModelInfer")

    async def stream(self, requests: Any, context: Any) -> None:
        """ModelStreamInfer."""
        try:
            authorise(self._peer, "ModelStreamInfer")
        except ApplianceError as error:
            await abort(context, error)
        stream = InferStream(self._engine, self._peer, context, remaining_us, self._max_request_bytes)
        await stream.run()

    def _call(self, method: str) -> Handler:
        async def call(body: bytes, context: Any) -> bytes:
            try:
                return await dispatch_unary(self._engine, self._peer, method, body)
            except ApplianceError as error:
                return await abort(context, error)
            except Exception:
                return await abort_unexpected(context, method)

        return call


def remaining_us(context: Any) -> int:
    """Microseconds until the client's deadline, at least 1; 0 where it set none."""
    remaining = context.time_remaining()
    return 0 if remaining is None else max(1, int(remaining * 1e6))
