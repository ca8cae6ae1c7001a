"""What people and programs get to see. rich loads only when a person is looking."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

#: Width where nobody looks: a pipe gets whole lines.
_PIPE_COLUMNS = 10_000

_STATE_STYLE = {
    "ready": "green",
    "loading": "yellow",
    "restarting": "yellow",
    "unloading": "yellow",
    "failed": "red",
    "quarantined": "red",
    "available": "green",
}


def console(*, is_error: bool = False) -> "Console":
    """A console on standard output or error that takes a pipe's width as unlimited and heeds NO_COLOR."""
    from rich.console import Console

    stream = sys.stderr if is_error else sys.stdout
    return Console(stderr=is_error, width=None if stream.isatty() else _PIPE_COLUMNS, highlight=False, soft_wrap=False)


def milliseconds(microseconds: float) -> str:
    """A duration for people."""
    return f"{microseconds / 1000:.3g} ms"


def print_json(value: Any) -> None:
    """One JSON document on standard output; NaN and infinities, which JSON lacks, become null."""
    click.echo(json.dumps(_finite(value), indent=2, ensure_ascii=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], empty: str) -> None:
    """A table; a column marked with ``>`` stands to the right. `empty` is said where there are no rows.

    On a terminal too narrow for it, every row becomes a paragraph of ``column  cell`` lines.
    """
    if not rows:
        click.echo(empty)
        return
    widths = (max(len(cell) for cell in cells) for cells in zip(columns, *rows, strict=True))
    if sum(widths) + 2 * len(columns) > console().width:
        for number, row in enumerate(rows):
            if number:
                click.echo()
            print_pairs([(column.removeprefix(">"), cell) for column, cell in zip(columns, row, strict=True)])
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column[0] == ">" else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=_STATE_STYLE.get(cell, "")) for cell in row))
    _print(table)


def print_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """Aligned ``name  value`` lines."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(name, Text(value, style=_STATE_STYLE.get(value, "")))
    _print(table)


def _print(table: "Table") -> None:
    """Print a table; without the blanks that fill its last column where nobody looks."""
    to = console()
    if to.is_terminal:
        to.print(table)
        return
    with to.capture() as captured:
        to.print(table)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


@contextmanager
def spinner(text: str, *, wants_json: bool) -> Iterator[None]:
    """Show on a terminal's standard error that something goes on."""
    quiet = wants_json or not sys.stderr.isatty()
    with nullcontext() if quiet else console(is_error=True).status(text):
        yield


def size(count: int) -> str:
    """Bytes for people, in binary units: ``"59.3 MiB"``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def duration(seconds: float) -> str:
    """A time span for people: ``"3 d 4 h"``, ``"2 min 5 s"``, ``"12 s"``."""
    parts: list[str] = []
    left = int(seconds)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])
