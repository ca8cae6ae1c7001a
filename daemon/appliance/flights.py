"""Batches a worker has, and when it is predicted to be done with them."""

from heapq import nsmallest

from appliance.cost_line import Line


class Flight:
    """A batch the worker has.

    Attributes:
        line: What batches of its shape cost.
        rows: Its rows.
        began_ns: When it was sent, or when the worker could begin it, whichever is later.
        ends_ns: When it is predicted to end.
    """

    __slots__ = ("began_ns", "ends_ns", "line", "rows")

    def __init__(self, line: Line, rows: int, began_ns: int) -> None:
        self.line = line
        self.rows = rows
        self.began_ns = began_ns
        self.ends_ns = began_ns + int(line.ns(rows))


class Flights:
    """The batches of one worker, in the order they were sent.

    Attributes:
        streams: Batches it runs at a time; others lie ready.
        last_end_ns: When one ended last.
    """

    __slots__ = ("_flights", "last_end_ns", "streams")

    def __init__(self, streams: int) -> None:
        self._flights: list[Flight] = []
        self.streams = streams
        self.last_end_ns = 0

    @property
    def free_ns(self) -> int:
        """When the worker is predicted to begin what it is given next; 0 where it would at once."""
        flights = self._flights
        beyond = len(flights) - self.streams + 1
        if beyond <= 0:
            return 0
        if len(flights) == 1:
            return flights[0].ends_ns
        return nsmallest(beyond, [flight.ends_ns for flight in flights])[-1]

    @property
    def idle(self) -> int:
        """Streams that have nothing to do; at least the one that the next batch is for."""
        return max(self.streams - len(self._flights), 1)

    def begin(self, line: Line, rows: int, now_ns: int) -> Flight:
        """A batch is sent."""
        free_ns = self.free_ns
        flight = Flight(line, rows, free_ns if free_ns > now_ns else now_ns)
        self._flights.append(flight)
        return flight

    def end(self, flight: Flight, now_ns: int) -> None:
        """A batch is back. One that lay ready begins now, whatever was predicted."""
        flights = self._flights
        flights.remove(flight)
        self.last_end_ns = now_ns
        if len(flights) >= self.streams:
            flight = flights[self.streams - 1]
            flight.began_ns = now_ns
            flight.ends_ns = now_ns + int(flight.line.ns(flight.rows))

    def clear(self) -> None:
        """The worker is gone with all it had."""
        self._flights.clear()
