"""Runs the command line in this process, against a daemon of canned answers on a real Unix socket."""

import http.server
import json
import socketserver
import threading
from types import SimpleNamespace

import pytest

from appliancectl.cli import main

MODEL = {
    "name": "echo",
    "version": "1",
    "state": "ready",
    "reason": "",
    "task": "tensor",
    "backend": "onnxruntime",
    "variant": "onnxruntime/cpu/FP32",
    "chosen_by": "rule",
    "requested_device": "cpu",
    "fallback": "",
    "device": "cpu",
    "precision": "FP32",
    "provider": "CPUExecutionProvider",
    "runtime": "onnxruntime 1.0",
    "max_batch_size": 8,
    "streams": 2,
    "pid": 7,
    "resident_bytes": 62_200_000,
    "restarts": 0,
    "load_ms": 51.7,
    "queued": 3,
    "running": 1,
}
BROKEN = MODEL | {"name": "broken", "state": "failed", "reason": "cannot load: its file is cut short", "pid": None}


def canned():
    """What the daemon answers, by method and path."""
    return {
        ("GET", "/v2"): (200, {"name": "inference-appliance", "version": "9.9.9"}),
        ("GET", "/admin/status"): (
            200,
            {
                "version": "9.9.9",
                "ready": True,
                "accepting": True,
                "pid": 7,
                "uptime_s": 3725.5,
                "rss_bytes": 1048576,
                "sockets": {"http": "unix"},
                "models": [MODEL, BROKEN],
            },
        ),
        ("GET", "/admin/models"): (200, {"models": [MODEL, BROKEN]}),
        ("GET", "/admin/models/echo"): (200, MODEL),
        ("GET", "/admin/models/none"): (404, {"error": "cannot find model 'none'", "kind": "model-not-found"}),
        ("GET", "/admin/hardware"): (
            200,
            {
                "cores": 2,
                "memory_bytes": 2**31,
                "devices": [
                    {
                        "id": "cpu",
                        "kind": "cpu",
                        "name": "A CPU",
                        "memory_bytes": 2**31,
                        "features": ["avx2"],
                        "vendor": "Maker",
                        "driver": "",
                        "uuid": "",
                        "cores": 2,
                        "is_integrated": False,
                        "details": {"threads": "2"},
                        "ladder": [{"step": "present", "passed": True, "reason": "", "fix": ""}],
                    }
                ],
                "memory": {
                    "total": 2**31,
                    "machine": 2**31,
                    "limit": 0,
                    "available": 2**30,
                    "huge_page_bytes": 0,
                    "huge_pages": 0,
                },
                "disks": [],
                "host": {"kernel": "6.8"},
                "problems": [],
            },
        ),
        ("GET", "/admin/backends"): (
            200,
            {
                "backends": [
                    {
                        "name": "tensorrt",
                        "status": "unsupported",
                        "reason": "no device",
                        "distribution": "d 1",
                        "runtime": "",
                        "devices": [],
                    }
                ]
            },
        ),
        ("POST", "/v2/repository/models/echo/load"): (200, MODEL),
        ("POST", "/v2/repository/models/echo/unload"): (200, MODEL | {"state": "unloaded"}),
        ("POST", "/v2/repository/models/broken/load"): (
            403,
            {"error": "cannot call RepositoryModelLoad: it needs the role admin", "kind": "permission-denied"},
        ),
    }


@pytest.fixture
def answers():
    return canned()


@pytest.fixture
def asked():
    """Method, path and JSON of what the daemon was asked, None where there was no body."""
    return []


@pytest.fixture
def socket_dir(tmp_path, answers, asked):
    """A directory whose http.sock answers as `answers` says."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def _answer(self):
            content = self.rfile.read(int(self.headers.get("content-length", 0)))
            asked.append((self.command, self.path, json.loads(content) if content else None))
            status, value = answers.get(
                (self.command, self.path), (404, {"error": "cannot find it", "kind": "unimplemented"})
            )
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = _answer  # noqa: N815 the names http.server looks for

        def log_message(self, *_):
            pass

        def address_string(self):
            return ""

    class Server(socketserver.ThreadingUnixStreamServer):
        daemon_threads = True

    server = Server(str(tmp_path / "http.sock"), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield tmp_path
    server.shutdown()
    server.server_close()
    thread.join(10)


@pytest.fixture
def run(capsys, monkeypatch):
    """Run ``appliancectl`` with arguments: exit code, standard output and error."""
    for name in ("APPLIANCE_SOCKET_DIR", "APPLIANCE_SOCKET", "APPLIANCE_HTTP_SOCKET", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)

    def start(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return SimpleNamespace(code=end.value.code, out=captured.out, err=captured.err)

    return start
