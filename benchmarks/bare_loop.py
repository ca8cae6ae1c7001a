"""What a server cannot exceed: a runtime alone, in a process of its own, in a loop over one batch that lies ready.

``python -m benchmarks.bare_loop BACKEND MODEL`` reads one JSON object a line, ``{"streams": 2, "threads": 1,
"batch": 4, "seconds": 1.0}``, and answers each with rows a second.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

#: Options beside threads that a backend's users would try: ONNX Runtime's own habit is to let idle threads spin.
_SPINNING = "spinning"


@dataclass(frozen=True)
class Setting:
    """One way to run the loop."""

    streams: int
    threads: int
    batch: int
    spins: bool = False

    def __str__(self) -> str:
        spins = f", {_SPINNING}" if self.spins else ""
        return f"{self.streams} x {self.threads} threads, {self.batch} rows{spins}"


def settings(backend: str) -> list[Setting]:
    """The grid: all cores in one run or one run for each core, by batch size, and spinning where the runtime has it."""
    cores = len(os.sched_getaffinity(0))
    ways = [(1, cores, False), (cores, 1, False)]
    if backend == "onnxruntime":
        ways.append((1, cores, True))
    return [Setting(streams, threads, batch, spins) for streams, threads, spins in ways for batch in (1, 2, 4, 8, 16)]


class BareLoop:
    """A process that runs the loop when asked, and is idle otherwise."""

    def __init__(self, backend: str, model: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.bare_loop", backend, str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._backend = backend

    def rows_per_second(self, setting: Setting, seconds: float) -> float:
        """Run it for so long."""
        question, answer = self._process.stdin, self._process.stdout
        if question is None or answer is None:
            raise RuntimeError("the bare loop has no pipes")
        print(json.dumps({**asdict(setting), "seconds": seconds}), file=question, flush=True)
        return float(answer.readline())

    def best(self, seconds: float) -> Setting:
        """The fastest setting, each tried for so long."""
        return max(settings(self._backend), key=lambda setting: self.rows_per_second(setting, seconds))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


Run = Callable[[], object]


def _onnxruntime(model: str, setting: Setting) -> list[Run]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = setting.threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if setting.spins else "0")
    runs: list[Run] = []
    for _ in range(setting.streams):
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        feeds = {"x": np.zeros((setting.batch, *session.get_inputs()[0].shape[1:]), np.float32)}
        runs.append(partial(session.run, None, feeds))
    return runs


def _openvino(model: str, setting: Setting) -> list[Run]:
    import openvino

    core = openvino.Core()
    graph = core.read_model(model)
    shape = [setting.batch, *(dimension.get_length() for dimension in list(graph.input(0).partial_shape)[1:])]
    graph.reshape(shape)  # static, as the runtime likes it best
    compiled = core.compile_model(
        graph,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": "f32",
            "NUM_STREAMS": setting.streams,
            "INFERENCE_NUM_THREADS": setting.streams * setting.threads,
        },
    )
    runs: list[Run] = []
    for _ in range(setting.streams):
        request = compiled.create_infer_request()
        array = np.zeros(shape, np.float32)
        runs.append(partial(request.infer, [array], share_inputs=True, share_outputs=True))
    return runs


_RUNS = {"onnxruntime": _onnxruntime, "openvino": _openvino}


def _measure(runs: list[Run], batch: int, seconds: float) -> float:
    """Rows a second of all streams together."""
    counts = [0] * len(runs)
    for run in runs:
        run()
    began = time.perf_counter()

    def loop(place: int) -> float:
        while (now := time.perf_counter()) - began < seconds:
            runs[place]()
            counts[place] += 1
        return now

    threads = [threading.Thread(target=loop, args=(place,)) for place in range(1, len(runs))]
    for thread in threads:
        thread.start()
    loop(0)
    for thread in threads:
        thread.join()
    return batch * sum(counts) / (time.perf_counter() - began)


def _serve(backend: str, model: str) -> None:
    made: dict[Setting, Any] = {}
    for line in sys.stdin:
        question = json.loads(line)
        seconds = question.pop("seconds")
        setting = Setting(**question)
        if setting not in made:
            made.clear()  # a session that lies ready costs memory, and its threads may spin for a while
            made[setting] = _RUNS[backend](model, setting)
        print(_measure(made[setting], setting.batch, seconds), flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
