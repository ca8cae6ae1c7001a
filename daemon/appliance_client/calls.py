"""Methods of the Open Inference Protocol other than inference, and their answers as plain values."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import DecodeError, Message

from appliance_client.errors import ProtocolError
from appliance_client.wire import open_inference_pb2 as oip

_T = TypeVar("_T")
_M = TypeVar("_M", bound=Message)


@dataclass(frozen=True, slots=True)
class TensorMetadata:
    """An input or output of a model; -1 in `shape` stands for any length."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """What a caller must know to call a model."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


@dataclass(frozen=True, slots=True)
class ServerMetadata:
    """The daemon's name, version and protocol extensions."""

    name: str
    version: str
    extensions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModelIndex:
    """One model of the repository; `state` and `reason` as the daemon words them."""

    name: str
    version: str
    state: str
    reason: str


@dataclass(frozen=True, slots=True)
class Duration:
    """How often a stage ran, and its time in nanoseconds."""

    count: int
    ns: int


@dataclass(frozen=True, slots=True)
class ModelStatistics:
    """Counters of one model since the daemon started.

    Attributes:
        name: The model.
        version: Its version.
        last_inference_ms: Milliseconds since 1970 of the last request; 0 for never.
        inference_count: Rows answered.
        execution_count: Batches run.
        success: Requests answered.
        fail: Requests refused or failed.
        queue: Waiting for a batch.
        compute_input: Copying in.
        compute_infer: The model's run.
        compute_output: Copying out.
        cache_hit: Requests answered from the model's cache, with the time of looking them up.
        cache_miss: Requests looked up in vain, likewise.
        executions_by_rows: Runs of the model by the number of rows in the batch.
    """

    name: str
    version: str
    last_inference_ms: int
    inference_count: int
    execution_count: int
    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    cache_hit: Duration
    cache_miss: Duration
    executions_by_rows: dict[int, Duration]


@dataclass(frozen=True, slots=True)
class Call(Generic[_T]):
    """A method with its request, and how to read its reply.

    Attributes:
        method: The method's name.
        message: Its request, serialised.
        read: Turns the reply's bytes into a value; raises ProtocolError where they are no reply.
    """

    method: str
    message: bytes
    read: Callable[[bytes], _T]


def _call(method: str, request: Message, response: type[_M], value: Callable[[_M], _T]) -> Call[_T]:
    def read(body: bytes) -> _T:
        try:
            message = response.FromString(body)
        except DecodeError:
            raise ProtocolError(f"cannot read the reply to {method}: it is no {response.DESCRIPTOR.name}") from None
        return value(message)

    return Call(method, request.SerializeToString(deterministic=True), read)


def server_live() -> Call[bool]:
    """True where the daemon runs at all."""
    return _call("ServerLive", oip.ServerLiveRequest(), oip.ServerLiveResponse, lambda reply: reply.live)


def server_ready() -> Call[bool]:
    """True where the daemon is ready for inference."""
    return _call("ServerReady", oip.ServerReadyRequest(), oip.ServerReadyResponse, lambda reply: reply.ready)


def model_ready(model: str, version: str) -> Call[bool]:
    """True where the model answers requests."""
    request = oip.ModelReadyRequest(name=model, version=version)
    return _call("ModelReady", request, oip.ModelReadyResponse, lambda reply: reply.ready)


def server_metadata() -> Call[ServerMetadata]:
    """Name, version and extensions of the daemon."""
    return _call(
        "ServerMetadata",
        oip.ServerMetadataRequest(),
        oip.ServerMetadataResponse,
        lambda reply: ServerMetadata(reply.name, reply.version, tuple(reply.extensions)),
    )


def model_metadata(model: str, version: str) -> Call[ModelMetadata]:
    """Inputs and outputs of a model."""
    request = oip.ModelMetadataRequest(name=model, version=version)
    return _call("ModelMetadata", request, oip.ModelMetadataResponse, _metadata)


def statistics(model: str, version: str) -> Call[tuple[ModelStatistics, ...]]:
    """Counters of one model, or of all where `model` is empty."""
    request = oip.ModelStatisticsRequest(name=model, version=version)
    return _call(
        "ModelStatistics",
        request,
        oip.ModelStatisticsResponse,
        lambda reply: tuple(_statistics(row) for row in reply.model_stats),
    )


def repository_index(ready: bool) -> Call[tuple[ModelIndex, ...]]:
    """Every model of the repository, or only those that are ready."""
    return _call(
        "RepositoryIndex",
        oip.RepositoryIndexRequest(ready=ready),
        oip.RepositoryIndexResponse,
        lambda reply: tuple(ModelIndex(row.name, row.version, row.state, row.reason) for row in reply.models),
    )


def load(model: str) -> Call[None]:
    """Load a model, or wait for a load under way."""
    request = oip.RepositoryModelLoadRequest(model_name=model)
    return _call("RepositoryModelLoad", request, oip.RepositoryModelLoadResponse, lambda _: None)


def unload(model: str) -> Call[None]:
    """Unload a model once its requests are answered."""
    request = oip.RepositoryModelUnloadRequest(model_name=model)
    return _call("RepositoryModelUnload", request, oip.RepositoryModelUnloadResponse, lambda _: None)


def _metadata(reply: oip.ModelMetadataResponse) -> ModelMetadata:
    return ModelMetadata(
        name=reply.name,
        versions=tuple(reply.versions),
        platform=reply.platform,
        inputs=tuple(TensorMetadata(row.name, row.datatype, tuple(row.shape)) for row in reply.inputs),
        outputs=tuple(TensorMetadata(row.name, row.datatype, tuple(row.shape)) for row in reply.outputs),
    )


def _statistics(row: oip.ModelStatistics) -> ModelStatistics:
    stages = row.inference_stats
    return ModelStatistics(
        name=row.name,
        version=row.version,
        last_inference_ms=row.last_inference,
        inference_count=row.inference_count,
        execution_count=row.execution_count,
        success=_duration(stages.success),
        fail=_duration(stages.fail),
        queue=_duration(stages.queue),
        compute_input=_duration(stages.compute_input),
        compute_infer=_duration(stages.compute_infer),
        compute_output=_duration(stages.compute_output),
        cache_hit=_duration(stages.cache_hit),
        cache_miss=_duration(stages.cache_miss),
        executions_by_rows={batch.batch_size: _duration(batch.compute_infer) for batch in row.batch_stats},
    )


def _duration(value: oip.StatisticDuration) -> Duration:
    return Duration(value.count, value.ns)
