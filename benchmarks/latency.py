"""Budgets 1, 2, 3 and 6: the native socket."""

import socket
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime

from appliance_client import Client
from benchmarks.load import native_load
from benchmarks.peers import peer
from benchmarks.report import Line, median, percentile

ROUNDS = 7


def _timed(call: Callable[[], object], times: int) -> list[float]:
    durations = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        durations.append((time.perf_counter() - began) * 1e6)
    return durations


def round_trip(infer_socket: str, peer_path: str) -> list[Line]:
    """Budget 1, against a bare uvloop echo of the same frame (no model, no worker, no numpy)."""
    ours, bare, queued = [], [], []
    array = np.zeros((1, 16), np.float32)
    with peer("frames", peer_path), Client(infer_socket) as client, socket.socket(socket.AF_UNIX) as echo:
        echo.connect(peer_path)
        frame = bytes(24)

        def exchange() -> None:
            echo.send(frame)
            echo.recv(4096)

        _timed(lambda: client.infer("identity", {"x": array}), 2000)
        for _ in range(ROUNDS):
            ours.append(_timed(lambda: client.infer("identity", {"x": array}), 1500))
            bare.append(_timed(exchange, 1500))
        for _ in range(300):
            queued.append(client.infer("identity", {"x": array}).timings.queue_us)
    p50 = median([median(each) for each in ours])
    floor = median([median(each) for each in bare])
    p99 = median([percentile(each, 0.99) for each in ours])
    return [
        Line(
            "1",
            "round trip, 64 bytes, Python client, p50",
            p50,
            "us",
            "<= 100 us",
            p50 <= 100,
            f"bare uvloop echo {floor:.0f} us",
            p50 / floor,
        ),
        Line("1", "the same, p99", p99, "us"),
        Line(
            "6",
            "lone request on an idle daemon: time queued, p50",
            median(queued),
            "us",
            "no batching delay",
            median(queued) < 50,
            "round trip",
            median(queued) / p50,
        ),
    ]


def native_round_trip(program: Path, infer_socket: str, frames: tuple[Path, Path]) -> list[Line]:
    """Budget 1 with a native client, so that the Python client's share can be told."""
    runs = [native_load(program, infer_socket, frames, 1, 1.0) for _ in range(5)]
    p50 = median([run["p50_us"] for run in runs])
    return [Line("1", "the same from a client in C, p50", p50, "us")]


def sixteen_connections(program: Path, infer_socket: str, peer_path: str, frames: tuple[Path, Path]) -> list[Line]:
    """Budget 2, against a bare uvloop echo under the same load client."""
    ours, bare = [], []
    with peer("frames", peer_path):
        for _ in range(ROUNDS):
            ours.append(native_load(program, infer_socket, frames, 16, 1.5))
            bare.append(native_load(program, peer_path, frames, 16, 0.7))
    rate = median([run["per_second"] for run in ours])
    p99 = median([run["p99_us"] for run in ours])
    floor = median([run["per_second"] for run in bare])
    return [
        Line(
            "2",
            "16 connections, one request each",
            rate,
            "/s",
            ">= 45,000/s",
            rate >= 45000,
            f"bare uvloop echo {floor:,.0f}/s",
            rate / floor,
        ),
        Line("2", "the same, p99", p99, "us", "<= 1,000 us", p99 <= 1000),
    ]


def large_input(infer_socket: str, model: Path) -> list[Line]:
    """Budget 3: 602,112 bytes by memfd, against the model's own time in this process."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    array = np.random.default_rng(0).random((1, 3, 224, 224), np.float32)
    ours, bare, model_us = [], [], []
    with Client(infer_socket) as client:
        _timed(lambda: client.infer("picture", {"x": array}), 300)
        for _ in range(ROUNDS):
            ours.append(median(_timed(lambda: client.infer("picture", {"x": array}), 300)))
            bare.append(median(_timed(lambda: session.run(None, {"x": array}), 300)))
            model_us.append(median([client.infer("picture", {"x": array}).timings.compute_us for _ in range(50)]))
    with Client(infer_socket, region_threshold=None) as client:
        inline = median(_timed(lambda: client.infer("picture", {"x": array}), 500))
    added = median([a - b for a, b in zip(ours, bare, strict=True)])
    memcpy = median(_timed(lambda: array.copy(), 300))
    return [
        Line(
            "3",
            "600 kB input by memfd: added to the model itself, p50",
            added,
            "us",
            "<= 100 us",
            added <= 100,
            f"model in process {median(bare):.0f} us",
            median(ours) / median(bare),
        ),
        Line("3", "of which the client's copy into the memfd, about", memcpy, "us"),
        Line("3", "the same model's time in the worker", median(model_us), "us"),
        Line("3", "the same input inline, p50", inline, "us", "", None, "by memfd", inline / median(ours)),
    ]
