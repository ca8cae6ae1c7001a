"""Puts files in place whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Final

_STAGING: Final = ".quantising-"


@contextmanager
def staging(output: Path) -> Iterator[Path]:
    """A new directory below `output` to write to, gone afterwards; so is what a killed task left behind.

    One task at a time may write to `output`.
    """
    output.mkdir(parents=True, exist_ok=True, mode=0o700)
    for left in output.glob(f"{_STAGING}*"):
        shutil.rmtree(left, ignore_errors=True)
    directory = Path(mkdtemp(prefix=_STAGING, dir=output))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def publish(made: Path, output: Path) -> int:
    """Move `made` and the weights beside it into `output`, durably, `made` last.

    Whoever finds a file of the name of `made` finds it whole and with its weights.

    Returns:
        How many bytes they have.

    Raises:
        OSError: The disk is full, or the like.
    """
    others = sorted(one for one in made.parent.iterdir() if one.stem == made.stem and one != made)
    total = 0
    for path in (*others, made):
        _sync(path)
        total += path.stat().st_size
    for path in (*others, made):
        path.rename(output / path.name)
        _sync(output)
    return total


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
