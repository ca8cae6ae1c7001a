"""A real daemon with real workers, shared by the end-to-end tests of a session."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.daemon import RunningDaemon, start_daemon
from support.models import write_identity

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def model_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample models, and `identity`: FP32 [-1,16] to the same."""
    directory = tmp_path_factory.mktemp("models")
    for sample in ("digits", "language-id"):
        (directory / sample).symlink_to(REPOSITORY / "models" / sample)
    write_identity(directory / "identity")
    return directory


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory, model_repository: Path):
    """One daemon for the session; TCP clients are administrators."""
    with start_daemon(tmp_path_factory.mktemp("run"), model_repository, access={"tcp_role": "admin"}) as running:
        yield running


@pytest.fixture
def own_daemon(tmp_path: Path):
    """Starts daemons of a test's own: call it with a repository and configuration sections."""
    started: list[RunningDaemon] = []

    def start(models: Path, **sections: object) -> RunningDaemon:
        directory = tmp_path / f"run{len(started)}"
        directory.mkdir()
        running = start_daemon(directory, models, **sections)
        started.append(running)
        return running

    yield start
    for running in started:
        running.stop()
