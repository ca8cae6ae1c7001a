"""The Open Inference Protocol below every transport: all unary methods but inference, and the messages of inference.

Method names, fields and parameters are Triton's (triton-inference-server/common protobuf/grpc_service.proto), so that
its clients work unchanged.
"""

from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.message import Message

from appliance import __version__
from appliance.errors import InvalidRequest, ModelNotFound, Unimplemented
from appliance.metrics import Duration, ModelStatistics
from appliance.server.access import authorise
from appliance.server.model_config import scheduling
from appliance.server.oip_infer import (
    check_request_id,
    message_from_result,
    request_from_message,
    serialise_result,
    shown,
)
from appliance.server.oip_wire import parse_infer, parse_message
from appliance.types import ModelDescription, ModelState, ModelStatus, Peer, TensorSpec
from appliance.wire import open_inference_pb2 as pb

if TYPE_CHECKING:
    from appliance.engine import Engine

__all__ = [
    "CALLS",
    "EXTENSIONS",
    "STATE_WORDS",
    "check_request_id",
    "config_message",
    "dispatch_unary",
    "index_message",
    "message_from_result",
    "metadata_message",
    "parse_infer",
    "request_from_message",
    "serialise_result",
    "shown",
    "statistics_message",
]

#: Extensions ServerMetadata reports, in Triton's words.
EXTENSIONS: Final = (
    "model_repository", "model_configuration", "schedule_policy", "sequence", "statistics", "binary_tensor_data",
    "parameters",
)  # fmt: skip

#: Triton's word for each state in the repository index.
STATE_WORDS: Final[dict[ModelState, str]] = {
    ModelState.UNLOADED: "UNAVAILABLE",
    ModelState.LOADING: "LOADING",
    ModelState.READY: "READY",
    ModelState.RESTARTING: "LOADING",
    ModelState.QUARANTINED: "UNAVAILABLE",
    ModelState.FAILED: "UNAVAILABLE",
    ModelState.UNLOADING: "UNLOADING",
}

#: Durations of Triton's statistics, by the names that it and `ModelStatistics` give them.
STAGES: Final = (
    "success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss",
)  # fmt: skip

#: Triton's word for a device, by what its id begins with; it has none for NPUs.
_KINDS: Final = {
    "cpu": pb.ModelInstanceGroup.KIND_CPU,
    "nvidia": pb.ModelInstanceGroup.KIND_GPU,
    "intel-gpu": pb.ModelInstanceGroup.KIND_GPU,
}
_OTHER_KIND: Final = pb.ModelInstanceGroup.KIND_AUTO


async def dispatch_unary(engine: "Engine", peer: Peer, method: str, body: bytes) -> bytes:
    """Answer any unary method but inference.

    Args:
        engine: What to ask.
        peer: Who asks.
        method: The method's name without its service, such as ``"ModelConfig"``.
        body: The method's request message, serialised.

    Returns:
        The method's response message, serialised.

    Raises:
        PermissionDenied: `peer` may not call `method`.
        ApplianceError: Anything else that went wrong, `Unimplemented` for a method that is not offered.
    """
    call = CALLS.get(method)
    if call is None:
        raise Unimplemented(f"cannot call {shown(method)}: this daemon does not offer it here")
    authorise(peer, method)
    kind, handler = call
    return (await handler(engine, parse_message(kind, body))).SerializeToString()


def metadata_message(description: ModelDescription) -> pb.ModelMetadataResponse:
    """What a model takes and gives, full shapes with -1 for the batch."""
    message = pb.ModelMetadataResponse(
        name=description.name, versions=description.versions, platform=description.platform
    )
    for spec in description.inputs:
        message.inputs.add(name=spec.name, datatype=spec.datatype, shape=spec.shape)
    for spec in description.outputs:
        message.outputs.add(name=spec.name, datatype=spec.datatype, shape=spec.shape)
    return message


def placement_parameters(status: ModelStatus) -> dict[str, str]:
    """What serves and where it really runs, as parameters of a model's metadata and configuration."""
    names = (
        "variant", "chosen_by", "requested_device", "device", "provider", "precision", "runtime", "fallback", "task",
    )  # fmt: skip
    return {name: value for name in names if (value := getattr(status, name))}


def config_message(description: ModelDescription) -> pb.ModelConfig:
    """A model as Triton's configuration says it: dims without the batch dimension, placement as parameters."""
    status = description.status
    rows = description.max_batch_size
    message = pb.ModelConfig(
        name=description.name,
        platform=description.platform,
        backend=status.backend,
        max_batch_size=rows,
        **scheduling(description),
    )
    message.version_policy.latest.num_versions = 1
    for spec in description.inputs:
        message.input.add(name=spec.name, data_type=_config_datatype(spec), dims=_dims(spec, rows))
    for spec in description.outputs:
        message.output.add(name=spec.name, data_type=_config_datatype(spec), dims=_dims(spec, rows))
    if status.device:
        kind = next((kind for start, kind in _KINDS.items() if status.device.startswith(start)), _OTHER_KIND)
        message.instance_group.add(name=status.device, count=1, kind=kind)
    for key, value in placement_parameters(status).items():
        message.parameters[key].string_value = value
    return message


def statistics_message(entries: Iterable[tuple[ModelStatus, ModelStatistics]]) -> pb.ModelStatisticsResponse:
    """Counters of models, durations in nanoseconds."""
    message = pb.ModelStatisticsResponse()
    for status, statistics in entries:
        model = message.model_stats.add(
            name=status.name,
            version=status.version,
            last_inference=statistics.last_inference_ms,
            inference_count=statistics.inference_count,
            execution_count=statistics.execution_count,
        )
        for field in STAGES:
            _copy_duration(getattr(model.inference_stats, field), getattr(statistics, field))
        for rows, batch in sorted(statistics.batches.items()):
            entry = model.batch_stats.add(batch_size=rows)
            for field in ("compute_input", "compute_infer", "compute_output"):
                _copy_duration(getattr(entry, field), getattr(batch, field))
        if status.resident_bytes:
            model.memory_usage.add(type="CPU", id=0, byte_size=status.resident_bytes)
    return message


def index_message(statuses: Iterable[ModelStatus], ready_only: bool = False) -> pb.RepositoryIndexResponse:
    """Every model of the repository with Triton's word for its state and the reason it is not ready."""
    message = pb.RepositoryIndexResponse()
    for status in statuses:
        if status.state is ModelState.READY or not ready_only:
            message.models.add(
                name=status.name, version=status.version, state=STATE_WORDS[status.state], reason=status.reason
            )
    return message


def _config_datatype(spec: TensorSpec) -> str:
    return "TYPE_STRING" if spec.datatype == "BYTES" else f"TYPE_{spec.datatype}"


def _dims(spec: TensorSpec, max_batch_size: int) -> tuple[int, ...]:
    return spec.shape[1:] if max_batch_size else spec.shape


def _copy_duration(message: pb.StatisticDuration, duration: Duration) -> None:
    message.count = duration.count
    message.ns = duration.ns


async def _server_live(engine: "Engine", request: pb.ServerLiveRequest) -> Message:
    return pb.ServerLiveResponse(live=True)


async def _server_ready(engine: "Engine", request: pb.ServerReadyRequest) -> Message:
    return pb.ServerReadyResponse(ready=engine.is_ready())


async def _server_metadata(engine: "Engine", request: pb.ServerMetadataRequest) -> Message:
    return pb.ServerMetadataResponse(name="inference-appliance", version=__version__, extensions=EXTENSIONS)


async def _model_ready(engine: "Engine", request: pb.ModelReadyRequest) -> Message:
    try:
        return pb.ModelReadyResponse(ready=engine.model_is_ready(request.name, request.version))
    except ModelNotFound:
        # as Triton answers: clients wait for a model by asking until it is ready
        return pb.ModelReadyResponse(ready=False)


async def _model_metadata(engine: "Engine", request: pb.ModelMetadataRequest) -> Message:
    return metadata_message(engine.describe(request.name, request.version))


async def _model_config(engine: "Engine", request: pb.ModelConfigRequest) -> Message:
    return pb.ModelConfigResponse(config=config_message(engine.describe(request.name, request.version)))


async def _model_statistics(engine: "Engine", request: pb.ModelStatisticsRequest) -> Message:
    return statistics_message(engine.statistics(request.name, request.version))


async def _repository_index(engine: "Engine", request: pb.RepositoryIndexRequest) -> Message:
    _check_repository(request.repository_name)
    return index_message(engine.statuses(), request.ready)


async def _load(engine: "Engine", request: pb.RepositoryModelLoadRequest) -> Message:
    _check_repository(request.repository_name)
    if request.parameters:
        raise InvalidRequest(
            f"cannot load with the parameter {shown(min(request.parameters))}: a model is loaded as the "
            "repository has it, without config or files from the request"
        )
    await engine.load(request.model_name)
    return pb.RepositoryModelLoadResponse()


async def _unload(engine: "Engine", request: pb.RepositoryModelUnloadRequest) -> Message:
    _check_repository(request.repository_name)
    # tritonclient always sends unload_dependents; models here have no dependents
    unknown = request.parameters.keys() - {"unload_dependents"}
    if unknown:
        raise InvalidRequest(f"cannot unload with the parameter {shown(min(unknown))}: there is no such parameter")
    await engine.unload(request.model_name)
    return pb.RepositoryModelUnloadResponse()


def _check_repository(name: str) -> None:
    if name:
        raise InvalidRequest(
            f"cannot use the repository {shown(name)}: there is one repository, and its name is left empty"
        )


#: Methods `dispatch_unary` answers, with the type of the request.
CALLS: Final[dict[str, tuple[type[Message], Callable[["Engine", Any], Awaitable[Message]]]]] = {
    "ServerLive": (pb.ServerLiveRequest, _server_live),
    "ServerReady": (pb.ServerReadyRequest, _server_ready),
    "ServerMetadata": (pb.ServerMetadataRequest, _server_metadata),
    "ModelReady": (pb.ModelReadyRequest, _model_ready),
    "ModelMetadata": (pb.ModelMetadataRequest, _model_metadata),
    "ModelConfig": (pb.ModelConfigRequest, _model_config),
    "ModelStatistics": (pb.ModelStatisticsRequest, _model_statistics),
    "RepositoryIndex": (pb.RepositoryIndexRequest, _repository_index),
    "RepositoryModelLoad": (pb.RepositoryModelLoadRequest, _load),
    "RepositoryModelUnload": (pb.RepositoryModelUnloadRequest, _unload),
}
