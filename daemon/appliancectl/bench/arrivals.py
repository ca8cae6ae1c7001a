"""When the requests of an open loop are due: pure functions of rate and seed."""

import random
from collections.abc import Iterator
from typing import Final

#: Words for `instants`.
ARRIVALS: Final = ("poisson", "uniform", "burst")


def instants(arrivals: str, rate: float, *, burst: int = 1, seed: int = 0) -> Iterator[float]:
    """Seconds from the start at which a request is due, without end, ascending.

    Args:
        arrivals: One of `ARRIVALS`.
        rate: Requests a second, on average.
        burst: Requests of a group, where they arrive in groups.
        seed: The same seed gives the same instants.
    """
    if arrivals == "uniform":
        return _uniform(rate)
    if arrivals == "poisson":
        return _poisson(rate, seed)
    return _bursts(rate, burst, seed)


def _uniform(rate: float) -> Iterator[float]:
    count = 0
    while True:
        yield count / rate
        count += 1


def _poisson(rate: float, seed: int) -> Iterator[float]:
    """Independent arrivals: the gaps between them are exponentially distributed."""
    chance = random.Random(seed)  # noqa: S311 - draws a load, guards nothing
    due = 0.0
    while True:
        due += chance.expovariate(rate)
        yield due


def _bursts(rate: float, size: int, seed: int) -> Iterator[float]:
    """Groups of `size` at the same instant; the groups arrive as `_poisson`."""
    for due in _poisson(rate / size, seed):
        for _ in range(size):
            yield due
