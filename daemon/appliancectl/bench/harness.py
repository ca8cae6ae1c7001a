"""The process of a LoadGen scenario: ``python -m appliancectl.bench.harness ORDER``.

Takes its order as JSON, tells its outcome as JSON on standard output, and ends when whoever ordered it is gone.
"""

import asyncio
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click
import mlperf_loadgen

from appliance_client import ApplianceError
from appliance_client.retry import pause_before
from appliancectl.bench.load import sample_library
from appliancectl.bench.loadgen_log import read_result
from appliancectl.bench.sut import DirectSystem, LoopSystem
from appliancectl.bench.tally import check_passing
from appliancectl.target import Target

if TYPE_CHECKING:
    from appliance_client import AsyncClient, Tensor

#: LoadGen's own names.
_SCENARIOS: Final = {
    "single-stream": "SingleStream",
    "multi-stream": "MultiStream",
    "server": "Server",
    "offline": "Offline",
}

#: Samples of a query of multi-stream, LoadGen's default.
_STREAMS: Final = 8

#: Samples in flight over one connection, at most; the daemon's bound is 1024 unless configured.
_WINDOW: Final = 512

#: Requests in flight while the throughput is estimated.
_ESTIMATE_AT_ONCE: Final = 64

#: LoadGen makes its queries beforehand, from what it is to expect: rather too many than too few.
_RATE_MARGIN: Final = 1.2
_LATENCY_MARGIN: Final = 0.8

#: The floor needs no long run: queries, or for ``server`` seconds at its rate.
_FLOOR_QUERIES: Final = {"single-stream": 5000, "multi-stream": 500, "offline": 20_000}
_FLOOR_SECONDS: Final = 1.0

#: Seconds of queries that ``server`` may be behind before LoadGen gives up.
_MAX_BEHIND_SECONDS: Final = 10.0

#: LoadGen's thread and the requests' share the interpreter; the default of 5 ms would show in every latency.
_SWITCH_SECONDS: Final = 0.0002


class Harness:
    """One scenario, run twice: against nobody and against the daemon.

    Args:
        order: A `Scenario` as a dictionary, with ``warm_up_s``, ``socket_dir`` and ``logs``.
        fail: Tells the error it is given and ends the process.
    """

    def __init__(self, order: dict[str, Any], fail: Callable[[BaseException], NoReturn]) -> None:
        directory = order["socket_dir"]
        self._target = Target(None if directory is None else Path(directory), wants_json=True)
        self._order = order
        self._name: str = order["name"]
        self._fail = fail
        self._samples: list[dict[str, Tensor]] = []
        self._refused: Counter[str] = Counter()
        self._warm_up_s: float = order["warm_up_s"]

    def run(self) -> dict[str, Any]:
        """Figures of both runs."""
        order = self._order
        self._samples = sample_library(self._target, order["model"], tuple(order["given"]))
        measured, floor = self._alone() if self._name == "single-stream" else self._on_a_loop()
        return {
            "model": order["model"],
            "scenario": self._name,
            "duration_s": order["duration_s"],
            "clients": order["clients"],
            "measured": measured,
            "floor": floor,
            "refused": dict(self._refused),
        }

    # ---------------------------------------------------------------- one sample at a time

    def _alone(self) -> tuple[dict[str, Any], dict[str, Any]]:
        floor = self._start(DirectSystem(lambda _: None, self._fail), "floor", self._floor_settings())
        model, samples, refused = self._order["model"], self._samples, self._refused
        priority = self._order["priority"]
        with self._target.client() as client:

            def ask(index: int) -> None:
                attempt = 0
                while True:
                    try:
                        client.infer(model, samples[index], priority=priority)
                        return
                    except ApplianceError as error:
                        check_passing(error)
                        refused[error.kind] += 1
                        time.sleep(pause_before(attempt))
                        attempt += 1

            fastest_s = self._warm_up_s
            end = time.monotonic() + self._warm_up_s
            while (before := time.monotonic()) < end:
                ask(0)
                fastest_s = min(fastest_s, time.monotonic() - before)
            self._refused.clear()
            settings = self._settings(fastest_s=fastest_s)
            return self._start(DirectSystem(ask, self._fail), "run", settings), floor

    # ---------------------------------------------------------------- many at a time

    def _on_a_loop(self) -> tuple[dict[str, Any], dict[str, Any]]:
        with ExitStack() as stack:
            system = LoopSystem(self._fail, _WINDOW * self._order["clients"])
            stack.callback(system.close)
            system.answer_with(_nobody)
            floor = self._start(system, "floor", self._floor_settings())
            connections = AsyncExitStack()
            clients = system.run(self._connect(connections))
            stack.callback(lambda: system.run(connections.aclose()))
            ask = self._asker(clients)
            if self._name == "multi-stream":
                settings = self._settings(fastest_s=system.run(_fastest_group(ask, _STREAMS, self._warm_up_s)))
            else:
                settings = self._settings(rate=system.run(_rate(ask, _ESTIMATE_AT_ONCE, self._warm_up_s)))
            self._refused.clear()
            system.answer_with(ask)
            return self._start(system, "run", settings), floor

    async def _connect(self, connections: AsyncExitStack) -> "list[AsyncClient]":
        count = self._order["clients"]
        return [await connections.enter_async_context(self._target.async_client()) for _ in range(count)]

    def _asker(self, clients: "list[AsyncClient]") -> Callable[[int], Awaitable[None]]:
        model, samples, refused = self._order["model"], self._samples, self._refused
        priority = self._order["priority"]
        turn = 0

        async def ask(index: int) -> None:
            nonlocal turn
            turn += 1
            client = clients[turn % len(clients)]
            attempt = 0
            while True:
                try:
                    await client.infer(model, samples[index % len(samples)], priority=priority)
                    return
                except ApplianceError as error:
                    check_passing(error)
                    refused[error.kind] += 1
                    await asyncio.sleep(pause_before(attempt))
                    attempt += 1

        return ask

    # ---------------------------------------------------------------- LoadGen

    def _settings(self, *, fastest_s: float = 0.0, rate: float = 0.0) -> Any:
        """LoadGen's settings for the run against the daemon.

        Args:
            fastest_s: The shortest time a query took, where one is in flight.
            rate: Samples a second, where they are not.
        """
        order = self._order
        settings = self._common_settings()
        settings.min_duration_ms = round(order["duration_s"] * 1000)
        settings.min_query_count = 2  # of one, LoadGen's rate is infinite
        expected_ns = max(1.0, fastest_s * _LATENCY_MARGIN * 1e9)
        settings.single_stream_expected_latency_ns = settings.multi_stream_expected_latency_ns = expected_ns
        settings.offline_expected_qps = order["target_qps"] or rate * _RATE_MARGIN
        return settings

    def _floor_settings(self) -> Any:
        settings = self._common_settings()
        if self._name == "server":
            settings.min_duration_ms = round(min(self._order["duration_s"], _FLOOR_SECONDS) * 1000)
            settings.min_query_count = 2
        else:
            settings.min_duration_ms = 1
            settings.min_query_count = _FLOOR_QUERIES[self._name]
        return settings

    def _common_settings(self) -> Any:
        order = self._order
        settings = mlperf_loadgen.TestSettings()
        settings.scenario = getattr(mlperf_loadgen.TestScenario, _SCENARIOS[self._name])
        settings.mode = mlperf_loadgen.TestMode.PerformanceOnly
        settings.multi_stream_samples_per_query = _STREAMS
        if self._name == "server":
            settings.server_target_qps = order["target_qps"]
            settings.server_target_latency_ns = round(order["target_latency_ms"] * 1e6)
            settings.server_max_async_queries = max(1024, round(order["target_qps"] * _MAX_BEHIND_SECONDS))
        settings.qsl_rng_seed = settings.sample_index_rng_seed = settings.schedule_rng_seed = order["seed"]
        return settings

    def _start(self, system: DirectSystem | LoopSystem, name: str, settings: Any) -> dict[str, Any]:
        """Let LoadGen run one test, which takes its time, and read what it found."""
        directory = Path(self._order["logs"]) / name
        directory.mkdir(exist_ok=True)
        logs = mlperf_loadgen.LogSettings()
        logs.enable_trace = False
        output = mlperf_loadgen.LogOutputSettings()
        output.outdir = str(directory)
        output.copy_summary_to_stdout = False
        logs.log_output = output
        count = len(self._samples)
        sut = mlperf_loadgen.ConstructFastSUT(system.issue, _nothing)
        library = mlperf_loadgen.ConstructQSL(count, count, _nothing, _nothing)
        try:
            # LoadGen looks for the file of an audit, which here is none, in the current directory by default.
            mlperf_loadgen.StartTestWithLogSettings(sut, library, settings, logs, str(directory / "no-audit"))
        finally:
            mlperf_loadgen.DestroyQSL(library)
            mlperf_loadgen.DestroyFastSUT(sut)
        return read_result(directory, self._name, _STREAMS)


def _nothing(*_: object) -> None:
    """What LoadGen may tell and nobody needs to know: samples to load, the end of the queries."""


async def _nobody(_: int) -> None:
    """Answer a sample at once."""


async def _fastest_group(ask: Callable[[int], Awaitable[None]], size: int, seconds: float) -> float:
    """Seconds the fastest group of `size` samples took."""
    fastest_s = seconds
    end = time.monotonic() + seconds
    while (before := time.monotonic()) < end:
        await asyncio.gather(*(ask(index) for index in range(size)))
        fastest_s = min(fastest_s, time.monotonic() - before)
    return fastest_s


async def _rate(ask: Callable[[int], Awaitable[None]], at_once: int, seconds: float) -> float:
    """Samples a second with `at_once` of them in flight."""
    count = 0
    begin = time.monotonic()

    async def loop() -> None:
        nonlocal count
        while time.monotonic() - begin < seconds:
            await ask(count)
            count += 1

    await asyncio.gather(*(loop() for _ in range(at_once)))
    return count / (time.monotonic() - begin)


def _watch(lifeline: int) -> None:
    """End with whoever holds the other end."""
    os.read(lifeline, 1)
    os._exit(1)


def main() -> None:
    """Entry point of the process."""
    order = json.loads(sys.argv[1])
    told = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever LoadGen prints is no outcome
    threading.Thread(target=_watch, args=(order["lifeline"],), daemon=True).start()

    def tell(outcome: dict[str, Any]) -> None:
        with os.fdopen(told, "w") as stream:
            json.dump(outcome, stream)

    def fail(error: BaseException) -> NoReturn:
        """From whichever thread: nothing may unwind through LoadGen, and nothing is left to be saved."""
        if isinstance(error, ApplianceError):
            tell({"error": str(error), "kind": error.kind, "is_retryable": error.is_retryable})
        elif isinstance(error, click.ClickException):
            tell({"error": error.format_message(), "kind": None})
        else:
            sys.excepthook(type(error), error, error.__traceback__)
            sys.stderr.flush()
        os._exit(1)

    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        outcome = Harness(order, fail).run()
    except Exception as error:
        fail(error)
    tell(outcome)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
