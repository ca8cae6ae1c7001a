"""The admin plane of choosing: hardware, measuring, quantising, pinning, jobs."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from appliance.backend import MAX_STREAMS, MAX_THREADS
from appliance.errors import InvalidRequest
from appliance.explanation import explain, explain_instances
from appliance.quantizer import DEFAULT_ROWS
from appliance.server.http_message import Request, Response, json_response
from appliance.server.http_routes import Route
from appliance.server.rest import parse_object

if TYPE_CHECKING:
    from appliance.engine import Engine


class TuningRoutes:
    """Handlers on one engine."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine

    def table(self) -> list[Route]:
        """The routes."""
        model = "/admin/models/{model}"
        return [
            Route("POST", "/admin/hardware/refresh", "HardwareRefresh", self._refresh),
            Route("POST", "/admin/hardware/record", "HardwareRecord", self._record),
            Route("GET", f"{model}/explain", "Explain", self._explain),
            Route("POST", f"{model}/tune", "Tune", self._tune),
            Route("POST", f"{model}/quantize", "Quantize", self._quantize),
            Route("POST", f"{model}/variants/remove", "VariantRemove", self._remove_variant),
            Route("POST", f"{model}/pin", "Pin", self._pin),
            Route("POST", f"{model}/unpin", "Unpin", self._unpin),
            Route("GET", f"{model}/instances", "Instances", self._instances),
            Route("POST", f"{model}/instances", "InstancesChange", self._change_instances),
            Route("GET", "/admin/jobs", "Jobs", self._jobs),
            Route("GET", "/admin/jobs/{job}", "Jobs", self._job),
            Route("POST", "/admin/jobs/{job}/cancel", "JobCancel", self._cancel),
            Route("POST", "/admin/doctor", "Doctor", self._doctor),
        ]

    async def _refresh(self, _: Request) -> Response:
        return json_response(asdict(await self._engine.hardware.refresh()))

    async def _record(self, _: Request) -> Response:
        return json_response(await self._engine.hardware.record())

    async def _explain(self, request: Request) -> Response:
        return json_response(await self._explanation(request.names["model"]))

    async def _explanation(self, name: str) -> dict[str, Any]:
        engine = self._engine
        options = await engine.tuner.options(name)
        status = engine.model(name).status()
        document = explain(options, engine.chooser.decide(options, status.variant), status)
        jobs = [job for kind in ("tune", "quantize") if (job := engine.jobs.of(kind, name)) is not None]
        return {**document, "jobs": [job.as_json() for job in jobs]}

    async def _tune(self, request: Request) -> Response:
        body = _Fields(request, "budget_seconds", "fresh")
        budget = body.number("budget_seconds")
        job = await self._engine.tuner.tune(request.names["model"], budget, body.flag("fresh"))
        return json_response(job.as_json())

    async def _quantize(self, request: Request) -> Response:
        body = _Fields(request, "method", "calibration", "rows")
        rows = body.number("rows")
        job = await self._engine.quantizer.quantize(
            request.names["model"],
            body.text("method") or "int8",
            body.text("calibration"),
            DEFAULT_ROWS if rows is None else int(rows),
        )
        return json_response(job.as_json())

    async def _remove_variant(self, request: Request) -> Response:
        body = _Fields(request, "variant")
        await self._engine.quantizer.remove(request.names["model"], body.text("variant"))
        return json_response(await self._explanation(request.names["model"]))

    async def _pin(self, request: Request) -> Response:
        body = _Fields(request, "variant")
        await self._engine.tuner.pin(request.names["model"], body.text("variant"))
        return json_response(await self._explanation(request.names["model"]))

    async def _unpin(self, request: Request) -> Response:
        await self._engine.tuner.unpin(request.names["model"])
        return json_response(await self._explanation(request.names["model"]))

    async def _instances(self, request: Request) -> Response:
        engine, name = self._engine, request.names["model"]
        options = await engine.tuner.options(name)
        status = engine.model(name).status()
        return json_response(explain_instances(options, engine.chooser.decide(options, status.variant), status))

    async def _change_instances(self, request: Request) -> Response:
        body = _Fields(request, "streams", "threads", "auto")
        name = request.names["model"]
        streams, threads = body.count("streams", MAX_STREAMS), body.count("threads", MAX_THREADS)
        is_free = streams is None and threads is None
        if body.flag("auto") is not is_free:
            raise InvalidRequest("cannot change instances: give 'streams', 'threads' or both, or 'auto' alone")
        if is_free:
            await self._engine.tuner.unpin(name)
        else:
            await self._engine.tuner.split(name, streams, threads)
        return await self._instances(request)

    async def _jobs(self, _: Request) -> Response:
        return json_response({"jobs": [job.as_json() for job in self._engine.jobs.listed()]})

    async def _job(self, request: Request) -> Response:
        return json_response(self._engine.jobs.find(request.names["job"]).as_json())

    async def _cancel(self, request: Request) -> Response:
        return json_response(self._engine.jobs.cancel(request.names["job"]).as_json())

    async def _doctor(self, request: Request) -> Response:
        body = _Fields(request, "environment")
        return json_response(await self._engine.diagnose(body.texts("environment")))


class _Fields:
    """A request's JSON object, which may hold the named fields and nothing else."""

    def __init__(self, request: Request, *names: str) -> None:
        self._values: Mapping[str, Any] = parse_object(request.body)
        unknown = sorted(set(self._values) - set(names))
        if unknown:
            raise InvalidRequest(f"cannot use {unknown[0][:64]!r}: the fields are {', '.join(names)}")

    def text(self, name: str) -> str:
        """A string, empty where it is missing."""
        value = self._values.get(name) or ""
        if not isinstance(value, str):
            raise InvalidRequest(f"cannot use {name!r}: it must be a string")
        return value

    def number(self, name: str) -> float | None:
        """A positive number, or None where it is missing."""
        value = self._values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
            raise InvalidRequest(f"cannot use {name!r}: it must be a number above 0")
        return float(value)

    def count(self, name: str, most: int) -> int | None:
        """A whole number from 1 to `most`, or None where it is missing."""
        value = self._values.get(name)
        if value is None:
            return None
        if type(value) is not int or not 1 <= value <= most:
            raise InvalidRequest(f"cannot use {name!r}: it must be a number from 1 to {most}")
        return value

    def texts(self, name: str) -> dict[str, str]:
        """An object of strings, empty where it is missing."""
        value = self._values.get(name) or {}
        if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
            raise InvalidRequest(f"cannot use {name!r}: it must be an object of strings")
        return value

    def flag(self, name: str) -> bool:
        """A boolean, False where it is missing."""
        value = self._values.get(name, False)
        if not isinstance(value, bool):
            raise InvalidRequest(f"cannot use {name!r}: it must be true or false")
        return value
