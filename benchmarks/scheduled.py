"""Our scheduled load client: requests at given moments or so many in flight, with a record of each."""

import json
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.wire.open_inference_pb2 import ModelInferRequest
from benchmarks.load import build, write_hello, write_infer

#: `struct record` of native_schedule.c.
_RECORD = np.dtype(
    [
        ("scheduled_ns", "<u8"),
        ("sent_ns", "<u8"),
        ("answered_ns", "<u8"),
        ("queue_us", "<u4"),
        ("compute_us", "<u4"),
        ("rows", "<u4"),
        ("kind", "S20"),
    ]
)

#: Time for the client to connect before it sends.
_LEAD_NS = 100_000_000


@dataclass(frozen=True)
class Traffic:
    """What one client sends, in a process of its own.

    Attributes:
        frame: A file with the INFER frame.
        arrivals_ns: Moments to send at, after the beginning, or None for a closed loop.
        window: Requests in flight in a closed loop.
        seconds: How long a closed loop sends.
        timeout_us: Of each request; 0 for none.
        connections: Taken in turn.
    """

    frame: Path
    arrivals_ns: "NDArray[np.int64] | None" = None
    window: int = 0
    seconds: float = 0.0
    timeout_us: int = 0
    connections: int = 8


@dataclass(frozen=True)
class Outcome:
    """What became of one client's requests.

    Attributes:
        records: One for each request, in the order of their schedule.
        cpu_seconds: Processor time of the client.
    """

    records: "NDArray[Any]"
    cpu_seconds: float

    @property
    def answered(self) -> "NDArray[Any]":
        """Records of the requests that got an answer, not an error."""
        return self.records[self.records["kind"] == b""]

    @property
    def latencies_us(self) -> "NDArray[np.float64]":
        """Of the answers, from the scheduled moment."""
        answered = self.answered
        return (answered["answered_ns"] - answered["scheduled_ns"]) / 1e3

    @property
    def late_us(self) -> "NDArray[np.float64]":
        """How late the client sent each request."""
        return (self.records["sent_ns"] - self.records["scheduled_ns"]) / 1e3

    def refusals(self) -> Mapping[str, int]:
        """Requests that got an error, by its kind."""
        kinds, counts = np.unique(self.records["kind"], return_counts=True)
        return {kind.decode(): int(count) for kind, count in zip(kinds, counts, strict=True) if kind}

    def per_second(self, deadline_us: float = np.inf, skip: float = 0.2) -> float:
        """Answers a second among those within `deadline_us`, without the first `skip` and after the last request.

        By least squares over the moments of the answers, since whole batches are answered at once: a count would be
        off by up to a batch at either end.
        """
        begin, end = (float(self.records["scheduled_ns"][place]) for place in (0, -1))
        answered = self.answered
        latency_us = (answered["answered_ns"] - answered["scheduled_ns"]) / 1e3
        moments = np.sort(answered["answered_ns"][latency_us <= deadline_us].astype(np.float64))
        moments = moments[(moments >= begin + skip * (end - begin)) & (moments <= end)]
        if len(moments) < 3 or np.ptp(moments) == 0:
            return 0.0
        seconds = (moments - moments.mean()) / 1e9
        return float(seconds @ np.arange(len(moments)) / (seconds @ seconds))


class Client:
    """Sends to one daemon."""

    def __init__(self, program: Path, infer_socket: str, scratch: Path) -> None:
        self._program = program
        self._socket = infer_socket
        self._scratch = scratch
        self._hello = write_hello(scratch)

    @classmethod
    def build(cls, infer_socket: str, scratch: Path) -> "Client | None":
        """None where there is no C compiler."""
        scratch.mkdir(exist_ok=True)
        program = build("native_schedule", scratch)
        return None if program is None else cls(program, infer_socket, scratch)

    def frame(self, model: str, elements: int, **parameters: int) -> Path:
        """A file with a request of one row of `elements` FP32 zeros."""
        message = ModelInferRequest(model_name=model)
        message.inputs.add(name="x", datatype="FP32", shape=[1, elements])
        for name, value in parameters.items():
            message.parameters[name].int64_param = value
        name = "-".join([model, *(f"{key}{value}" for key, value in parameters.items())])
        return write_infer(self._scratch / f"{name}.bin", message, 4 * elements)

    def send(self, *traffic: Traffic) -> list[Outcome]:
        """Have each client send what it is to; all begin at the same moment, and this returns when all have ended.

        Raises:
            RuntimeError: A client failed.
        """
        begin_ns = time.monotonic_ns() + _LEAD_NS
        running = [self._start(number, each, begin_ns) for number, each in enumerate(traffic)]
        outcomes = []
        for number, process in enumerate(running):
            output, trouble = process.communicate()
            if process.returncode:
                raise RuntimeError(f"native_schedule ended with {process.returncode}: {trouble}")
            records = np.fromfile(self._records(number), _RECORD)
            outcomes.append(Outcome(records, json.loads(output)["cpu_seconds"]))
        return outcomes

    def _records(self, number: int) -> Path:
        return self._scratch / f"records-{number}.bin"

    def _start(self, number: int, traffic: Traffic, begin_ns: int) -> "subprocess.Popen[str]":
        if traffic.arrivals_ns is None:
            how = ["window", str(traffic.window), str(traffic.seconds)]
        else:
            schedule = self._scratch / f"schedule-{number}.bin"
            traffic.arrivals_ns.astype("<u8").tofile(schedule)
            how = ["schedule", str(schedule)]
        what = [self._socket, self._hello, traffic.frame, self._records(number)]
        numbers = [traffic.connections, traffic.timeout_us, begin_ns]
        command = [str(self._program), *map(str, what), *map(str, numbers), *how]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
