"""The survey as the daemon takes it: a child, and what is left where the child fails."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from appliance.child import ChildFailed
from appliance.config import Config
from appliance.inventory import Rung, Step
from appliance.inventory.asking import directories_of, take_inventory, take_recording
from appliance.inventory.cpu import read_inventory
from appliance.inventory.fork import Fork, NoAnswer
from appliance.inventory.ladder import with_rung
from appliance.inventory.survey import survey
from appliance.inventory.system import Live, open_error
from support.machine import Replay

#: A busy machine may be slow to start a child; nothing here waits for it to pass.
PATIENCE = 30.0


def test_this_machine_s_inventory_comes_from_a_child(tmp_path):
    directories = {"models": str(tmp_path), "state": str(tmp_path / "not" / "yet")}
    inventory = asyncio.run(take_inventory(directories, PATIENCE))
    assert inventory.problems == ()
    cpu = inventory.devices[0]
    assert (cpu.id, cpu.kind, cpu.cores) == ("cpu", "cpu", inventory.cores)
    assert 1 <= inventory.cores <= len(os.sched_getaffinity(0))
    assert inventory.memory_bytes == inventory.memory.total > 0
    assert {disk.purpose: disk.path for disk in inventory.disks} == directories
    space = os.statvfs(tmp_path)
    assert {disk.total_bytes for disk in inventory.disks} == {space.f_blocks * space.f_frsize}
    assert inventory.host["kernel"] == os.uname().release


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import time; time.sleep(60)", "it gave no answer within 0.2 s"),
        ("import os; os.abort()", "killed by SIGABRT"),
        ("print('Segmentation fault')", "its answer is not JSON"),
        ("print('{}')", "its answer is not an inventory"),
        ('print(\'{"inventory": {"devices": 7}}\')', "its answer is not an inventory"),
        ("print('{\"inventory\": []}')", "its answer is not an inventory"),
        ("raise SystemExit(3)", "ended with status 3"),
    ],
)
def test_a_survey_that_fails_leaves_cpu_and_memory_and_says_why(program, reason):
    seconds = 0.2 if "sleep" in program else PATIENCE
    inventory = asyncio.run(take_inventory({}, seconds, [sys.executable, "-c", program]))
    plain = read_inventory()
    assert (inventory.devices, inventory.cores) == (plain.devices, plain.cores)
    assert len(inventory.problems) == 1
    assert inventory.problems[0].startswith("cannot survey the hardware: ")
    assert reason in inventory.problems[0]


def test_a_recording_replays_to_the_inventory_it_came_with(tmp_path):
    directories = {"models": str(tmp_path)}
    document = asyncio.run(take_recording(directories, PATIENCE))
    again = survey(Replay(json.loads(json.dumps(document))), directories)
    assert [device.id for device in again.devices] == [one["id"] for one in document["inventory"]["devices"]]
    assert again.disks[0].device == document["inventory"]["disks"][0]["device"]
    assert again.host == document["inventory"]["host"]


def test_a_recording_that_fails_says_so():
    with pytest.raises(ChildFailed, match="not a recording"):
        asyncio.run(take_recording({}, PATIENCE, [sys.executable, "-c", "print('{}')"]))


def test_the_child_is_light(tmp_path):
    """It starts often and beside a busy daemon: nothing heavy, and NVML only where there is a sign of NVIDIA."""
    program = "import sys, appliance.worker.survey\nprint(*sorted({name.partition('.')[0] for name in sys.modules}))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert not set(ended.stdout.split()) & {"numpy", "pydantic", "pynvml", "asyncio", "uvloop", "subprocess", "logging"}


def test_directories_by_purpose(tmp_path, monkeypatch):
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/appliance")
    config = Config.model_validate({"repository": {"path": str(tmp_path), "cache": str(tmp_path / "c")}})
    assert directories_of(config) == {
        "models": str(tmp_path),
        "cache": str(tmp_path / "c"),
        "state": "/var/lib/appliance",
    }


# ---------------------------------------------------------------- ladder


def test_a_backend_s_rung_takes_its_place_in_the_ladder():
    inventory = survey(Replay.of("rtx-workstation"), {})
    listed = with_rung(inventory, "nvidia0", Rung(Step.LISTED, False, "CUDA lists no device", "install cuda"))
    gpu = listed.device("nvidia0")
    assert [rung.step for rung in gpu.ladder] == list(Step)
    assert gpu.failed.reason == "CUDA lists no device"
    assert listed.device("cpu") == inventory.device("cpu")
    assert with_rung(listed, "nvidia0", Rung(Step.LISTED, True)).device("nvidia0").is_usable
    assert with_rung(inventory, "none", Rung(Step.LISTED, True)) == inventory


# ---------------------------------------------------------------- processes


def at_once():
    pass


def soon():
    return time.monotonic() + PATIENCE


def test_a_forked_process_answers():
    assert Fork(lambda: {"a": [1, "ä"]}, at_once).answer(soon()) == {"a": [1, "ä"]}


def fails():
    raise OSError(5, "Input/output error")


def flood():
    return "x" * (2 << 20)


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "its process was killed by SIGKILL"),
        (fails, "it failed with OSError: Input/output error"),
        (lambda: os._exit(3), "its process ended without an answer"),
        (flood, "its answer is longer than 1048576 bytes"),
        (object, "its process ended without an answer"),
    ],
)
def test_a_forked_process_that_fails_says_how(work, reason):
    with pytest.raises(NoAnswer, match=reason):
        Fork(work, at_once).answer(soon())


def test_a_forked_process_that_hangs_is_killed():
    fork = Fork(lambda: time.sleep(60), at_once)
    with pytest.raises(NoAnswer, match="it gave no answer within"):
        fork.answer(time.monotonic() + 0.1)
    _, status = os.waitpid(fork.pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_what_cannot_be_killed_holds_nothing_of_the_survey_s():
    """A process stuck in a driver stays; here one that has left the group stands for it."""
    program = (
        "import os, time\n"
        "from appliance.inventory.fork import Fork\n"
        "def stay():\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        os.setsid()\n"
        "        time.sleep(300)\n"
        "    return pid\n"
        "print(Fork(stay, lambda: None).answer(time.monotonic() + 30.0))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=50)
    os.kill(int(ended.stdout), signal.SIGKILL)


def test_a_node_is_opened_in_a_process_of_its_own(tmp_path):
    system = Live({"open": open_error}, PATIENCE)
    assert system.ask("open", "/dev/null")() == ""
    assert system.ask("open", str(tmp_path / "none"))() == "ENOENT"
    with pytest.raises(NoAnswer, match="it was not asked"):
        Live().ask("open", "/dev/null")()


def test_the_live_system_reads_nodes_and_who_asks():
    system = Live()
    node = system.node("/dev/null")
    assert (node.mode, node.user, node.group, node.refusal) == (0o666, "root", "root", "")
    identity = system.identity()
    assert identity.uid == os.geteuid()
    assert set(identity.groups) <= set(identity.member_of)
