"""grpc.health.v1 (grpc/grpc doc/health-checking.md): Check and Watch for the server and for each model by its name."""

import asyncio
from typing import TYPE_CHECKING, Final, Protocol

from appliance.errors import InvalidRequest, ModelNotFound
from appliance.server.oip_wire import parse_message
from appliance.wire.open_inference_pb2 import HealthCheckRequest, HealthCheckResponse

if TYPE_CHECKING:
    from appliance.engine import Engine

_SERVING: Final = HealthCheckResponse.SERVING
_NOT_SERVING: Final = HealthCheckResponse.NOT_SERVING
_SERVICE_UNKNOWN: Final = HealthCheckResponse.SERVICE_UNKNOWN

#: Names of the whole server.
_SERVER: Final = frozenset(("", "inference.GRPCInferenceService"))


class Answers(Protocol):
    """Where Watch's answers go."""

    async def write(self, message: bytes) -> None:
        """Send one, and wait until the client has taken it."""
        ...


class HealthService:
    """The methods of Health. It tells states and nothing else, so every caller may use it."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._is_closing = False
        self._watchers: set[asyncio.Event] = set()

    def close(self) -> None:
        """Report NOT_SERVING from now on, and end every Watch after it has said so."""
        self._is_closing = True
        for changed in self._watchers:
            changed.set()

    def check(self, body: bytes) -> bytes:
        """The state of one service.

        Raises:
            ModelNotFound: It is neither the server nor a model.
            InvalidRequest: `body` is no HealthCheckRequest.
        """
        status = self._status(parse_message(HealthCheckRequest, body).service)
        if status == _SERVICE_UNKNOWN:
            raise ModelNotFound("cannot check the service: it is neither the server nor a model")
        return HealthCheckResponse(status=status).SerializeToString()

    async def watch(self, body: bytes, call: Answers) -> None:
        """The state of one service now and after each change; SERVICE_UNKNOWN while it is none.

        Raises:
            InvalidRequest: `body` is no HealthCheckRequest.
        """
        service = parse_message(HealthCheckRequest, body).service
        changed = asyncio.Event()
        self._watchers.add(changed)
        stop_watching = self._engine.watch(lambda name, is_ready: changed.set())
        told = None
        try:
            while True:
                changed.clear()
                status = self._status(service)
                if status != told:
                    await call.write(HealthCheckResponse(status=status).SerializeToString())
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
