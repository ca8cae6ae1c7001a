"""The plugin contract: what a backend must offer, in terms of numpy arrays and plain values.

A backend is found through the entry-point group ``appliance.backends``. The daemon imports the plugin's module only in
a worker process, and the plugin imports its vendor runtime only inside `Backend.load` or `Backend.probe`. A plugin
knows nothing of asyncio, sockets or batches of requests: it is handed arrays whose first dimension is the batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, Protocol, runtime_checkable

from appliance.inventory import Device, Inventory
from appliance.types import TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

ENTRY_POINT_GROUP: Final = "appliance.backends"

#: Raised in majors when a plugin written for the older contract can no longer work.
CONTRACT_VERSION: Final = 1

Scope = Literal["model", "device"]

#: Runs that a session takes at the same time at most: each is a batch of its own in the worker.
MAX_STREAMS: Final = 64

#: Cores that each of them may use at most.
MAX_THREADS: Final = 1024

#: Options that mean the same to every backend that has them: how many runs go on at the same time, by default one, and
#: how many cores each may use, by default an equal part of all. They change nothing of what is computed but the order
#: in which numbers are added up.
SPLIT: Final = ("streams", "threads")

#: Precisions an artifact's weights and a variant's computation may have. FP64 counts as FP32: neither is lowered.
#: ``"INT8-WEIGHTS"`` and ``"INT4-WEIGHTS"`` mean weights stored so and a computation in floating point.
PRECISIONS: Final = ("FP32", "BF16", "FP16", "INT8", "INT8-WEIGHTS", "INT4-WEIGHTS")


@dataclass(frozen=True, slots=True)
class Artifact:
    """One verified file of a model.

    Attributes:
        path: Where it lies; a directory for formats of several files.
        format: ``"onnx"``, ``"openvino-ir"`` or a plugin's own word.
        precision: Precision of the weights as stored, such as ``"FP32"``.
        sha256: Hex digest, or empty where the manifest gives none.
    """

    path: Path
    format: str
    precision: str = "FP32"
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run an artifact.

    Attributes:
        backend: Entry-point name of the backend.
        device: Id of a device of the inventory, such as ``"cpu"``.
        precision: Precision of the computation, one of `PRECISIONS`: of the multiplications that make up most of the
            work. ``"INT8"`` needs an artifact quantised to INT8; what such a model leaves in floating point is the
            business of `options`.
        options: The backend's own settings, such as ``{"threads": "2"}``; values are text so that they can be stored.
            They may change speed and memory; of two variants that differ in options alone both are checked for
            accuracy, unless they differ in `SPLIT` alone.
    """

    backend: str
    device: str
    precision: str
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Support:
    """A backend's answer to "can you work here". Not usable is a value, never an exception.

    Attributes:
        devices: Ids of the devices the runtime lists and the backend can use; empty where it can use none.
        runtime: Name and version of the vendor runtime, such as ``"onnxruntime 1.31.1"``.
        reason: Why no device is usable, with the fix where there is one; empty when usable.
        unlisted: Why the runtime cannot use a device of the inventory that is of a kind it serves, by device id: the
            reason of the ladder's rung LISTED. Devices of kinds the backend never serves are left out.
    """

    devices: tuple[str, ...]
    runtime: str = ""
    reason: str = ""
    unlisted: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Execution:
    """Proof of placement: what a session really runs on, as the runtime itself reports it.

    Attributes:
        device: Device id that executes the model.
        provider: The runtime's own name of the executor, such as ``"CPUExecutionProvider"``.
        precision: Precision the computation runs in.
        detail: Anything worth showing a person, such as thread and stream counts.
        reason: Where `device` is not the variant's: why, naming the library or driver at fault; else empty.
    """

    device: str
    provider: str
    precision: str
    detail: str = ""
    reason: str = ""


@runtime_checkable
class Session(Protocol):
    """A loaded variant: tensors in, tensors out.

    `run` is called from one thread at a time. Input arrays are C-contiguous, writable views on shared memory that are
    valid during the call only. BF16 travels as ``uint16`` arrays holding the upper halves of FP32; BYTES as ``object``
    arrays of ``bytes``; every other datatype as its numpy namesake.

    A session that takes several runs at a time also has a property ``streams: int``, from 1 to `MAX_STREAMS`: so many
    calls of `run` may go on at the same time, each in a thread of its own. The threads stay the same while it serves.
    A session without it has one stream.

    A session that becomes faster of itself while it runs, as by compiling in the background for the shapes it sees,
    also has a property ``is_settled: bool``: False while the shapes that ran last may yet become faster. Asked between
    runs, by the thread that runs. It turns True after a bounded number of further runs of the same shapes and a bounded
    time; what is measured is measured then. A session without it is always settled.
    """

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        """Inputs in the artifact's order, full shapes, -1 for a dynamic dimension."""
        ...

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """Outputs in the artifact's order, full shapes, -1 for a dynamic dimension."""
        ...

    def run(self, inputs: "Mapping[str, NDArray[Any]]", outputs: Sequence[str]) -> "Mapping[str, NDArray[Any]]":
        """Compute one batch.

        Args:
            inputs: Every input by name.
            outputs: Names of the outputs wanted, never empty.

        Returns:
            At least the wanted outputs by name. The arrays may be reused by the same thread's next call, and by no
            other's.

        Raises:
            Exception: Anything; the whole batch fails with `BackendError` carrying the message.
        """
        ...

    def executed_on(self) -> Execution:
        """What the session runs on; asked after at least one `run`, while none goes on."""
        ...

    def close(self) -> None:
        """Give back what the session holds. Called at most once."""
        ...


@runtime_checkable
class Backend(Protocol):
    """A runtime that can load artifacts. Constructed without arguments, in a worker process."""

    name: ClassVar[str]
    formats: ClassVar[frozenset[str]]
    scope: ClassVar[Scope]

    def probe(self, inventory: Inventory) -> Support:
        """Say which devices of `inventory` this backend can use. May import the vendor runtime."""
        ...

    def candidates(self, artifact: Artifact, device: Device) -> Sequence[Variant]:
        """Ways to run `artifact` on `device`, the one to try first at the front. Pure: imports no vendor runtime.

        Asked with a nominal artifact, whose path is of no meaning, for each format of the backend and each of
        `PRECISIONS`. An artifact of precision ``"FP32"`` yields first a variant that computes in FP32, where the device
        can; variants of lower precision that the backend makes of it while loading follow. Every offer is measured, so
        an offer that cannot win costs the machine time.
        """
        ...

    def load(self, artifact: Artifact, variant: Variant) -> Session:
        """Load `artifact` as `variant`.

        Raises:
            Exception: Anything; the load fails with `BackendError` carrying the message.
        """
        ...
