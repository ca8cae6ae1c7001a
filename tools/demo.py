"""``make demo``: the appliance on real inputs, through its real processes and sockets.

Starts ``applianced`` on sockets in a temporary directory, loads every sample model, sends each of its held-out inputs
over every transport, one request at a time, and prints what came back. Ends with 0 only if every label is the same over
all transports and each model is as accurate as its manifest says.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import TextIOWrapper
from pathlib import Path
from subprocess import DEVNULL, Popen, TimeoutExpired
from typing import Final

from report import as_json, show
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transports import TRANSPORTS, Ask, Endpoints, RefusedError
from trials import TOLERANCE, Outcome, SampleModel, Trial, problems_of, read_models

from appliance_client import AdminClient, ApplianceError

REPOSITORY: Final = Path(__file__).resolve().parents[1]

_START_SECONDS: Final = 30.0
_LOAD_SECONDS: Final = 120.0
_STOP_SECONDS: Final = 20.0
_LOG_LINES: Final = 15
#: Longest path of a Unix socket is 107 bytes (unix(7)); the sockets' names need some.
_MAX_DIRECTORY: Final = 80


class DemoError(Exception):
    """The demonstration cannot go on; the message says why."""


@contextmanager
def running_daemon(directory: Path, repository: Path) -> Iterator[tuple[Popen[bytes], Endpoints]]:
    """``applianced`` as a process with sockets in `directory` and no model loaded; ended on the way out.

    Raises:
        DemoError: It does not start, or does not end as it should; the message holds the end of its log.
    """
    listen = {"directory": str(directory), "grpc_tcp": "127.0.0.1:0", "http_tcp": "127.0.0.1:0"}
    config, log = directory / "config.toml", directory / "log"
    lines = [
        "[repository]",
        f"path = {json.dumps(str(repository))}",
        "load = []",
        f"state = {json.dumps(str(directory / 'state'))}",
        "[listen]",
    ]
    config.write_text("\n".join((*lines, *(f"{key} = {json.dumps(value)}" for key, value in listen.items()))))
    with log.open("wb") as stream:
        daemon = Popen(
            [sys.executable, "-m", "appliance.main", "--config", str(config)],
            stdin=DEVNULL,
            stdout=stream,
            stderr=stream,
        )
    try:
        yield daemon, _wait_for_endpoints(daemon, directory / "endpoints.json")
        daemon.terminate()
        if daemon.wait(_STOP_SECONDS):
            raise DemoError("the daemon did not end well")
    except (DemoError, RefusedError, ApplianceError, OSError, TimeoutExpired) as error:
        ended = f"; the daemon had ended with status {daemon.returncode}" if daemon.poll() else ""
        raise DemoError(f"{error}{ended}\nthe end of the daemon's log:\n{_tail(log)}") from error
    finally:
        if daemon.poll() is None:
            daemon.kill()
            daemon.wait()


def _wait_for_endpoints(daemon: Popen[bytes], path: Path) -> Endpoints:
    end = time.monotonic() + _START_SECONDS
    while not path.exists():
        if daemon.poll() is not None:
            raise DemoError("the daemon did not start")
        if time.monotonic() > end:
            raise DemoError(f"the daemon did not listen within {_START_SECONDS:g} s")
        time.sleep(0.02)
    endpoints: Endpoints = json.loads(path.read_text(encoding="utf-8"))
    return endpoints


def _tail(log: Path) -> str:
    """The last lines of a log, indented."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
    return "\n".join(f"  {line}" for line in lines) or "  its log is empty"


def try_transport(name: str, ask: Ask, model: SampleModel, on_answer: Callable[[], None]) -> Outcome:
    """Send every sample of `model`, the next one when the last is answered."""
    outcome = Outcome(name)
    ask(model.name, model.input, model.is_image, model.samples[0].content)  # the first request opens the connection
    for sample in model.samples:
        began = time.perf_counter()
        label = ask(model.name, model.input, model.is_image, sample.content)
        outcome.latencies_s.append(time.perf_counter() - began)
        outcome.labels.append(label)
        on_answer()
    return outcome


def run_trials(models: Sequence[SampleModel], endpoints: Endpoints, say: Console) -> list[Trial]:
    """Load every model and try it over every transport, showing on `say` how far it is."""
    admin = AdminClient(endpoints["http"], timeout=_LOAD_SECONDS)
    columns = (TextColumn("{task.description:<28}"), BarColumn(30), MofNCompleteColumn())
    steps = len(models) + len(TRANSPORTS) * sum(len(model.samples) for model in models)
    with Progress(*columns, console=say, transient=True, disable=not say.is_terminal) as progress, ExitStack() as stack:
        task = progress.add_task("", total=steps)

        def advance() -> None:
            progress.advance(task)

        statuses = []
        for model in models:
            progress.update(task, description=f"loading {model.name}")
            status = admin.post(f"/v2/repository/models/{model.name}/load", {})
            where = f"{status['runtime']} on {status['device']}, {status['precision']}"
            say.print(f"loaded {model.name} in {status['load_ms']:.0f} ms: {where}")
            statuses.append(status)
            advance()
        connected = {name: stack.enter_context(connect(endpoints)) for name, connect in TRANSPORTS.items()}
        trials = []
        for model, status in zip(models, statuses, strict=True):
            outcomes = []
            for name, ask in connected.items():
                progress.update(task, description=f"{model.name} over {name}")
                outcomes.append(try_transport(name, ask, model, advance))
            trials.append(Trial(model, status, outcomes))
    return trials


def demonstrate(models: Sequence[SampleModel], repository: Path, say: Console) -> list[Trial]:
    """Start the daemon, try every model, stop the daemon.

    Raises:
        DemoError: It did not come to an end.
    """
    usual = Path(tempfile.gettempdir())
    place = usual if len(str(usual)) <= _MAX_DIRECTORY else Path("/tmp")  # noqa: S108 - mkdtemp makes it private
    with tempfile.TemporaryDirectory(prefix="appliance-demo-", dir=place) as scratch:
        directory = Path(scratch)
        with running_daemon(directory, repository) as (daemon, endpoints):
            say.print(f"applianced runs as process {daemon.pid}, sockets in {directory}")
            return run_trials(models, endpoints, say)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make demo", description="Shows the appliance at work on real inputs.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--models", type=Path, default=REPOSITORY / "models", help="model repository")
    return parser.parse_args()


def main() -> int:
    """Exit code 0: every answer is right; 1: one is not, or the daemon cannot run; 130: interrupted."""
    arguments = _arguments()
    # A terminated demonstration still ends its daemon on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # samples are in many scripts, terminals in one
    say = Console(highlight=False, stderr=arguments.json)
    try:
        models = read_models(arguments.models)
        if not models:
            raise DemoError("no model of the repository has evaluation samples")
        trials = demonstrate(models, arguments.models, say)
    except (DemoError, OSError, KeyError, ValueError) as error:
        sys.stderr.write(f"the demonstration failed: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the daemon is stopped\n")
        return 130
    problems = [problem for trial in trials for problem in problems_of(trial)]
    if arguments.json:
        sys.stdout.write(json.dumps(as_json(trials, problems), indent=2, ensure_ascii=False) + "\n")
    else:
        show(trials, say)
    for problem in problems:
        sys.stderr.write(f"wrong: {problem}\n")
    if not problems:
        say.print(f"\nAll right: the same answers everywhere, accuracy as stated (within {TOLERANCE}).")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
