"""``make demo``: the appliance on real inputs, through its real processes and sockets.

Starts ``applianced`` on sockets in a temporary directory, loads every sample model, sends each of its held-out inputs
over every transport, one request at a time, and prints what came back. Ends with 0 only if every label is the same over
all transports and each model is as accurate as its manifest says.
"""

import argparse
import base64
import json
import math
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from subprocess import DEVNULL, Popen, TimeoutExpired
from typing import Any, Final

from appliance_client import AdminClient, ApplianceError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text
from transports import TRANSPORTS, Ask, Endpoints, RefusedError

REPOSITORY: Final = Path(__file__).resolve().parents[1]

#: How far below the manifest's accuracy a model may stay: other processors round differently.
TOLERANCE: Final = 0.005

_START_SECONDS: Final = 30.0
_LOAD_SECONDS: Final = 120.0
_STOP_SECONDS: Final = 20.0
_LOG_LINES: Final = 15
#: Longest path of a Unix socket is 107 bytes (unix(7)); the sockets' names need some.
_MAX_DIRECTORY: Final = 80

_SHADES: Final = " ░▒▓█"


class DemoError(Exception):
    """The demonstration cannot go on; the message says why."""


@dataclass(frozen=True)
class Sample:
    """A held-out input and the label it should get."""

    content: bytes
    label: str


@dataclass(frozen=True)
class SampleModel:
    """A model of the repository that brings inputs to try it with.

    Attributes:
        name: The model.
        input: Name of the BYTES input the samples are for.
        is_image: True where the samples are pictures, else they are texts.
        reference: Accuracy the manifest states for the samples.
        samples: All of them.
    """

    name: str
    input: str
    is_image: bool
    reference: float
    samples: Sequence[Sample]


@dataclass
class Outcome:
    """What a model answered over one transport.

    Attributes:
        transport: The transport's name in `TRANSPORTS`.
        labels: One for each sample, in order.
        latencies_s: Seconds each request took, seen from the client, in order.
    """

    transport: str
    labels: list[str] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Trial:
    """A model, how the daemon placed it, and what it answered over each transport."""

    model: SampleModel
    status: dict[str, Any]
    outcomes: Sequence[Outcome]


# ---------------------------------------------------------------- what is sent


def read_models(repository: Path) -> list[SampleModel]:
    """Every model of `repository` that has evaluation samples, by name.

    Raises:
        DemoError: There is none.
    """
    found = []
    for manifest in sorted(repository.glob("*/model.toml")):
        entry = tomllib.loads(manifest.read_text(encoding="utf-8"))
        samples = entry.get("samples", {})
        kind = next((kind for kind in ("image", "text") if kind in entry), None)
        if kind is None or "evaluation" not in samples:
            continue
        name = entry[kind].get("input", kind)
        lines = (manifest.parent / samples["evaluation"]).read_text(encoding="utf-8").splitlines()
        found.append(
            SampleModel(
                name=entry["name"],
                input=name,
                is_image=kind == "image",
                reference=samples["reference"]["accuracy"],
                samples=[_sample(json.loads(line), name) for line in lines],
            )
        )
    if not found:
        raise DemoError("no model of the repository has evaluation samples")
    return found


def _sample(line: dict[str, Any], name: str) -> Sample:
    value = line["inputs"][name]
    content = base64.b64decode(value["base64"]) if isinstance(value, dict) else value.encode()
    return Sample(content, line["label"])


# ---------------------------------------------------------------- the daemon


@contextmanager
def running_daemon(directory: Path, repository: Path) -> Iterator[tuple[Popen[bytes], Endpoints]]:
    """``applianced`` as a process with sockets in `directory` and no model loaded; ended on the way out.

    Raises:
        DemoError: It does not start, or does not end as it should; the message holds the end of its log.
    """
    listen = {"directory": str(directory), "grpc_tcp": "127.0.0.1:0", "http_tcp": "127.0.0.1:0"}
    config, log = directory / "config.toml", directory / "log"
    lines = ["[repository]", f"path = {json.dumps(str(repository))}", "load = []", "[listen]"]
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


# ---------------------------------------------------------------- asking


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


# ---------------------------------------------------------------- judging


def accuracy(outcome: Outcome, samples: Sequence[Sample]) -> float:
    """Part of the samples that got the right label."""
    right = sum(label == sample.label for label, sample in zip(outcome.labels, samples, strict=True))
    return right / len(samples)


def percentile_ms(latencies_s: Sequence[float], percent: int) -> float:
    """A percentile by nearest rank, in milliseconds."""
    rank = math.ceil(len(latencies_s) * percent / 100)
    return sorted(latencies_s)[max(rank, 1) - 1] * 1e3


def problems_of(trial: Trial) -> list[str]:
    """What is wrong with a model's answers, a sentence each; empty where they are right."""
    model = trial.model
    found = []
    if len(trial.outcomes) != len(TRANSPORTS):
        found.append(f"{model.name} was tried over {len(trial.outcomes)} of {len(TRANSPORTS)} transports")
    for outcome in trial.outcomes:
        if len(outcome.labels) != len(model.samples):
            found.append(
                f"{model.name} over {outcome.transport}: {len(outcome.labels)} answers to {len(model.samples)} requests"
            )
            continue
        reached = accuracy(outcome, model.samples)
        if reached < model.reference - TOLERANCE:
            found.append(
                f"{model.name} over {outcome.transport}: accuracy is {reached:.4f}, "
                f"and the manifest says {model.reference:.4f}"
            )
    for index, labels in enumerate(zip(*(outcome.labels for outcome in trial.outcomes), strict=False)):
        if len(set(labels)) > 1:
            answers = ", ".join(
                f"{label!r} over {outcome.transport}" for label, outcome in zip(labels, trial.outcomes, strict=True)
            )
            found.append(f"{model.name}: the transports disagree on input {index + 1}: {answers}")
            break
    return found


# ---------------------------------------------------------------- showing


def table_of(trials: Sequence[Trial]) -> Table:
    """The one table; fits 80 columns with the sample models."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("model", "backend", "device", "precision", "transport"):
        table.add_column(heading, overflow="fold")
    for heading in ("accuracy", "p50 ms", "p99 ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    for trial in trials:
        status = trial.status
        for outcome in trial.outcomes:
            table.add_row(
                trial.model.name,
                status["backend"],
                status["device"],
                status["precision"],
                outcome.transport,
                f"{accuracy(outcome, trial.model.samples):.2%}",
                f"{percentile_ms(outcome.latencies_s, 50):.2f}",
                f"{percentile_ms(outcome.latencies_s, 99):.2f}",
            )
        table.add_section()
    return table


def shaded(picture: bytes) -> list[str]:
    """A small grey picture as lines of text, two characters a pixel."""
    from PIL import Image

    with Image.open(BytesIO(picture)) as image:
        grey = image.convert("L")
        width, pixels = grey.width, grey.tobytes()
    cells = [_SHADES[level * (len(_SHADES) - 1) // 255] * 2 for level in pixels]
    return ["".join(cells[start : start + width]) for start in range(0, len(cells), width)]


def show(trials: Sequence[Trial], say: Console) -> None:
    """The table, and one input of each model with its answer."""
    say.print()
    say.print(table_of(trials))
    counts = " and ".join(f"{len(trial.model.samples)} held-out inputs of {trial.model.name}" for trial in trials)
    say.print(
        f"\nOver each transport: {counts}. native is infer.sock. p50 and p99 are of single requests, one after "
        "another, as the client sees them: encoding, sockets, queue, model and decoding together."
    )
    for trial in trials:
        sample, label = trial.model.samples[0], trial.outcomes[0].labels[0]
        say.print(f"\n{trial.model.name} says {label!r} to")
        lines = shaded(sample.content) if trial.model.is_image else [sample.content.decode()]
        for line in lines:
            say.print(Text(f"  {line}"))


def as_json(trials: Sequence[Trial], problems: Sequence[str]) -> dict[str, Any]:
    """The same as one JSON value."""
    models = []
    for trial in trials:
        model = trial.model
        first = model.samples[0].content
        models.append(
            {
                "status": trial.status,
                "samples": len(model.samples),
                "reference_accuracy": model.reference,
                "example": {
                    "input": {"base64": base64.b64encode(first).decode()} if model.is_image else first.decode(),
                    "label": trial.outcomes[0].labels[0],
                },
                "transports": [
                    {
                        "transport": outcome.transport,
                        "requests": len(outcome.labels),
                        "accuracy": round(accuracy(outcome, model.samples), 4),
                        "p50_ms": round(percentile_ms(outcome.latencies_s, 50), 4),
                        "p99_ms": round(percentile_ms(outcome.latencies_s, 99), 4),
                    }
                    for outcome in trial.outcomes
                ],
            }
        )
    return {"ok": not problems, "problems": list(problems), "models": models}


# ---------------------------------------------------------------- the whole


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
    say = Console(highlight=False, stderr=arguments.json)
    try:
        models = read_models(arguments.models)
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
        say.print("\nEvery answer is the same over all transports, and accuracy is what the manifests say.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
