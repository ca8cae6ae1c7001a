"""``appliancectl doctor``: what it prints, how it ends, and what it sees of a daemon that is out of reach."""

import contextlib
import grp
import json
import os
import socket
import stat
import tempfile
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from appliance_client.errors import ConnectionLost, DaemonUnreachable
from appliancectl import doctor, outside

FINDINGS = [
    {
        "check": "device",
        "severity": "error",
        "title": "nvidia0 (RTX 4090) has no working driver",
        "reason": "restart required: the driver was upgraded while its kernel module stayed loaded",
        "fix": "restart the machine",
    },
    {
        "check": "measurements",
        "severity": "note",
        "title": "model digits is not fully measured",
        "reason": "3 of 4 ways to run it have no measurement yet " + "and so on " * 20,
        "fix": "appliancectl tune digits",
    },
]


def answer(findings):
    is_healthy = all(finding["severity"] == "note" for finding in findings)
    return {"findings": findings, "healthy": is_healthy, "checks": ["device", "measurements"]}


@pytest.fixture
def told(answers):
    """Sets what the daemon answers."""

    def tell(findings):
        answers["POST", "/admin/doctor"] = (200, answer(findings))

    return tell


def test_a_healthy_installation_exits_0(run, socket_dir, told):
    told([])
    shown = run("doctor", "--socket-dir", socket_dir)
    assert (shown.code, shown.out, shown.err) == (0, "nothing to mend: 2 checks found nothing\n", "")


def test_notes_alone_exit_0(run, socket_dir, told):
    told(FINDINGS[1:])
    shown = run("doctor", "--socket-dir", socket_dir)
    assert (shown.code, shown.out.splitlines()[-1]) == (0, "1 note from 2 checks")


def test_findings_are_paragraphs_and_exit_1(run, socket_dir, told):
    """A pipe gets reason and fix on one line each, whatever their length."""
    told(FINDINGS)
    shown = run("doctor", "--socket-dir", socket_dir)
    assert shown.code == 1
    lines = shown.out.splitlines()
    assert lines[:4] == [
        "error    nvidia0 (RTX 4090) has no working driver",
        "         restart required: the driver was upgraded while its kernel module stayed loaded",
        "         fix: restart the machine",
        "",
    ]
    assert (len(lines), lines[-1]) == (9, "1 error, 1 note from 2 checks")


def test_a_terminal_gets_colours_and_80_columns(run, socket_dir, told, monkeypatch):
    told(FINDINGS)
    screen = StringIO()
    terminal = Console(file=screen, force_terminal=True, width=80, color_system="standard", highlight=False)
    monkeypatch.setattr(doctor, "console", lambda: terminal)
    assert run("doctor", "--socket-dir", socket_dir).code == 1
    lines = screen.getvalue().splitlines()
    assert "\x1b[1;31merror" in lines[0]
    assert "\x1b[1;36mnote" in screen.getvalue()
    plain = [line for line in lines if "\x1b" not in line]
    assert max(map(len, plain)) <= 80
    assert len(plain) > 6


def test_json_is_the_daemon_s_own(run, socket_dir, told):
    told(FINDINGS)
    shown = run("doctor", "--json", "--socket-dir", socket_dir)
    assert (shown.code, json.loads(shown.out), shown.err) == (1, answer(FINDINGS), "")


def test_only_what_matters_to_runtimes_is_sent(run, socket_dir, told, monkeypatch):
    """Nobody's tokens and proxies travel."""
    sent = doctor._environment(
        {"CUDA_HOME": "/c", "LD_PRELOAD": "x", "HTTPS_PROXY": "http://user:secret@proxy", "TOKEN": "t", "LD_X": "y"}
    )
    assert sent == {"CUDA_HOME": "/c", "LD_PRELOAD": "x"}


def test_one_who_may_not_ask_is_refused(run, socket_dir, answers):
    refusal = {"error": "cannot call Doctor: it needs the role admin", "kind": "permission-denied"}
    answers["POST", "/admin/doctor"] = (403, refusal)
    shown = run("doctor", "--socket-dir", socket_dir)
    assert (shown.code, shown.out) == (1, "")
    assert "access.admin_uids" in shown.err


# ---------------------------------------------------------------- out of reach


def finding(run, *arguments, code=3):
    """The only finding of a doctor who cannot reach the daemon."""
    shown = run("doctor", "--json", *arguments)
    document = json.loads(shown.out)
    assert (shown.code, shown.err, document["healthy"]) == (code, "", False)
    assert document["kind"] in ("daemon-unreachable", "connection-lost")
    (found,) = document["findings"]
    assert found["check"] in document["checks"]
    return found


def leave_socket(directory: Path) -> Path:
    """A socket that nobody listens on, as a killed daemon leaves it."""
    path = directory / "http.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    return path


def test_without_a_socket_directory_the_daemon_is_not_running(run, tmp_path):
    found = finding(run, "--socket-dir", tmp_path / "none")
    assert (found["severity"], found["title"]) == ("error", "the daemon is not running")
    assert "no directory" in found["reason"]
    assert "applianced --socket-dir" in found["fix"]


def test_without_a_socket_it_is_not_running_either(run, tmp_path):
    found = finding(run, "--socket-dir", tmp_path)
    assert "no socket" in found["reason"]
    shown = run("doctor", "--socket-dir", tmp_path)
    assert (shown.code, shown.out.splitlines()[0]) == (3, "error    the daemon is not running")


def test_a_stale_socket_means_that_the_daemon_died(run, tmp_path):
    leave_socket(tmp_path)
    found = finding(run, "--socket-dir", tmp_path)
    assert "has died" in found["title"]
    assert "replaces the old socket" in found["fix"]


def test_a_file_in_the_socket_s_place_is_named(run, tmp_path):
    (tmp_path / "http.sock").touch()
    assert finding(run, "--socket-dir", tmp_path)["fix"] == f"rm {tmp_path / 'http.sock'}"


def test_a_daemon_that_hangs_up_is_not_taken_for_an_absent_one(run, tmp_path):
    path = tmp_path / "http.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        (found,) = outside.examine(path, ConnectionLost("the daemon closed the connection"))
    assert found["title"] == "the daemon listens and does not answer"


@contextlib.contextmanager
def as_nobody():
    """This process without root's powers."""
    groups, gid = os.getgroups(), os.getegid()
    os.setgroups([])
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(gid)
        os.setgroups(groups)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
@pytest.mark.parametrize(
    ("directory_mode", "socket_mode", "gid", "barrier", "fix"),
    [
        (0o750, 0o660, 1, "directory", "sudo usermod -aG {group} {user}"),
        (0o755, 0o660, 1, "socket", "sudo usermod -aG {group} {user}"),
        (0o700, 0o660, 1, "directory", "sudo -u root"),
        (0o755, 0o600, 1, "socket", "sudo -u root"),
        (0o750, 0o660, 0, "directory", "sudo -u root"),
    ],
)
def test_one_who_may_not_open_the_socket_is_told_the_group(directory_mode, socket_mode, gid, barrier, fix):
    """Joining the group is advised only where the group may, and never for root's."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name) / "s"
        place.mkdir()
        path = leave_socket(place)
        for each, mode in ((Path(name), 0o755), (place, directory_mode), (path, socket_mode)):
            os.chown(each, 0, gid)
            each.chmod(mode)
        user, group = outside._user_name(65534), grp.getgrgid(gid).gr_name
        with as_nobody():
            (found,) = outside.examine(path, DaemonUnreachable("cannot reach it"))
    assert found["title"] == "you may not use the daemon's socket"
    assert str(place if barrier == "directory" else path) in found["reason"]
    assert f"user {user}" in found["reason"]
    assert f"group {group}" in found["reason"]
    assert fix.format(group=group, user=user) in found["fix"]


# ---------------------------------------------------------------- systemd


@pytest.fixture
def systemd(tmp_path, monkeypatch):
    """A systemctl and a journalctl that say what they are told to, and a service directory to stand in for the real."""
    programs = tmp_path / "bin"
    programs.mkdir()
    service = tmp_path / "service"
    service.mkdir()
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setattr(outside, "SERVICE_DIRECTORY", service)

    def say(name, *lines):
        program = programs / name
        words = "\n".join(lines)
        program.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/{name}.arguments\ncat <<'END'\n{words}\nEND\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    say.service = service
    say("journalctl")
    return say


def unit_of(run, service):
    document = json.loads(run("doctor", "--json", "--socket-dir", service).out)
    assert {found["check"] for found in document["findings"]} <= set(document["checks"])
    return document["findings"], next((each for each in document["findings"] if each["check"] == "unit"), None)


def test_a_unit_that_failed_comes_first_with_its_last_words(run, systemd):
    systemd("systemctl", "LoadState=loaded", "ActiveState=failed", "Result=exit-code", "NRestarts=5")
    systemd("journalctl", "applianced: cannot use the configuration: repository.pth", "exited with 1")
    findings, unit = unit_of(run, systemd.service)
    assert findings[0] is unit
    assert unit["severity"] == "error"
    assert "exit-code after 5 restarts" in unit["reason"]
    assert "repository.pth | exited with 1" in unit["reason"]
    assert "journalctl -u applianced" in unit["fix"]


@pytest.mark.parametrize(
    ("lines", "severity", "words"),
    [
        (("LoadState=not-found", "ActiveState=inactive"), "note", "install the unit"),
        (("LoadState=loaded", "ActiveState=inactive"), "warning", "sudo systemctl enable --now applianced"),
        (("LoadState=loaded", "ActiveState=activating", "SubState=start"), "note", "try again"),
        (("LoadState=loaded", "ActiveState=activating", "SubState=auto-restart"), "error", "journalctl -u applianced"),
        (("LoadState=loaded", "ActiveState=active"), "note", "journalctl -u applianced"),
    ],
)
def test_each_state_of_the_unit(run, systemd, lines, severity, words):
    systemd("systemctl", *lines)
    _, unit = unit_of(run, systemd.service)
    assert (unit["severity"], words in unit["fix"]) == (severity, True), unit


def test_a_user_s_own_unit_is_asked_for_where_the_socket_is_the_user_s(run, systemd, tmp_path, monkeypatch):
    systemd("systemctl", "LoadState=loaded", "ActiveState=inactive")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "appliance").mkdir()
    leave_socket(tmp_path / "appliance")
    document = json.loads(run("doctor", "--json").out)
    assert [each["fix"].partition(" starts")[0] for each in document["findings"] if each["check"] == "unit"] == [
        "systemctl --user enable --now applianced"
    ]
    assert "--user" in (tmp_path / "systemctl.arguments").read_text()


def test_a_systemctl_that_fails_says_nothing(run, systemd):
    systemd("systemctl")
    with (systemd.service.parent / "bin" / "systemctl").open("a") as program:
        program.write("exit 1\n")
    findings, unit = unit_of(run, systemd.service)
    assert (len(findings), unit) == (1, None)


def test_a_systemctl_that_hangs_is_not_waited_for(run, systemd, monkeypatch):
    monkeypatch.setattr(outside, "_COMMAND_SECONDS", 0.1)
    systemd("systemctl")
    (systemd.service.parent / "bin" / "systemctl").write_text("#!/bin/sh\nexec sleep 60\n")
    assert unit_of(run, systemd.service)[1] is None
