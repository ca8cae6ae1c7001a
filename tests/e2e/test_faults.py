"""Workers that crash, hang, flood and lie: what breaks is one worker's requests, never the daemon or another model."""

import asyncio
import contextlib
import os
import pickle
import resource
import signal
import sys
import time
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
    BackendError,
    Client,
    InvalidRequest,
    ModelNotReady,
    NoPlacement,
    WorkerLost,
)
from support.daemon import (
    FAKE_BACKEND,
    PATIENCE_SECONDS,
    children,
    is_alive,
    open_descriptors,
    start_daemon,
    wait_until,
)
from support.models import Gate, save, write_fake, write_identity

#: What a load that crashed or hung may be told as.
LOAD_FAILED = (BackendError, WorkerLost, NoPlacement)


def tensor(value: float, rows: int = 1) -> dict[str, np.ndarray]:
    """A request of the fake backend's default shape; its first element is `value`."""
    return {"x": np.full((rows, 16), value, np.float32)}


def command(word: str) -> dict[str, np.ndarray]:
    """A request that commands a fault."""
    return tensor(MAGIC[word])


class Faulty:
    """A daemon with the fake backend, to which tests add models of their own."""

    def __init__(self, running, models: Path) -> None:
        self.running = running
        self.models = models
        self.client = Client(running.infer_socket, timeout=PATIENCE_SECONDS)

    def add(self, name: str, **behaviour) -> str:
        """Write a model and load it."""
        write_fake(self.models / name, **behaviour)
        self.client.load(name)
        return name

    def pid(self, name: str) -> int | None:
        return self.running.model(name)["pid"]

    def outcome(self, model: str, inputs) -> ApplianceError | None:
        """The error a request ends with, or None; an answer must be an echo."""
        try:
            answer = self.client.infer(model, inputs)
        except ApplianceError as error:
            return error
        assert np.array_equal(answer["y"], inputs["x"])
        return None

    def answers(self, model: str) -> bool:
        return self.outcome(model, tensor(7)) is None

    def wait_until_answers(self, model: str) -> None:
        wait_until(lambda: self.answers(model), f"{model} answers again: {self.running.log[-2000:]}")


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    directory = tmp_path_factory.mktemp("faults")
    models = directory / "models"
    write_fake(models / "steady")
    write_identity(models / "identity")
    sections = {"workers": {"heartbeat_seconds": 0.5, "backoff_seconds": 0.05, "crashes_to_quarantine": 3}}
    with start_daemon(directory, models, environment=FAKE_BACKEND, **sections) as running:
        faulty = Faulty(running, models)
        yield faulty
        faulty.client.close()
        assert faulty.running.process.poll() is None


async def settled(awaitable):
    """A request's answer or error."""
    try:
        return await awaitable
    except ApplianceError as error:
        return error


# -------------------------------------------------------------------------------------------------- death


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS], ids=lambda number: number.name)
def test_death_of_a_worker_fails_what_it_had_and_nothing_else(faulty, tmp_path, number):
    """In flight: WorkerLost. Queued: answered after the restart. Not ready until then. Other models: untouched."""
    load, run = Gate(tmp_path / "load"), Gate(tmp_path / "run")
    load.open()
    name = f"dies-{number.name.lower()}"
    faulty.add(name, manifest="max_batch_size = 1", load_gate=str(load), run_gate=str(run))
    load.shut()
    pid = faulty.pid(name)

    async def scenario():
        async with (
            AsyncClient(faulty.running.infer_socket) as client,
            AsyncClient(faulty.running.infer_socket) as other,
        ):
            flying = [asyncio.ensure_future(settled(client.infer(name, command("wait"))))]
            await until(lambda: faulty.running.model(name)["running"] == 1)
            flying.append(asyncio.ensure_future(settled(client.infer(name, tensor(1)))))
            await until(lambda: faulty.running.model(name)["running"] == 2)
            queued = [asyncio.ensure_future(settled(client.infer(name, tensor(2 + place)))) for place in range(8)]
            await until(lambda: faulty.running.model(name)["queued"] == 8)
            os.kill(pid, number)
            lost = await asyncio.gather(*flying)
            assert [type(error) for error in lost] == [WorkerLost, WorkerLost]
            assert all(error.is_retryable for error in lost)
            assert number.name in str(lost[0])
            assert not await other.model_ready(name)
            assert isinstance(await settled(other.infer(name, tensor(1))), ModelNotReady)
            assert (await other.infer("steady", tensor(5)))["y"][0, 0] == 5
            assert not any(task.done() for task in queued)
            load.open()
            run.open()
            answers = await asyncio.gather(*queued)
            assert [float(answer["y"][0, 0]) for answer in answers] == [2.0 + place for place in range(8)]
            assert await other.model_ready(name)

    asyncio.run(scenario())
    status = faulty.running.model(name)
    assert status["restarts"] == 1
    assert status["pid"] != pid
    assert not is_alive(pid)
    assert (status["queued"], status["running"]) == (0, 0)


async def until(condition) -> None:
    """`wait_until` for coroutines; the condition itself may block."""
    await asyncio.to_thread(wait_until, condition, "the condition holds")


@pytest.mark.parametrize("is_loaded", [False, True], ids=["idle", "under-load"])
def test_a_model_whose_worker_was_killed_answers_again(faulty, is_loaded, record_property, capsys):
    """ONNX Runtime's worker; while it is away only the retryable kinds are seen, and nobody else sees anything."""
    name = f"recovers-{is_loaded}".lower()
    write_identity(faulty.models / name)
    faulty.client.load(name)
    pid = faulty.pid(name)
    killed = asyncio.Event()
    done = asyncio.Event()
    recovery = asyncio.Event()
    recovered = []

    async def load_on(model: str, errors: list) -> None:
        async with AsyncClient(faulty.running.infer_socket) as client:
            number = 0
            while not done.is_set():
                number += 1
                answer = await settled(client.infer(model, tensor(number % 97)))
                if isinstance(answer, ApplianceError):
                    errors.append(answer)
                    await asyncio.sleep(0.002)
                    continue
                assert answer["y"][0, 0] == number % 97
                # Idle, a request that came before the death was noticed may have waited for the next worker.
                if model == name and killed.is_set() and (errors or not is_loaded) and not recovered:
                    recovered.append(time.monotonic())
                    recovery.set()

    async def scenario():
        mine, others = [], []
        tasks = [asyncio.ensure_future(load_on(name, mine)) for _ in range(8)] if is_loaded else []
        tasks += [asyncio.ensure_future(load_on("steady", others)) for _ in range(2)]
        await asyncio.sleep(0)
        if is_loaded:
            await until(lambda: faulty.running.model(name)["running"] > 0)
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        killed.set()
        if not is_loaded:
            tasks.append(asyncio.ensure_future(load_on(name, mine)))
        async with asyncio.timeout(PATIENCE_SECONDS):
            await recovery.wait()
        done.set()
        await asyncio.gather(*tasks)
        assert others == []
        assert {type(error) for error in mine} <= {WorkerLost, ModelNotReady}
        return recovered[0] - began, mine

    seconds, errors = asyncio.run(scenario())
    record_property("recovery_seconds", seconds)
    with capsys.disabled():
        lost = sum(isinstance(error, WorkerLost) for error in errors)
        print(
            f"\n[{'under load' if is_loaded else 'idle'}: answers {seconds:.3f} s after kill -9, {lost} requests lost]"
        )
    assert not is_alive(pid)


def test_a_worker_that_exits_by_itself_is_replaced(faulty):
    name = faulty.add("exits")
    assert isinstance(faulty.outcome(name, command("exit")), WorkerLost)
    faulty.wait_until_answers(name)


def test_what_a_worker_started_goes_with_it(faulty):
    """A plugin's own child does not survive the worker, nor keep the daemon waiting for the worker's last words."""
    name = faulty.add("parent", child=True)
    pid = faulty.pid(name)
    (child,) = children(pid)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid) and not is_alive(child), "the worker and its child are gone")
    faulty.wait_until_answers(name)
    (child,) = children(faulty.pid(name))
    faulty.client.unload(name)
    wait_until(lambda: not is_alive(child), "the child is gone")


# -------------------------------------------------------------------------------------------------- hangs


@pytest.mark.parametrize("word", ["hang", "hang-gil"])
def test_a_worker_whose_batch_never_ends_is_killed_and_replaced(faulty, word):
    name = faulty.add(f"never-{word}", batch={"max_batch_seconds": 0.4})
    pid = faulty.pid(name)
    error = faulty.outcome(name, command(word))
    assert isinstance(error, WorkerLost)
    faulty.wait_until_answers(name)
    assert not is_alive(pid)
    assert faulty.answers("steady")


@pytest.mark.parametrize("is_busy", [False, True], ids=["idle", "busy"])
def test_a_stopped_worker_is_noticed_and_replaced(faulty, tmp_path, is_busy):
    run = Gate(tmp_path / "run")
    name = faulty.add(f"stopped-{is_busy}".lower(), batch={"max_batch_seconds": 0.4}, run_gate=str(run))
    pid = faulty.pid(name)
    os.kill(pid, signal.SIGSTOP)
    if is_busy:
        assert isinstance(faulty.outcome(name, tensor(3)), WorkerLost)
    wait_until(lambda: not is_alive(pid), "the stopped worker is gone")
    faulty.wait_until_answers(name)


def test_a_daemon_that_stood_still_does_not_blame_its_workers(faulty):
    """Stopped for longer than every limit, and continued: the workers were fine all the time."""
    before = {name: faulty.pid(name) for name in ("steady", "identity")}
    os.kill(faulty.running.pid, signal.SIGSTOP)
    time.sleep(2.0)  # what is tested is that time passes: four heartbeats
    os.kill(faulty.running.pid, signal.SIGCONT)
    assert faulty.answers("steady")
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        assert {name: faulty.pid(name) for name in before} == before
        time.sleep(0.05)


# -------------------------------------------------------------------------------------------------- quarantine


def test_three_crashes_in_a_minute_quarantine_the_model_and_a_load_ends_it(faulty):
    name = faulty.add("fragile")
    for crash in range(3):
        # Each crash is another request, or the second would condemn the request rather than the model.
        inputs = tensor(MAGIC["kill"])
        inputs["x"][0, 1] = crash
        assert isinstance(faulty.outcome(name, inputs), WorkerLost)
        if crash < 2:
            faulty.wait_until_answers(name)
    status = faulty.running.wait_for_state(name, "quarantined")
    assert "3 times" in status["reason"]
    assert status["pid"] is None
    refused = faulty.outcome(name, tensor(1))
    assert isinstance(refused, ModelNotReady)
    assert "quarantined" in str(refused)
    assert not faulty.client.model_ready(name)
    assert faulty.answers("steady")
    faulty.client.load(name)
    assert faulty.running.model(name)["state"] == "ready"
    assert faulty.answers(name)


def test_a_load_gets_a_restarting_model_going_at_once(faulty, tmp_path):
    """The restart that hangs is given up and leaves no process."""
    load = Gate(tmp_path / "load")
    load.open()
    name = faulty.add("stuck", load_gate=str(load))
    load.shut()
    os.kill(faulty.pid(name), signal.SIGKILL)
    faulty.running.wait_for_state(name, "restarting")
    write_fake(faulty.models / name)
    faulty.client.load(name)
    assert faulty.answers(name)
    fresh = faulty.pid(name)
    loaded = {faulty.pid(model["name"]) for model in faulty.running.get("/admin/models")["models"]}
    wait_until(lambda: set(faulty.running.workers()) <= loaded, "no worker is left over")
    assert faulty.pid(name) == fresh


def test_quarantine_ends_by_itself(tmp_path):
    models = tmp_path / "models"
    write_fake(models / "fragile")
    workers = {"crashes_to_quarantine": 1, "quarantine_seconds": 0.3}
    daemon = start_daemon(tmp_path, models, environment=FAKE_BACKEND, workers=workers)
    with daemon as running, Client(running.infer_socket) as client:
        with pytest.raises(WorkerLost):
            client.infer("fragile", command("crash"))
        running.wait_for_state("fragile", "quarantined")
        running.wait_for_state("fragile", "ready")
        assert client.infer("fragile", tensor(1))["y"][0, 0] == 1


# -------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("word", ["crash", "kill", "exit", "raise", "big", "memory"])
@pytest.mark.parametrize("when", ["on_load", "on_warmup"])
def test_a_failing_load_is_an_error_and_leaves_nothing_behind(faulty, word, when):
    """Neither process nor descriptor, and the model was never ready."""
    name = f"fails-{when.replace('_', '-')}-{word}"
    write_fake(faulty.models / name, **{when: word})
    with pytest.raises(LOAD_FAILED):  # once, so that what is made on first use is there
        faulty.client.load(name)
    workers, descriptors = set(faulty.running.workers()), open_descriptors(faulty.running.pid)
    for _ in range(3):
        with pytest.raises(LOAD_FAILED) as caught:
            faulty.client.load(name)
        assert "/etc/appliance" not in str(caught.value)
        assert not faulty.client.model_ready(name)
    assert faulty.running.model(name)["state"] == "failed"
    assert faulty.running.model(name)["reason"]
    wait_until(lambda: set(faulty.running.workers()) == workers, "no worker is left over")
    wait_until(lambda: open_descriptors(faulty.running.pid) == descriptors, "no descriptor is left over")
    faulty.client.unload(name)
    assert faulty.running.model(name)["state"] == "unloaded"


def test_a_load_that_hangs_is_given_up(tmp_path):
    models = tmp_path / "models"
    write_fake(models / "hangs", on_load="hang-gil")
    write_fake(models / "late", on_warmup="hang")
    write_fake(models / "steady")
    with start_daemon(tmp_path, models, environment=FAKE_BACKEND, workers={"load_seconds": 2}) as running:
        states = {model["name"]: model["state"] for model in running.get("/admin/models")["models"]}
        assert states == {"hangs": "failed", "late": "failed", "steady": "ready"}
        assert "longer than 2 s" in running.model("hangs")["reason"]
        wait_until(lambda: len(running.workers()) == 1, "the hung workers are gone")


def onnx_bytes(tmp_path) -> bytes:
    """A model with enough weights that each cut hits another part of it."""
    weights = numpy_helper.from_array(np.ones((16, 16), np.float32), "w")
    float_ = TensorProto.FLOAT
    save(
        tmp_path / "whole",
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [("x", float_, ["n", 16])],
        [("y", float_, ["n", 16])],
        [weights],
    )
    return (tmp_path / "whole" / "1" / "model.onnx").read_bytes()


@pytest.mark.parametrize("kind", ["0", "1", "50", "99", "random", "text", "pickle"])
def test_an_artifact_that_is_no_model_is_a_load_error(faulty, tmp_path, kind):
    whole = onnx_bytes(tmp_path)
    contents = {
        "random": np.random.default_rng(7).bytes(20_000),
        "text": b"this is no model\n" * 100,
        "pickle": pickle.dumps({"weights": [1.0] * 100}),
    }
    content = contents[kind] if kind in contents else whole[: len(whole) * int(kind) // 100]
    name = f"broken-{kind}"
    path = faulty.models / name / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises((BackendError, ArtifactCorrupt, NoPlacement, InvalidRequest)) as caught:
        faulty.client.load(name)
    assert str(faulty.models) not in str(caught.value)
    assert faulty.running.model(name)["state"] == "failed"
    assert faulty.answers("steady")


def test_an_artifact_whose_digest_differs_is_refused(faulty):
    name = "tampered"
    write_identity(faulty.models / name)
    entry = '[[artifacts]]\npath = "1/model.onnx"\nformat = "onnx"\nsha256 = "' + "0" * 64 + '"'
    (faulty.models / name / "model.toml").write_text(f'schema = 1\nname = "{name}"\n{entry}\n')
    with pytest.raises(ArtifactCorrupt, match="sha256"):
        faulty.client.load(name)


@pytest.mark.parametrize("strict", [False, True])
def test_one_broken_startup_model_does_not_keep_the_daemon_from_serving(tmp_path, strict):
    """With `strict` the daemon serves the others just the same, and says that it is not ready."""
    models = tmp_path / "models"
    write_fake(models / "steady")
    write_fake(models / "broken", on_load="raise")
    (models / "garbage").mkdir()
    (models / "garbage" / "model.toml").write_text("this is = = no manifest")
    repository = {"strict": strict, "load": ["*"]}
    with start_daemon(tmp_path, models, wait=False, environment=FAKE_BACKEND, repository=repository) as running:
        for name, state in (("steady", "ready"), ("broken", "failed"), ("garbage", "failed")):
            assert running.wait_for_state(name, state)["state"] == state
        with Client(running.infer_socket) as client:
            if strict:
                wait_until(lambda: "ready after" in running.log, "the start is over")
                assert not client.server_ready()
            else:
                wait_until(client.server_ready, "the daemon is ready")
            assert client.infer("steady", tensor(1))["y"][0, 0] == 1
            if strict:
                write_fake(models / "broken")
                (models / "garbage" / "model.toml").unlink()
                write_identity(models / "garbage")
                client.load("broken")
                assert not client.server_ready()
                client.load("garbage")
                assert client.server_ready()


def test_a_startup_model_that_does_not_exist_counts_as_failed(tmp_path):
    models = tmp_path / "models"
    write_fake(models / "steady")
    repository = {"strict": True, "load": ["steady", "absent", "Not A Name"]}
    with start_daemon(tmp_path, models, wait=False, environment=FAKE_BACKEND, repository=repository) as running:
        wait_until(lambda: "ready after" in running.log, "the start is over")
        with Client(running.infer_socket) as client:
            assert not client.server_ready()
            assert client.infer("steady", tensor(1))["y"][0, 0] == 1


def test_a_tokenizer_that_makes_its_library_panic_fails_that_model_only(faulty):
    """The library's panics are no Exceptions in Python."""
    name = "panics"
    write_fake(faulty.models / name, manifest="[text]", inputs=[["input_ids", "INT64", [-1, -1]]])
    tokenizer = (
        '{"version": "1.0", "pre_tokenizer": {"type": "FixedLength", "length": 0}, '
        '"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'
    )
    manifest = faulty.models / name / "model.toml"
    (faulty.models / name / "tokenizer.json").write_text(tokenizer)
    manifest.write_text(manifest.read_text().replace("[text]\n", "") + '\n[text]\nmask = ""\n')
    with pytest.raises(ApplianceError, match="tokenizer") as caught:
        faulty.client.load(name)
    assert caught.value.kind == "invalid-manifest"
    assert faulty.answers("steady")


# -------------------------------------------------------------------------------------------------- memory


def test_a_backend_without_memory_fails_the_request_and_lives(faulty):
    name = faulty.add("poor")
    pid = faulty.pid(name)
    assert isinstance(faulty.outcome(name, command("memory")), BackendError)
    assert faulty.answers(name)
    assert faulty.pid(name) == pid


def test_a_worker_that_may_take_no_more_memory_is_the_only_one_to_suffer(faulty):
    """Its requests fail, whether it survives that or not; the daemon and the other models do not notice."""
    name = faulty.add("limited")
    pid = faulty.pid(name)
    size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (size + (1 << 20), size + (1 << 20)))
    errors = [faulty.outcome(name, command("leak")) for _ in range(16)]
    assert any(isinstance(error, (BackendError, WorkerLost)) for error in errors)
    assert faulty.answers("steady")
    if is_alive(pid):
        os.kill(pid, signal.SIGKILL)
    faulty.wait_until_answers(name)


# -------------------------------------------------------------------------------------------------- poison


def test_a_request_that_crashes_the_worker_twice_is_refused(faulty):
    """The model stays up, and requests that were in flight at the crashes are not taken for the cause."""
    name = faulty.add("poisoned", manifest="max_batch_size = 4", c_us=1000)
    seen = []

    async def scenario():
        done = asyncio.Event()

        async def innocent(client, value: float) -> None:
            while not done.is_set():
                answer = await settled(client.infer(name, tensor(value)))
                if isinstance(answer, ApplianceError):
                    assert isinstance(answer, (WorkerLost, ModelNotReady)), answer
                    await asyncio.sleep(0.005)
                else:
                    assert answer["y"][0, 0] == value

        async with AsyncClient(faulty.running.infer_socket) as client:
            others = [asyncio.ensure_future(innocent(client, value)) for value in range(1, 7)]
            async with asyncio.timeout(PATIENCE_SECONDS):
                while True:
                    answer = await settled(client.infer(name, command("crash")))
                    assert isinstance(answer, ApplianceError)
                    if isinstance(answer, ModelNotReady):
                        await asyncio.sleep(0.01)
                        continue
                    seen.append(type(answer))
                    if isinstance(answer, InvalidRequest):
                        assert "twice" in str(answer)
                        break
            done.set()
            await asyncio.gather(*others)

    asyncio.run(scenario())
    assert seen == [WorkerLost, WorkerLost, InvalidRequest]
    assert faulty.running.model(name)["state"] == "ready"
    assert faulty.running.model(name)["restarts"] == 2
    assert isinstance(faulty.outcome(name, command("crash")), InvalidRequest)
    assert faulty.answers(name)


def test_a_poison_request_sent_many_times_over_does_not_quarantine_the_model(faulty):
    name = faulty.add("flooded", manifest="max_batch_size = 2")

    async def scenario():
        async with AsyncClient(faulty.running.infer_socket) as client:
            return await asyncio.gather(*(settled(client.infer(name, command("crash"))) for _ in range(12)))

    outcomes = asyncio.run(scenario())
    assert {type(error) for error in outcomes} <= {WorkerLost, InvalidRequest, ModelNotReady}
    faulty.wait_until_answers(name)
    assert faulty.running.model(name)["restarts"] <= 2


# -------------------------------------------------------------------------------------------------- lies and noise


@pytest.mark.parametrize("word", ["missing", "rows", "dtype", "rank", "raise", "big"])
def test_a_backend_that_breaks_its_contract_fails_its_batch_as_internal(faulty, tmp_path, word):
    """Batch-mates of the request it goes wrong with get their answers; nobody is told a path."""
    run = Gate(tmp_path / "run")
    name = faulty.add(f"lies-{word}", run_gate=str(run))

    async def scenario():
        async with AsyncClient(faulty.running.infer_socket) as client:
            held = []
            for place in (1, 2):
                held.append(asyncio.ensure_future(client.infer(name, command("wait"))))
                await until(lambda place=place: faulty.running.model(name)["running"] == place)
            bad = asyncio.ensure_future(settled(client.infer(name, command(word))))
            await until(lambda: faulty.running.model(name)["queued"] == 1)
            mates = [asyncio.ensure_future(client.infer(name, tensor(value, rows=2))) for value in range(1, 6)]
            await until(lambda: faulty.running.model(name)["queued"] == 6)
            run.open()
            await asyncio.gather(*held)
            error = await bad
            assert isinstance(error, BackendError)
            assert "/etc/appliance" not in str(error)
            assert len(str(error)) < 1000
            for value, mate in enumerate(mates, 1):
                assert np.array_equal((await mate)["y"], tensor(value, rows=2)["x"])

    asyncio.run(scenario())
    assert faulty.answers(name)
    status = faulty.running.model(name)
    assert (status["queued"], status["running"]) == (0, 0)


def test_one_bad_request_never_fails_its_batch_mates(faulty):
    """An index out of range makes ONNX Runtime fail the whole batch; the others' rows are run again."""
    table = numpy_helper.from_array(np.arange(40, dtype=np.float32).reshape(10, 4), "table")
    name = "gather"
    save(
        faulty.models / name,
        [helper.make_node("Gather", ["table", "x"], ["y"], axis=0)],
        [("x", TensorProto.INT64, ["n"])],
        [("y", TensorProto.FLOAT, ["n", 4])],
        [table],
    )
    faulty.client.load(name)

    async def scenario():
        async with AsyncClient(faulty.running.infer_socket) as client:
            indices = [1_000_000 if place % 10 == 3 else place % 10 for place in range(200)]
            requests = [client.infer(name, {"x": np.array([index], np.int64)}) for index in indices]
            outcomes = await asyncio.gather(*map(settled, requests))
            for index, outcome in zip(indices, outcomes, strict=True):
                if index > 9:
                    assert isinstance(outcome, BackendError)
                else:
                    assert np.array_equal(outcome["y"], np.arange(4, dtype=np.float32)[None] + 4 * index)

    asyncio.run(scenario())
    status = faulty.running.model(name)
    assert (status["state"], status["queued"], status["running"]) == ("ready", 0, 0)


def test_a_flood_on_standard_error_blocks_nobody_and_does_not_fill_the_log(faulty):
    name = faulty.add("noisy")
    before = len(faulty.running.log)

    async def scenario():
        async with AsyncClient(faulty.running.infer_socket) as client:
            noise = [client.infer(name, command("print")) for _ in range(20)]
            quiet = [client.infer("steady", tensor(value)) for value in range(50)]
            await asyncio.gather(*noise, *quiet)

    asyncio.run(scenario())
    written = len(faulty.running.log) - before
    assert written < 1 << 20, "20 MiB were printed"
    assert "writes too much" in faulty.running.log


def test_a_worker_that_dies_while_it_floods_does_not_hold_the_daemon_up(faulty):
    name = faulty.add("last-words")
    with contextlib.suppress(ApplianceError):
        faulty.client.infer(name, command("print"))
    assert isinstance(faulty.outcome(name, command("crash")), WorkerLost)
    faulty.wait_until_answers(name)


def test_nothing_is_left_over_when_every_model_is_unloaded(faulty):
    """Runs last: whatever the tests above did to their models, unloading them gives everything back."""
    for model in faulty.running.get("/admin/models")["models"]:
        if model["name"] not in ("steady", "identity"):
            faulty.client.unload(model["name"])
    pids = {faulty.pid("steady"), faulty.pid("identity")}
    wait_until(lambda: set(children(faulty.running.pid)) == pids, "only two workers are left")
    maps = Path(f"/proc/{faulty.running.pid}/maps").read_text()
    assert maps.count("memfd:appliance-input") == 4
    assert maps.count("memfd:appliance-output") == 4
    assert "memfd:appliance-spill" not in maps
