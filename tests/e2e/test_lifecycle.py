"""Starting, stopping and being killed: what was admitted is answered, and nothing is left behind."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "plugins_fake"))

from fake_backend import MAGIC

from appliance_client import ApplianceError, AsyncClient, Client, ConnectionLost, ShuttingDown
from support.askers import GrpcInfer, HttpInfer
from support.daemon import FAKE_BACKEND, children, is_alive, start_daemon, wait_until
from support.models import Gate, write_fake, write_identity

#: Longer than any test waits: a daemon that ends within the test's patience did not wait for its grace.
FOREVER = 3600


def tensor(value: float, rows: int = 1, width: int = 16) -> dict[str, np.ndarray]:
    return {"x": np.full((rows, width), value, np.float32)}


async def settled(awaitable):
    """A request's answer or error."""
    try:
        return await awaitable
    except ApplianceError as error:
        return error


async def until(condition) -> None:
    """`wait_until` for coroutines."""
    await asyncio.to_thread(wait_until, condition, "the condition holds")


@pytest.fixture
def launch(tmp_path):
    """Starts daemons with the fake backend in one socket directory; ends whatever is still there."""
    started = []

    def start(wait: bool = True, **sections):
        running = start_daemon(tmp_path, tmp_path / "models", wait=wait, environment=FAKE_BACKEND, **sections)
        started.append(running)
        return running

    yield start
    for running in started:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()


def left_behind(running, pids) -> list:
    """What a daemon that ended has not taken with it."""
    files = [path.name for path in running.socket_dir.iterdir() if path.name != "applianced.lock"]
    return files + [pid for pid in pids if is_alive(pid)]


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


@pytest.mark.parametrize("to_workers_too", [False, True], ids=["daemon", "whole-group"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_what_was_admitted_before_the_signal_is_answered_and_nothing_new_is_taken(
    launch, tmp_path, number, to_workers_too
):
    """Also where the signal goes to the whole control group, as systemd sends it by default."""
    run = Gate(tmp_path / "run")
    write_fake(tmp_path / "models" / "slow", manifest="max_batch_size = 1", run_gate=str(run))
    running = launch(shutdown={"grace_seconds": FOREVER})
    workers = running.workers()

    async def scenario():
        async with AsyncClient(running.infer_socket) as client, AsyncClient(running.infer_socket) as idle:
            assert await idle.server_live()
            flying = [asyncio.ensure_future(settled(client.infer("slow", tensor(MAGIC["wait"]))))]
            flying += [asyncio.ensure_future(settled(client.infer("slow", tensor(value)))) for value in range(20)]
            await until(lambda: running.model("slow")["queued"] == 19)
            for pid in [*(workers if to_workers_too else []), running.pid]:
                os.kill(pid, number)
            await until(lambda: not connects(running.infer_socket))
            assert not any(task.done() for task in flying)
            run.open()
            answers = await asyncio.gather(*flying)
            assert [float(answer["y"][0, 0]) for answer in answers] == [float(MAGIC["wait"]), *range(20)]

    asyncio.run(scenario())
    assert running.process.wait(45) == 0
    assert left_behind(running, workers) == []


@pytest.mark.parametrize("transport", [HttpInfer, GrpcInfer])
def test_what_came_over_other_transports_is_answered_too(launch, tmp_path, transport):
    run = Gate(tmp_path / "run")
    write_fake(tmp_path / "models" / "slow", manifest="max_batch_size = 1", run_gate=str(run))
    running = launch(shutdown={"grace_seconds": FOREVER})
    askers = [transport(running) for _ in range(8)]
    outcomes = {}

    def ask(number: int) -> None:
        outcomes[number] = askers[number]("slow", MAGIC["wait"] if number == 0 else number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for number, thread in enumerate(threads):
        thread.start()
        wait_until(lambda number=number: taken(running) > number, "it is taken")
    running.process.send_signal(signal.SIGTERM)
    wait_until(lambda: not connects(running.infer_socket), "the daemon drains")
    assert outcomes == {}
    run.open()
    for thread in threads:
        thread.join(45)
    assert outcomes == {0: MAGIC["wait"], **{number: number for number in range(1, 8)}}
    assert running.process.wait(45) == 0
    for asker in askers:
        asker.close()


def taken(running) -> int:
    """Requests that wait or run."""
    status = running.model("slow")
    return status["queued"] + status["running"]


def connects(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
        return True


def test_a_draining_daemon_refuses_new_requests_on_old_connections(launch, tmp_path):
    """Readiness is false from then on, and the refusal is retryable elsewhere."""
    run = Gate(tmp_path / "run")
    write_fake(tmp_path / "models" / "slow", run_gate=str(run))
    running = launch(shutdown={"grace_seconds": FOREVER})

    def raw(path: str) -> int:
        return running.http("GET", path)[0]

    assert raw("/v2/health/ready") == 200
    import grpc

    channel = grpc.insecure_channel(f"unix:{running.grpc_socket}")
    ready = channel.unary_unary("/inference.GRPCInferenceService/ServerReady")
    infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    assert ready(b"", timeout=30) == b"\x08\x01"

    async def scenario():
        async with AsyncClient(running.infer_socket) as client:
            held = asyncio.ensure_future(settled(client.infer("slow", tensor(MAGIC["wait"]))))
            await until(lambda: running.model("slow")["running"] == 1)
            connection = client._current
            running.process.send_signal(signal.SIGTERM)
            await until(lambda: not connects(running.infer_socket))
            # The client opens a new connection after GOAWAY; what an old client would do is send on the old one.
            codec = client._codec
            from appliance_client.retry import Deadline

            refused = asyncio.get_running_loop().create_future()
            request = codec.request("slow", tensor(1), (), "", None)
            await connection.infer(codec, request, Deadline(None), lambda outcome, _: refused.set_result(outcome))
            error = await refused
            assert isinstance(error, ShuttingDown)
            assert error.is_retryable
            run.open()
            assert (await held)["y"][0, 0] == MAGIC["wait"]

    asyncio.run(scenario())
    with pytest.raises(grpc.RpcError) as caught:
        infer(b"\x0a\x04slow", timeout=30)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    channel.close()
    assert running.process.wait(45) == 0


def test_after_the_grace_the_rest_is_refused_and_the_daemon_ends(launch, tmp_path):
    write_fake(tmp_path / "models" / "slow", manifest="max_batch_size = 1")
    running = launch(shutdown={"grace_seconds": 0.2})
    workers = running.workers()

    async def scenario():
        async with AsyncClient(running.infer_socket) as client:
            flying = [asyncio.ensure_future(settled(client.infer("slow", tensor(MAGIC["hang"]))))]
            flying += [asyncio.ensure_future(settled(client.infer("slow", tensor(value)))) for value in range(5)]
            await until(lambda: running.model("slow")["queued"] == 4)
            running.process.send_signal(signal.SIGTERM)
            for error in await asyncio.gather(*flying):
                assert isinstance(error, ShuttingDown)
                assert error.is_retryable

    asyncio.run(scenario())
    assert running.process.wait(45) == 0
    assert left_behind(running, workers) == []


def test_an_answer_larger_than_the_socket_holds_still_leaves(launch, tmp_path):
    """32 MB that a slow reader has not taken when the last request is done."""
    run = Gate(tmp_path / "run")
    write_fake(
        tmp_path / "models" / "large",
        run_gate=str(run),
        inputs=[["x", "FP32", [-1, 1 << 20]]],
        outputs=[["y", "FP32", [-1, 1 << 20]]],
    )
    running = launch(shutdown={"grace_seconds": FOREVER})
    with Client(running.infer_socket, timeout=60) as client:
        client.infer("large", tensor(1, width=1 << 20))

    async def scenario():
        async with AsyncClient(running.infer_socket) as client:
            flying = asyncio.ensure_future(client.infer("large", tensor(MAGIC["wait"], rows=8, width=1 << 20)))
            await until(lambda: running.model("large")["running"] == 1)
            running.process.send_signal(signal.SIGTERM)
            await until(lambda: not connects(running.infer_socket))
            run.open()
            answer = await flying
            assert answer["y"].shape == (8, 1 << 20)
            assert np.all(answer["y"] == MAGIC["wait"])

    asyncio.run(scenario())
    assert running.process.wait(45) == 0


@pytest.mark.parametrize("is_ready", [False, True], ids=["at-start", "later"])
def test_a_signal_while_a_model_loads_ends_the_daemon_at_once(launch, tmp_path, is_ready):
    """The load never ends by itself, and the grace is for requests, not for loads."""
    gate, log = Gate(tmp_path / "load"), tmp_path / "log-of-loads"
    if is_ready:
        (tmp_path / "models").mkdir()
        running = launch(shutdown={"grace_seconds": FOREVER})
    write_fake(tmp_path / "models" / "slow", load_gate=str(gate), load_log=str(log))
    if not is_ready:
        running = launch(wait=False, shutdown={"grace_seconds": FOREVER})

    async def scenario():
        async with AsyncClient(running.infer_socket) as client:
            loading = asyncio.ensure_future(settled(client.load("slow")))
            await until(log.exists)
            running.process.send_signal(signal.SIGTERM)
            assert isinstance(await loading, (ShuttingDown, ConnectionLost))

    asyncio.run(scenario())
    assert running.process.wait(45) == 0
    worker = int(log.read_text().split()[0])
    assert left_behind(running, [worker]) == []
    assert "Traceback" not in running.log


@pytest.mark.parametrize("is_reload", [False, True], ids=["unload", "reload"])
def test_a_signal_while_a_model_unloads_lets_its_requests_finish(launch, tmp_path, is_reload):
    """Likewise for the instance that a reload has replaced and that still works off what it admitted."""
    run = Gate(tmp_path / "run")
    write_fake(tmp_path / "models" / "slow", manifest="max_batch_size = 1", run_gate=str(run))
    running = launch(shutdown={"grace_seconds": FOREVER})
    workers = running.workers()

    async def scenario():
        async with AsyncClient(running.infer_socket) as client, AsyncClient(running.infer_socket) as admin:
            flying = [asyncio.ensure_future(settled(client.infer("slow", tensor(MAGIC["wait"]))))]
            flying += [asyncio.ensure_future(settled(client.infer("slow", tensor(value)))) for value in range(5)]
            await until(lambda: running.model("slow")["queued"] == 4)
            if is_reload:
                write_fake(tmp_path / "models" / "slow", version=2, run_gate=str(run))
                await admin.load("slow")
                assert running.model("slow")["version"] == "2"
                workers.extend(running.workers())
            else:
                unloading = asyncio.ensure_future(settled(admin.unload("slow")))
                await until(lambda: running.model("slow")["state"] == "unloading")
            running.process.send_signal(signal.SIGTERM)
            await until(lambda: not connects(running.infer_socket))
            run.open()
            answers = await asyncio.gather(*flying)
            assert [float(answer["y"][0, 0]) for answer in answers] == [float(MAGIC["wait"]), *range(5)]
            if not is_reload:
                await unloading

    asyncio.run(scenario())
    assert running.process.wait(45) == 0
    assert left_behind(running, workers) == []


def test_idle_clients_do_not_keep_the_daemon_from_ending(launch, tmp_path):
    write_fake(tmp_path / "models" / "steady")
    running = launch(shutdown={"grace_seconds": FOREVER})
    workers = running.workers()
    client = Client(running.infer_socket)
    client.infer("steady", tensor(1))
    silent = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    for probe, path in zip(silent, (running.infer_socket, running.http_socket, running.grpc_socket), strict=True):
        probe.connect(path)
    assert running.stop() == 0
    assert left_behind(running, workers) == []
    for probe in silent:
        probe.close()
    client.close()


def test_a_second_signal_changes_nothing(launch, tmp_path):
    run = Gate(tmp_path / "run")
    write_fake(tmp_path / "models" / "slow", run_gate=str(run))
    running = launch(shutdown={"grace_seconds": FOREVER})

    async def scenario():
        async with AsyncClient(running.infer_socket) as client:
            flying = asyncio.ensure_future(client.infer("slow", tensor(MAGIC["wait"])))
            await until(lambda: running.model("slow")["running"] == 1)
            running.process.send_signal(signal.SIGTERM)
            await until(lambda: not connects(running.infer_socket))
            running.process.send_signal(signal.SIGTERM)
            running.process.send_signal(signal.SIGINT)
            run.open()
            assert (await flying)["y"][0, 0] == MAGIC["wait"]

    asyncio.run(scenario())
    assert running.process.wait(45) == 0


@pytest.mark.parametrize("is_loading", [False, True], ids=["probing", "loading"])
def test_a_child_that_is_only_just_starting_does_not_outlive_the_daemon(launch, tmp_path, is_loading):
    """Killed before the child has asked the kernel for its death signal; what it would load never ends."""
    (tmp_path / "models").mkdir()
    for _ in range(3):
        running = launch()
        write_fake(tmp_path / "models" / "endless", on_load="hang-gil")
        sender = threading.Thread(target=load_whatever, args=(running.infer_socket, "endless"))
        sender.start()
        wanted = b"appliance.worker\0" if is_loading else b"appliance.worker.probe\0"
        wait_until(lambda wanted=wanted, running=running: has_child(running, wanted), "the child is being started")
        started = running.workers()
        running.process.kill()
        running.process.wait()
        wait_until(lambda started=started: not any(map(is_alive, started)), "the children are gone")
        sender.join()
        shutil.rmtree(tmp_path / "models" / "endless")


def has_child(running, wanted: bytes) -> bool:
    """True while the daemon has a child with `wanted` in its command line."""
    with contextlib.suppress(OSError):
        return any(wanted in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in running.workers())
    return False


def load_whatever(path: str, model: str) -> None:
    with contextlib.suppress(ApplianceError), Client(path, timeout=45) as client:
        client.load(model)


@pytest.mark.parametrize("occupied", ["idle", "running", "hung", "stopped", "loading"])
def test_nothing_survives_a_daemon_that_is_killed(launch, tmp_path, occupied, capsys):
    """No process, no socket, no shared memory, whatever the workers are at; the next start is clean."""
    load, log = Gate(tmp_path / "load"), tmp_path / "log-of-loads"
    write_fake(tmp_path / "models" / "victim", load_log=str(log))
    write_identity(tmp_path / "models" / "identity")
    before = shared_memory()
    running = launch()
    workers = running.workers()
    assert len(workers) == 2
    workers = children(running.pid)  # whoever else is there shall go too
    if occupied == "loading":
        write_fake(tmp_path / "models" / "late", load_gate=str(load), load_log=str(log))

    async def scenario():
        async with AsyncClient(running.infer_socket) as client:
            work = []
            if occupied in ("running", "hung"):
                word = "hang" if occupied == "running" else "hang-gil"
                work.append(asyncio.ensure_future(settled(client.infer("victim", tensor(MAGIC[word])))))
                await until(lambda: running.model("victim")["running"] == 1)
            elif occupied == "stopped":
                os.kill(running.model("victim")["pid"], signal.SIGSTOP)
            elif occupied == "loading":
                work.append(asyncio.ensure_future(settled(client.load("late"))))
                await until(lambda: len(log.read_text().split()) == 2)
                workers.append(int(log.read_text().split()[1]))
            running.process.kill()
            running.process.wait()
            began = time.monotonic()
            await until(lambda: left_behind(running, workers) == [])
            with capsys.disabled():
                print(f"\n[{occupied}: all gone {time.monotonic() - began:.3f} s after kill -9 of the daemon]")
            for outcome in await asyncio.gather(*work):
                assert isinstance(outcome, ConnectionLost)

    asyncio.run(scenario())
    assert shared_memory() == before
    load.open()
    again = launch()
    with Client(again.infer_socket, timeout=45) as client:
        assert client.infer("victim", tensor(2))["y"][0, 0] == 2
    assert again.stop() == 0


def test_stale_sockets_do_not_hinder_the_next_start(launch, tmp_path):
    """As they stand where the guardian of the daemon was killed with it."""
    write_fake(tmp_path / "models" / "steady")
    directory = tmp_path / "s"
    directory.mkdir()
    for name in ("infer", "grpc", "http"):
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(directory / f"{name}.sock"))
    running = launch()
    with Client(running.infer_socket) as client:
        assert client.infer("steady", tensor(2))["y"][0, 0] == 2
    assert running.stop() == 0


def test_the_guardian_leaves_alone_what_is_not_the_daemons(launch, tmp_path):
    """A daemon that refused to start over a file in its place has removed nothing when it is gone."""
    (tmp_path / "models").mkdir()
    directory = tmp_path / "s"
    directory.mkdir()
    (directory / "http.sock").write_text("somebody's notes")
    with pytest.raises(AssertionError, match="no socket"):
        launch()
    wait_until(lambda: not (directory / "infer.sock").exists(), "what was the daemon's is gone")
    assert (directory / "http.sock").read_text() == "somebody's notes"


def test_a_successor_keeps_its_sockets_when_the_guardian_of_the_killed_one_is_late(launch, tmp_path):
    (tmp_path / "models").mkdir()
    for _ in range(5):
        running = launch()
        running.process.kill()
        running.process.wait()
    last = launch()
    with Client(last.infer_socket) as client:
        assert client.server_ready()
    names = {path.name for path in last.socket_dir.iterdir()}
    assert {"infer.sock", "grpc.sock", "http.sock", "endpoints.json"} <= names


def test_sixteen_models_load_side_by_side(launch, tmp_path):
    """All sixteen are in their backends at once, and the daemon answers meanwhile."""
    gate, log = Gate(tmp_path / "load"), tmp_path / "log-of-loads"
    names = [f"model-{number:02}" for number in range(16)]
    for name in names:
        write_fake(tmp_path / "models" / name, load_gate=str(gate), load_log=str(log))
    running = launch(wait=False)
    wait_until(lambda: log.exists() and len(log.read_text().split()) == 16, "all sixteen load")
    with Client(running.infer_socket, timeout=45) as client:
        assert client.server_live()
        assert not client.server_ready()
        assert {model["state"] for model in running.get("/admin/models")["models"]} == {"loading"}
        gate.open()
        wait_until(client.server_ready, "all are loaded")
        for number, name in enumerate(names):
            assert client.infer(name, tensor(number))["y"][0, 0] == number
    workers = running.workers()
    assert len(workers) == 16
    assert running.stop() == 0
    assert left_behind(running, workers) == []
