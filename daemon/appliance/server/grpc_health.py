"""grpc.health.v1 (grpc/grpc doc/health-checking.md): Check and Watch for the server and for each model by its name."""

import asyncio
from typing import TYPE_CHECKING, Any, Final

import grpc

from appliance.errors import ApplianceError, InvalidRequest, ModelNotFound
from appliance.server.grpc_errors import abort
from appliance.server.oip_wire import parse_message
from appliance.wire.open_inference_pb2 import HealthCheckRequest, HealthCheckResponse

if TYPE_CHECKING:
    from appliance.engine import Engine

_SERVING: Final = HealthCheckResponse.SERVING
_NOT_SERVING: Final = HealthCheckResponse.NOT_SERVING
_SERVICE_UNKNOWN: Final = HealthCheckResponse.SERVICE_UNKNOWN

#: Names of the whole server.
_SERVER: Final = frozenset(("", "inference.GRPCInferenceService"))


class HealthService:
    """The methods of Health. It tells states and nothing else, so every caller may use it."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._is_closing = False
        self._watchers: set[asyncio.Event] = set()

    def handlers(self) -> dict[str, Any]:
        """Handlers by method."""
        return {
            "Check": grpc.unary_unary_rpc_method_handler(self.check),
            "Watch": grpc.unary_stream_rpc_method_handler(self.watch),
        }

    def close(self) -> None:
        """Report NOT_SERVING from now on, and end every Watch after it has said so."""
        self._is_closing = True
        for changed in self._watchers:
            changed.set()

    async def check(self, body: bytes, context: Any) -> bytes:
        """The state of one service; NOT_FOUND for one that is none."""
        try:
            service = parse_message(HealthCheckRequest, body).service
            status = self._status(service)
            if status == _SERVICE_UNKNOWN:
                raise ModelNotFound("cannot check the service: it is neither the server nor a model")
        except ApplianceError as error:
            return await abort(context, error)
        return HealthCheckResponse(status=status).SerializeToString()

    async def watch(self, body: bytes, context: Any) -> None:
        """The state of one service now and after each change; SERVICE_UNKNOWN while it is none."""
        try:
            service = parse_message(HealthCheckRequest, body).service
        except ApplianceError as error:
            await abort(context, error)
        changed = asyncio.Event()
        self._watchers.add(changed)
        stop_watching = self._engine.watch(lambda name, is_ready: changed.set())
        told = None
        try:
            while True:
                changed.clear()
                status = self._status(service)
                if status != told:
                    await context.write(HealthCheckResponse(status=status).SerializeToString())
                    told = status
                if self._is_closing:
                    return
                await changed.wait()
        finally:
            stop_watching()
            self._watchers.discard(changed)

    def _status(self, service: str) -> HealthCheckResponse.ServingStatus:
        try:
            is_ready = self._engine.is_ready() if service in _SERVER else self._engine.model_is_ready(service)
        except (ModelNotFound, InvalidRequest):
            return _SERVICE_UNKNOWN
        return _SERVING if is_ready and not self._is_closing else _NOT_SERVING
