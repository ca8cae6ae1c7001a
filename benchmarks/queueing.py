"""Budgets 5, 6, 7, 8 and fairness: what the batcher and the scheduler are for."""

from pathlib import Path
from typing import Final

from rich.console import Console

from benchmarks import fairness, overload, saturation, tail
from benchmarks.report import Line
from benchmarks.scheduled import Client
from benchmarks.served import serve

#: What is measured here.
PARTS: Final = frozenset({"5", "6", "7", "8", "fair"})

#: Runtimes of the real model: all of them for budget 5, the first for the others.
_BACKENDS: Final = ("onnxruntime", "openvino")


def measure(only: set[str], scratch: Path, say: Console) -> list[Line]:
    """The lines of those parts that are among `only`."""
    needed = {"5": _BACKENDS, "7": _BACKENDS[:1], "8": _BACKENDS[:1]}
    backends = max((needed.get(part, ()) for part in only), key=len)
    lines: list[Line] = []
    say.print("measuring the models that queueing is measured on ...")
    with serve(scratch, backends) as (daemon, real, synthetic):
        client = Client.build(daemon.infer_socket, scratch / "scheduled")
        if client is None:
            return []
        both = [*synthetic, *real[:1]]
        if "5" in only:
            say.print("saturated ...")
            for model in synthetic:
                lines += saturation.synthetic(client, model)
            for model in real:
                lines += saturation.real(client, model, scratch / "queueing" / model.name / "1" / "model.onnx")
        if "6" in only:
            say.print("lone requests ...")
            for model in synthetic:
                lines += tail.lone(client, model)
        if "7" in only:
            say.print("Poisson arrivals ...")
            for model in both:
                lines += tail.poisson_tail(client, model)
        if "8" in only:
            say.print("ten times too much ...")
            for model in both:
                lines += overload.tenfold(daemon, client, model)
        if "fair" in only:
            say.print("a flood, and work in the background ...")
            for model in synthetic[1:]:
                lines += fairness.flood(client, model)
            lines += fairness.background(client, synthetic[-1])
    return lines
