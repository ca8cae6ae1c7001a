"""How many batches a model runs at a time, changed by the command line while requests come, with the real runtimes."""

import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from operator import ge
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from appliance_client import Client
from support.daemon import wait_until

REPOSITORY = Path(__file__).parents[2]
CLIENTS = 4

pytestmark = pytest.mark.timeout(180)


def ctl(daemon, *words: str, code: int = 0):
    """The JSON that ``appliancectl instances digits`` prints."""
    program = "from appliancectl.cli import main; main()"
    arguments = ["instances", "digits", *words, "--json", "--socket-dir", str(daemon.socket_dir)]
    ended = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == code, (ended.stdout, ended.stderr)
    return json.loads(ended.stdout)


@pytest.fixture
def serve(own_daemon, tmp_path):
    """Starts a daemon with the model digits, whose manifest ends with the lines given."""

    def start(*lines: str):
        shutil.copytree(REPOSITORY / "models" / "digits", tmp_path / "models" / "digits")
        manifest = tmp_path / "models" / "digits" / "model.toml"
        manifest.write_text("\n".join([manifest.read_text(), *lines]))
        return own_daemon(tmp_path / "models", tuning={"enabled": False})

    return start


class Traffic:
    """Clients that send batches of all sizes until they are told to stop, and check every answer."""

    def __init__(self, daemon, expected: list[tuple[np.ndarray, np.ndarray]]) -> None:
        self._socket = daemon.infer_socket
        self._expected = expected
        self._over = threading.Event()
        self._threads = ThreadPoolExecutor(CLIENTS)
        self.answered = [0] * CLIENTS
        self._ends = [self._threads.submit(self._send, number) for number in range(CLIENTS)]

    def _send(self, number: int) -> None:
        with Client(self._socket) as client:
            while not self._over.is_set():
                pixels, logits = self._expected[(number + self.answered[number]) % len(self._expected)]
                answer = client.infer("digits", {"pixels": pixels})["logits"]
                np.testing.assert_allclose(answer, logits, rtol=1e-3, atol=1e-4)
                self.answered[number] += 1

    def go_on(self) -> None:
        """Wait until every client has had some more answers, or one has met with an error."""
        wanted = [count + 20 for count in self.answered]
        wait_until(
            lambda: all(map(ge, self.answered, wanted)) or any(each.done() for each in self._ends), "they are answered"
        )

    def end(self) -> None:
        """Stop; raises what a client met with."""
        self._over.set()
        for each in self._ends:
            each.result(60)


def expected_answers(daemon) -> list[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(3)
    batches = [random.random((rows, 1, 8, 8), np.float32) for rows in (1, 2, 3, 5, 8, 13)]
    with Client(daemon.infer_socket) as client:
        return [(pixels, np.array(client.infer("digits", {"pixels": pixels})["logits"])) for pixels in batches]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_streams_change_under_traffic_without_a_failed_request(serve, backend):
    running = serve("[placement]", f'backend = "{backend}"', 'precision = "FP32"')
    before = ctl(running)
    cores = before["cores"]
    assert (before["streams"], before["threads"], before["chosen_by"]) == (1, cores, "rule")
    traffic = Traffic(running, expected_answers(running))
    for options, streams, threads in (
        (("--streams", "2"), 2, max(cores // 2, 1)),
        (("--streams", "1", "--threads", "1"), 1, 1),
        (("--streams", "2", "--threads", "1"), 2, 1),
        (("--auto",), 1, cores),
        (("--streams", "2"), 2, max(cores // 2, 1)),
    ):
        answer = ctl(running, *options)
        assert (answer["streams"], answer["threads"]) == (streams if cores > 1 or backend != "openvino" else 1, threads)
        assert (answer["chosen_by"] == "pinned") is ("--auto" not in options)
        assert running.model("digits")["variant"] == answer["variant"]
        traffic.go_on()
    traffic.end()
    assert running.model("digits")["restarts"] == 0
    assert running.stop() == 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "or 'auto' alone"),
        ({"auto": True, "streams": 2}, "or 'auto' alone"),
        ({"streams": 0}, "'streams': it must be a number from 1 to 64"),
        ({"streams": 2.0}, "'streams': it must be a number from 1 to 64"),
        ({"threads": 1025}, "'threads': it must be a number from 1 to 1024"),
        ({"threads": True}, "'threads': it must be a number from 1 to 1024"),
        ({"auto": 1}, "it must be true or false"),
        ({"weight": 2}, "the fields are streams, threads, auto"),
    ],
)
def test_what_makes_no_sense_is_refused(daemon, body, message):
    status, _, content = daemon.http("POST", "/admin/models/digits/instances", json.dumps(body).encode())
    assert status == 400
    assert message in json.loads(content)["error"]
    assert daemon.http("POST", "/admin/models/nothing/instances", b'{"streams": 2}')[0] == 404


def test_the_manifest_has_the_last_word(serve):
    running = serve("[instances]", "streams = 2", "threads = 1", "[placement]", 'backend = "onnxruntime"')
    model = running.model("digits")
    assert (model["variant"], model["streams"]) == ("onnxruntime/cpu/FP32/streams=2/threads=1", 2)
    answer = ctl(running)
    assert (answer["streams"], answer["threads"], answer["manifest"]) == (2, 1, {"streams": 2, "threads": 1})
    assert "[instances] of its manifest says streams = 2" in ctl(running, "--streams", "1", code=1)["error"]
    traffic = Traffic(running, expected_answers(running))
    traffic.go_on()
    traffic.end()
