"""A session on compiled models: tensors in, tensors out, neither copied."""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from appliance.backend import Execution, Variant
from appliance.types import TensorSpec
from appliance_plugins.openvino.devices import id_of
from appliance_plugins.openvino.shapes import ShapeCompilations

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PRECISIONS: Final = {
    "f32": "FP32",
    "float32": "FP32",
    "bf16": "BF16",
    "bfloat16": "BF16",
    "f16": "FP16",
    "float16": "FP16",
}

_DATATYPES: Final = {
    "boolean": "BOOL",
    "u8": "UINT8",
    "u16": "UINT16",
    "u32": "UINT32",
    "i8": "INT8",
    "i16": "INT16",
    "i32": "INT32",
    "i64": "INT64",
    "f16": "FP16",
    "bf16": "BF16",
    "f32": "FP32",
}
_INT32: Final = np.iinfo(np.int32)

#: Operators that make up most of a model's work, as plugins call them in the runtime model.
_HEAVY: Final = frozenset({"FullyConnected", "Convolution", "GroupConvolution", "MatMul", "Gemm", "Deconvolution"})
_INT8: Final = frozenset({"i8", "u8", "I8", "U8"})


@dataclass(frozen=True, slots=True)
class Placing:
    """Where a session was to run.

    Attributes:
        name: OpenVINO's name of the device.
        names: OpenVINO's names of all devices that it lists, by the inventory's id.
        variant: What was asked for.
    """

    name: str
    names: Mapping[str, str]
    variant: Variant


class Request:
    """One infer request of a compiled model, its inputs bound to the caller's memory."""

    def __init__(self, compiled: Any) -> None:
        import openvino

        self._openvino = openvino
        self.compiled = compiled
        self._request = compiled.create_infer_request()
        self._bound: list[NDArray[Any] | None] = [None] * len(compiled.inputs)

    def run(self, arrays: "Sequence[NDArray[Any]]", bf16: Sequence[bool]) -> None:
        """Compute; `bf16` says which arrays hold BF16."""
        for index, array in enumerate(arrays):
            # The same array means the same memory, so binding it again would only cost time.
            if array is not self._bound[index]:
                self._request.set_input_tensor(index, self._tensor(array, bf16[index]))
                self._bound[index] = array
        self._request.infer(share_outputs=True)

    def output(self, index: int) -> "NDArray[Any]":
        """An output of the last run, in the request's own memory."""
        array: NDArray[Any] = self._request.get_output_tensor(index).data
        return array

    def _tensor(self, array: "NDArray[Any]", is_bf16: bool) -> Any:
        if is_bf16:
            return self._openvino.Tensor(array, self._openvino.Shape(array.shape), self._openvino.Type.bf16)
        return self._openvino.Tensor(array, shared_memory=True)


class OwnRequests:
    """A request for each thread that runs: what it gave stays as it is until the same thread runs again."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self._own = threading.local()

    def mine(self) -> Request:
        """The calling thread's, made when it first asks."""
        request: Request | None = getattr(self._own, "request", None)
        if request is None:
            request = self._own.request = Request(self.compiled)
        return request


class CompiledSession:
    """A model on one device, by a compilation that takes any shape, by some for single shapes, or by both."""

    def __init__(
        self,
        general: Request | OwnRequests | None,
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        placing: Placing,
        shapes: ShapeCompilations[Request] | None,
        streams: int = 1,
    ) -> None:
        """Take over what was compiled.

        Args:
            general: Takes any shape that the model does, and where `streams` is above 1 is one for each thread; None
                where the device has no such thing.
            inputs: The model's ports.
            outputs: The model's ports.
            placing: Where it was to run.
            shapes: Compilations for single shapes; None where there are to be none, and `general` is given then.
            streams: Runs that may go on at the same time; above 1 without `shapes` alone.

        Raises:
            ValueError: A port has a type or shape that cannot be served.
        """
        self._own = general if isinstance(general, OwnRequests) else None
        self._general = None if isinstance(general, OwnRequests) else general
        self._placing = placing
        self._shapes = shapes
        self._ran: Request | OwnRequests | None = general
        self.streams = streams
        self.inputs = _specs(inputs)
        self.outputs = _specs(outputs)
        self._ports = {spec.name: index for index, spec in enumerate(self.outputs)}
        self._bf16_inputs = [spec.datatype == "BF16" for spec in self.inputs]
        self._bf16_outputs = frozenset(spec.name for spec in self.outputs if spec.datatype == "BF16")
        self._wide = [(index, spec.name) for index, spec in enumerate(self.inputs) if spec.datatype == "INT64"]

    @property
    def is_settled(self) -> bool:
        """False while the shapes that ran last may get a compilation of their own."""
        return self._shapes is None or self._shapes.is_settled

    def run(self, inputs: "Mapping[str, NDArray[Any]]", outputs: Sequence[str]) -> "Mapping[str, NDArray[Any]]":
        """Compute one batch; neither inputs nor outputs are copied.

        Raises:
            ValueError: An INT64 value does not fit the INT32 that the runtime computes in.
        """
        arrays = [inputs[spec.name] for spec in self.inputs]
        for index, name in self._wide:
            array = arrays[index]
            if array.size and (array.min() < _INT32.min or array.max() > _INT32.max):
                raise ValueError(f"input {name!r} has a value beyond 32 bits, and openvino computes INT64 in INT32")
        if self._own is not None:
            request = self._own.mine()
            request.run(arrays, self._bf16_inputs)
        else:
            request = self._ran = self._compute(arrays)
        return {name: self._output(request, name) for name in outputs}

    def _compute(self, arrays: "Sequence[NDArray[Any]]") -> Request:
        """Run by the compilation that suits the arrays' shapes best; returns it."""
        if self._shapes is None:
            request = self._general
        else:
            shapes = tuple(array.shape for array in arrays)
            request = self._shapes.find(shapes)
            if request is None and self._general is not None:
                began = time.monotonic()
                self._general.run(arrays, self._bf16_inputs)
                self._shapes.spend(shapes, time.monotonic() - began)
                return self._general
            if request is None:
                request = self._shapes.compile_now(shapes)
        if request is None:
            raise ValueError("the session has neither a general compilation nor one for these shapes")
        request.run(arrays, self._bf16_inputs)
        return request

    def executed_on(self) -> Execution:
        """Device and precision as the compiled model that ran last reports them."""
        if self._ran is None:
            raise ValueError("the session has not run yet, and its device compiles for what is run")
        compiled = self._ran.compiled
        devices = [str(one).strip("()") for one in compiled.get_property("EXECUTION_DEVICES")]
        ids = [id_of(name, self._placing.names) for name in devices]
        asked = self._placing.variant.device
        strangers = [one for one in ids if one != asked]
        reason = (
            f"openvino was asked for {self._placing.name} and executes on {', '.join(devices)}" if strangers else ""
        )
        return Execution(
            device=strangers[0] if strangers else asked,
            provider=",".join(devices),
            precision=self._precision(compiled),
            detail=_detail(compiled),
            reason=reason,
        )

    def close(self) -> None:
        """Drop requests and models."""
        if self._shapes is not None:
            self._shapes.close()
        self._ran = None
        self._own = None
        self._general = None

    def _precision(self, compiled: Any) -> str:
        wished = self._placing.variant.precision
        if wished.endswith("-WEIGHTS"):
            return wished
        word = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        hint = _PRECISIONS.get(word, word)
        return "INT8" if wished == "INT8" and _multiplies_int8(compiled) else hint

    def _output(self, request: Request, name: str) -> "NDArray[Any]":
        array = request.output(self._ports[name])
        return array.view(np.uint16) if name in self._bf16_outputs else array


def _multiplies_int8(compiled: Any) -> bool:
    """True where any of the operators that make up the work runs in INT8 (`CompiledModel.get_runtime_model`)."""
    for node in compiled.get_runtime_model().get_ops():
        facts = node.get_rt_info()
        if "layerType" not in facts or "runtimePrecision" not in facts:
            continue
        kind, precision = (str(facts[name].astype(str)) for name in ("layerType", "runtimePrecision"))
        if kind in _HEAVY and precision in _INT8:
            return True
    return False


def _detail(compiled: Any) -> str:
    """Streams and threads, where the plugin has such properties."""
    found = []
    for name, key in (("streams", "NUM_STREAMS"), ("threads", "INFERENCE_NUM_THREADS")):
        try:
            found.append(f"{name}={compiled.get_property(key)}")
        except RuntimeError:  # GPUs and NPUs know no threads
            continue
    return ", ".join(found)


def _specs(ports: Sequence[Any]) -> tuple[TensorSpec, ...]:
    specs = []
    for port in ports:
        kind = port.element_type.get_type_name()
        # IR made from other frameworks may leave tensors without a name.
        name = port.any_name if port.names else port.get_node().get_friendly_name()
        if kind not in _DATATYPES:
            raise ValueError(f"{name!r} is {kind}, which openvino does not compute exactly")
        shape = port.partial_shape
        if shape.rank.is_dynamic:
            raise ValueError(f"{name!r} has no fixed number of dimensions")
        sizes = tuple(-1 if size.is_dynamic else size.get_length() for size in shape)
        specs.append(TensorSpec(name, _DATATYPES[kind], sizes))
    return tuple(specs)
