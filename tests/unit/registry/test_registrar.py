"""The registrar's process, spoken to directly."""

import json
import os
import resource
import signal
import subprocess

import pytest

from appliance.child import MAX_LINE_BYTES
from appliance.registry import FILE_NAME
from appliance.registry_link import registrar_command
from support.registry import rows, wait_for_end


@pytest.fixture
def registrar(tmp_path):
    process = subprocess.Popen(
        registrar_command(tmp_path / FILE_NAME), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with process:
        yield process
        process.kill()


def digest(number: int, text: str = "c") -> dict:
    row = {"fingerprint": f"print{number}", "sha256": text}
    return {"id": number, "do": "write", "changes": [{"do": "put", "table": "digests", "row": row}]}


def say(process, *questions) -> None:
    process.stdin.write(b"".join(json.dumps(question).encode() + b"\n" for question in questions))
    process.stdin.flush()


def hear(process) -> dict:
    return json.loads(process.stdout.readline())


@pytest.mark.parametrize("answered", [1, 50, 120])
def test_every_acknowledged_write_is_there_after_kill_9(registrar, tmp_path, answered):
    """200 transactions are under way; a question each, so that each is a commit of its own."""
    say(registrar, *(digest(number) for number in range(200)))
    acknowledged = [hear(registrar)["id"] for _ in range(answered)]
    registrar.send_signal(signal.SIGKILL)
    rest = registrar.stdout.read().splitlines(keepends=True)
    acknowledged += [json.loads(line)["id"] for line in rest if line.endswith(b"\n")]
    found = {row["fingerprint"] for row in rows(tmp_path, "digests")}
    assert {f"print{number}" for number in acknowledged} <= found
    restarted = subprocess.run(
        registrar_command(tmp_path / FILE_NAME), input=b'{"id": 1, "do": "check"}\n', capture_output=True, timeout=60
    )
    answer = json.loads(restarted.stdout)
    assert answer["result"]["problems"] == []
    assert answer["moved_aside"] == ""


def test_questions_are_answered_in_their_order_with_their_ids(registrar):
    say(registrar, digest(7), {"id": 3, "do": "sing"}, {"id": 9, "do": "read"})
    assert [hear(registrar)["id"] for _ in range(4)] == [7, 3, 9, 9]


def test_it_finishes_what_it_was_asked_and_ends_with_its_input(registrar, tmp_path):
    say(registrar, *(digest(number) for number in range(20)))
    registrar.stdin.close()
    assert registrar.wait(30) == 0
    assert len(rows(tmp_path, "digests")) == 20
    assert os.listdir(tmp_path) == [FILE_NAME]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_meant_for_the_daemon_do_not_end_it(registrar, number):
    say(registrar, digest(1))
    assert hear(registrar)["id"] == 1
    registrar.send_signal(number)
    say(registrar, digest(2))
    assert hear(registrar)["id"] == 2


def test_a_line_without_end_is_not_read_for_ever(registrar):
    registrar.stdin.write(b" " * (MAX_LINE_BYTES + 1))
    registrar.stdin.flush()
    assert registrar.wait(30) == 2


def test_a_disk_that_takes_no_more_is_reported_and_used_again_once_it_does(registrar, tmp_path):
    say(registrar, digest(1))
    assert "result" in hear(registrar)
    resource.prlimit(registrar.pid, resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
    say(registrar, digest(2, "x" * 20_000))
    failed = hear(registrar)["failed"]
    assert failed["kind"] == "internal"
    assert failed["message"].startswith("cannot use the registry: disk I/O error")
    resource.prlimit(registrar.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    say(registrar, digest(2))
    assert "result" in hear(registrar)
    assert len(rows(tmp_path, "digests")) == 2


def test_numpy_is_not_loaded_though_the_library_would(registrar):
    say(registrar, {"id": 1, "do": "check"})
    hear(registrar)
    with open(f"/proc/{registrar.pid}/maps") as maps:
        assert "/numpy/" not in maps.read()


def test_it_dies_with_its_parent(tmp_path):
    """Even with a pipe to its input held open by somebody else."""
    reading, writing = os.pipe()
    parent = subprocess.Popen(
        ["sh", "-c", '"$@" & echo $!; read nothing', "sh", *registrar_command(tmp_path / FILE_NAME)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    os.close(reading)
    os.close(writing)
    with parent:
        pid = int(parent.stdout.readline())
        parent.kill()
    wait_for_end(pid)
