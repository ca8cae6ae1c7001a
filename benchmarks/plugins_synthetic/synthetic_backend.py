"""Backend ``synthetic``: a device whose batches take exactly a·n + c, and no core. Put this directory on PYTHONPATH.

An artifact of format ``"synthetic"`` is a JSON object: ``{"a_us": 4000, "c_us": 1000}``, microseconds for each row and
for each run. Input ``x`` and output ``y`` are FP32 [-1, 8], the latter the former unchanged.
"""

import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final

from appliance.backend import Artifact, Execution, Support, Variant
from appliance.inventory import Device, Inventory
from appliance.types import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: A sleep may end so much too late, so the rest of a run is spun.
_SPUN_NS: Final = 100_000


class Synthetic:
    """See the module's docstring."""

    name: ClassVar[str] = "synthetic"
    formats: ClassVar[frozenset[str]] = frozenset({"synthetic"})
    scope: ClassVar[str] = "model"

    def probe(self, inventory: Inventory) -> Support:
        """The processor."""
        return Support(tuple(device.id for device in inventory.devices if device.kind == "cpu"), "synthetic 1.0")

    def candidates(self, artifact: Artifact, device: Device) -> Sequence[Variant]:
        """One."""
        return (Variant(self.name, device.id, "FP32"),) if artifact.precision == "FP32" else ()

    def load(self, artifact: Artifact, variant: Variant) -> "_Session":
        """Read a and c."""
        return _Session(json.loads(artifact.path.read_bytes()), variant)


class _Session:
    inputs = (TensorSpec("x", "FP32", (-1, 8)),)
    outputs = (TensorSpec("y", "FP32", (-1, 8)),)

    def __init__(self, times: Mapping[str, float], variant: Variant) -> None:
        self._variant = variant
        self._a_ns = times["a_us"] * 1e3
        self._c_ns = times["c_us"] * 1e3
        self._owed_ns = 0.0

    def run(self, inputs: "Mapping[str, NDArray[Any]]", outputs: Sequence[str]) -> "Mapping[str, NDArray[np.float32]]":
        """Wait. What a run took too long, because the core was not to be had, the next one takes less.

        So the mean is right on a busy machine. A run is at most a tenth shorter for it, and no more than one run's time
        is made up for.
        """
        began = time.monotonic_ns()
        wanted = self._a_ns * len(inputs["x"]) + self._c_ns
        end = began + wanted - min(self._owed_ns, wanted / 10)
        time.sleep(max(end - time.monotonic_ns() - _SPUN_NS, 0) / 1e9)
        while (now := time.monotonic_ns()) < end:
            pass
        self._owed_ns = min(self._owed_ns + now - began - wanted, wanted)
        return {"y": inputs["x"]}

    def executed_on(self) -> Execution:
        """The processor, which does nothing."""
        return Execution(self._variant.device, "Synthetic", self._variant.precision)

    def close(self) -> None:
        """Nothing is held."""
