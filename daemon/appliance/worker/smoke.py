"""A computation whose answer is known, on one device: whether what a runtime lists really computes.

Drivers and runtimes that do not fit together list a device and then crash, hang, answer wrongly or run on the CPU.
"""

import base64
import tempfile
from pathlib import Path
from typing import Final

import numpy as np

from appliance.backend import Artifact, Backend
from appliance.inventory import Inventory
from appliance.worker.messages import presentable

#: y = x W + b as an ONNX model (operator set 17): x FP32 [2, 4], y FP32 [2, 3].
MODEL: Final = base64.b64decode(
    "CAkSADqoAQoRCgF4CgF3EgFoIgZNYXRNdWwKDgoBaAoBYhIBeSIDQWRkEgVzbW9rZSo7CAQIAxABQgF3SjAAAIA/AAAAAAAAAMAAAAA/AACA"
    "PwAAAAAAAAAAAACAvwAAgEAAAABAAAAAAAAAgD8qFQgDEAFCAWJKDAAAgD8AAIC/AAAAP1oTCgF4Eg4KDAgBEggKAggCCgIIBGITCgF5Eg4K"
    "DAgBEggKAggCCgIIA0IECgAQEQ=="
)
QUESTION: Final = ((1.0, 2.0, 3.0, 4.0), (-1.0, 0.5, 0.0, 2.0))
ANSWER: Final = ((11.0, -2.0, 14.5), (4.25, -0.5, 4.5))

#: All numbers are exact in BF16 and FP16, so what a right computation may be off by is little in any precision.
_TOLERANCE: Final = 0.05

#: Format of the model above.
_FORMAT: Final = "onnx"


def try_device(backend: Backend, inventory: Inventory, device_id: str) -> str | None:
    """Run the model on a device, by the first variant that `backend` offers there.

    Returns:
        An empty string where the answer is right and the device gave it, else what went wrong; None where the backend
        cannot be tried, since it does not read the model's format or has nothing to offer for it.
    """
    if _FORMAT not in backend.formats:
        return None
    support = backend.probe(inventory)
    device = inventory.device(device_id)
    if device is None or device_id not in support.devices:
        return support.unlisted.get(device_id) or support.reason or f"{backend.name} does not list the device"
    with tempfile.TemporaryDirectory(prefix="appliance-smoke-") as directory:
        path = Path(directory) / "model.onnx"
        path.write_bytes(MODEL)
        artifact = Artifact(path, _FORMAT)
        variants = backend.candidates(artifact, device)
        if not variants:
            return None
        try:
            session = backend.load(artifact, variants[0])
            answer = session.run({"x": np.array(QUESTION, np.float32)}, ["y"])["y"].astype(np.float32)
            execution = session.executed_on()
        except Exception as error:
            return presentable(error)
    if execution.device != device_id:
        return f"it ran on {execution.device!r} instead: {execution.reason or 'the runtime gives no reason'}"
    if answer.shape != np.shape(ANSWER) or not np.allclose(answer, ANSWER, rtol=0, atol=_TOLERANCE):
        return f"it computed {answer.tolist()} where {np.array(ANSWER).tolist()} is right"
    return ""
