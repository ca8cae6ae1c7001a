"""Budgets 10 and 11: start, memory, idling."""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime

from appliance_client import Client
from benchmarks.report import Line, median
from support.daemon import RunningDaemon, start_daemon

_IDLE_SECONDS = 10.0


def _resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start() -> list[Line]:
    """Budget 10, first figure: from exec to ready without models, against an interpreter that imports asyncio."""
    ours, bare = [], []
    with tempfile.TemporaryDirectory() as empty:
        for _ in range(5):
            with tempfile.TemporaryDirectory() as directory:
                began = time.perf_counter()
                running = start_daemon(Path(directory), Path(empty))
                ours.append((time.perf_counter() - began) * 1000)
                running.stop()
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", "import asyncio"], check=True)
            bare.append((time.perf_counter() - began) * 1000)
    ready, floor = median(ours), median(bare)
    return [
        Line(
            "10",
            "applianced ready without models",
            ready,
            "ms",
            "<= 1,000 ms",
            ready <= 1000,
            f"python -c 'import asyncio' {floor:.0f} ms",
            ready / floor,
        ),
    ]


def load_large(daemon: RunningDaemon, model: Path, name: str, backend: str) -> list[Line]:
    """Budget 10, second figure: load to first answer of a 90 MB model, page cache and compiled-model cache warm."""
    array = np.zeros((1, 768), np.float32)
    ours, bare = [], []
    with Client(daemon.infer_socket, timeout=120) as client:
        for _ in range(6):
            client.unload(name)
            began = time.perf_counter()
            client.load(name)
            client.infer(name, {"x": array})
            ours.append((time.perf_counter() - began) * 1000)
            began = time.perf_counter()
            session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
            session.run(None, {"x": array})
            bare.append((time.perf_counter() - began) * 1000)
            del session
    took, floor = median(ours[1:]), median(bare[1:])
    return [
        Line(
            "10",
            f"90 MB model through {backend}: load to first answer, caches warm",
            took,
            "ms",
            "<= 500 ms",
            took <= 500,
            f"onnxruntime in process {floor:.0f} ms",
            took / floor,
        ),
    ]


def idle(daemon: RunningDaemon, what: str) -> list[Line]:
    """Budget 11: resident memory, and processor time while nothing happens."""
    processes = [daemon.pid, *daemon.workers()]
    time.sleep(1.0)  # let the last answer's work end; what follows measures a stretch of time
    before = sum(map(_cpu_seconds, processes))
    time.sleep(_IDLE_SECONDS)
    used = 100 * (sum(map(_cpu_seconds, processes)) - before) / _IDLE_SECONDS
    memory = _resident_mb(daemon.pid)
    bare = subprocess.run(
        [sys.executable, "-c", "import asyncio, uvloop, grpc.aio; print(open('/proc/self/statm').read().split()[1])"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    floor = int(bare.stdout) * resource.getpagesize() / 1e6
    return [
        Line(
            "11",
            f"front-end resident, {what}",
            memory,
            "MB",
            "<= 60 MB",
            memory <= 60,
            f"python with uvloop and grpc {floor:.0f} MB",
            memory / floor,
        ),
        Line("11", f"daemon and {len(processes) - 1} workers idle, {what}", used, "% of a core", "< 0.5 %", used < 0.5),
    ]
