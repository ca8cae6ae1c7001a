"""Every answer belongs to its request: 100,000 distinct ones of sixteen clients, many of them withdrawn."""

import asyncio
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1]))

from appliance_client import AsyncClient, DeadlineExceeded, Overloaded
from support.daemon import FAKE_BACKEND, open_descriptors, start_daemon, wait_until
from support.models import write_fake, write_identity

CLIENTS = 16
REQUESTS = 100_000
IN_FLIGHT = 24  # of each client


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    directory = tmp_path_factory.mktemp("correlation")
    write_identity(directory / "models" / "identity")
    write_identity(directory / "models" / "narrow", shape=("batch", 3))
    with start_daemon(directory, directory / "models") as running:
        yield running


class Sender:
    """One client and what became of its requests."""

    def __init__(self, number: int, path: str) -> None:
        self._number = number
        self._random = random.Random(number)
        self._client = AsyncClient(path, region_threshold=128 if number % 4 == 0 else None)
        self._serial = 0
        self.seen: Counter = Counter()

    async def run(self, requests: int) -> None:
        """Send `requests` requests, `IN_FLIGHT` at a time."""
        async with self._client:
            await asyncio.gather(*(self._lane(requests // IN_FLIGHT) for _ in range(IN_FLIGHT)))

    async def _lane(self, requests: int) -> None:
        for _ in range(requests):
            draw = self._random.random()
            if draw < 0.04:
                await self._withdraw(draw < 0.02)
            elif draw < 0.05:
                await self._hurry()
            else:
                await self._ask()

    def _request(self) -> tuple[str, np.ndarray]:
        """A model, and rows that nobody else sends: client, serial number and row are in each."""
        self._serial += 1
        model, width = ("narrow", 3) if self._serial % 5 == 0 else ("identity", 16)
        rows = self._random.randint(1, 4)
        values = np.full((rows, width), self._random.random(), np.float32)
        values[:, 0] = self._number
        values[:, 1] = self._serial
        values[:, 2] = range(rows)
        return model, values

    async def _ask(self, timeout: float | None = None) -> None:
        model, values = self._request()
        answer = await self._client.infer(model, {"x": values}, timeout=timeout)
        if not np.array_equal(answer["y"], values):
            raise AssertionError(f"{model}: {values} was answered with {answer['y']}")
        self.seen["answered"] += 1
        self.seen["shared"] += answer.timings.batch_rows > len(values)

    async def _withdraw(self, at_once: bool) -> None:
        task = asyncio.ensure_future(self._ask())
        for _ in range(1 if at_once else self._random.randint(2, 12)):
            await asyncio.sleep(0)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            self.seen["withdrawn"] += 1

    async def _hurry(self) -> None:
        try:
            await self._ask(timeout=self._random.choice((0.0005, 0.002, 0.01)))
        except DeadlineExceeded:
            self.seen["late"] += 1


def test_every_answer_belongs_to_its_request(running):
    async def scenario() -> Counter:
        senders = [Sender(number, running.infer_socket) for number in range(CLIENTS)]
        await asyncio.gather(*(sender.run(REQUESTS // CLIENTS) for sender in senders))
        return sum((sender.seen for sender in senders), Counter())

    descriptors = open_descriptors(running.pid)
    seen = asyncio.run(scenario())
    total = seen["answered"] + seen["withdrawn"] + seen["late"]
    assert total == REQUESTS // CLIENTS // IN_FLIGHT * IN_FLIGHT * CLIENTS
    assert seen["withdrawn"] > 1000, seen
    assert seen["shared"] > 1000, "requests of different clients shared batches"

    def is_settled() -> bool:
        return all((model["queued"], model["running"]) == (0, 0) for model in running.get("/admin/models")["models"])

    wait_until(is_settled, "nothing is queued or running")
    for model in running.get("/admin/models")["models"]:
        assert (model["state"], model["restarts"]) == ("ready", 0)
    wait_until(lambda: open_descriptors(running.pid) <= descriptors, "the descriptors are given back")
    assert "Traceback" not in running.log


def test_a_queue_that_is_full_refuses_at_once_and_keeps_what_it_has(tmp_path):
    """Those refused are told so; each of the others gets its own answer."""
    batch = {"max_queue_size": 20}
    write_fake(tmp_path / "models" / "slow", manifest="max_batch_size = 2", batch=batch, c_us=2000)

    async def scenario(path: str) -> Counter:
        seen: Counter = Counter()

        async def ask(client, value: int) -> None:
            try:
                answer = await client.infer("slow", {"x": np.full((1, 16), value, np.float32)})
            except Overloaded as error:
                seen["refused" if error.is_retryable else "refused for good"] += 1
            else:
                assert np.all(answer["y"] == value)
                seen["answered"] += 1

        async with AsyncClient(path) as one, AsyncClient(path) as other:
            await asyncio.gather(*(ask((one, other)[value % 2], 1000 + value) for value in range(400)))
        return seen

    with start_daemon(tmp_path, tmp_path / "models", environment=FAKE_BACKEND) as running:
        seen = asyncio.run(scenario(running.infer_socket))
        assert seen["answered"] + seen["refused"] == 400
        assert seen["refused"] > 0
        assert seen["answered"] >= 20
        status = running.model("slow")
        assert (status["queued"], status["running"]) == (0, 0)
        counters = running.get("/v2/models/slow/stats")["model_stats"][0]
        assert counters["inference_stats"]["success"]["count"] == seen["answered"]
