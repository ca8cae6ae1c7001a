"""What ``appliancectl hardware`` shows of recorded machines."""

import json
import re
from dataclasses import asdict

import pytest

from appliance.inventory.survey import survey
from support.machine import DIRECTORIES, MACHINES, Replay


def answer_of(name):
    return json.loads(json.dumps(asdict(survey(Replay.of(name), DIRECTORIES))))


@pytest.fixture
def show(run, socket_dir, answers):
    def shown(name, *arguments):
        answers["GET", "/admin/hardware"] = answers["POST", "/admin/hardware/refresh"] = (200, answer_of(name))
        return run("hardware", *arguments, "--socket-dir", socket_dir)

    return shown


@pytest.mark.parametrize("name", sorted(path.stem for path in MACHINES.glob("*.json")))
def test_every_machine_can_be_shown(show, name):
    shown = show(name)
    assert (shown.code, shown.err) == (0, "")
    for device in answer_of(name)["devices"]:
        assert re.search(rf"^{device['id']} +{device['kind']} +{re.escape(device['name'])} ", shown.out, re.MULTILINE)


def test_a_device_that_is_not_usable_comes_with_reason_and_fix(show):
    out = show("igpu-no-render-group").out
    assert re.search(r"^intel-gpu0 +gpu +Intel Iris Xe Graphics .* no: access$", out, re.MULTILINE)
    assert "\nintel-gpu0 is not usable: user appliance may not open /dev/dri/renderD128: it has owner root" in out
    assert "\n  fix: sudo usermod -aG render appliance, then restart the daemon" in out
    assert "present → driver → ✗ openable → ? listed → ? smoke-tested" in out


def test_a_device_that_passed_is_usable(show, answers, run, socket_dir):
    document = answer_of("rtx-workstation")
    for rung in document["devices"][1]["ladder"]:
        rung["passed"] = True
    answers["GET", "/admin/hardware"] = (200, document)
    out = run("hardware", "--socket-dir", socket_dir).out
    assert re.search(r"^nvidia0 .* 550.90.07 +yes$", out, re.MULTILINE)
    assert "other processes  Xorg (2214) 298 MiB" in out


def test_limits_and_disks_of_a_container(show):
    out = show("container-limited").out
    assert re.search(r"^memory limit +4.0 GiB by control group, of 251.6 GiB$", out, re.MULTILINE)
    assert re.search(r"^quota +1.5 cores$", out, re.MULTILINE)
    assert "models: 55.9 GiB free of 97.8 GiB on nvme1n1p1 (ext4, solid state)" in out


def test_huge_pages_and_disks_that_turn(show):
    out = show("amx-server").out
    assert re.search(r"^huge pages +512 of 2.0 MiB$", out, re.MULTILINE)
    assert "on sdb1 (xfs, rotating)" in out


def test_problems_are_shown(show, answers, run, socket_dir):
    answers["GET", "/admin/hardware"] = (200, answer_of("epyc-vm") | {"problems": ["cannot survey the hardware: why"]})
    assert "\nproblem: cannot survey the hardware: why\n" in run("hardware", "--socket-dir", socket_dir).out


def test_refresh_asks_anew(show, answers):
    answers.pop(("GET", "/admin/hardware"))
    assert json.loads(show("raspberry-pi", "--refresh", "--json").out) == answer_of("raspberry-pi")


def test_a_recording_is_written(show, answers, tmp_path):
    answers["POST", "/admin/hardware/record"] = (200, {"format": 1, "files": {"/a": "ä"}})
    shown = show("plain-laptop", "--record", tmp_path / "machine.json")
    assert json.loads((tmp_path / "machine.json").read_text()) == {"format": 1, "files": {"/a": "ä"}}
    assert "machine.json" in shown.out


def test_a_recording_that_cannot_be_written_is_refused(show, answers, tmp_path):
    answers["POST", "/admin/hardware/record"] = (200, {})
    shown = show("plain-laptop", "--record", tmp_path / "none" / "machine.json")
    assert (shown.code, shown.out) == (1, "")
    assert "cannot write" in shown.err
