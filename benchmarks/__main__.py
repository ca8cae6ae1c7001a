"""``python -m benchmarks``: run the budgets and print the table, or JSON with ``--json``."""

import argparse
import contextlib
import shutil
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from rich.console import Console  # noqa: E402 - the tests' support package is found through the line above

from benchmarks import ablation, embedding, grpc_rate, latency, policy_cost, queueing, resources  # noqa: E402
from benchmarks.load import build, write_frames  # noqa: E402
from benchmarks.models import write_large, write_picture  # noqa: E402
from benchmarks.report import Line, machine, show  # noqa: E402
from support.daemon import start_daemon  # noqa: E402
from support.models import write_identity  # noqa: E402

#: Numbers of the budgets, and what else has a line: fairness between clients, what the policy costs, and the ablation.
BUDGETS = ("1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "fair", "policy", "ablation")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description="Measures the budgets on this machine.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--only", nargs="*", default=BUDGETS, choices=BUDGETS, help="budgets to measure")
    return parser.parse_args()


def _measure(only: list[str], scratch: Path, say: Console) -> list[Line]:
    lines: list[Line] = []
    program = build("native_load", scratch)
    frames = write_frames(scratch)
    models = scratch / "models"
    write_identity(models / "identity")
    picture = write_picture(models / "picture")
    large = write_large(models)
    for sample in ("digits", "language-id"):
        (models / sample).symlink_to(REPOSITORY / "models" / sample)
    run = scratch / "run"
    run.mkdir()
    if "10" in only:
        say.print("start ...")
        lines += resources.start()
    startup = ["identity", "picture", "digits"]
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(start_daemon(run, models, repository={"load": startup}))
        echo = str(scratch / "echo.sock")
        if "11" in only:
            say.print("idling ...")
            lines += resources.idle(daemon, "3 tensor and image models")
        if {"1", "6"} & set(only):
            say.print("round trips ...")
            lines += latency.round_trip(daemon.infer_socket, echo)
            if program is not None:
                lines += latency.native_round_trip(program, daemon.infer_socket, frames)
        if "2" in only and program is not None:
            say.print("16 connections ...")
            lines += latency.sixteen_connections(program, daemon.infer_socket, echo, frames)
        if "3" in only:
            say.print("large inputs ...")
            lines += latency.large_input(daemon.infer_socket, picture / "1" / "model.onnx")
        if "4" in only and shutil.which("h2load"):
            say.print("gRPC ...")
            lines += grpc_rate.sixteen_in_flight(daemon, scratch)
        if "10" in only:
            say.print("a 90 MB model ...")
            for backend in ("onnxruntime", "openvino"):
                lines += resources.load_large(daemon, large, f"large-{backend}", backend)
        if "11" in only:
            say.print("idling with a tokenizer ...")
            daemon.http("POST", "/v2/repository/models/language-id/load")
            lines += resources.idle(daemon, "and a text model's tokenizer")
    if "ablation" in only:
        say.print("the batcher beside other rules, in virtual time ...")
        lines += ablation.lines()
    if "policy" in only:
        say.print("the policy's own cost ...")
        lines += policy_cost.cost()
    if queueing.PARTS & set(only) and program is not None:
        lines += queueing.measure(set(only), scratch, say)
    if "9" in only and embedding.SOURCE.is_dir():
        say.print("a sentence encoder: quantising, measuring, choosing (minutes) ...")
        lines += _choice(scratch)
    if "9" in only and not embedding.SOURCE.is_dir():
        say.print("left out: 9, the sentence encoder is missing: make minilm")
    if program is None:
        say.print("left out: 2, 5, 7, 8, fair and the C client, there is no C compiler")
    if "4" in only and not shutil.which("h2load"):
        say.print("left out: 4, h2load is missing (Debian: nghttp2-client)")
    return lines


def _choice(scratch: Path) -> list[Line]:
    models = scratch / "encoders"
    embedding.write_models(models)
    run = scratch / "choice"
    run.mkdir()
    with start_daemon(run, models, repository={"load": []}) as daemon:
        served, lines = embedding.choose(daemon)
        return lines + embedding.throughput(daemon, served)


def main() -> int:
    """Measure; exit 0 also when a budget is missed, since a machine may simply be slower."""
    arguments = _arguments()
    say = Console(stderr=True)
    facts = machine()
    with tempfile.TemporaryDirectory() as scratch:
        lines = _measure(list(arguments.only), Path(scratch), say)
    show(sorted(lines, key=lambda line: BUDGETS.index(line.budget)), facts, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
