"""Loading, unloading and reloading under traffic: no request meets a gap, and nothing is done twice."""

import asyncio
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

sys.path.append(str(Path(__file__).parents[1] / "plugins_fake"))

from fake_backend import MAGIC

from appliance_client import (
    ApplianceError,
    ArtifactCorrupt,
    AsyncClient,
    Client,
    InvalidManifest,
    InvalidRequest,
    ModelNotFound,
    ModelNotReady,
)
from support.askers import GrpcInfer, HttpInfer
from support.daemon import FAKE_BACKEND, PATIENCE_SECONDS, start_daemon, wait_until
from support.models import Gate, save, write_fake

REPOSITORY = Path(__file__).parents[2]
LANGUAGES = REPOSITORY / "models" / "language-id"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A daemon with an empty repository that tests add to, and the repository."""
    directory = tmp_path_factory.mktemp("reload")
    models = directory / "models"
    models.mkdir()
    with start_daemon(directory, models, environment=FAKE_BACKEND) as running:
        yield running, models


@pytest.fixture
def client(served):
    with Client(served[0].infer_socket, timeout=PATIENCE_SECONDS) as client:
        yield client


def tensor(value: float) -> dict[str, np.ndarray]:
    return {"x": np.full((1, 16), value, np.float32)}


def write_adder(directory: Path, addend: float, version: int = 1) -> None:
    """A model whose answers tell which one it is: y = x + `addend`."""
    float_ = [TensorProto.FLOAT, ["n", 16]]
    constant = numpy_helper.from_array(np.float32(addend), "c")
    add = helper.make_node("Add", ["x", "c"], ["y"])
    save(directory, [add], [("x", *float_)], [("y", *float_)], [constant], version)


async def settled(awaitable):
    """A request's answer or error."""
    try:
        return await awaitable
    except ApplianceError as error:
        return error


async def until(condition) -> None:
    """`wait_until` for coroutines."""
    await asyncio.to_thread(wait_until, condition, "the condition holds")


class Traffic:
    """Requests on a schedule, 200 a second, from several connections; every outcome is kept."""

    def __init__(self, path: str, model: str, inputs) -> None:
        self._path, self._model, self._inputs = path, model, inputs
        self._task = None
        self._stop = asyncio.Event()
        self._came = asyncio.Event()
        self.outcomes: list = []
        self.was_unready = False

    async def __aenter__(self):
        self._task = asyncio.ensure_future(self._run())
        await self.more(20)
        return self

    async def __aexit__(self, *_):
        self._stop.set()
        await self._task

    async def more(self, count: int) -> None:
        """Wait for `count` more outcomes."""
        wanted = len(self.outcomes) + count
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(self.outcomes) < wanted:
                self._came.clear()
                await self._came.wait()

    async def _run(self) -> None:
        flying = set()
        clients = [AsyncClient(self._path) for _ in range(4)]
        due = time.monotonic()
        number = 0
        while not self._stop.is_set():
            task = asyncio.ensure_future(self._one(clients[number % 4]))
            flying.add(task)
            task.add_done_callback(flying.discard)
            number += 1
            if number % 10 == 0:
                self.was_unready |= not await clients[0].model_ready(self._model)
            due += 0.005
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        await asyncio.gather(*flying)
        for client in clients:
            await client.close()

    async def _one(self, client) -> None:
        self.outcomes.append(await settled(client.infer(self._model, self._inputs)))
        self._came.set()

    def errors(self) -> list:
        return [outcome for outcome in self.outcomes if isinstance(outcome, ApplianceError)]


def test_a_reload_under_traffic_fails_no_request_and_changes_the_answers(served):
    running, models = served
    write_adder(models / "adder", 1)

    async def scenario():
        async with AsyncClient(running.infer_socket) as admin:
            await admin.load("adder")
            old = running.model("adder")["pid"]
            async with Traffic(running.infer_socket, "adder", tensor(0)) as traffic:
                for version in (2, 3):
                    write_adder(models / "adder", version, version)
                    await admin.load("adder")
                    answer = await admin.infer("adder", tensor(0))
                    assert answer["y"][0, 0] == version
                    assert answer.version == str(version)
                    await traffic.more(20)
            assert traffic.errors() == []
            assert not traffic.was_unready
            values = [float(outcome["y"][0, 0]) for outcome in traffic.outcomes]
            assert set(values) == {1.0, 2.0, 3.0}
            await until(lambda: running.workers() == [running.model("adder")["pid"]])
            assert running.model("adder")["pid"] != old

    asyncio.run(scenario())


@pytest.mark.parametrize("transport", [HttpInfer, GrpcInfer])
def test_a_reload_fails_no_request_of_other_transports_either(served, client, transport):
    running, models = served
    name = f"adder-{transport.__name__.lower()}"
    write_adder(models / name, 1)
    client.load(name)
    outcomes: list = []
    done = threading.Event()

    def work() -> None:
        ask = transport(running)
        while not done.is_set():
            outcomes.append(ask(name, 0))
        ask.close()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for version in (2, 3):
        seen = len(outcomes)
        wait_until(lambda seen=seen: len(outcomes) > seen + 20, "requests are under way")
        write_adder(models / name, version, version)
        client.load(name)
    seen = len(outcomes)
    wait_until(lambda: len(outcomes) > seen + 20, "requests went on")
    done.set()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert set(outcomes) == {1.0, 2.0, 3.0}
    client.unload(name)


def test_a_text_model_is_reloaded_under_traffic_without_a_gap(served):
    """Texts that are being tokenised at the swap are answered too; a new tokenizer alone is a change."""
    running, models = served
    shutil.copytree(LANGUAGES, models / "language-id")

    async def scenario():
        async with AsyncClient(running.infer_socket) as admin:
            await admin.load("language-id")
            inputs = {"text": np.array([["Guten Morgen, wie geht es Ihnen heute?"]], object)}
            expected = (await admin.infer("language-id", inputs)).text("label")
            async with Traffic(running.infer_socket, "language-id", inputs) as traffic:
                for _ in range(3):
                    before = running.model("language-id")["pid"]
                    os.utime(models / "language-id" / "tokenizer.json")
                    await admin.load("language-id")
                    assert running.model("language-id")["pid"] != before
                    await traffic.more(20)
            assert traffic.errors() == []
            assert all(outcome.text("label") == expected for outcome in traffic.outcomes)

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", ["truncated", "manifest", "digest", "gone"])
def test_a_reload_that_fails_leaves_the_old_version_serving(served, kind):
    running, models = served
    name = f"solid-{kind}"
    write_adder(models / name, 1)
    expected = {"truncated": ApplianceError, "manifest": InvalidManifest, "digest": ArtifactCorrupt}

    async def scenario():
        async with AsyncClient(running.infer_socket) as admin:
            await admin.load(name)
            pid = running.model(name)["pid"]
            async with Traffic(running.infer_socket, name, tensor(0)) as traffic:
                if kind == "truncated":
                    write_adder(models / name, 2, version=2)
                    path = models / name / "2" / "model.onnx"
                    path.write_bytes(path.read_bytes()[:50])
                elif kind == "manifest":
                    (models / name / "model.toml").write_text('name = "somebody-else"')
                elif kind == "digest":
                    entry = '[[artifacts]]\npath = "1/model.onnx"\nformat = "onnx"\nsha256 = "' + "0" * 64 + '"'
                    (models / name / "model.toml").write_text(f'name = "{name}"\n{entry}\n')
                else:
                    shutil.rmtree(models / name)
                for _ in range(2):
                    error = await settled(admin.load(name))
                    assert isinstance(error, expected.get(kind, ModelNotFound))
                await traffic.more(20)
            assert traffic.errors() == []
            assert not traffic.was_unready
            assert {float(outcome["y"][0, 0]) for outcome in traffic.outcomes} == {1.0}
            status = running.model(name)
            assert (status["state"], status["version"], status["pid"]) == ("ready", "1", pid)
            shutil.rmtree(models / name, ignore_errors=True)
            write_adder(models / name, 5, version=3)
            await admin.load(name)
            assert (await admin.infer(name, tensor(0)))["y"][0, 0] == 5
            await admin.unload(name)

    asyncio.run(scenario())


def test_a_model_whose_directory_is_gone_is_served_until_it_is_unloaded_and_then_forgotten(served, client):
    running, models = served
    write_adder(models / "fleeting", 1)
    client.load("fleeting")
    shutil.rmtree(models / "fleeting")
    assert client.infer("fleeting", tensor(0))["y"][0, 0] == 1
    client.unload("fleeting")
    assert "fleeting" not in {model["name"] for model in running.get("/admin/models")["models"]}
    with pytest.raises(ModelNotFound):
        client.load("fleeting")
    with pytest.raises(ModelNotFound):
        client.infer("fleeting", tensor(0))


def test_a_worker_that_restarts_into_another_model_is_not_let_near_old_requests(served, client):
    """The artifact was replaced in place by one of other shapes, and then the worker died: only a load takes it."""
    running, models = served
    write_fake(models / "swapped")
    client.load("swapped")
    assert client.infer("swapped", tensor(1))["y"].shape == (1, 16)
    write_fake(models / "swapped", inputs=[["x", "FP32", [-1, 8]]], outputs=[["y", "FP32", [-1, 8]]])
    os.kill(running.model("swapped")["pid"], signal.SIGKILL)
    wait_until(lambda: "files changed" in running.model("swapped")["reason"], "the change is noticed")
    with pytest.raises(ModelNotReady):
        client.infer("swapped", tensor(1))
    client.load("swapped")
    assert client.infer("swapped", {"x": np.ones((1, 8), np.float32)})["y"].shape == (1, 8)
    with pytest.raises(InvalidRequest):
        client.infer("swapped", tensor(1))
    client.unload("swapped")


def test_unloading_answers_what_is_queued(served, tmp_path):
    """Every request admitted before is answered, every later one refused, and a load that follows waits its turn."""
    running, models = served
    run = Gate(tmp_path / "run")
    write_fake(models / "queued", manifest="max_batch_size = 1", run_gate=str(run))

    async def scenario():
        async with AsyncClient(running.infer_socket) as client, AsyncClient(running.infer_socket) as admin:
            await admin.load("queued")
            flying = [asyncio.ensure_future(settled(client.infer("queued", tensor(MAGIC["wait"]))))]
            flying += [asyncio.ensure_future(settled(client.infer("queued", tensor(value)))) for value in range(50)]
            await until(lambda: running.model("queued")["queued"] == 49)
            unloading = [asyncio.ensure_future(admin.unload("queued")) for _ in range(3)]
            await until(lambda: running.model("queued")["state"] == "unloading")
            loading = [asyncio.ensure_future(admin.load("queued")) for _ in range(3)]
            refused = await settled(client.infer("queued", tensor(1)))
            assert isinstance(refused, ModelNotReady)
            assert not await client.model_ready("queued")
            assert not any(task.done() for task in [*flying, *unloading, *loading])
            run.open()
            answers = await asyncio.gather(*flying)
            assert [float(answer["y"][0, 0]) for answer in answers] == [float(MAGIC["wait"]), *range(50)]
            await asyncio.gather(*unloading, *loading)
            assert (await client.infer("queued", tensor(3)))["y"][0, 0] == 3

    asyncio.run(scenario())


def test_cancelled_requests_do_not_run_and_do_not_keep_an_unload_waiting(served, tmp_path):
    """One was running: its answer is dropped. The others were queued: the backend never sees them."""
    running, models = served
    run = Gate(tmp_path / "run")
    write_fake(models / "fickle", manifest="max_batch_size = 1", run_gate=str(run))

    async def scenario():
        async with AsyncClient(running.infer_socket) as client, AsyncClient(running.infer_socket) as other:
            await other.load("fickle")
            tasks = [asyncio.ensure_future(client.infer("fickle", tensor(MAGIC["wait"])))]
            await until(lambda: running.model("fickle")["running"] == 1)
            tasks += [asyncio.ensure_future(client.infer("fickle", tensor(MAGIC["crash"]))) for _ in range(8)]
            await until(lambda: running.model("fickle")["queued"] == 7)
            survivor = asyncio.ensure_future(other.infer("fickle", tensor(4)))
            await until(lambda: running.model("fickle")["queued"] == 8)
            tasks[1].cancel()  # waits in the worker's second slot, so it would crash it: the worker is asked to run it
            for task in tasks[2:]:
                task.cancel()
            await until(lambda: running.model("fickle")["queued"] == 1)
            assert not survivor.done()
            tasks[0].cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert all(task.cancelled() for task in tasks)
            return survivor

    async def whole():
        survivor = await scenario()
        with pytest.raises(ApplianceError):
            await survivor  # its connection was closed with it waiting
        run.open()
        async with AsyncClient(running.infer_socket) as client:
            await until(lambda: running.model("fickle")["running"] == 0)
            running.wait_for_state("fickle", "ready")
            assert running.model("fickle")["restarts"] <= 1
            assert (await client.infer("fickle", tensor(9)))["y"][0, 0] == 9
            await client.unload("fickle")

    asyncio.run(whole())
    statistics = running.get("/v2/models/fickle/stats")["model_stats"][0]
    assert statistics["inference_stats"]["success"]["count"] == 1


def test_metadata_health_and_lists_are_answered_while_a_model_loads(served, tmp_path, client):
    running, models = served
    gate = Gate(tmp_path / "load")
    write_adder(models / "present", 1)
    client.load("present")
    write_fake(models / "coming", load_gate=str(gate))
    with Client(running.infer_socket, timeout=PATIENCE_SECONDS) as admin:
        loading = threading.Thread(target=admin.load, args=("coming",))
        loading.start()
        running.wait_for_state("coming", "loading")
        for _ in range(20):
            assert client.server_live()
            assert client.server_ready()
            assert client.model_ready("present")
            assert not client.model_ready("coming")
            assert client.model_metadata("present").inputs[0].name == "x"
            assert "coming" in {entry.name for entry in client.repository_index()}
            assert client.infer("present", tensor(1))["y"][0, 0] == 2
            for refused in (client.model_metadata, lambda name: client.infer(name, tensor(1))):
                with pytest.raises(ModelNotReady):
                    refused("coming")
            assert running.get("/v2/models/present")["name"] == "present"
            assert running.http("GET", "/metrics")[0] == 200
        assert loading.is_alive()
        gate.open()
        loading.join(PATIENCE_SECONDS)
    assert client.infer("coming", tensor(1))["y"][0, 0] == 1
    client.unload("coming")
    client.unload("present")


def test_loads_and_unloads_of_one_model_join_and_repeat_for_free(served, tmp_path):
    running, models = served
    gate, log = Gate(tmp_path / "load"), tmp_path / "log-of-loads"
    write_fake(models / "once", load_gate=str(gate), load_log=str(log))

    def loads() -> int:
        return len(log.read_text().split()) if log.exists() else 0

    async def scenario():
        async with AsyncClient(running.infer_socket) as client:
            leaver = AsyncClient(running.infer_socket)
            left = asyncio.ensure_future(settled(leaver.load("once")))
            await until(lambda: loads() == 1)
            loading = [asyncio.ensure_future(client.load("once")) for _ in range(10)]
            await client.server_live()
            await leaver.close()  # whoever asked first leaves; the others still get their model
            await left
            gate.open()
            await asyncio.gather(*loading)
            assert loads() == 1
            await asyncio.gather(*(client.load("once") for _ in range(5)))
            assert loads() == 1
            await asyncio.gather(*(client.unload("once") for _ in range(10)))
            await client.unload("once")
            assert running.model("once")["state"] == "unloaded"
            assert running.model("once")["pid"] is None
            await client.load("once")
            assert loads() == 2
            await client.unload("once")

    asyncio.run(scenario())


@pytest.mark.timeout(240)
def test_eight_threads_load_unload_and_infer_one_model_at_will(served):
    """Nothing but answers, not-ready and shutting-down is seen, nothing locks up, and it works afterwards."""
    running, models = served
    write_fake(models / "shared", c_us=200)
    seen: Counter = Counter()
    wrong: list = []
    end = time.monotonic() + 60

    def work(number: int) -> None:
        random = np.random.default_rng(number)
        with Client(running.infer_socket, timeout=PATIENCE_SECONDS) as client:
            while time.monotonic() < end:
                value = float(random.integers(1, 90))
                action = random.random()
                try:
                    if action < 0.05:
                        client.load("shared")
                    elif action < 0.08:
                        client.unload("shared")
                    elif client.infer("shared", tensor(value))["y"][0, 0] != value:
                        wrong.append(value)
                    seen["ok"] += 1
                except ApplianceError as error:
                    seen[error.kind] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * PATIENCE_SECONDS)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert set(seen) <= {"ok", "model-not-ready", "model-not-found"}, seen
    assert seen["ok"] > 100
    with Client(running.infer_socket, timeout=PATIENCE_SECONDS) as client:
        client.load("shared")
        status = running.model("shared")
        assert (status["state"], status["queued"], status["running"]) == ("ready", 0, 0)
        assert client.infer("shared", tensor(3))["y"][0, 0] == 3
        client.unload("shared")
    pids = {model["pid"] for model in running.get("/admin/models")["models"]} - {None}
    wait_until(lambda: set(running.workers()) == pids, "no worker is left over")
