"""The backend: which devices, which variants, and loading one."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Final

from appliance.backend import Artifact, Scope, Session, Support, Variant
from appliance.inventory import Device, Inventory
from appliance_plugins.openvino.devices import Listed, is_served, match, why_unlisted
from appliance_plugins.openvino.session import CompiledSession, OwnRequests, Placing, Request
from appliance_plugins.openvino.settings import Settings, offers
from appliance_plugins.openvino.shapes import ShapeCompilations, Shapes

#: Compiling is thought to take as long at least, lest a cached compilation makes it look free.
_LEAST_COMPILE_SECONDS: Final = 0.05


class OpenVinoBackend:
    """OpenVINO's CPU, GPU and NPU plugins."""

    name: ClassVar[str] = "openvino"
    formats: ClassVar[frozenset[str]] = frozenset({"onnx", "openvino-ir"})
    scope: ClassVar[Scope] = "model"

    _core: Any = None

    def __init__(self) -> None:
        self._names: Mapping[str, str] = {"cpu": "CPU"}
        self._cores = 0

    def probe(self, inventory: Inventory) -> Support:
        """The devices that the runtime lists."""
        try:
            import openvino
        except ImportError as error:
            return Support((), reason=f"openvino cannot be imported: {error}")
        runtime = f"openvino {openvino.__version__.partition('-')[0]}"
        self._cores = max((device.cores for device in inventory.devices if device.kind == "cpu"), default=0)
        served = [device for device in inventory.devices if is_served(device)]
        self._names = match(served, self._listed())
        unlisted = {device.id: why_unlisted(device) for device in served if device.id not in self._names}
        devices = tuple(device.id for device in served if device.id in self._names)
        return Support(devices, runtime, "" if devices else "; ".join(unlisted.values()), unlisted)

    def candidates(self, artifact: Artifact, device: Device) -> Sequence[Variant]:
        """What `settings.offers` lists. Asks for a directory for what it compiles."""
        if not is_served(device) or artifact.format not in self.formats:
            return ()
        return tuple(
            Variant(self.name, device.id, precision, {**options, "cache_dir": ""})
            for precision, options in offers(artifact.precision, device)
        )

    def load(self, artifact: Artifact, variant: Variant) -> Session:
        """Read and compile a model.

        Raises:
            ValueError: The variant or one of the model's types cannot be served.
            Exception: What the runtime raises for a model it cannot load.
        """
        settings = self._within_quota(Settings.of(variant, artifact.precision), variant.device)
        if variant.device not in self._names:
            raise ValueError(f"device {variant.device!r} is none that openvino lists")
        placing = Placing(self._names[variant.device], self._names, variant)
        path = os.fspath(artifact.path)
        if settings.needs_static:
            return self._load_static(path, placing, settings)
        # Compiled by path, not by model: a cached compilation is then used without reading the model at all. OpenVINO
        # knows a changed file by its size and second of modification, so the cache's place must name the artifact.
        began = time.monotonic()
        compiled = self._own_core().compile_model(path, placing.name, settings.properties())
        seconds = max(time.monotonic() - began, _LEAST_COMPILE_SECONDS)
        # On the CPU the runtime has no more streams than cores, whatever it is asked for.
        streams = min(settings.streams, int(compiled.get_property("NUM_STREAMS"))) if settings.streams > 1 else 1
        if streams > 1:
            return CompiledSession(OwnRequests(compiled), compiled.inputs, compiled.outputs, placing, None, streams)
        shapes = None
        if settings.static and any(port.partial_shape.is_dynamic for port in compiled.inputs):
            # Not cached: a file of all weights for every shape would soon fill the disk.
            source = _Source(self._own_core(), path, placing.name, settings.properties(is_cached=False))
            shapes = ShapeCompilations(source.request, settings.static, seconds)
        return CompiledSession(Request(compiled), compiled.inputs, compiled.outputs, placing, shapes)

    def _within_quota(self, settings: Settings, device: str) -> Settings:
        """As many threads on the CPU as there are cores in the inventory, where the runtime's own choice is more.

        The inventory counts a container's CPU quota; the runtime goes by the affinity.
        """
        if device != "cpu" or settings.threads or not 0 < self._cores < len(os.sched_getaffinity(0)):
            return settings
        return replace(settings, threads=self._cores)

    def _load_static(self, path: str, placing: Placing, settings: Settings) -> Session:
        """For a device that compiles single shapes only."""
        source = _Source(self._own_core(), path, placing.name, settings.properties())
        model = source.model()
        if not any(port.partial_shape.is_dynamic for port in model.inputs):
            compiled = self._own_core().compile_model(model, placing.name, settings.properties())
            return CompiledSession(Request(compiled), compiled.inputs, compiled.outputs, placing, None)
        shapes = ShapeCompilations(source.request, settings.static or 1, seconds=0.0)
        return CompiledSession(None, model.inputs, model.outputs, placing, shapes)

    def _listed(self) -> list[Listed]:
        core = self._own_core()
        return [Listed.of(core, name) for name in core.available_devices]

    @classmethod
    def _own_core(cls) -> Any:
        """One for the process: each has a thread pool and a plugin registry of its own."""
        if OpenVinoBackend._core is None:
            import openvino

            OpenVinoBackend._core = openvino.Core()
        return OpenVinoBackend._core


class _Source:
    """A model that is compiled for one shape after the other; read once, so that its weights lie in memory once."""

    def __init__(self, core: Any, path: str, device: str, properties: Mapping[str, Any]) -> None:
        self._core = core
        self._path = path
        self._device = device
        self._properties = properties
        self._model: Any = None

    def model(self) -> Any:
        """The model as it was read."""
        if self._model is None:
            self._model = self._core.read_model(self._path)
        return self._model

    def request(self, shapes: Shapes) -> Request:
        """A request to the model compiled for these shapes."""
        model = self.model().clone()
        model.reshape(dict(enumerate(map(list, shapes))))
        return Request(self._core.compile_model(model, self._device, self._properties))
