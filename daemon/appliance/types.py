"""Values that every layer shares: datatypes, tensors, timings, identities. No I/O."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

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
        batch_rows: Rows of the batch the request ran in.
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


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A decoded request, before it is checked against a model.

    Attributes:
        model: Model name as the client wrote it.
        version: Version as the client wrote it; empty for the model's default.
        inputs: Tensors in the client's order.
        outputs: Names of the outputs wanted; empty for all.
        timeout_us: Microseconds the client is willing to wait from now; 0 for no limit.
        peer: Who asks.
    """

    model: str
    version: str
    inputs: Sequence[Tensor]
    outputs: Sequence[str] = ()
    timeout_us: int = 0
    peer: Peer | None = None


@dataclass(slots=True)
class InferResult:
    """An answer whose tensors own their bytes."""

    model: str
    version: str
    outputs: list[Tensor]
    timings: Timings = field(default_factory=Timings)


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
        running: Requests in a worker now.
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
    running: int = 0


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
    """

    name: str
    version: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int
    status: ModelStatus
