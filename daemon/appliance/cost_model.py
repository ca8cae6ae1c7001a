"""What batches cost on one placement, learned from every one that ran.

Batches of each shape have a `Line`; shapes differ in the units of a row, such as its padded tokens. A line starts from
the registry's measurement, or from its neighbours in units, and goes by its own batches once it has seen a few. What
concerns all lines is seen here, since one that is used seldom would see it late:

- Where a few batches in a row, or most of the last ones, were slower than predicted, or faster, the device has changed
  its pace, as when it throttles. Then everything is scaled, lines and batch sizes that nobody uses at the time too.
- Where those of one size were and those of others were not, that size alone forgets what it knew.

Values only: there is no clock here.
"""

from collections import Counter, deque
from operator import attrgetter
from typing import Final

from appliance.cost_line import ROW, SETTLED, Line, Size
from appliance.measurement import Measurement
from appliance.types import CostStatus

#: Of so many batches this many, or so many in a row, must be slower, or faster, than predicted for the pace to have
#: changed: where a tenth of all batches stall, that happens by chance once in a million.
_TREND: Final = 21
_AGREEING: Final = 12
_IN_A_ROW: Final = 6
#: By more than this, and the spread, for a batch to count.
_NOTICEABLE: Final = 0.2
#: Once in `_TREND` batches their median says whether the pace creeps: by more than this, and half the spread.
_CREEP: Final = 0.04
#: Lines of one model; beyond that the one used longest ago is dropped.
_MAX_LINES: Final = 64
#: Units are told apart by their four leading bits: eight lines from one power of two to the next.
_UNIT_BITS: Final = 4

_by_last = attrgetter("last")
_by_units = attrgetter("units")


class CostModel:
    """The lines of one placement."""

    def __init__(self) -> None:
        self._lines: dict[int, Line] = {}
        self._measured: Line | None = None  # as it was, whatever has changed since
        self._common: Line | None = None  # of rows of one unit: where lines start from before one is settled
        self._is_settled = False
        self._batches = 0
        self._run = 0  # batches in a row that were slower than predicted; negative where they were faster
        self._trend: deque[tuple[Size, float, int]] = deque(maxlen=_TREND)  # size, took to predicted, slower or faster

    def seed(self, measurement: Measurement | None) -> None:
        """Start from what was measured of the placement; lines that have seen little take it over."""
        self._measured = self._common = None
        if measurement is not None and measurement.points:
            measured = self._measured = Line.measured(measurement)
            self._common = Line(1)
            self._common.start_from(measured, 1.0 / measured.units)
        self._lend()

    def line(self, units: int) -> Line:
        """The line of rows of so many units; it is updated in place.

        Units that differ by less than an eighth share a line, which goes by the first of them.
        """
        key = _leading(units)
        line = self._lines.get(key)
        if line is None:
            if len(self._lines) >= _MAX_LINES:
                oldest = min(self._lines.values(), key=_by_last)
                del self._lines[_leading(oldest.units)]  # who still holds it may go on using it
            line = self._lines[key] = Line(max(units, 1))
            line.last = self._batches
            self._borrow(line)
        return line

    def note(self, line: Line, rows: int, took_ns: int) -> None:
        """Learn from a batch of `rows` rows, 0 counting as 1, that took `took_ns`."""
        rows = rows if rows > 0 else 1
        took_ns = took_ns if took_ns > 0 else 1
        self._batches += 1
        line.last = self._batches
        size, ratio = line.learn(rows, took_ns)
        if line.samples <= SETTLED:
            self._note_young(line, rows, took_ns)
            return
        bound = 1.0 + _NOTICEABLE + line.spread
        side = (ratio > bound) - (ratio * bound < 1.0)
        self._trend.append((size, ratio, side))
        if side:
            self._note_side(line, size, side)
        else:
            size.run = self._run = 0
        if self._batches % _TREND == 0:
            self._note_creep(line)
        if line.is_due:
            line.fit()

    def describe(self, max_rows: int) -> tuple[CostStatus, ...]:
        """Every line that has seen batches, by units; before the first batch what was measured.

        Args:
            max_rows: Rows that the session takes at most.
        """
        lines = sorted((line for line in self._lines.values() if line.samples), key=_by_units)
        if not lines and self._measured is not None:
            lines = [self._measured]
        return tuple(self._describe(line, max_rows) for line in lines)

    def _describe(self, line: Line, max_rows: int) -> CostStatus:
        rows, measured = line.last_rows, self._measured
        scale = None
        if measured is not None:
            slope_ns = measured.slope_ns * line.units / measured.units
            scale = line.ns(rows) / (slope_ns * rows + measured.intercept_ns)
        return CostStatus(
            units=line.units,
            slope_us=line.slope_ns / 1e3,
            intercept_us=line.intercept_ns / 1e3,
            spread=line.spread,
            setup_share=line.setup_share,
            efficient_rows=line.efficient_rows(max_rows),
            samples=line.samples,
            scale=scale,
        )

    # ---------------------------------------------------------------- what lines have of one another

    def _note_young(self, line: Line, rows: int, took_ns: int) -> None:
        """Learn from one of a line's first batches, which tell too little about it to go by them alone."""
        if line.samples == SETTLED:
            line.fit()
            self._is_settled = True
        elif self._is_settled:
            self._borrow(line)
            return
        else:
            self._note_common(line, rows, took_ns)
        self._lend()

    def _note_common(self, line: Line, rows: int, took_ns: int) -> None:
        common = self._common
        if common is None:
            common = self._common = Line(1)
            common.slope_ns /= line.units
        common.learn(rows * line.units, took_ns)
        if self._measured is None or common.samples >= SETTLED:
            common.fit()

    def _lend(self) -> None:
        """Let lines that know too little of themselves start from the others again."""
        for line in self._lines.values():
            if line.samples < SETTLED:
                self._borrow(line)

    def _borrow(self, line: Line) -> None:
        """Let `line` start from its neighbours in units: between two of them, or from one, by units a row."""
        others = [each for each in self._lines.values() if each.samples >= SETTLED]
        if not others and self._common is not None:
            others = [self._common]
        below = max((each for each in others if each.units <= line.units), key=_by_units, default=None)
        above = min((each for each in others if each.units >= line.units), key=_by_units, default=None)
        if below is not None and above is not None and above is not below:
            share = (line.units - below.units) / (above.units - below.units)
            line.start_from(below)
            line.slope_ns += share * (above.slope_ns - below.slope_ns)
            line.intercept_ns += share * (above.intercept_ns - below.intercept_ns)
            line.spread = max(below.spread, above.spread)
        elif (near := below or above) is not None:
            line.start_from(near, line.units / near.units)

    # ---------------------------------------------------------------- the device's pace

    def _note_side(self, line: Line, size: Size, side: int) -> None:
        """A batch was slower than predicted, or faster: see whether the pace has changed, or this size alone."""
        trend = self._trend
        self._run = self._run + side if self._run * side > 0 else side
        if abs(self._run) >= _IN_A_ROW:
            self._scale(line, _median([ratio for _, ratio, _ in list(trend)[-_IN_A_ROW:]]), _IN_A_ROW)
            return
        if sum([each == side for _, _, each in trend]) >= _AGREEING:
            self._scale(line, _median([ratio for _, ratio, each in trend if each == side]), _AGREEING)
            return
        size.run = size.run + side if size.run * side > 0 else side
        if abs(size.run) >= ROW:
            as_predicted = [each for each, _, away in trend if not away]
            if size not in as_predicted and len(as_predicted) >= max(ROW, (len(trend) - ROW) / 2):
                size.forget()
                line.fit()
                self._run = 0

    def _note_creep(self, line: Line) -> None:
        """See whether the pace has changed by little."""
        trend = self._trend
        if len(trend) == _TREND and sum([side != 0 for _, _, side in trend]) <= ROW:  # where more are, it is a step
            factor = _median([ratio for _, ratio, _ in trend])
            if abs(factor - 1.0) > _CREEP + line.spread / 2:
                self._scale(line, factor, _TREND)

    def _scale(self, line: Line, factor: float, fresh: int) -> None:
        """Everything takes `factor` times what it did, as the last `fresh` batches show, the newest one of `line`."""
        sizes = Counter([size for size, _, _ in list(self._trend)[-fresh:]])
        self._trend.clear()
        self._run = 0
        for each in dict.fromkeys((*self._lines.values(), line)):  # one that was dropped may be in use yet
            each.scale(factor, sizes)
        if self._common is not None:
            self._common.scale(factor, sizes)


def _median(values: list[float]) -> float:
    """The lower one of two in the middle: what disturbs only slows."""
    return sorted(values)[(len(values) - 1) // 2]


def _leading(units: int) -> int:
    """`units`, all but its leading bits cleared."""
    extra = units.bit_length() - _UNIT_BITS
    return units >> extra << extra if extra > 0 else max(units, 1)
