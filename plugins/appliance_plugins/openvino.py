"""Backend ``openvino``: ONNX models and OpenVINO IR on the CPU.

Options: ``threads`` (cores of one run, by default all), ``streams`` (runs side by side; without it the LATENCY hint
chooses), ``cache_dir`` (keeps compiled models). The CPU plugin computes INT64 in INT32, and UINT64 and FP64 in narrower
types too, and its string tensors lose trailing NULs; what would be silently wrong is refused here.
"""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np

from appliance.backend import Artifact, Execution, Scope, Session, Support, Variant
from appliance.inventory import Device, Inventory
from appliance.types import TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DEVICE: Final = "CPU"
_HINTS: Final = {"FP32": "f32", "BF16": "bf16"}
_PRECISIONS: Final = {
    "f32": "FP32",
    "float32": "FP32",
    "bf16": "BF16",
    "bfloat16": "BF16",
    "f16": "FP16",
    "float16": "FP16",
}
_BF16_FEATURES: Final = frozenset({"avx512_bf16", "amx_bf16"})

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


class OpenVinoBackend:
    """OpenVINO's CPU plugin."""

    name: ClassVar[str] = "openvino"
    formats: ClassVar[frozenset[str]] = frozenset({"onnx", "openvino-ir"})
    scope: ClassVar[Scope] = "model"

    _core: Any = None

    def probe(self, inventory: Inventory) -> Support:
        """The CPU, where the runtime can be imported and lists it."""
        try:
            import openvino
        except ImportError as error:
            return Support((), reason=f"openvino cannot be imported: {error}")
        runtime = f"openvino {openvino.__version__.partition('-')[0]}"
        if _DEVICE not in self._own_core().available_devices:
            return Support((), runtime, "this build of openvino has no CPU plugin")
        return Support(tuple(device.id for device in inventory.devices if device.kind == "cpu"), runtime)

    def candidates(self, artifact: Artifact, device: Device) -> Sequence[Variant]:
        """FP32 first; BF16 where the processor multiplies it natively. Asks for a directory for what it compiles."""
        if device.kind != "cpu" or artifact.format not in self.formats:
            return ()
        has_bf16 = not _BF16_FEATURES.isdisjoint(device.features)
        return tuple(
            Variant(self.name, device.id, one, {"cache_dir": ""})
            for one in (("FP32", "BF16") if has_bf16 else ("FP32",))
        )

    def load(self, artifact: Artifact, variant: Variant) -> Session:
        """Read and compile a model.

        Raises:
            ValueError: The variant or one of the model's types cannot be served.
            Exception: What the runtime raises for a model it cannot load.
        """
        # Compiled by path, not by model: a cached compilation is then used without reading the model at all. OpenVINO
        # knows a changed file by its size and second of modification, so the cache's place must name the artifact.
        compiled = self._own_core().compile_model(os.fspath(artifact.path), _DEVICE, _properties(variant))
        return _CompiledSession(compiled, variant.device)

    @classmethod
    def _own_core(cls) -> Any:
        """One for the process: each has a thread pool and a plugin registry of its own."""
        if OpenVinoBackend._core is None:
            import openvino

            OpenVinoBackend._core = openvino.Core()
        return OpenVinoBackend._core


class _CompiledSession:
    """One infer request of a compiled model, its inputs bound to the caller's memory."""

    def __init__(self, compiled: Any, device: str) -> None:
        import openvino

        self._openvino = openvino
        self._compiled = compiled
        self._device = device
        self.inputs = _specs(compiled.inputs)
        self.outputs = _specs(compiled.outputs)
        self._request = compiled.create_infer_request()
        self._ports = {spec.name: index for index, spec in enumerate(self.outputs)}
        self._bf16_outputs = frozenset(spec.name for spec in self.outputs if spec.datatype == "BF16")
        self._bound: list[NDArray[Any] | None] = [None] * len(self.inputs)

    def run(self, inputs: "Mapping[str, NDArray[Any]]", outputs: Sequence[str]) -> "Mapping[str, NDArray[Any]]":
        """Compute one batch; neither inputs nor outputs are copied.

        Raises:
            ValueError: An INT64 value does not fit the INT32 that the runtime computes in.
        """
        for index, spec in enumerate(self.inputs):
            array = inputs[spec.name]
            if spec.datatype == "INT64" and array.size and (array.min() < _INT32.min or array.max() > _INT32.max):
                raise ValueError(
                    f"input {spec.name!r} has a value beyond 32 bits, and openvino computes INT64 in INT32"
                )
            # The same array means the same memory, so binding it again would only cost time.
            if array is not self._bound[index]:
                self._request.set_input_tensor(index, self._tensor(spec, array))
                self._bound[index] = array
        self._request.infer(share_outputs=True)
        return {name: self._output(name) for name in outputs}

    def executed_on(self) -> Execution:
        """Devices and precision as the compiled model reports them."""
        devices = [str(one) for one in self._compiled.get_property("EXECUTION_DEVICES")]
        precision = self._compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        detail = ", ".join(
            f"{name}={self._compiled.get_property(key)}"
            for name, key in (("streams", "NUM_STREAMS"), ("threads", "INFERENCE_NUM_THREADS"))
        )
        device = self._device if devices == [_DEVICE] else ",".join(devices).lower()
        return Execution(device, ",".join(devices), _PRECISIONS.get(precision, precision), detail)

    def close(self) -> None:
        """Drop request and model."""
        self._bound.clear()
        del self._request, self._compiled

    def _tensor(self, spec: TensorSpec, array: "NDArray[Any]") -> Any:
        if spec.datatype == "BF16":
            return self._openvino.Tensor(array, self._openvino.Shape(array.shape), self._openvino.Type.bf16)
        return self._openvino.Tensor(array, shared_memory=True)

    def _output(self, name: str) -> "NDArray[Any]":
        array: NDArray[Any] = self._request.get_output_tensor(self._ports[name]).data
        return array.view(np.uint16) if name in self._bf16_outputs else array


def _specs(ports: Sequence[Any]) -> tuple[TensorSpec, ...]:
    specs = []
    for port in ports:
        kind = port.element_type.get_type_name()
        # IR made from other frameworks may leave tensors without a name.
        name = port.any_name if port.names else port.get_node().get_friendly_name()
        if kind not in _DATATYPES:
            raise ValueError(f"{name!r} is {kind}, which openvino does not compute exactly on the CPU")
        shape = port.partial_shape
        if shape.rank.is_dynamic:
            raise ValueError(f"{name!r} has no fixed number of dimensions")
        sizes = tuple(-1 if size.is_dynamic else size.get_length() for size in shape)
        specs.append(TensorSpec(name, _DATATYPES[kind], sizes))
    return tuple(specs)


def _properties(variant: Variant) -> dict[str, Any]:
    unknown = sorted(set(variant.options) - {"threads", "streams", "cache_dir"})
    if unknown:
        raise ValueError(f"option {unknown[0]!r} is unknown; there are 'threads', 'streams' and 'cache_dir'")
    if variant.precision not in _HINTS:
        raise ValueError(f"precision {variant.precision} is not on offer, only {' and '.join(_HINTS)}")
    # Explicit, since a processor with BF16 would otherwise use it unasked.
    properties: dict[str, Any] = {"INFERENCE_PRECISION_HINT": _HINTS[variant.precision]}
    if threads := variant.options.get("threads"):
        properties["INFERENCE_NUM_THREADS"] = _count("threads", threads)
    if streams := variant.options.get("streams"):
        properties["NUM_STREAMS"] = _count("streams", streams)
    else:
        properties["PERFORMANCE_HINT"] = "LATENCY"
    if cache_dir := variant.options.get("cache_dir"):
        properties["CACHE_DIR"] = cache_dir
    return properties


def _count(name: str, text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise ValueError(f"option {name!r} is {text!r} and must be a number from 1 to 1024")
    return int(text)
