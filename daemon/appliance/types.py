"""Values that every layer shares: datatypes, tensors, timings, identities. No I/O."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from appliance.clients import Client
    from appliance.manifest import Manifest

#: Bytes of one element by Open Inference Protocol datatype; 0 marks BYTES, whose elements carry a 4-byte
#: little-endian length each. BF16 is Triton's addition to the protocol's list.
ITEM_BYTES: Final[dict[str, int]] = {
    "BOOL": 1,
    "UINT8": 1,
    "UINT16": 2,
    "UINT32": 4,
    "UINT64": 8,
    "INT8": 1,
    "INT16": 2,
    "INT32": 4,
    "INT64": 8,
    "FP16": 2,
    "BF16": 2,
    "FP32": 4,
    "FP64": 8,
    "BYTES": 0,
}

#: Buffers a tensor's bytes may live in. All are C-contiguous and of format "B".
Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a model takes or gives under one name.

    Attributes:
        name: The tensor's name on the wire.
        datatype: An Open Inference Protocol datatype.
        shape: Full shape, batch dimension included where the model has one; -1 stands for any length.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(slots=True)
class Tensor:
    """One tensor of a request or an answer.

    Attributes:
        name: The tensor's name.
        datatype: An Open Inference Protocol datatype.
        shape: Full shape, no negative dimension.
        content: Row-major little-endian elements; BYTES elements each preceded by a 4-byte little-endian length.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    content: Buffer


@dataclass(slots=True)
class Timings:
    """Where the time of one request went, in nanoseconds of CLOCK_MONOTONIC, each stamped where the stage ran.

    Attributes:
        decode_ns: Decoding and resizing images, in the worker.
        tokenise_ns: Turning text into token ids, in the front-end's thread pool.
        queue_ns: From admission until a batch took the request.
        copy_ns: Into the input slab and out of the output slab, the whole batch.
        compute_ns: The backend's run, the whole batch.
        postprocess_ns: Labels, scores and the like, in the worker.
        batch_rows: Rows of the batch the request ran in; 0 for an answer from the cache.
    """

    decode_ns: int = 0
    tokenise_ns: int = 0
    queue_ns: int = 0
    copy_ns: int = 0
    compute_ns: int = 0
    postprocess_ns: int = 0
    batch_rows: int = 0


class Role(StrEnum):
    """What a caller may do. `ADMIN` includes `INFER`."""

    INFER = "infer"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is on the other end of a connection.

    Attributes:
        transport: ``"native"``, ``"grpc"`` or ``"http"``.
        role: The highest role the peer holds.
        uid: User id from SO_PEERCRED, or None where the transport cannot know it.
        gid: Group id, likewise.
        pid: Process id at connect time, for display only.
    """

    transport: str
    role: Role
    uid: int | None = None
    gid: int | None = None
    pid: int | None = None


class ModelState(StrEnum):
    """Where a model stands. Only `READY` answers requests."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    QUARANTINED = "quarantined"
    FAILED = "failed"
    UNLOADING = "unloading"


class SequenceStep(NamedTuple):
    """A request's place in a sequence, by Triton's reserved parameters ``sequence_id``, ``_start`` and ``_end``.

    Attributes:
        id: The client's name for the sequence: a number other than 0, or a string that is not empty.
        is_start: True for the first request of the sequence.
        is_end: True for the last.
    """

    id: int | str
    is_start: bool = False
    is_end: bool = False


class RequestOptions(NamedTuple):
    """How a request asks to be scheduled.

    Attributes:
        timeout_us: The ``timeout`` parameter: microseconds from now; 0 for none.
        priority: The ``priority`` parameter: 1 is the most urgent; 0 for the model's default.
        sequence: The sequence it belongs to, or None.
    """

    timeout_us: int = 0
    priority: int = 0
    sequence: SequenceStep | None = None


#: What a request asks that asks nothing; read as this very object, so that a comparison by identity will do.
NO_OPTIONS: Final = RequestOptions()


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A decoded request, before it is checked against a model.

    Attributes:
        model: Model name as the client wrote it.
        version: Version as the client wrote it; empty for the model's default.
        inputs: Tensors in the client's order.
        outputs: Names of the outputs wanted; empty for all.
        timeout_us: Microseconds the transport gives it from now; 0 for no limit.
        peer: Who asks.
        options: What its parameters ask for.
        client: Whose account it goes on; None for the daemon's own requests.
    """

    model: str
    version: str
    inputs: Sequence[Tensor]
    outputs: Sequence[str] = ()
    timeout_us: int = 0
    peer: Peer | None = None
    options: RequestOptions = NO_OPTIONS
    client: "Client | None" = None


@dataclass(slots=True)
class InferResult:
    """An answer whose tensors own their bytes."""

    model: str
    version: str
    outputs: list[Tensor]
    timings: Timings = field(default_factory=Timings)


@dataclass(frozen=True, slots=True)
class CacheStatus:
    """A model's response cache.

    Attributes:
        answers: Answers it holds.
        nbytes: Memory they take with all that goes with them.
        hit_rate: Share of requests since the daemon started that were looked up and did not run; 0 where none was.
    """

    answers: int
    nbytes: int
    hit_rate: float


@dataclass(frozen=True, slots=True)
class CostStatus:
    """What batches of one shape cost on a placement: about ``slope * rows + intercept``.

    Attributes:
        units: Elements of a row's variable dimensions, such as padded tokens; 1 for fixed shapes.
        slope_us: What a row adds.
        intercept_us: What a batch costs whatever its rows.
        spread: Relative standard deviation of batches around that.
        setup_share: The intercept's share of a batch of one row, 0 to 1.
        efficient_rows: The smallest batch with 95 % of the throughput that batches without end would have; at most as
            large as the session takes.
        samples: Batches it was learned from; 0 where it is what was measured before.
        scale: What a batch as seen last takes now, divided by what was measured; None where nothing was.
    """

    units: int
    slope_us: float
    intercept_us: float
    spread: float
    setup_share: float
    efficient_rows: int
    samples: int
    scale: float | None


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One model as `status` and the repository index show it.

    Attributes:
        name: The model.
        version: The version served, or the one a load would take.
        state: Where it stands.
        reason: Why it is not ready; empty when it is.
        task: The manifest's task.
        backend: Backend of the placement, or empty before the first load.
        variant: The candidate that serves, as ``explain`` names it, likewise.
        chosen_by: ``"rule"``, ``"measured"`` or ``"pinned"``, likewise.
        requested_device: Device the placement asked for, likewise.
        fallback: Why it does not run on the device of the first choice; empty where it does.
        device: Device the session reported, likewise.
        precision: Precision the session reported, likewise.
        provider: The runtime's own name of the executor, likewise.
        runtime: Name and version of the runtime, likewise.
        max_batch_size: Rows of a batch; 0 for a model without batch dimension.
        pid: The worker's process id while one runs.
        resident_bytes: The worker's resident memory after loading.
        restarts: Times a worker was started again after a crash.
        last_crash: How its worker ended when it crashed last; empty while it never has.
        load_ms: How long the last load took, warm-up included.
        queued: Requests waiting now.
        queued_by_priority: Those in the queue, by level, the most urgent first; steps of sequences whose turn has not
            come are not among them.
        queued_bytes: Bytes of their tensors.
        running: Requests in a worker now.
        streams: Batches that its session runs at the same time; 0 before the first load.
        cache: Its response cache; None for a model without one, or that is not loaded.
        costs: What its batches cost, by shape; empty before the first one where nothing was measured.
    """

    name: str
    version: str
    state: ModelState
    reason: str = ""
    task: str = "tensor"
    backend: str = ""
    variant: str = ""
    chosen_by: str = ""
    requested_device: str = ""
    fallback: str = ""
    device: str = ""
    precision: str = ""
    provider: str = ""
    runtime: str = ""
    max_batch_size: int = 0
    pid: int | None = None
    resident_bytes: int = 0
    restarts: int = 0
    last_crash: str = ""
    load_ms: float = 0.0
    queued: int = 0
    queued_by_priority: tuple[int, ...] = ()
    queued_bytes: int = 0
    running: int = 0
    streams: int = 0
    cache: CacheStatus | None = None
    costs: tuple[CostStatus, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What a client must know to call a model.

    Attributes:
        name: The model.
        version: The version described.
        versions: All versions in the repository, oldest first.
        platform: Open Inference Protocol platform, such as ``"onnxruntime_onnx"``.
        inputs: Inputs to send, full shapes with -1 for the batch. A text or image input stands in place of the tensors
            that the daemon makes from it; those are accepted too.
        outputs: Outputs on offer, labels and scores included, full shapes.
        max_batch_size: Rows of a request at most; 0 for a model without batch dimension.
        status: Its state and placement.
        manifest: What its directory says.
    """

    name: str
    version: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int
    status: ModelStatus
    manifest: "Manifest"
