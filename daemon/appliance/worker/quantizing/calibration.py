"""Inputs that ranges are learnt from."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from appliance.errors import InvalidRequest
from appliance.worker.question import Say
from appliance.worker.samples import SampleReader

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Ranges learnt from fewer rows are those of these rows, not the model's.
MIN_ROWS: Final = 8


class Calibration:
    """Rows of a sample, read anew in every pass, so that they need not fit into memory.

    Iterating gives each row's feeds: every session input by name, with a leading dimension of 1 where the model has a
    batch dimension. Each row taken is said as progress.

    Attributes:
        count: Rows in a pass.
        first: The first row's feeds.
    """

    def __init__(self, reader: SampleReader, path: Path, limit: int, say: Say) -> None:
        """Read all rows once.

        Raises:
            InvalidRequest: They are too few, do not suit the model, hold NaN or infinities, or are of a datatype that
                no toolkit takes.
            ArtifactCorrupt: The manifest gives the sample another sha256.
        """
        self._reader = reader
        self._path = path
        self._limit = limit
        self._say = say
        self._done = 0
        self._total = 0
        self.first: dict[str, NDArray[Any]] = {}
        self.count = 0
        for row in reader.rows(path, limit):
            _check(row.feeds, self.count)
            self.first = self.first or row.feeds
            self.count += 1
        if self.count < MIN_ROWS:
            raise InvalidRequest(
                f"cannot calibrate with {self.count} row{'s' if self.count != 1 else ''}: the rule is at least "
                f"{MIN_ROWS}, since ranges learnt from fewer hold for these inputs alone"
            )

    def expect(self, passes: int) -> None:
        """Announce how often the rows will be iterated over, so that progress has a total."""
        self._total = passes * self.count

    def peek(self, count: int) -> "Iterator[dict[str, NDArray[Any]]]":
        """The feeds of the first `count` rows, aside from the passes announced."""
        return (row.feeds for row in self._reader.rows(self._path, min(count, self._limit)))

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> "Iterator[dict[str, NDArray[Any]]]":
        for row in self._reader.rows(self._path, self._limit):
            self._done += 1
            total = max(self._total, self._done)
            self._say({"progress": {"step": "calibrating", "done": self._done, "total": total}})
            yield row.feeds


def _check(feeds: "dict[str, NDArray[Any]]", row: int) -> None:
    for name, array in feeds.items():
        if array.dtype == object:
            raise InvalidRequest(f"cannot calibrate: input {name!r} is BYTES, and ranges are learnt from numbers")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InvalidRequest(f"cannot calibrate: input {name!r} of row {row} holds a NaN or an infinity")
