"""What batches of one shape cost: about ``slope * rows + intercept``, fitted to the medians of the last of each size.

A stall, or a first run that compiles, moves a median next to nothing. The fit minimises squared relative errors, so
that small batches count as much as large ones and the leverage of a stall shrinks with its height; what the line was
takes part in it as a prior. Where all batches have one size, the line keeps its shape and scales.
"""

from collections import Counter, deque
from collections.abc import Iterable
from math import ceil
from typing import Final

from appliance.measurement import Measurement

#: Batches that a line needs of its own before it is to go by them.
SETTLED: Final = 5
#: Batches in a row that make a size forget what came before them.
ROW: Final = 5
#: Batches of one size that are remembered. Half of them are more than what changes the pace
#: (`appliance.cost_model`), so that a line does not follow by itself before the others are told.
_WINDOW: Final = 25
#: A line is fitted after each of its first batches, then after so many.
_AT_FIRST: Final = 8
_EVERY: Final = 5
#: A batch size that so many of the line's batches did not have counts no more.
_FADED: Final = 128
#: The intercept's share of a batch of one row where nothing is known, and the spread.
_SETUP_SHARE: Final = 0.2
_SPREAD: Final = 0.1
#: Batches that the line as it was counts for in a fit: where it was a guess, and where it was measured.
_GUESSED: Final = 4.0
_KNOWN: Final = 16.0
#: A size that is faster than a line of many batches by more than this factor counts for less, with the factor's square:
#: relative errors alone would let it have its way.
_STRIDE: Final = 1.5
#: Nanoseconds that scaling leads to at most and at least, however often it happens to what is not used.
_LONGEST: Final = 1e15
_SHORTEST: Final = 1e-3
#: A unit further from one than this is given up.
_NEAR_ONE: Final = 1e-6
#: No batch is larger (the manifest's bound).
_MOST_ROWS: Final = 65536


class Size:
    """Batches of one size: as many rows as two to a power, or up to twice as many.

    Attributes:
        rows: What all of them are scaled to, by the line as it was when they ran.
        median_ns: What they take, as of the last fit.
        last: The line's number of the last one.
        run: How many of the last ones were slower than predicted without a break; negative where they were faster.
    """

    __slots__ = ("_ns", "_unit_ns", "last", "median_ns", "rows", "run")

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._unit_ns = 1.0
        self._ns: deque[float] = deque(maxlen=_WINDOW)  # in `_unit_ns`, so that scaling them all is a product
        self.median_ns = 0.0
        self.last = 0
        self.run = 0

    def __len__(self) -> int:
        return len(self._ns)

    def append(self, ns: float, number: int) -> None:
        """Remember a batch."""
        self._ns.append(ns / self._unit_ns)
        self.last = number

    def take_median(self) -> None:
        """Of few batches the faster ones count: what disturbs only slows."""
        self.median_ns = sorted(self._ns)[(len(self._ns) - 1) // 2] * self._unit_ns

    def forget(self) -> None:
        """Keep the newest few alone."""
        self._ns = deque(list(self._ns)[-ROW:], _WINDOW)
        self.run = 0

    def scale(self, factor: float, fresh: int) -> None:
        """Scale all but the newest `fresh`."""
        self.run = 0
        if not self.median_ns:
            self.take_median()
        factor = _bound(self.median_ns * factor) / self.median_ns
        self.median_ns *= factor
        unit_ns = self._unit_ns = self._unit_ns * factor
        if not _NEAR_ONE < unit_ns < 1.0 / _NEAR_ONE:
            self._ns = deque([ns * unit_ns for ns in self._ns], _WINDOW)
            self._unit_ns = 1.0
        if fresh:
            for place in range(-min(fresh, len(self._ns)), 0):
                self._ns[place] /= factor
            self.take_median()


class Line:
    """What batches of one shape cost.

    Attributes:
        units: Elements of a row's variable dimensions, such as padded tokens; 1 for fixed shapes.
        slope_ns: What a row adds.
        intercept_ns: What a batch costs whatever its rows.
        spread: Relative standard deviation of batches around what was predicted; a robust estimate.
        samples: Batches seen.
        last: The model's number of the last of them.
        last_rows: Its rows.
    """

    __slots__ = (
        "_fitted", "_ratios", "_sizes", "_top", "_trust", "intercept_ns", "last", "last_rows", "samples", "slope_ns",
        "spread", "units",
    )  # fmt: skip

    def __init__(self, units: int) -> None:
        self.units = units
        self.slope_ns = 1.0 - _SETUP_SHARE
        self.intercept_ns = _SETUP_SHARE
        self.spread = _SPREAD
        self.samples = 0
        self.last = 0
        self.last_rows = 1
        self._sizes: dict[int, Size] = {}
        self._ratios: deque[float] = deque(maxlen=_WINDOW)  # what batches took to what was predicted
        self._fitted = 0  # samples when it was fitted last
        self._top = 2  # rows of the largest batch seen or measured
        self._trust = _GUESSED

    @classmethod
    def measured(cls, measurement: Measurement) -> "Line":
        """What the registry knows; `measurement` has a point at least."""
        line = cls(measurement.row_units)
        points = measurement.points
        line.spread = sorted(point.spread_us / point.median_us for point in points)[len(points) // 2]
        line.last_rows = max(points[0].rows, 1)
        line._top = max(points[-1].rows, line._top)
        if len(points) == 1:
            factor = points[0].median_us * 1e3 / line.ns(line.last_rows)
            line.slope_ns *= factor
            line.intercept_ns *= factor
        else:
            line._trust = _KNOWN
            line.slope_ns, line.intercept_ns = _fit((max(p.rows, 1), p.median_us * 1e3, 1.0) for p in points)
        return line

    # ---------------------------------------------------------------- predictions

    def ns(self, rows: float) -> float:
        """Predicted time of a batch: the median."""
        return self.slope_ns * rows + self.intercept_ns

    def late_ns(self, rows: float) -> float:
        """Predicted time of a batch that few exceed: two standard deviations above the median."""
        return (self.slope_ns * rows + self.intercept_ns) * (1.0 + 2.0 * self.spread)

    def rows_within(self, limit_ns: float) -> int:
        """Rows of the largest batch that few times takes longer than `limit_ns`; 0 where even the smallest may."""
        room = limit_ns / (1.0 + 2.0 * self.spread) - self.intercept_ns
        if room <= 0.0:
            return 0
        return int(room / self.slope_ns) if self.slope_ns * _MOST_ROWS > room else _MOST_ROWS

    @property
    def setup_share(self) -> float:
        """The intercept's share of a batch of one row, 0 to 1: how much batching can gain."""
        return self.intercept_ns / (self.slope_ns + self.intercept_ns)

    def efficient_rows(self, max_rows: int, share: float = 0.95) -> int:
        """The smallest batch that reaches `share` of the throughput that batches without end would have."""
        wanted = share / (1.0 - share) * self.intercept_ns
        if wanted >= self.slope_ns * max_rows:
            return max(max_rows, 1)
        return max(ceil(wanted / self.slope_ns - 1e-9), 1)

    # ---------------------------------------------------------------- learning

    def start_from(self, other: "Line", units: float = 1.0) -> None:
        """Take over what `other` knows, whose rows have so many times fewer units."""
        self.slope_ns = other.slope_ns * units
        self.intercept_ns = other.intercept_ns
        self.spread = other.spread
        self._trust = other._trust if units == 1.0 else _GUESSED

    def learn(self, rows: int, took_ns: int) -> tuple[Size, float]:
        """Remember a batch; its size, and what it took to what was predicted for it."""
        self.samples = samples = self.samples + 1
        self.last_rows = rows
        size = self._sizes.get(rows.bit_length())
        if size is None:
            size = self._sizes[rows.bit_length()] = Size(rows)
        if rows > self._top:
            self._top = rows
        slope, intercept = self.slope_ns, self.intercept_ns
        ratio = took_ns / (slope * rows + intercept)
        size.append(ratio * (slope * size.rows + intercept), samples)
        if samples > SETTLED:
            self._ratios.append(ratio)
        return size, ratio

    @property
    def is_due(self) -> bool:
        """True where it is time for another fit."""
        return self.samples % _EVERY == 0 or self.samples <= _AT_FIRST

    def fit(self) -> None:
        """Go by the batches it remembers, and by what it was."""
        slope, intercept = self.slope_ns, self.intercept_ns
        stride = _STRIDE if self.samples > _WINDOW else _LONGEST
        points: list[tuple[float, float, float]] = []
        above = below = 0.0
        for size in self._sizes.values():
            if size.last > self._fitted:
                size.take_median()
            weight = len(size) * (1.0 - (self.samples - size.last) / _FADED)
            if weight > 0.0:
                rows, ns = size.rows, size.median_ns
                ratio = (slope * rows + intercept) / ns
                if ratio > stride:
                    weight /= ratio * ratio
                points.append((rows, ns, weight))
                above += weight * ratio
                below += weight * ratio * ratio
        factor = above / below  # of its past, what fits best
        if len(points) == 1:
            self.slope_ns, self.intercept_ns = slope * factor, intercept * factor
        else:
            top, weight = self._top, self._trust / 2
            points.append((1.0, (slope + intercept) * factor, weight))
            points.append((top, (slope * top + intercept) * factor, weight))
            self.slope_ns, self.intercept_ns = _fit(points)
        self._fitted = self.samples
        if self._ratios:
            deviations = sorted([abs(ratio - 1.0) for ratio in self._ratios])
            seen = len(deviations)
            self.spread += (min(1.4826 * deviations[seen // 2], 1.0) - self.spread) * seen / (2 * _WINDOW)

    def scale(self, factor: float, fresh: Counter[Size]) -> None:
        """Everything takes `factor` times what it did, as so many of the newest batches of each size show already."""
        new = 0
        for size in self._sizes.values():
            size.scale(factor, fresh[size])
            new += fresh[size]
        if new:
            old = len(self._ratios) - new
            self._ratios = deque([r if i < old else r / factor for i, r in enumerate(self._ratios)], _WINDOW)
            self.fit()  # it may have gone part of the way by itself
        else:
            factor = _bound(self.ns(1) * factor) / self.ns(1)
            self.slope_ns *= factor
            self.intercept_ns *= factor


def _bound(ns: float) -> float:
    return min(max(ns, _SHORTEST), _LONGEST)


def _fit(points: Iterable[tuple[float, float, float]]) -> tuple[float, float]:
    """Slope and intercept, neither negative, with the least squares of relative errors at (rows, ns, weight)."""
    rows_rows = rows_one = one_one = rows_y = one_y = 0.0
    for rows, y, weight in points:
        one = 1.0 / y
        scaled = rows * one
        rows_rows += weight * scaled * scaled
        rows_one += weight * scaled * one
        one_one += weight * one * one
        rows_y += weight * scaled
        one_y += weight * one
    determinant = rows_rows * one_one - rows_one * rows_one
    slope = (rows_y * one_one - one_y * rows_one) / determinant
    intercept = (rows_rows * one_y - rows_one * rows_y) / determinant
    if slope < 0.0:
        return 0.0, one_y / one_one
    if intercept < 0.0:
        return rows_y / rows_rows, 0.0
    return slope, intercept
