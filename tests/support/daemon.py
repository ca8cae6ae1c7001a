"""Starts the real daemon as a process and waits until it is ready."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

#: The environment in which a daemon and its workers find the backend ``fake``.
FAKE_BACKEND = {"PYTHONPATH": str(Path(__file__).parents[1] / "plugins_fake")}

#: Most that a test waits for something that takes well under a second on an idle machine.
PATIENCE_SECONDS = 45


def wait_until(condition, what: str, seconds: float = PATIENCE_SECONDS):
    """Poll `condition` until it gives something true; fails the test when it does not in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.01)  # between polls; what is waited for is the condition
    raise AssertionError(f"not within {seconds} s: {what}")


@dataclass
class RunningDaemon:
    """A daemon process and where it listens."""

    process: subprocess.Popen
    socket_dir: Path
    log_path: Path
    endpoints: dict

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def infer_socket(self) -> str:
        return str(self.socket_dir / "infer.sock")

    @property
    def grpc_socket(self) -> str:
        return str(self.socket_dir / "grpc.sock")

    @property
    def http_socket(self) -> str:
        return str(self.socket_dir / "http.sock")

    @property
    def grpc_tcp(self) -> str:
        return self.endpoints["grpc_tcp"]

    @property
    def http_tcp(self) -> str:
        return self.endpoints["http_tcp"]

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def http(self, method: str, path: str, body: bytes = b"", headers: dict | None = None):
        """One HTTP exchange over the Unix socket: status, headers, body."""
        connection = http.client.HTTPConnection("localhost", timeout=PATIENCE_SECONDS)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(PATIENCE_SECONDS)
        connection.sock.connect(self.http_socket)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()

    def get(self, path: str):
        """The JSON document at `path`."""
        status, _, body = self.http("GET", path)
        assert status == 200, (status, body)
        return json.loads(body)

    def model(self, name: str) -> dict:
        """One model as the admin API shows it."""
        return self.get(f"/admin/models/{name}")

    def wait_for_state(self, name: str, *states: str) -> dict:
        """Wait until a model is in one of `states`."""
        return wait_until(lambda: (m := self.model(name))["state"] in states and m, f"{name} is {' or '.join(states)}")

    def workers(self) -> list[int]:
        """Process ids of the daemon's workers, and of the children that probe backends."""
        return [pid for pid in children(self.pid) if b"appliance.worker" in command_line(pid)]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the daemon and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


def children(pid: int) -> list[int]:
    """Direct children of a process, from /proc."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == pid and fields[0] != "Z":
                    found.append(int(entry.name))
    return found


def command_line(pid: int) -> bytes:
    """The words of a process, separated by NUL; empty once it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _toml(value) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_toml(each)}" for key, each in value.items()) + " }"
    return json.dumps(value)  # strings, numbers, booleans and lists are written alike


def start_daemon(
    directory: Path, models: Path, wait: bool = True, environment: dict | None = None, **sections
) -> RunningDaemon:
    """Start a daemon on sockets below `directory` and wait until it is ready.

    Keyword arguments are configuration sections, such as ``limits={"max_regions": 2}``.
    """
    socket_dir = directory / "s"
    merged = {"listen": {"grpc_tcp": "127.0.0.1:0", "http_tcp": "127.0.0.1:0", "directory": str(socket_dir)}}
    merged["repository"] = {"path": str(models), "cache": str(directory / "cache"), "state": str(directory / "state")}
    merged["tuning"] = {"enabled": False}  # what a test measures it asks for
    for name, values in sections.items():
        merged[name] = {**merged.get(name, {}), **values}
    config = directory / "config.toml"
    lines = []
    for name, values in merged.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {_toml(value)}" for key, value in values.items()]
    config.write_text("\n".join(lines))
    (socket_dir / "endpoints.json").unlink(missing_ok=True)  # that of a daemon killed before says nothing of this one
    log_path = directory / "log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "appliance.main", "--config", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **(environment or {})},
        )
    running = RunningDaemon(process, socket_dir, log_path, {})

    def listens():
        assert process.poll() is None, f"the daemon ended with {process.returncode}: {running.log}"
        return (socket_dir / "endpoints.json").exists()

    try:
        wait_until(listens, "the daemon listens")
        running.endpoints = json.loads((socket_dir / "endpoints.json").read_text())
        if wait:
            wait_until(lambda: running.http("GET", "/v2/health/ready")[0] == 200, f"the daemon is ready: {running.log}")
    except BaseException:
        process.kill()
        process.wait()
        raise
    return running


def open_descriptors(pid: int) -> int:
    """How many descriptors a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def is_alive(pid: int) -> bool:
    """True while a process of that id runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
