"""``appliancectl doctor`` against real daemons in which something is really wrong."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from appliance_client import Client, WorkerLost
from support.daemon import FAKE_BACKEND, start_daemon, wait_until
from support.models import write_fake, write_identity

#: The same entry point as `fake`, in a module that cannot be imported.
BROKEN_PLUGIN = {
    "broken_backend-0.dist-info/METADATA": "Metadata-Version: 2.1\nName: broken-backend\nVersion: 0\n",
    "broken_backend-0.dist-info/entry_points.txt": "[appliance.backends]\nbroken = broken_backend:Backend\n",
    "broken_backend.py": "raise ImportError('libvendor.so.7: cannot open shared object file')\n",
}


def examine(socket_dir: Path, **environment):
    """What the program finds, by check, and how it ends."""
    program = [sys.executable, "-c", "from appliancectl.cli import main; main()", "doctor", "--json"]
    ended = subprocess.run(
        [*program, "--socket-dir", socket_dir],
        capture_output=True,
        timeout=50,
        check=False,
        text=True,
        env={**os.environ, **environment},
    )
    assert ended.stderr == ""
    document = json.loads(ended.stdout)
    assert ended.returncode == 0 if document["healthy"] else ended.returncode in (1, 3)
    found = {}
    for finding in document["findings"]:
        assert finding["check"] in document["checks"]
        assert finding["severity"] in ("error", "warning", "note")
        assert finding["title"]
        assert finding["reason"]
        assert finding["fix"]
        found.setdefault(finding["check"], []).append(finding)
    return found, ended.returncode


@pytest.fixture
def started(tmp_path):
    """Starts daemons with the fake backend: call it with configuration sections."""
    running = []

    def start(environment=FAKE_BACKEND, **sections):
        directory = tmp_path / f"run{len(running)}"
        directory.mkdir()
        (tmp_path / "models").mkdir(exist_ok=True)
        running.append(start_daemon(directory, tmp_path / "models", environment=environment, **sections))
        return running[-1]

    yield start
    for daemon in running:
        daemon.stop()


def test_a_daemon_without_faults_has_none_of_them(started, tmp_path):
    """Whatever else this machine may lack: the faults that follow are not seen where they were not seeded."""
    write_identity(tmp_path / "models" / "identity")
    found, _ = examine(started().socket_dir)
    seeded = {"model", "crashes", "placement", "fallback", "pin", "directory", "registry", "backend", "environment"}
    assert not seeded & set(found), found
    assert "tune identity" in found["measurements"][0]["fix"]


def test_a_state_directory_that_cannot_be_written(started, tmp_path):
    (tmp_path / "state").write_text("a file in its place")
    found, code = examine(started(repository={"state": str(tmp_path / "state")}).socket_dir)
    assert code == 1
    (directory,) = found["directory"]
    assert (directory["severity"], "state directory" in directory["title"]) == ("error", True)
    assert str(tmp_path / "state") in directory["fix"]
    assert found["registry"][0]["severity"] == "error"


def test_a_registry_that_is_damaged(started, tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "registry.db").write_bytes(b"no database" * 1000)
    running = started(repository={"state": str(tmp_path / "state")})
    found, code = examine(running.socket_dir)
    (registry,) = found["registry"]
    assert (code, registry["severity"], registry["title"]) == (1, "warning", "the registry was damaged and began anew")
    kept = [path for path in (tmp_path / "state").iterdir() if path.read_bytes().startswith(b"no database")]
    assert [path.name in registry["reason"] for path in kept] == [True]


def test_a_registry_that_is_another_program_s(started, tmp_path):
    (tmp_path / "state").mkdir()
    with sqlite3.connect(tmp_path / "state" / "registry.db") as database:
        database.execute("create table recipes (name text)")
    database.close()
    found, code = examine(started(repository={"state": str(tmp_path / "state")}).socket_dir)
    (registry,) = found["registry"]
    assert (code, registry["severity"]) == (1, "error")
    assert "another program" in registry["reason"]
    assert "repository.state" in registry["fix"]


def test_a_worker_that_crashes_and_a_model_that_cannot_be_loaded(started, tmp_path):
    write_fake(tmp_path / "models" / "fickle")
    write_fake(tmp_path / "models" / "hopeless", on_load="raise")
    running = started()
    with Client(running.infer_socket) as client, pytest.raises(WorkerLost):
        client.infer("fickle", {"x": np.full((1, 16), 101, np.float32)})  # the fake backend's command to crash
    wait_until(lambda: running.model("fickle")["restarts"], "the worker runs again")
    running.wait_for_state("fickle", "ready")
    found, code = examine(running.socket_dir)
    (crashed,), (failed,) = found["crashes"], found["model"]
    assert code == 1
    assert "fickle was restarted once" in crashed["title"]
    assert "SIGSEGV" in crashed["reason"]
    assert (failed["severity"], "hopeless" in failed["title"]) == ("error", True)
    assert "appliancectl load hopeless" in failed["fix"]


def test_a_model_in_quarantine(started, tmp_path):
    write_fake(tmp_path / "models" / "fickle")
    running = started(workers={"crashes_to_quarantine": 1})
    with Client(running.infer_socket) as client, pytest.raises(WorkerLost):
        client.infer("fickle", {"x": np.full((1, 16), 101, np.float32)})
    running.wait_for_state("fickle", "quarantined")
    (found,) = examine(running.socket_dir)[0]["model"]
    assert (found["severity"], found["title"]) == ("error", "model fickle is quarantined")
    assert "SIGSEGV" in found["reason"]


def test_a_plugin_that_is_broken_and_one_that_is_disabled(started, tmp_path):
    for name, text in BROKEN_PLUGIN.items():
        (tmp_path / "plugins" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "plugins" / name).write_text(text)
    plugins = f"{tmp_path / 'plugins'}{os.pathsep}{FAKE_BACKEND['PYTHONPATH']}"
    running = started({"PYTHONPATH": plugins}, **{"backends.fake": {"enabled": False}})
    found, code = examine(running.socket_dir)
    by_title = {finding["title"]: finding for finding in found["backend"]}
    broken, disabled = by_title["the backend broken is broken"], by_title["the backend fake is disabled"]
    assert (code, broken["severity"], disabled["severity"]) == (1, "error", "note")
    assert "libvendor.so.7" in broken["reason"]
    assert "[backends.fake]" in disabled["fix"]


def test_a_variable_that_the_shell_has_and_the_daemon_has_not(started):
    running = started({"LD_LIBRARY_PATH": ""})
    found, _ = examine(running.socket_dir, LD_LIBRARY_PATH="/opt/vendor/lib")
    (variable,) = found["environment"]
    assert variable["title"] == "LD_LIBRARY_PATH is set in your shell and differently for the daemon"
    assert "/opt/vendor/lib" in variable["fix"]


def test_a_model_repository_that_is_gone(started, tmp_path):
    running = started()
    (tmp_path / "models").rmdir()
    (found,) = examine(running.socket_dir)[0]["directory"]
    assert (found["severity"], "models directory cannot be read" in found["title"]) == ("error", True)


def test_a_daemon_that_was_killed(started):
    running = started()
    running.process.kill()
    running.process.wait()
    found, code = examine(running.socket_dir)
    (unreachable,) = found["socket"]
    assert (code, unreachable["severity"]) == (3, "error")
    assert "applianced --socket-dir" in unreachable["fix"]
