"""The models on which queueing is measured: a real one, and synthetic ones whose batches of n take exactly a·n + c."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance_client import AdminClient
from benchmarks.embedding import finish
from benchmarks.models import write_convolutions, write_synthetic
from benchmarks.scheduled import Client, Traffic
from support.daemon import RunningDaemon, start_daemon

PLUGINS = Path(__file__).parent / "plugins_synthetic"

#: Share of c in the 5 ms that one row takes: what batching gains at most is 1 / (1 - share).
SHARES = (0.05, 0.2, 0.75)
ROW_US = 5000.0
MAX_ROWS = 32

_TUNE_SECONDS = 300


@dataclass(frozen=True)
class Served:
    """One of them, loaded, measured by the daemon and running as it chose.

    Attributes:
        name: Of the model.
        elements: FP32 elements of a row.
        variant: What serves.
        streams: Batches that the session runs at the same time.
        a_us, c_us: Of a synthetic model; 0 of a real one.
    """

    name: str
    elements: int
    variant: str
    streams: int = 1
    a_us: float = 0.0
    c_us: float = 0.0

    @property
    def best_per_second(self) -> float:
        """Rows a second that a synthetic device gives at most."""
        return MAX_ROWS / (self.a_us * MAX_ROWS + self.c_us) * 1e6


@contextlib.contextmanager
def serve(scratch: Path, backends: tuple[str, ...]) -> Iterator[tuple[RunningDaemon, list[Served], list[Served]]]:
    """A daemon with the synthetic models, and the real one for each of `backends`, all of them measured."""
    models = scratch / "queueing"
    synthetic = {}
    for share in SHARES:
        a_us, c_us = ROW_US * (1 - share), ROW_US * share
        synthetic[write_synthetic(models, a_us, c_us, MAX_ROWS)] = a_us, c_us
    real = [write_convolutions(models, backend) for backend in backends]
    run = scratch / "queueing-run"
    run.mkdir()
    path = os.pathsep.join(filter(None, (str(PLUGINS), os.environ.get("PYTHONPATH"))))
    tuning = {"enabled": False, "point_seconds": 0.25}
    with start_daemon(run, models, environment={"PYTHONPATH": path}, tuning=tuning) as daemon:
        admin = AdminClient(daemon.http_socket, timeout=_TUNE_SECONDS)
        for name in (*synthetic, *real):
            finish(admin, admin.post(f"/admin/models/{name}/tune", {}))
        yield (
            daemon,
            [_served(admin, name, 64) for name in real],
            [_served(admin, name, 8, *times) for name, times in synthetic.items()],
        )


def _served(admin: AdminClient, name: str, elements: int, a_us: float = 0.0, c_us: float = 0.0) -> Served:
    document: dict[str, Any] = admin.get(f"/admin/models/{name}/explain")
    variant = document["serving"]["variant"]
    streams = next(one["streams"] for one in document["candidates"] if one["name"] == variant)
    return Served(name, elements, variant, streams, a_us, c_us)


def service_us(client: Client, model: Served, seconds: float) -> float:
    """Median time of single rows in the session, as many in flight as it has streams."""
    (outcome,) = client.send(
        Traffic(client.frame(model.name, model.elements), window=model.streams, seconds=seconds, connections=1)
    )
    answered = outcome.answered
    return float(sorted(answered["compute_us"][answered["rows"] == 1])[(answered["rows"] == 1).sum() // 2])
