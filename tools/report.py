"""What people and programs get to see of `make demo`."""

import base64
from collections.abc import Sequence
from io import BytesIO
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text
from trials import Trial, accuracy, percentile_ms

_SHADES: Final = " ░▒▓█"


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
