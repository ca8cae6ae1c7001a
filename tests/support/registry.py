"""Records for the registry, and looks at its database from outside."""

import contextlib
import os
import select
import sqlite3
import sys

from appliance.measurement import Measurement, Point, VariantKey
from appliance.quality import Comparison, Evidence
from appliance.registry import FILE_NAME, Registry
from appliance.registry_link import registrar_command
from appliance.stored import DerivedVariant

#: Takes from root what lets it write where the mode forbids it (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH), then runs the
#: rest of the command line.
_WITHOUT_PRIVILEGE = """
import ctypes, os, sys
for capability in (1, 2):
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


def key(number: int = 0) -> VariantKey:
    return VariantKey(f"{number:064x}", "onnxruntime", "onnxruntime 1.31.1", "cpu", "avx2", "FP32", '{"threads": "2"}')


def measurement(number: int = 0, points: int = 3) -> Measurement:
    return Measurement(
        key=key(number),
        points=tuple(Point(1 << each, 100.5 * (each + 1), 2.25, 50, each == 1, 3.5) for each in range(points)),
        load_ms=12.5,
        peak_bytes=1 << 33,
        device="cpu",
        provider="CPUExecutionProvider",
        tokens=16,
        measured_at="2030-01-02T03:04:05+00:00",
    )


def evidence(number: int = 0, value: float = 0.9) -> Evidence:
    compared = Comparison("cosine", value, 1.0, 0.8, 300)
    return Evidence(key(number), key(99).id, "f" * 64, 0.01, compared, judged_at="2030-01-02T03:04:05+00:00")


def variant(name: str = "int8-0a1b", model: str = "model") -> DerivedVariant:
    return DerivedVariant(name, model, "1", "a" * 64, "int8", "onnx", "INT8", f"{model}/model.onnx", "b" * 64, 77, 300)


def registry(directory, busy_seconds: float = 5.0, **settings) -> Registry:
    settings.setdefault("command", registrar_command(directory / FILE_NAME, busy_seconds))
    return Registry(directory, **settings)


def unprivileged(command: list[str]) -> list[str]:
    """`command`, bound by the modes of files even where root runs it."""
    return [sys.executable, "-c", _WITHOUT_PRIVILEGE, *command]


def rows(directory, table: str) -> list[dict]:
    """What the file has, the oldest first."""
    with contextlib.closing(sqlite3.connect(directory / FILE_NAME)) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(f"SELECT * FROM {table} ORDER BY rowid")]


def wait_for_end(pid: int, seconds: float = 20.0) -> None:
    """Return once a process is gone, whosever child it is."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        assert poll.poll(seconds * 1000), "the process lives on"
    finally:
        os.close(handle)
