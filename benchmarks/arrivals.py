"""When requests arrive, and how long they would take in the ideal queue."""

import heapq

import numpy as np
from numpy.typing import NDArray


def poisson(per_second: float, seconds: float, seed: int) -> "NDArray[np.int64]":
    """Arrivals of a Poisson process, in nanoseconds after the beginning."""
    generator = np.random.default_rng(seed)
    count = int(per_second * seconds)
    return np.cumsum(generator.exponential(1e9 / per_second, count)).astype(np.int64)


def ideal_us(arrivals_ns: "NDArray[np.int64]", service_ns: float, servers: int) -> "NDArray[np.float64]":
    """Latencies in the queue M/D/c, first come first served: exact service, no overhead."""
    free = [0.0] * servers
    latencies = np.empty(len(arrivals_ns))
    for place, arrival in enumerate(arrivals_ns.tolist()):
        end = max(heapq.heappop(free), arrival) + service_ns
        heapq.heappush(free, end)
        latencies[place] = (end - arrival) / 1e3
    return latencies
