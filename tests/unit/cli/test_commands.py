"""What the commands print, how they end, and what they load."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from appliancectl.cli import cli
from appliancectl.failure import _ADVICE
from appliancectl.output import duration, size

DOCUMENTATION = (Path(__file__).parents[3] / "docs" / "cli.md").read_text()


def test_status_shows_daemon_and_models(run, socket_dir):
    shown = run("status", "--socket-dir", socket_dir)
    assert shown.code == 0
    assert re.search(r"^daemon +ready$", shown.out, re.MULTILINE)
    assert re.search(r"^up for +1 h 2 min$", shown.out, re.MULTILINE)
    assert re.search(r"^echo +1 +ready +onnxruntime +cpu +FP32 +59.3 MiB +3 +1$", shown.out, re.MULTILINE)
    assert "broken: cannot load: its file is cut short" in shown.out
    assert shown.err == ""


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        (["status"], "/admin/status"),
        (["models"], "/admin/models"),
        (["models", "echo"], "/admin/models/echo"),
        (["hardware"], "/admin/hardware"),
        (["backends"], "/admin/backends"),
    ],
)
def test_json_is_the_daemon_s_own(run, socket_dir, answers, arguments, path):
    shown = run(*arguments, "--json", "--socket-dir", socket_dir)
    assert (shown.code, json.loads(shown.out)) == (0, answers["GET", path][1])
    assert shown.err == ""


def test_one_model_in_full(run, socket_dir):
    shown = run("models", "echo", "--socket-dir", socket_dir)
    assert "CPUExecutionProvider" in shown.out
    assert "3 waiting, 1 running" in shown.out
    assert "up to 8 rows, 2 at a time" in shown.out


def test_load_and_unload_say_what_came_of_it(run, socket_dir):
    loaded = run("load", "echo", "--socket-dir", socket_dir)
    assert loaded.out == "echo version 1 is ready: onnxruntime on cpu in FP32, loaded in 52 ms\n"
    assert run("unload", "echo", "--socket-dir", socket_dir).out == "echo is unloaded\n"
    assert json.loads(run("unload", "echo", "--json", "--socket-dir", socket_dir).out)["state"] == "unloaded"


def test_hardware_and_backends(run, socket_dir):
    shown = run("hardware", "--socket-dir", socket_dir).out
    assert re.search(r"^cpu +cpu +A CPU +2.0 GiB +- +untried$", shown, re.MULTILINE)
    assert re.search(r"^cores +2 may be used$", shown, re.MULTILINE)
    assert re.search(
        r"^tensorrt +unsupported .* no device$", run("backends", "--socket-dir", socket_dir).out, re.MULTILINE
    )


def test_version_with_and_without_a_daemon(run, socket_dir, tmp_path_factory):
    assert "applianced 9.9.9" in run("version", "--socket-dir", socket_dir).out
    alone = run("version", "--json", "--socket-dir", tmp_path_factory.mktemp("empty"))
    assert (alone.code, json.loads(alone.out)["applianced"]) == (0, None)


def test_a_refusal_exits_1_and_says_what_to_do(run, socket_dir):
    shown = run("models", "none", "--socket-dir", socket_dir)
    assert (shown.code, shown.out) == (1, "")
    assert shown.err.startswith("cannot find model 'none'\n")
    assert "appliancectl models" in shown.err
    assert "access.admin_uids" in run("load", "broken", "--socket-dir", socket_dir).err


def test_an_absent_daemon_exits_3(run, tmp_path):
    shown = run("status", "--socket-dir", tmp_path)
    assert (shown.code, shown.out) == (3, "")
    assert shown.err.startswith("cannot reach the daemon")
    assert "applianced" in shown.err


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["load"], ["status", "--bad"], ["bench", "m", "--concurrency", "0"]]
)
def test_wrong_usage_exits_2(run, arguments):
    shown = run(*arguments)
    assert (shown.code, shown.out) == (2, "")
    assert "Usage: appliancectl" in shown.err
    as_json = run(*arguments, "--json")
    assert (as_json.code, json.loads(as_json.out)["kind"], as_json.err) == (2, "usage", "")


def test_errors_as_json_are_on_standard_output(run, socket_dir, tmp_path_factory):
    shown = run("models", "none", "--json", "--socket-dir", socket_dir)
    assert (shown.code, shown.err) == (1, "")
    assert json.loads(shown.out) == {"error": "cannot find model 'none'", "kind": "model-not-found"}
    absent = run("status", "--json", "--socket-dir", tmp_path_factory.mktemp("empty"))
    assert (absent.code, json.loads(absent.out)["kind"]) == (3, "daemon-unreachable")


def test_the_directory_comes_from_the_environment(run, socket_dir, monkeypatch):
    monkeypatch.setenv("APPLIANCE_SOCKET_DIR", str(socket_dir))
    assert run("models").code == 0


def test_the_user_s_own_daemon_is_found(run, socket_dir, monkeypatch):
    (socket_dir / "appliance").mkdir()
    (socket_dir / "http.sock").rename(socket_dir / "appliance" / "http.sock")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(socket_dir))
    assert run("models").code == 0


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(run, shell):
    shown = run("completion", shell)
    assert (shown.code, "_APPLIANCECTL_COMPLETE" in shown.out) == (0, True)


def start(*arguments, **environment):
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    program = [sys.executable, "-c", "from appliancectl.cli import main; main()", *map(str, arguments)]
    return subprocess.run(program, env=kept | environment, capture_output=True, timeout=30, check=False)


def test_models_are_completed_from_the_daemon(socket_dir):
    words = {"_APPLIANCECTL_COMPLETE": "bash_complete", "COMP_WORDS": "appliancectl load e", "COMP_CWORD": "2"}
    assert start(APPLIANCE_SOCKET_DIR=str(socket_dir), **words).stdout == b"plain,echo\n"


def test_a_pipe_gets_plain_unbroken_lines(socket_dir):
    shown = start("status", "--socket-dir", socket_dir, COLUMNS="20", FORCE_COLOR="")
    assert shown.returncode == 0
    assert b"\x1b" not in shown.stdout
    assert re.search(rb"^echo +1 +ready +onnxruntime +cpu +FP32 +59.3 MiB +3 +1$", shown.stdout, re.MULTILINE)


def on_a_terminal(*arguments, columns, **environment):
    """Run with standard output on a pseudo-terminal of so many columns; returns what it wrote."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, columns, 0, 0))
    program = [sys.executable, "-c", "from appliancectl.cli import main; main()", *map(str, arguments)]
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ} | {"TERM": "xterm"}
    with subprocess.Popen(program, stdout=theirs, stdin=theirs, env=kept | environment) as process:
        os.close(theirs)
        written = b""
        try:
            while chunk := os.read(ours, 65536):
                written += chunk
        except OSError:
            pass  # Linux ends a pseudo-terminal with EIO
        assert process.wait(30) == 0
    os.close(ours)
    return written.decode()


def test_a_narrow_terminal_is_not_overrun(socket_dir):
    written = on_a_terminal("models", "--socket-dir", socket_dir, columns=40, NO_COLOR="1")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", written)
    assert re.search(r"^precision  FP32 *\r?$", plain, re.MULTILINE)
    lines = plain.replace("broken: cannot load: its file is cut short", "").splitlines()
    assert max(map(len, lines)) <= 40


def test_colours_are_for_terminals_that_want_them(socket_dir):
    assert "\x1b[32m" in on_a_terminal("models", "--socket-dir", socket_dir, columns=120)
    assert "\x1b[3" not in on_a_terminal("models", "--socket-dir", socket_dir, columns=120, NO_COLOR="1")


@pytest.mark.parametrize("arguments", [["--help"], ["status"], ["load", "echo", "--json"]])
def test_administration_starts_without_heavy_imports(socket_dir, arguments):
    program = (
        "import sys, atexit\n"
        "heavy = ('numpy', 'google.protobuf', 'grpc', 'asyncio', 'appliance')\n"
        "atexit.register(lambda: sys.stderr.write(repr([m for m in heavy if m in sys.modules])))\n"
        f"from appliancectl.cli import main; main({arguments!r})"
    )
    environment = {"PATH": os.environ["PATH"], "APPLIANCE_SOCKET_DIR": str(socket_dir)}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, timeout=30, check=True
    )
    assert ended.stderr == b"[]"


def test_a_reader_that_has_seen_enough_is_no_error(socket_dir):
    command = f"{sys.executable} -c 'from appliancectl.cli import main; main()' models --json --socket-dir {socket_dir}"
    ended = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{command} | head -c 0"], capture_output=True, timeout=30, check=False
    )
    assert ended.stderr == b""


def test_every_command_and_option_is_documented():
    for name, command in cli.commands.items():
        assert f"### `appliancectl {name}" in DOCUMENTATION, name
        for option in (option for parameter in command.params for option in parameter.opts if option.startswith("--")):
            assert option in DOCUMENTATION, (name, option)


def test_every_command_has_help_and_the_common_options():
    for name, command in cli.commands.items():
        assert command.help, name
        options = {option for parameter in command.params for option in parameter.opts}
        assert name == "completion" or {"--json", "--socket-dir"} <= options, name


def test_advice_is_for_kinds_that_exist():
    from appliance_client.errors import KINDS

    assert set(_ADVICE) <= set(KINDS) | {"connection-lost"}


def test_sizes_and_durations_for_people():
    assert [size(count) for count in (0, 1023, 1024, 62_200_000, 2**40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "59.3 MiB",
        "1.0 TiB",
    ]
    assert [duration(s) for s in (0, 59.9, 125, 3600, 273_600)] == ["0 s", "59 s", "2 min 5 s", "1 h", "3 d 4 h"]
