"""Runs of one session in as many threads as it has streams, for measuring."""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from appliance.worker.model import ServedModel

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Streams:
    """All streams of a session; the thread that made it is one of their threads, and they stay the same."""

    def __init__(self, model: ServedModel) -> None:
        self._session = model.session
        self._names = [spec.name for spec in model.outputs]
        self._count = model.streams
        self._threads = ThreadPoolExecutor(max(model.streams - 1, 1), "stream")

    def run_for(self, feeds: "Mapping[str, NDArray[Any]]", length_ns: int) -> tuple[list[int], int]:
        """Run in every stream until `length_ns` have passed, once at least.

        Returns:
            The time in ns that each run took beside the others, and how many there were, those not timed included.

        Raises:
            Exception: Whatever the runtime raises, once every stream has ended.
        """
        ended: list[list[int]] = []
        end_ns = time.monotonic_ns() + length_ns
        others = [self._threads.submit(self._run, feeds, end_ns, ended) for _ in range(self._count - 1)]
        try:
            count = self._run(feeds, end_ns, ended)
        finally:
            wait(others)
        count += sum(other.result() for other in others)
        return [took for samples in ended for took in samples], count

    def _run(self, feeds: "Mapping[str, NDArray[Any]]", end_ns: int, ended: list[list[int]]) -> int:
        """One stream. It goes on while others are still timed, since a run beside fewer would pass for faster."""
        run, names, clock = self._session.run, self._names, time.monotonic_ns
        samples: list[int] = []
        try:
            while not samples or clock() < end_ns:
                began = clock()
                run(feeds, names)
                samples.append(clock() - began)
        finally:
            ended.append(samples)
        count = len(samples)
        while len(ended) < self._count:
            run(feeds, names)
            count += 1
        return count
