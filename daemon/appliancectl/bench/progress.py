"""How far a measurement is."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from appliancectl.output import console

#: Told the seconds gone by since it was told last.
Advance = Callable[[float], None]


@contextmanager
def progress(total_s: float, *, quiet: bool) -> Iterator[Advance]:
    """A bar on a terminal's standard error, told the seconds gone by."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("measuring"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console(is_error=True), transient=True) as bar:
        task = bar.add_task("", total=total_s)
        yield lambda seconds: bar.advance(task, seconds)
