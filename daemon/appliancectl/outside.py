"""Why the daemon is out of reach, as far as that shows from outside: its socket, its unit, its log."""

import errno
import grp
import os
import pwd
import shutil
import socket
import stat
import subprocess
from pathlib import Path
from typing import Final

from appliance_client.endpoints import SERVICE_DIRECTORY
from appliance_client.errors import ApplianceError, DaemonUnreachable

CHECKS: Final = ("socket", "unit")

#: systemctl and journalctl may wait for a system that is in trouble itself.
_COMMAND_SECONDS: Final = 5.0
_CONNECT_SECONDS: Final = 2.0
_LOG_LINES: Final = 5

Found = dict[str, str]


def examine(path: Path, error: ApplianceError) -> list[Found]:
    """What is found, the likeliest cause first.

    Args:
        path: The daemon's HTTP socket.
        error: What became of the attempt to use it.
    """
    unit = _unit(path)
    found = [_socket(path, error), *(() if unit is None else _unit_state(unit))]
    # A unit that failed is the reason why nothing listens.
    return sorted(found, key=lambda each: each["severity"] != "error" or each["check"] != "unit")


def _error(check: str, title: str, reason: str, fix: str, severity: str = "error") -> Found:
    return {"check": check, "severity": severity, "title": title, "reason": reason, "fix": fix}


# ---------------------------------------------------------------- the socket


def _socket(path: Path, error: ApplianceError) -> Found:
    """Tries it again, so that the system's own reason is known."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_CONNECT_SECONDS)
        try:
            probe.connect(str(path))
        except OSError as problem:
            return _unconnectable(path, problem)
    if isinstance(error, DaemonUnreachable):
        return _error("socket", "the daemon came back a moment ago", str(error), "appliancectl doctor")
    return _error(
        "socket",
        "the daemon listens and does not answer",
        str(error),
        f"{_unit_command('restart', path)}; before that, its log may say what it waits for",
    )


def _unconnectable(path: Path, problem: OSError) -> Found:
    start = _unit_command("start", path)
    elsewhere = "where it runs with another directory, appliancectl doctor --socket-dir DIRECTORY"
    if problem.errno in (errno.EACCES, errno.EPERM):
        return _forbidden(path)
    if problem.errno == errno.ECONNREFUSED:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return _error("socket", "a file stands in the socket's place", f"{path} is no socket", f"rm {path}")
        return _error(
            "socket",
            "the daemon has died and left its socket behind",
            f"nobody listens on {path}",
            f"{start}; the daemon replaces the old socket",
        )
    if problem.errno == errno.ENOENT and not path.parent.is_dir():
        return _error(
            "socket", "the daemon is not running", f"there is no directory {path.parent}", f"{start}; {elsewhere}"
        )
    if problem.errno in (errno.ENOENT, errno.ENOTDIR):
        return _error("socket", "the daemon is not running", f"there is no socket {path}", f"{start}; {elsewhere}")
    reason = f"{path}: {(problem.strerror or str(problem)).lower()}"
    return _error("socket", "the daemon's socket cannot be used", reason, f"{start}; {elsewhere}")


def _forbidden(path: Path) -> Found:
    """Names the group that may use it, as far as the caller may see."""
    user = _user_name(os.geteuid())
    barrier = _barrier(path)
    try:
        status = barrier.stat()
    except OSError:
        return _error(
            "socket",
            "you may not use the daemon's socket",
            f"user {user} may not look at {barrier}",
            "sudo appliancectl doctor",
        )
    group, owner = _group_name(status.st_gid), _user_name(status.st_uid)
    mode = stat.S_IMODE(status.st_mode)
    reason = f"user {user} may not use {barrier}, which has owner {owner}, group {group} and mode {mode:04o}"
    if group == "root" or not mode & (stat.S_IXGRP if barrier.is_dir() else stat.S_IWGRP):
        fix = f"run it as {owner}: sudo -u {owner} appliancectl doctor"
    elif user in _members(group) and status.st_gid not in os.getgroups():
        reason += f"; user {user} has joined the group {group}, but this session is older than that"
        fix = f"log in again, or newgrp {group}"
    else:
        fix = f"sudo usermod -aG {group} {user}, then log in again; or sudo -u {owner} appliancectl doctor"
    return _error("socket", "you may not use the daemon's socket", reason, fix)


def _barrier(path: Path) -> Path:
    """The first directory on the way that may not be entered, or the socket itself."""
    for place in reversed(path.parents):
        if not os.access(place, os.X_OK, effective_ids=True):
            return place
    return path


def _members(group: str) -> list[str]:
    try:
        return grp.getgrnam(group).gr_mem
    except KeyError:
        return []


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


# ---------------------------------------------------------------- the unit


def _unit(path: Path) -> list[str] | None:
    """Arguments that name the unit which has the socket; None where it can be no unit's, or nobody can say."""
    if path.parent == SERVICE_DIRECTORY:
        return ["applianced"]
    own = os.environ.get("XDG_RUNTIME_DIR")
    return ["--user", "applianced"] if own and path.parent == Path(own) / "appliance" else None


def _unit_command(verb: str, path: Path) -> str:
    """How a person starts or restarts the daemon."""
    unit = _unit(path)
    if unit is None:
        return f"start it: applianced --socket-dir {path.parent}"
    return f"systemctl {verb} {' '.join(unit)}" if "--user" in unit else f"sudo systemctl {verb} {' '.join(unit)}"


def _unit_state(unit: list[str]) -> list[Found]:
    output = _run(["systemctl", "show", "--property=LoadState,ActiveState,SubState,Result,NRestarts", *unit])
    state = dict(line.split("=", 1) for line in output.splitlines() if "=" in line)
    if state.get("LoadState") == "not-found":
        fix = "install the unit applianced.service, or start a daemon of your own: applianced"
        return [_error("unit", "there is no systemd unit applianced", "systemctl does not know it", fix, "note")]
    active = state.get("ActiveState", "")
    log = f"journalctl {' '.join(unit[:-1])} -u {unit[-1]} -n 50".replace("  ", " ")
    lines = _last_lines(unit)
    if active == "failed" or state.get("SubState") == "auto-restart":
        reason = f"systemd says {state.get('Result') or 'failed'} after {state.get('NRestarts', '0')} restarts{lines}"
        return [_error("unit", "the unit applianced has failed", reason, f"{log} says why; mend that and start it")]
    if active == "activating":
        return [_error("unit", "the daemon is starting", f"systemd says {active}{lines}", "try again", "note")]
    if active == "active":
        reason = f"systemd says that it runs{lines}"
        return [_error("unit", "the unit applianced runs", reason, f"{log} says what it does", "note")]
    if active == "inactive":
        fix = "sudo systemctl enable --now applianced starts it, now and with the machine"
        fix = fix.replace("sudo systemctl", "systemctl --user") if "--user" in unit else fix
        return [_error("unit", "the unit applianced is not started", f"systemd says inactive{lines}", fix, "warning")]
    return []


def _last_lines(unit: list[str]) -> str:
    lines = _run(["journalctl", *unit[:-1], "-u", unit[-1], "-n", str(_LOG_LINES), "--no-pager", "-q", "-o", "cat"])
    return f"; its last words: {' | '.join(lines.splitlines())}" if lines else ""


def _run(command: list[str]) -> str:
    """What a command prints; empty where it is not there, fails or takes too long."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_COMMAND_SECONDS, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout.strip() if ended.returncode == 0 else ""
