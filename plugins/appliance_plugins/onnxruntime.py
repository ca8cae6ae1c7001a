"""Backend ``onnxruntime``: ONNX models on the CPU and, with the runtime's CUDA build, on NVIDIA GPUs.

Options: ``streams`` is how many runs may go on at the same time, by default one. On the CPU ``threads`` is how many
cores each may use, by default an equal part of all the process may run on, or of fewer where the inventory that was
probed says so; ``spin_us`` is how long idle threads stay awake after a run, by default not at all. Nothing of CUDA has
run on a GPU yet; that a session without it lands on the CPU, and why, has been seen.
"""

import ctypes
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np

from appliance.backend import MAX_STREAMS, MAX_THREADS, Artifact, Execution, Scope, Session, Support, Variant
from appliance.inventory import Device, Inventory
from appliance.types import TensorSpec
from appliance_plugins import cuda_provider
from appliance_plugins.splits import splits

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PROVIDER: Final = "CPUExecutionProvider"
#: Precision of the computation by the artifact's: the CPU provider computes what the graph says, but casts FP16 to FP32
#: and has no kernels for BF16.
_ON_CPU: Final = {
    "FP64": "FP32",
    "FP32": "FP32",
    "FP16": "FP32",
    "INT8": "INT8",
    "INT8-WEIGHTS": "INT8-WEIGHTS",
    "INT4-WEIGHTS": "INT4-WEIGHTS",
}
_ON_CUDA: Final = {"FP64": "FP32", "FP32": "FP32", "FP16": "FP16"}

#: Long enough for the next operator of a run, and for the next run of a busy client; see `_spinning`.
_OFFERED_SPIN_US: Final = "200"
_MAX_SPIN_US: Final = 1_000_000

_ONNX_BFLOAT16: Final = 16  # TensorProto.DataType.BFLOAT16
_SEVERITY_ERROR: Final = 3

_DATATYPES: Final = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(bfloat16)": "BF16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}


class OnnxRuntimeBackend:
    """ONNX Runtime's CPU and CUDA execution providers."""

    name: ClassVar[str] = "onnxruntime"
    formats: ClassVar[frozenset[str]] = frozenset({"onnx"})
    scope: ClassVar[Scope] = "model"

    def __init__(self) -> None:
        self._uuids: dict[str, str] = {}
        self._cores = 0

    def probe(self, inventory: Inventory) -> Support:
        """The CPU, and NVIDIA devices where this build has CUDA and finds its libraries."""
        try:
            import onnxruntime
        except ImportError as error:
            return Support((), reason=f"onnxruntime cannot be imported: {error}")
        runtime = f"onnxruntime {onnxruntime.__version__}"
        if _PROVIDER not in onnxruntime.get_available_providers():
            return Support((), runtime, f"this build of onnxruntime has no {_PROVIDER}")
        cards = [device.id for device in inventory.devices if _is_card(device)]
        absent = cuda_provider.why_absent(onnxruntime) if cards else ""
        self._uuids = {device.id: device.uuid for device in inventory.devices if _is_card(device)}
        processors = [device for device in inventory.devices if device.kind == "cpu"]
        self._cores = max((device.cores for device in processors), default=0)
        devices = [device.id for device in processors]
        return Support(
            devices=(*devices, *(() if absent else cards)),
            runtime=runtime,
            unlisted=dict.fromkeys(cards, absent) if absent else {},
        )

    def candidates(self, artifact: Artifact, device: Device) -> Sequence[Variant]:
        """What the graph says, on all cores; threads that stay awake for a moment; one core; several runs at a time."""
        if artifact.format not in self.formats:
            return ()
        if _is_card(device):
            precision = _ON_CUDA.get(artifact.precision)
            return (Variant(self.name, device.id, precision),) if precision else ()
        precision = _ON_CPU.get(artifact.precision) if device.kind == "cpu" else None
        if precision is None:
            return ()
        # On one core no thread has to be woken.
        choices: tuple[Mapping[str, str], ...] = ({},)
        if device.cores != 1:
            choices = ({}, {"spin_us": _OFFERED_SPIN_US}, {"threads": "1"}, *splits(device.cores))
        return tuple(Variant(self.name, device.id, precision, options) for options in choices)

    def load(self, artifact: Artifact, variant: Variant) -> Session:
        """Load an ONNX file. A session that was to run on CUDA and cannot runs on the CPU, and says so.

        Raises:
            ValueError: The variant or one of the model's types cannot be served.
            Exception: What the runtime raises for a model it cannot load.
        """
        import onnxruntime

        is_cuda = variant.device.startswith("nvidia")
        if not is_cuda and variant.device != "cpu":
            raise ValueError(f"device {variant.device!r} is neither the CPU nor an NVIDIA device")
        offered = (_ON_CUDA if is_cuda else _ON_CPU).get(artifact.precision)
        if variant.precision != offered:
            raise ValueError(
                f"precision {variant.precision} is not on offer for an artifact in {artifact.precision}"
                + (f", only {offered}" if offered else "")
            )
        streams, threads, spin_us = _read(variant.options)
        threads = threads or max(self._cores_to_use() // streams, 1)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _SEVERITY_ERROR
        # The caller's thread works too, and all runs share the others.
        options.intra_op_num_threads = streams * (threads - 1) + 1
        options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        for key, value in _spinning(spin_us).items():
            options.add_session_config_entry(key, value)
        providers: list[Any] = [_PROVIDER]
        if is_cuda and cuda_provider.PROVIDER in onnxruntime.get_available_providers():
            uuid = self._uuids.get(variant.device, "")
            providers.insert(0, (cuda_provider.PROVIDER, cuda_provider.options(variant.device, uuid)))
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        # Its own way of falling back is to print and try again.
        session = onnxruntime.InferenceSession(
            os.fspath(artifact.path), options, providers=providers, enable_fallback=False
        )
        if is_cuda:
            execution = _on_cuda(onnxruntime, session, artifact, variant)
        else:
            parts = {"streams": streams if streams > 1 else 0, "threads": threads, "spin_us": spin_us}
            detail = ", ".join(f"{name}={value}" for name, value in parts.items() if value)
            execution = Execution(variant.device, _PROVIDER, variant.precision, detail)
        return _wrap(session, execution, streams)

    def _cores_to_use(self) -> int:
        """All there are; the inventory counts a container's CPU quota, which the affinity does not show."""
        affinity = len(os.sched_getaffinity(0))
        return min(self._cores or affinity, affinity)


def _is_card(device: Device) -> bool:
    return device.kind == "gpu" and device.vendor == "nvidia"


def _on_cuda(runtime: Any, session: Any, artifact: Artifact, variant: Variant) -> Execution:
    """Where a session that was to run on CUDA runs, by what the runtime says of each node."""
    on_cpu = Execution("cpu", _PROVIDER, _ON_CPU[artifact.precision])
    if cuda_provider.PROVIDER not in session.get_providers():
        return replace(on_cpu, reason=cuda_provider.why_unused(runtime))
    nodes = cuda_provider.nodes_by_provider(session)
    if nodes and cuda_provider.PROVIDER not in nodes:
        return replace(on_cpu, reason="the CUDA provider has a kernel for none of the model's operators")
    others = sum(count for provider, count in nodes.items() if provider != cuda_provider.PROVIDER)
    detail = f"{others} of {sum(nodes.values())} operators on the CPU" if others else ""
    return Execution(variant.device, cuda_provider.PROVIDER, variant.precision, detail)


def _wrap(session: Any, execution: Execution, streams: int) -> Session:
    inputs, outputs = _specs(session.get_inputs()), _specs(session.get_outputs())
    datatypes = {spec.datatype for spec in (*inputs, *outputs)}
    if "BF16" in datatypes:
        if "BYTES" in datatypes:
            raise ValueError("the runtime's Python interface cannot carry BF16 and string tensors in one run")
        return _Bf16Session(session, inputs, outputs, execution, streams)
    if "BYTES" in datatypes:
        return _TextSession(session, inputs, outputs, execution, streams)
    return _ArraySession(session, inputs, outputs, execution, streams)


class _ArraySession:
    """A session whose tensors numpy knows. The runtime's own may run in many threads and makes every output anew."""

    def __init__(
        self,
        session: Any,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        execution: Execution,
        streams: int,
    ) -> None:
        self._session = session
        self._execution = execution
        self.inputs = inputs
        self.outputs = outputs
        self.streams = streams

    def run(self, inputs: "Mapping[str, NDArray[Any]]", outputs: Sequence[str]) -> "Mapping[str, NDArray[Any]]":
        """Compute one batch; the inputs are not copied."""
        return dict(zip(outputs, self._session.run(outputs, inputs), strict=True))

    def executed_on(self) -> Execution:
        """What was found when the session was made: providers do not change afterwards."""
        return self._execution

    def close(self) -> None:
        """Drop the session."""
        del self._session


class _TextSession(_ArraySession):
    """A session with string tensors, which the runtime takes as text: elements must be UTF-8."""

    def run(self, inputs: "Mapping[str, NDArray[Any]]", outputs: Sequence[str]) -> "Mapping[str, NDArray[Any]]":
        """Compute one batch.

        Raises:
            UnicodeDecodeError: An element is not UTF-8.
        """
        texts = {name: _map_elements(_decode, array) for name, array in inputs.items()}
        return {
            name: _map_elements(_encode, array) for name, array in super().run(outputs=outputs, inputs=texts).items()
        }


class _Bf16Session(_ArraySession):
    """A session with BF16 tensors, which have no numpy type and travel as the runtime's own values."""

    def run(self, inputs: "Mapping[str, NDArray[Any]]", outputs: Sequence[str]) -> "Mapping[str, NDArray[Any]]":
        """Compute one batch; BF16 outputs are copied out of the runtime's memory."""
        from onnxruntime import OrtValue

        bf16 = {spec.name for spec in self.inputs if spec.datatype == "BF16"}
        values = {
            name: OrtValue.ortvalue_from_numpy_with_onnx_type(array, _ONNX_BFLOAT16)
            if name in bf16
            else OrtValue.ortvalue_from_numpy(array)
            for name, array in inputs.items()
        }
        results = self._session.run_with_ort_values(list(outputs), values)
        return {name: _array_of(value) for name, value in zip(outputs, results, strict=True)}


def _array_of(value: Any) -> "NDArray[Any]":
    if value.element_type() != _ONNX_BFLOAT16:
        array: NDArray[Any] = value.numpy()
        return array
    shape = tuple(value.shape())
    count = int(np.prod(shape, dtype=np.int64))
    if count == 0:
        return np.empty(shape, dtype=np.uint16)
    raw = memoryview((ctypes.c_uint16 * count).from_address(value.data_ptr())).cast("B")
    return np.frombuffer(raw, dtype=np.uint16).reshape(shape).copy()


def _specs(nodes: Sequence[Any]) -> tuple[TensorSpec, ...]:
    specs = []
    for node in nodes:
        if node.type not in _DATATYPES:
            raise ValueError(f"{node.name!r} is {node.type}, which the Open Inference Protocol has no tensor for")
        shape = tuple(size if isinstance(size, int) and size >= 0 else -1 for size in node.shape)
        specs.append(TensorSpec(node.name, _DATATYPES[node.type], shape))
    return tuple(specs)


def _map_elements(change: Any, array: "NDArray[Any]") -> "NDArray[Any]":
    if array.dtype != object:
        return array
    changed = np.empty(array.shape, dtype=object)
    changed.reshape(-1)[:] = [change(element) for element in array.reshape(-1).tolist()]
    return changed


def _decode(element: bytes) -> str:
    return element.decode("utf-8")


def _encode(element: str) -> bytes:
    return element.encode("utf-8")


def _spinning(spin_us: int) -> dict[str, str]:
    """Session settings for threads that stay awake `spin_us` after a run.

    Waking a thread costs tens of microseconds, more on a virtual machine, at each of a model's operators; the runtime's
    own habit is to keep every core busy for tens of milliseconds after every run, to the cost of whatever else runs.
    """
    if not spin_us:
        return {"session.intra_op.allow_spinning": "0"}
    return {"session.intra_op.allow_spinning": "1", "session.intra_op.spin_duration_us": str(spin_us)}


def _read(options: Mapping[str, str]) -> tuple[int, int, int]:
    """Streams, threads of each or 0 for an equal part of the cores, and microseconds of spinning."""
    unknown = sorted(set(options) - {"streams", "threads", "spin_us"})
    if unknown:
        raise ValueError(f"option {unknown[0]!r} is unknown; there are 'streams', 'threads' and 'spin_us'")
    streams = _number(options, "streams", 1, MAX_STREAMS) or 1
    return streams, _number(options, "threads", 1, MAX_THREADS), _number(options, "spin_us", 0, _MAX_SPIN_US)


def _number(options: Mapping[str, str], name: str, least: int, most: int) -> int:
    text = options.get(name) or "0"
    if name in options and (not text.isdecimal() or not least <= int(text) <= most):
        raise ValueError(f"option {name!r} is {text!r} and must be a number from {least} to {most}")
    return int(text)
