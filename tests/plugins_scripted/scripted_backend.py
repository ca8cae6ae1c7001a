"""Backends ``quick`` and ``slow``, whose speed and accuracy a test writes down. Put this directory on PYTHONPATH.

An artifact of format ``"scripted"`` is a JSON object; every key may be left out::

    {
      "us": {"FP32": 400, "BF16": 200},      # microseconds of a run, by precision; `slow` takes three times as long
      "error": {"INT8": 0.3},                # added to every output, by precision
      "nan": ["BF16"],                       # precisions whose outputs are NaN
      "lands_on": {"nvidia0": "cpu"},        # device that really executes, by device asked for
      "runs": PATH,                          # each process that measures adds a line with its variant to this file
      "hold": PATH                           # runs of a second and more, once this file exists
    }

Input ``x`` and output ``y`` are FP32 [-1, 8]. Both backends run on every device of the inventory; sessions have as many
streams as the option ``streams`` says. A model's sample is JSON lines with ``x`` as numbers.
"""

import json
import os
import time
from pathlib import Path
from typing import ClassVar

import numpy as np

from appliance.backend import Execution, Support, Variant
from appliance.types import TensorSpec


class Quick:
    """See the module's docstring."""

    name: ClassVar[str] = "quick"
    formats: ClassVar[frozenset[str]] = frozenset({"scripted"})
    scope: ClassVar[str] = "model"
    factor: ClassVar[int] = 1

    def probe(self, inventory):
        return Support(devices=tuple(device.id for device in inventory.devices), runtime=f"{self.name} 1.0")

    def candidates(self, artifact, device):
        if artifact.precision == "FP32":
            return tuple(Variant(self.name, device.id, precision) for precision in ("FP32", "BF16"))
        return (Variant(self.name, device.id, "INT8"),) if artifact.precision == "INT8" else ()

    def load(self, artifact, variant):
        script = json.loads(artifact.path.read_bytes())
        if "runs" in script:
            with open(script["runs"], "a") as log:
                log.write(f"{variant.backend}/{variant.device}/{variant.precision}\n")
        return _Session(script, variant, self.factor)


class Slow(Quick):
    """Three times slower."""

    name: ClassVar[str] = "slow"
    factor: ClassVar[int] = 3


class _Session:
    inputs = (TensorSpec("x", "FP32", (-1, 8)),)
    outputs = (TensorSpec("y", "FP32", (-1, 8)),)

    def __init__(self, script, variant, factor):
        self._script, self._variant = script, variant
        self.streams = int(variant.options.get("streams", "1"))
        self._seconds = script.get("us", {}).get(variant.precision, 400) * factor / 1e6
        self._error = script.get("error", {}).get(variant.precision, 0.0)
        if variant.precision in script.get("nan", ()):
            self._error = float("nan")

    def run(self, inputs, outputs):
        hold = self._script.get("hold")
        end = time.perf_counter() + (1.0 if hold and Path(hold).exists() else self._seconds)
        time.sleep(max(end - time.perf_counter() - 1e-4, 0))
        while time.perf_counter() < end:  # sleeping alone would be as exact as the timer
            pass
        return {"y": inputs["x"] + np.float32(self._error)}

    def executed_on(self):
        device = self._script.get("lands_on", {}).get(self._variant.device, self._variant.device)
        reason = "" if device == self._variant.device else "libscripted.so.9: cannot open shared object file"
        return Execution(device, f"Scripted-{os.getpid()}", self._variant.precision, "", reason)

    def close(self):
        pass
