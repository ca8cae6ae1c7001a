"""Backend ``fake``: does on command what real runtimes do on a bad day. For tests; put this directory on PYTHONPATH.

An artifact of format ``"fake"`` is a JSON object; every key may be left out::

    {
      "inputs":  [["x", "FP32", [-1, 16]]],      # name, datatype, full shape
      "outputs": [["y", "FP32", [-1, 16]]],      # output i echoes input i, or the last input where there are fewer
      "a_us": 0, "c_us": 0,                      # a run of n rows sleeps a_us * n + c_us microseconds
      "load_us": 0,                              # loading sleeps this long
      "child": false,                            # loading starts a process that would outlive the worker
      "load_log": PATH,                          # each load adds a line with its process id to this file
      "load_gate": PATH, "run_gate": PATH,       # a load, or a run told to `wait`, goes on once this file exists
      "on_load": COMMAND, "on_warmup": COMMAND,  # obeyed while loading, or in the first run
      "in_precision": {"BF16": COMMAND},         # obeyed in every run of a variant of that precision
      "raise_above": {"rows": 4, "says": TEXT},  # a run of more rows raises RuntimeError of this text
      "precision": "FP32",                       # what executed_on reports
      "streams": 2,                              # runs it takes at the same time; left out, the session does not say
      "resident_bytes": 0                        # memory that loading takes and keeps
    }

Echoing works between equal datatypes and shapes. A COMMAND is a word of `COMMANDS`. A run obeys the command whose
number (``MAGIC[word]``; for BYTES the word itself) is the first element of the first input::

    crash       SIGSEGV                     kill        SIGKILL to itself
    exit        leaves with status 3        raise       raises RuntimeError
    hang        sleeps for an hour          hang-gil    the same, holding the interpreter lock
                (both first print "hanging" on standard error)
    leak        keeps 1 MiB for each run    missing     leaves the first output out
    rows        one row too few             dtype       another datatype
    rank        one dimension too many      nan         NaN in every element (floating point only)
    print       prints 1 MiB                big         raises with a very long message that names a path
    memory      raises MemoryError          wait        waits for run_gate
    stop        SIGSTOP to itself
"""

import ctypes
import json
import os
import signal
import subprocess
import time
from typing import ClassVar

import numpy as np

from appliance.backend import Execution, Support, Variant
from appliance.types import TensorSpec

COMMANDS = (
    "crash", "kill", "exit", "raise", "hang", "hang-gil", "leak", "missing", "rows", "dtype", "rank", "nan", "print",
    "big", "memory", "wait", "stop",
)  # fmt: skip

#: First element of the first input that commands each word; small, so that every numeric datatype but BOOL holds it.
MAGIC = {word: 101 + number for number, word in enumerate(COMMANDS)}
_WORDS = {number: word for word, number in MAGIC.items()}


class FakeBackend:
    """See the module's docstring."""

    name: ClassVar[str] = "fake"
    formats: ClassVar[frozenset[str]] = frozenset({"fake"})
    scope: ClassVar[str] = "model"

    def probe(self, inventory):
        return Support(devices=("cpu",), runtime="fake 1.0")

    def candidates(self, artifact, device):
        return (Variant("fake", device.id, "FP32"),)

    def load(self, artifact, variant):
        behaviour = json.loads(artifact.path.read_bytes())
        if "load_log" in behaviour:
            with open(behaviour["load_log"], "a") as log:
                log.write(f"{os.getpid()}\n")
        if behaviour.get("child"):
            subprocess.Popen(["sleep", "3600"])
        time.sleep(behaviour.get("load_us", 0) / 1e6)
        _wait_for(behaviour.get("load_gate"))
        _obey(behaviour.get("on_load"))
        return FakeSession(behaviour, variant)


class FakeSession:
    """Echoes, unless told otherwise."""

    def __init__(self, behaviour, variant):
        default = [["x", "FP32", [-1, 16]]], [["y", "FP32", [-1, 16]]]
        self.inputs = _specs(behaviour.get("inputs", default[0]))
        self.outputs = _specs(behaviour.get("outputs", default[1]))
        self._device = variant.device
        self._precision = behaviour.get("precision", variant.precision)
        self._a_us, self._c_us = behaviour.get("a_us", 0), behaviour.get("c_us", 0)
        if "streams" in behaviour:
            self.streams = behaviour["streams"]
        self._on_warmup = behaviour.get("on_warmup")
        self._in_precision = behaviour.get("in_precision", {}).get(variant.precision)
        self._run_gate = behaviour.get("run_gate")
        self._raise_above = behaviour.get("raise_above")
        self._kept = [bytearray(os.urandom(4096) * (behaviour.get("resident_bytes", 0) // 4096))]

    def run(self, inputs, outputs):
        command, self._on_warmup = self._on_warmup, None
        first = inputs[self.inputs[0].name]
        command = command or self._in_precision
        if command is None and first.size:
            command = _command_of(first.reshape(-1)[0])
        rows = first.shape[0] if first.ndim else 1
        if self._raise_above is not None and rows > self._raise_above["rows"]:
            raise RuntimeError(self._raise_above["says"])
        duration_us = self._a_us * rows + self._c_us
        if duration_us:
            time.sleep(duration_us / 1e6)
        if command == "leak":
            self._kept.append(bytearray(os.urandom(4096) * 256))
        if command == "wait":
            _wait_for(self._run_gate)
        _obey(command)
        results = {}
        for index, spec in enumerate(self.outputs):
            source = inputs[self.inputs[min(index, len(self.inputs) - 1)].name]
            results[spec.name] = _spoilt(command, source) if index == 0 else source
        if command == "missing":
            del results[self.outputs[0].name]
        return {name: results[name] for name in outputs if name in results}

    def executed_on(self):
        return Execution(self._device, "FakeProvider", self._precision, "")

    def close(self):
        self._kept.clear()


def _wait_for(path):
    while path is not None and not os.path.exists(path):
        time.sleep(0.002)


def _specs(entries):
    return tuple(TensorSpec(name, datatype, tuple(shape)) for name, datatype, shape in entries)


def _command_of(element):
    if isinstance(element, bytes):
        word = element.decode("utf-8", "replace")
        return word if word in MAGIC else None
    if isinstance(element, np.bool_) or not np.isfinite(element):
        return None
    return _WORDS.get(element.item()) if element.item() == int(element) else None


def _spoilt(command, array):
    if command == "rows":
        return array[:-1]
    if command == "dtype":
        return array.astype(np.int16 if array.dtype != np.int16 else np.int32)
    if command == "rank":
        return array[..., np.newaxis]
    if command == "nan":
        return np.full_like(array, np.nan)
    return array


def _obey(command):
    if command == "crash":
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        ctypes.string_at(0)
    elif command == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif command == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif command == "exit":
        os._exit(3)
    elif command == "raise":
        raise RuntimeError("the fake device raised on command")
    elif command in ("hang", "hang-gil"):
        os.write(2, b"hanging\n")
    if command == "hang":
        time.sleep(3600)
    elif command == "hang-gil":
        ctypes.PyDLL(None).sleep(3600)
    elif command == "print":
        os.write(1, b"noise from native code\n" * 45590)
    elif command == "big":
        raise RuntimeError("cannot open /etc/appliance/secret/key.pem at 0x7f00deadbeef " + "x" * 100_000)
    elif command == "memory":
        raise MemoryError("the fake device is full")
