"""The ASGI application: check who asks, find the row, run its handler, turn errors into their status."""

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from typing import TYPE_CHECKING, Any, Final

from appliance.config import Config
from appliance.errors import (
    ApplianceError,
    InvalidRequest,
    ModelNotReady,
    Overloaded,
    PermissionDenied,
    ShuttingDown,
    Unimplemented,
)
from appliance.server import rest_models
from appliance.server.access import authorise
from appliance.server.admin import AdminViews
from appliance.server.budget import BodyBudget
from appliance.server.exposition import expose
from appliance.server.http_connection import Connection
from appliance.server.http_message import (
    INLINE_BYTES,
    Body,
    ClientGoneError,
    Receive,
    Request,
    Response,
    error_response,
    join_headers,
    json_response,
    request_id,
)
from appliance.server.http_routes import Route, Routes
from appliance.server.http_tuning import TuningRoutes
from appliance.server.rest import RestInfer, decode_infer, encode_infer, parse_object, split_body
from appliance.types import InferResult

if TYPE_CHECKING:
    from appliance.engine import Engine

Send = Callable[[dict[str, Any]], Awaitable[None]]

log = logging.getLogger("appliance.http")

#: Bodies of all requests in flight may hold this many times `limits.max_request_bytes`.
BUDGET_REQUESTS: Final = 4

#: Paths of Triton's protocol that this daemon knows and does not offer.
_NOT_OFFERED: Final = re.compile(
    r"/v2/(?:(system|cuda)sharedmemory(?:/.*)?|(?:models/[^/]+/)?trace/setting|logging"
    r"|models/[^/]+(?:/versions/[^/]+)?/generate(?:_stream)?)"
)

_LOCAL_HOSTS: Final = ("localhost", "127.0.0.1", "[::1]")


class OriginGuard:
    """Refuses requests that a web page could have made through a foreign or rebound host name (DNS rebinding)."""

    def __init__(self, hosts: Iterable[str]) -> None:
        names = "|".join(re.escape(host) for host in (*_LOCAL_HOSTS, *hosts))
        self._host = re.compile(rf"(?:{names})(?::[0-9]{{1,5}})?", re.IGNORECASE)
        self._origin = re.compile(rf"https?://(?:{names})(?::[0-9]{{1,5}})?", re.IGNORECASE)

    def check(self, headers: Mapping[bytes, bytes], is_unix: bool) -> None:
        """Let a request pass whose Host, and Origin if it has one, are this machine's or configured.

        Raises:
            PermissionDenied: They are not.
        """
        host = headers.get(b"host", b"").decode("latin-1")
        if not (self._host.fullmatch(host) or (is_unix and not host)):
            raise PermissionDenied("cannot answer: Host must be localhost or a name of the daemon's configuration")
        origin = headers.get(b"origin")
        if origin is not None and not self._origin.fullmatch(origin.decode("latin-1")):
            raise PermissionDenied("cannot answer: Origin must be localhost or a name of the daemon's configuration")


def _date() -> bytes:
    return formatdate(time.time(), usegmt=True).encode("ascii")


def _wants_heavy_json(call: RestInfer, result: InferResult) -> bool:
    as_json = sum(len(tensor.content) for tensor in result.outputs if not call.is_binary(tensor.name))
    return as_json > INLINE_BYTES // 4


class HttpApp:
    """Everything HTTP offers, on one engine."""

    def __init__(self, engine: "Engine", config: Config) -> None:
        self._engine = engine
        self._config = config
        self._guard = OriginGuard(config.access.hosts)
        self._budget = BodyBudget(BUDGET_REQUESTS * config.limits.max_request_bytes)
        # one thread: parsing holds the interpreter lock, more threads would only hold more memory
        self._json_thread = ThreadPoolExecutor(1, "http-json")
        self.endpoints: dict[str, str] = {}
        self._admin = AdminViews(engine, self.endpoints)
        self._routes = Routes(self._table())

    def _table(self) -> list[Route]:
        model = "/v2/models/{model}[/versions/{version}]"
        repository = "/v2/repository/models/{model}"
        return [
            Route("POST", f"{model}/infer", "ModelInfer", self._infer),
            Route("GET", "/v2", "ServerMetadata", self._server_metadata),
            Route("GET", "/v2/health/live", "ServerLive", self._live),
            Route("GET", "/v2/health/ready", "ServerReady", self._ready),
            Route("GET", model, "ModelMetadata", self._model_metadata),
            Route("GET", f"{model}/ready", "ModelReady", self._model_ready),
            Route("GET", f"{model}/config", "ModelConfig", self._model_config),
            Route("GET", f"{model}/stats", "ModelStatistics", self._statistics),
            Route("GET", "/v2/models/stats", "ModelStatistics", self._statistics),
            Route("POST", "/v2/repository/index", "RepositoryIndex", self._index),
            Route("POST", f"{repository}/load", "RepositoryModelLoad", self._load),
            Route("POST", f"{repository}/unload", "RepositoryModelUnload", self._unload),
            Route("GET", "/admin/status", "Status", self._admin_status),
            Route("GET", "/admin/models", "Status", self._admin_models),
            Route("GET", "/admin/models/{model}", "Status", self._admin_model),
            Route("GET", "/admin/hardware", "Hardware", self._admin_hardware),
            Route("GET", "/admin/backends", "Backends", self._admin_backends),
            *TuningRoutes(self._engine).table(),
            Route("GET", "/metrics", "ModelStatistics", self._metrics),
        ]

    def close(self) -> None:
        """Give back the thread; called once nothing is in flight."""
        self._json_thread.shutdown(wait=False, cancel_futures=True)

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request (ASGI 3). Whatever goes wrong becomes an answer, except that nobody is left to read it."""
        headers = join_headers(scope["headers"])
        connection: Connection = scope["state"]["connection"]
        request = Request(scope["method"], scope["path"], headers, connection, receive, request_id(headers))
        with Body(request, self._config.limits.max_request_bytes, self._budget) as body:
            try:
                response = await self._respond(request, body)
            except ClientGoneError:
                return
            except asyncio.CancelledError:
                if connection.transport.is_closing():
                    return
                response = error_response(ShuttingDown("cannot finish the request: the daemon is stopping"))
            except ApplianceError as error:
                response = error_response(error)
            except Exception:
                log.exception("request %s failed: %s %.200r", request.id, request.method, request.path)
                response = error_response(ApplianceError(f"cannot answer request {request.id}: see the daemon's log"))
            await self._send(send, request, response)

    async def _respond(self, request: Request, body: Body) -> Response:
        if request.connection.is_over_cap:
            raise Overloaded(f"cannot serve the connection: {self._config.limits.max_connections} are open already")
        self._guard.check(request.headers, request.connection.is_unix)
        match = self._routes.match(request.method, request.path)
        if match.route is None:
            return self._no_route(request, match.allowed)
        authorise(request.connection.peer, match.route.access)
        request.names = match.names
        if match.route.method == "POST":
            request.body = await body.read()
        return await match.route.handler(request)

    @staticmethod
    def _no_route(request: Request, allowed: tuple[str, ...]) -> Response:
        path = request.path[:200]
        if allowed:
            text = f"cannot {request.method[:16]} {path!r}: the method must be {' or '.join(allowed)}"
            response = json_response({"error": text, "kind": Unimplemented.kind}, 405)
            response.headers.append((b"allow", ", ".join(allowed).encode("ascii")))
            return response
        if _NOT_OFFERED.fullmatch(request.path):
            raise Unimplemented(
                f"cannot serve {path!r}: this daemon does not offer that part of the protocol over HTTP"
            )
        return json_response({"error": f"cannot find {path!r}: no such path", "kind": Unimplemented.kind}, 404)

    @staticmethod
    async def _send(send: Send, request: Request, response: Response) -> None:
        size = sum(len(part) for part in response.parts)
        headers = [
            (b"content-type", response.content_type),
            (b"content-length", str(size).encode("ascii")),
            (b"x-request-id", request.id.encode("ascii")),
            (b"date", _date()),
            *response.headers,
        ]
        if request.connection.is_over_cap:
            headers.append((b"connection", b"close"))
        if request.method != "HEAD":
            request.connection.expect_answer()
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        parts = (b"".join(response.parts),) if size <= INLINE_BYTES else response.parts
        for index, part in enumerate(parts):
            await send({"type": "http.response.body", "body": part, "more_body": index + 1 < len(parts)})

    async def _off_loop(self, is_heavy: bool, function: Callable[..., Any], *args: Any) -> Any:
        if not is_heavy:
            return function(*args)
        return await asyncio.get_running_loop().run_in_executor(self._json_thread, function, *args)

    async def _infer(self, request: Request) -> Response:
        header_length = request.headers.get(b"inference-header-content-length")
        json, tail = split_body(request.body, header_length)
        model, version, connection = request.names["model"], request.names["version"], request.connection
        call: RestInfer = await self._off_loop(
            len(json) > INLINE_BYTES, decode_infer, model, version, json, tail, connection.peer, connection.account
        )
        with connection.withdrawn_on_loss():
            result = await self._engine.infer(call.request)
        parts, json_bytes = await self._off_loop(_wants_heavy_json(call, result), encode_infer, call, result)
        if json_bytes is None:
            return Response(200, parts)
        length = (b"inference-header-content-length", str(json_bytes).encode("ascii"))
        return Response(200, parts, b"application/octet-stream", [length])

    async def _server_metadata(self, _: Request) -> Response:
        return json_response(self._admin.server_metadata())

    async def _live(self, _: Request) -> Response:
        return json_response({"live": True})

    async def _ready(self, _: Request) -> Response:
        if self._engine.is_ready():
            return json_response({"ready": True})
        if self._engine.accepting:
            error, kind = "cannot serve yet: startup models are not ready", ModelNotReady.kind
        else:
            error, kind = "cannot serve any more: the daemon is stopping", ShuttingDown.kind
        return json_response({"ready": False, "error": error, "kind": kind}, 503)

    async def _model_ready(self, request: Request) -> Response:
        name = request.names["model"]
        if self._engine.model_is_ready(name, request.names["version"]):
            return json_response({"name": name, "ready": True})
        error = f"cannot use model {name!r}: it is not ready"
        return json_response({"name": name, "ready": False, "error": error, "kind": ModelNotReady.kind}, 503)

    async def _model_metadata(self, request: Request) -> Response:
        return json_response(
            rest_models.metadata(self._engine.describe(request.names["model"], request.names["version"]))
        )

    async def _model_config(self, request: Request) -> Response:
        return json_response(
            rest_models.config(self._engine.describe(request.names["model"], request.names["version"]))
        )

    async def _statistics(self, request: Request) -> Response:
        names = request.names
        rows = self._engine.statistics(names.get("model", ""), names.get("version", ""))
        return json_response(rest_models.statistics(rows))

    async def _index(self, request: Request) -> Response:
        ready = parse_object(request.body).get("ready", False)
        if type(ready) is not bool:
            raise InvalidRequest("cannot decode the request: ready must be true or false")
        return json_response(rest_models.repository_index(self._engine.statuses(), ready))

    async def _load(self, request: Request) -> Response:
        parameters = parse_object(request.body).get("parameters") or {}
        if parameters:
            raise Unimplemented("cannot load with parameters: a model is loaded as its directory says")
        await self._engine.load(request.names["model"])
        return await self._admin_model(request)

    async def _unload(self, request: Request) -> Response:
        await self._engine.unload(request.names["model"])
        return await self._admin_model(request)

    async def _admin_status(self, _: Request) -> Response:
        return json_response(self._admin.status())

    async def _admin_models(self, _: Request) -> Response:
        return json_response({"models": self._admin.models()})

    async def _admin_model(self, request: Request) -> Response:
        return json_response(self._admin.model(request.names["model"]))

    async def _admin_hardware(self, _: Request) -> Response:
        return json_response(await self._admin.hardware())

    async def _admin_backends(self, _: Request) -> Response:
        return json_response({"backends": await self._admin.backends()})

    async def _metrics(self, _: Request) -> Response:
        text = expose(self._engine.statistics(), self._engine.is_ready(), self._admin.resident_bytes())
        return Response(200, (text.encode("utf-8"),), b"text/plain; version=0.0.4; charset=utf-8")
