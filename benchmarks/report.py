"""What a benchmark found, and the machine it found it on."""

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata

from rich.console import Console
from rich.table import Table

from appliance.inventory.cpu import read_inventory


@dataclass(frozen=True)
class Line:
    """One figure.

    Attributes:
        budget: Number of the budget it belongs to.
        what: What was measured.
        value: The figure.
        unit: Its unit.
        budgeted: The budget in words, or empty for a figure that only informs.
        is_met: Whether the budget holds; None without one.
        against: What it is compared with, measured in the same run.
        ratio: The figure over that one's.
    """

    budget: str
    what: str
    value: float
    unit: str
    budgeted: str = ""
    is_met: bool | None = None
    against: str = ""
    ratio: float | None = None


def machine() -> dict[str, object]:
    """Facts that a figure means nothing without."""
    inventory = read_inventory()
    cpu = inventory.devices[0]
    return {
        "cpu": cpu.name,
        "features": list(cpu.features),
        "cores": inventory.cores,
        "memory_gib": round(inventory.memory_bytes / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
        **{name: metadata.version(name) for name in ("onnxruntime", "openvino", "grpcio", "uvloop", "numpy")},
    }


def show(lines: Sequence[Line], facts: dict[str, object], as_json: bool) -> None:
    """Print everything, as a table or as one JSON object."""
    if as_json:
        print(json.dumps({"machine": facts, "lines": [asdict(line) for line in lines]}, indent=2))
        return
    console = Console()
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()), highlight=False)
    table = Table("#", "what", "figure", "budget", "", "ratio", "against")
    for line in lines:
        mark = "" if line.is_met is None else "[green]met" if line.is_met else "[red]missed"
        ratio = "" if line.ratio is None else f"{line.ratio:.2f}"
        table.add_row(
            line.budget,
            line.what,
            f"{line.value:,.{1 if line.unit else 4}f} {line.unit}".strip(),
            line.budgeted,
            mark,
            ratio,
            line.against,
        )
    console.print(table)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of `values` lie."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The middle one of the rounds' ratios."""
    return median([a / b for a, b in zip(ours, theirs, strict=True)])
