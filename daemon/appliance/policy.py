"""How many rows the next batch takes.

Of q rows that wait for a server whose batches of n take ``slope * n + intercept``, a first batch of
``sqrt(2 q intercept / slope)`` rows lets them wait the least in total (Santos and Magazine, "Batching in
single-operation manufacturing systems", Operations Research Letters 4, 1985). With more of them each row waits for more
others, with fewer the intercept is paid more often. Requests that are still to come wait for an intercept too, as long
as the server is busy without a break: load / (1 - load) of them for each that is served now. A long queue says that
many come, whatever the load was so far. So where the intercept is small, requests run one by one until they queue up,
and where it is large, all that wait go at once. docs/batching.md shows what this does beside other rules.
"""

from math import sqrt
from typing import Final

from appliance.cost_line import Line
from appliance.flights import Flights
from appliance.manifest import BatchSection

#: The load that is reckoned with at most: a little above it is measured as easily, and is a queue without end.
_MAX_LOAD: Final = 0.94
#: One request more is still to come for so many that wait.
_FORESIGHT: Final = 3.0
#: A remainder that is smaller than a quarter of the queue goes along: it would pay an intercept for itself.
_REMAINDER: Final = 0.75
#: The intercept is taken to be this part of the slope at least. Who believes that there is none runs one row at a time,
#: whatever waits, and so would never see it again.
_LEAST_SHARE: Final = 0.02
#: Load is averaged over the time of so many batches of one row.
_MEMORY: Final = 256.0


class Policy:
    """The rule for one model.

    Attributes:
        delay_ns: For how long an under-full batch is held back; 0, the default, is never.
        is_fixed: True where the manifest says how large batches are, in Triton's words.
    """

    def __init__(self, section: BatchSection) -> None:
        self.delay_ns = section.max_queue_delay_us * 1000
        self._preferred = tuple(section.preferred_batch_sizes)
        self.is_fixed = bool(self.delay_ns or self._preferred)
        self._fresh_ns = 0.0  # work that was sent and is not in the average yet
        self._work_ns = 0.0
        self._time_ns = 0.0
        self._last_ns = 0
        self._pressure = 0.0  # requests still to come for each that is served

    def is_full(self, rows: int, max_rows: int) -> bool:
        """True where `rows` waiting rows are worth no more waiting."""
        return rows >= (min(self._preferred[0], max_rows) if self._preferred else max_rows)

    def rows_to_take(self, rows: int, line: Line, max_rows: int, flights: Flights) -> int:
        """Rows of the next batch, 1 to `max_rows`, where `rows` of its shape wait and `flights` are under way."""
        most = rows if rows < max_rows else max_rows
        if most <= 1:
            return 1
        if self._preferred:
            return max((size for size in self._preferred if size <= most), default=most)
        slope = line.slope_ns
        if self.delay_ns or slope <= 0:
            return most
        streams = flights.streams
        if streams > 1:  # those that are idle share what waits, and what waits is served by all
            rows = -(-rows // flights.idle)
            most = rows if rows < max_rows else max_rows
        share = max(line.intercept_ns / slope, _LEAST_SHARE)
        gain = share / streams * (self._pressure + rows / _FORESIGHT)
        take = int(sqrt(2 * rows * gain) + 0.5)
        if take > _REMAINDER * rows or take > most:
            return most
        return take or 1

    def note(self, rows: int, line: Line, max_rows: int, streams: int, now_ns: int) -> None:
        """A batch of `rows` is sent: what is served tells how much comes."""
        slope, intercept = line.slope_ns, line.intercept_ns
        self._fresh_ns += rows * (slope + intercept / max_rows)
        passed = now_ns - self._last_ns
        if passed < slope + intercept:
            return  # soon enough with the next
        self._last_ns = now_ns
        memory = _MEMORY * (slope + intercept)
        keep = memory / (memory + passed)
        work = self._work_ns = self._work_ns * keep + self._fresh_ns
        time = self._time_ns = self._time_ns * keep + passed
        self._fresh_ns = 0.0
        load = work / ((time if time > memory / 4 else memory / 4) * streams)
        self._pressure = load / (1.0 - load) if load < _MAX_LOAD else _MAX_LOAD / (1.0 - _MAX_LOAD)
