"""Backend ``onnxruntime``: ONNX models on the CPU.

Options: ``threads`` is how many cores one run may use, by default all the process may run on.
"""

import ctypes
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np

from appliance.backend import Artifact, Execution, Scope, Session, Support, Variant
from appliance.inventory import Device, Inventory
from appliance.types import TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PROVIDER: Final = "CPUExecutionProvider"
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
    """ONNX Runtime's CPU execution provider."""

    name: ClassVar[str] = "onnxruntime"
    formats: ClassVar[frozenset[str]] = frozenset({"onnx"})
    scope: ClassVar[Scope] = "model"

    def probe(self, inventory: Inventory) -> Support:
        """The CPU, where the runtime can be imported and offers it."""
        try:
            import onnxruntime
        except ImportError as error:
            return Support((), reason=f"onnxruntime cannot be imported: {error}")
        runtime = f"onnxruntime {onnxruntime.__version__}"
        if _PROVIDER not in onnxruntime.get_available_providers():
            return Support((), runtime, f"this build of onnxruntime has no {_PROVIDER}")
        return Support(tuple(device.id for device in inventory.devices if device.kind == "cpu"), runtime)

    def candidates(self, artifact: Artifact, device: Device) -> Sequence[Variant]:
        """The precision the model has: the CPU provider computes what the graph says."""
        if device.kind != "cpu" or artifact.format not in self.formats:
            return ()
        return (Variant(self.name, device.id, "FP32"),)

    def load(self, artifact: Artifact, variant: Variant) -> Session:
        """Load an ONNX file.

        Raises:
            ValueError: The variant or one of the model's types cannot be served.
            Exception: What the runtime raises for a model it cannot load.
        """
        import onnxruntime

        if variant.precision != "FP32":
            raise ValueError(f"precision {variant.precision} is not on offer, only FP32")
        threads = _threads(variant.options)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _SEVERITY_ERROR
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        # Spinning threads keep a core busy for tens of milliseconds after every run.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(os.fspath(artifact.path), options, providers=[_PROVIDER])
        if session.get_providers() != [_PROVIDER]:
            raise ValueError(f"the runtime placed the model on {', '.join(session.get_providers())}")
        inputs, outputs = _specs(session.get_inputs()), _specs(session.get_outputs())
        datatypes = {spec.datatype for spec in (*inputs, *outputs)}
        execution = Execution(variant.device, _PROVIDER, variant.precision, f"threads={threads}")
        if "BF16" in datatypes:
            if "BYTES" in datatypes:
                raise ValueError("the runtime's Python interface cannot carry BF16 and string tensors in one run")
            return _Bf16Session(session, inputs, outputs, execution)
        if "BYTES" in datatypes:
            return _TextSession(session, inputs, outputs, execution)
        return _ArraySession(session, inputs, outputs, execution)


class _ArraySession:
    """A session whose tensors numpy knows."""

    def __init__(
        self, session: Any, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], execution: Execution
    ) -> None:
        self._session = session
        self._execution = execution
        self.inputs = inputs
        self.outputs = outputs

    def run(self, inputs: "Mapping[str, NDArray[Any]]", outputs: Sequence[str]) -> "Mapping[str, NDArray[Any]]":
        """Compute one batch; the inputs are not copied."""
        return dict(zip(outputs, self._session.run(outputs, inputs), strict=True))

    def executed_on(self) -> Execution:
        """The CPU provider is the only one the session has."""
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


def _threads(options: Mapping[str, str]) -> int:
    unknown = sorted(set(options) - {"threads"})
    if unknown:
        raise ValueError(f"option {unknown[0]!r} is unknown; there is only 'threads'")
    text = options.get("threads") or str(len(os.sched_getaffinity(0)))
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise ValueError(f"option 'threads' is {text!r} and must be a number from 1 to 1024")
    return int(text)
