import importlib.util
import sys
from pathlib import Path

import pytest

# importlib import mode gives test modules no package, so the harness is loaded by its path.
_spec = importlib.util.spec_from_file_location("worker_harness", Path(__file__).parent / "harness.py")
harness = sys.modules["worker_harness"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(harness)


@pytest.fixture
def start():
    """Starts workers that end with the test."""
    workers = []

    def start_one(**arguments):
        workers.append(harness.Worker(**arguments))
        return workers[-1]

    yield start_one
    for worker in workers:
        worker.close()


@pytest.fixture
def fake(start, tmp_path):
    """A worker that has loaded a fake model of the given behaviour and has a slab."""

    def load(manifest=None, **behaviour):
        worker = start()
        artifact = harness.write_fake(tmp_path, **behaviour)
        worker.loaded = worker.load(tmp_path, artifact, "fake", manifest, artifact_format="fake")
        worker.give_slab()
        return worker

    return load
