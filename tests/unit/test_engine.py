"""The engine on its own, with real workers of the fake backend: who is told what, and how it ends."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))

from appliance.config import Config
from appliance.engine import Engine
from appliance.errors import BackendError, InvalidRequest, ModelNotFound, ModelNotReady, ShuttingDown
from appliance.inventory.cpu import read_inventory
from appliance.types import InferRequest, ModelState, Tensor
from support.daemon import FAKE_BACKEND
from support.models import Gate, write_fake
from support.workers import until


@pytest.fixture(autouse=True)
def _fake_backend(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", FAKE_BACKEND["PYTHONPATH"])  # for workers
    monkeypatch.syspath_prepend(FAKE_BACKEND["PYTHONPATH"])  # for discovery, which looks here for entry points


def run(tmp_path, scenario, **repository):
    """Run `scenario` with an engine on the repository ``models``, and stop it."""

    async def whole():
        places = {name: str(tmp_path / name) for name in ("cache", "state")}
        document = {
            "repository": {"path": str(tmp_path / "models"), **places, **repository},
            "tuning": {"enabled": False},
        }
        engine = Engine(Config.model_validate(document), read_inventory())
        try:
            await scenario(engine)
        finally:
            await engine.stop(30)

    (tmp_path / "models").mkdir(exist_ok=True)
    asyncio.run(whole())


def request(value: bytes = b"\x01") -> InferRequest:
    return InferRequest("model", "", [Tensor("x", "FP32", (1, 16), value * 64)])


async def state(engine, wanted: ModelState) -> None:
    await until(lambda: engine.statuses()[0].state is wanted)


def test_listeners_hear_of_every_change_once_and_in_order(tmp_path):
    """Models before the server; a reload, during which requests are answered, is no change at all."""
    write_fake(tmp_path / "models" / "model")

    async def scenario(engine):
        heard = []
        forget = engine.watch(lambda name, is_ready: heard.append((name, is_ready)))
        await engine.start()
        assert heard == [("model", True), ("", True)]
        heard.clear()
        write_fake(tmp_path / "models" / "model", version=2)
        await engine.load("model")
        assert heard == []
        await engine.unload("model")
        assert heard == [("model", False)]
        await engine.load("model")
        await engine.load("model")
        assert heard == [("model", False), ("model", True)]
        heard.clear()
        engine.begin_drain()
        assert heard == [("model", False), ("", False)]
        engine.begin_drain()
        await engine.stop(30)
        assert heard == [("model", False), ("", False)]
        forget()
        forget()

    run(tmp_path, scenario)


def test_a_crash_is_heard_before_the_caller_is_told(tmp_path):
    write_fake(tmp_path / "models" / "model")

    async def scenario(engine):
        await engine.start()
        heard = []
        engine.watch(lambda name, is_ready: heard.append((name, is_ready)))
        pid = engine.statuses()[0].pid
        os.kill(pid, signal.SIGSTOP)
        call = asyncio.ensure_future(engine.infer(request()))
        await asyncio.sleep(0)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(Exception, match="SIGKILL"):
            await call
        assert heard == [("model", False)]
        await state(engine, ModelState.READY)
        assert heard == [("model", False), ("model", True)]

    run(tmp_path, scenario)


def test_one_who_stops_listening_hears_no_more_and_the_others_still_do(tmp_path):
    write_fake(tmp_path / "models" / "model")

    async def scenario(engine):
        first, second = [], []

        def once(name, is_ready):
            first.append(name)
            forget()

        forget = engine.watch(once)
        engine.watch(lambda name, is_ready: second.append(name))
        await engine.load("model")
        assert len(first) == 1
        assert "model" in second

    run(tmp_path, scenario)


def test_stopping_twice_or_at_once_is_one_stop(tmp_path):
    write_fake(tmp_path / "models" / "model")

    async def scenario(engine):
        await engine.start()
        await asyncio.gather(engine.stop(30), engine.stop(30))
        await engine.stop(30)
        assert [status.pid for status in engine.statuses()] == [None]
        for refused in (engine.load("model"), engine.infer(request())):
            with pytest.raises(ShuttingDown):
                await refused

    run(tmp_path, scenario)


def test_stopping_before_the_start_and_during_it(tmp_path):
    gate = Gate(tmp_path / "load")
    write_fake(tmp_path / "models" / "model", load_gate=str(gate), load_log=str(tmp_path / "log"))

    async def scenario(engine):
        starting = asyncio.ensure_future(engine.start())
        await until((tmp_path / "log").exists)
        await engine.stop(30)
        await starting
        assert not engine.is_ready()
        assert engine.statuses()[0].pid is None

    run(tmp_path, scenario)

    async def never_started(engine):
        assert not engine.is_ready()

    run(tmp_path, never_started)


def test_cancelling_infer_withdraws_the_request(tmp_path):
    write_fake(tmp_path / "models" / "model", manifest="max_batch_size = 1", c_us=20_000)

    async def scenario(engine):
        await engine.start()
        calls = [asyncio.ensure_future(engine.infer(request())) for _ in range(6)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert engine.statuses()[0].queued + engine.statuses()[0].running == 6
        for call in calls[1:]:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert calls[0].result().outputs[0].content == b"\x01" * 64
        assert all(call.cancelled() for call in calls[1:])
        assert engine.statuses()[0].queued == 0
        ((_, statistics),) = engine.statistics("model")
        assert (statistics.success.count, statistics.cancelled) == (1, 5)
        await state(engine, ModelState.READY)

    run(tmp_path, scenario)


def test_what_cannot_be_asked_is_told_apart(tmp_path):
    """Never loaded, failed, unknown, and a name that can be nobody's."""
    write_fake(tmp_path / "models" / "model", on_load="raise")

    async def scenario(engine):
        await engine.start()
        assert engine.is_ready()
        with pytest.raises(ModelNotReady, match="the fake device raised"):
            await engine.infer(request())
        assert not engine.model_is_ready("model")
        with pytest.raises(ModelNotReady):
            engine.describe("model")
        for name, error in (("absent", ModelNotFound), ("../model", InvalidRequest), ("", InvalidRequest)):
            for ask in (engine.model_is_ready, engine.describe):
                with pytest.raises(error):
                    ask(name)
            for change in (engine.load, engine.unload):
                with pytest.raises(error):
                    await change(name)
        with pytest.raises(BackendError):
            await engine.load("model")
        await engine.unload("model")
        assert engine.statuses()[0].state is ModelState.UNLOADED

    run(tmp_path, scenario)


def test_a_directory_that_is_no_models_is_left_alone(tmp_path):
    write_fake(tmp_path / "models" / "model")
    for name in ("Not A Model", ".hidden", "_private"):
        (tmp_path / "models" / name).mkdir()
    (tmp_path / "models" / "file").write_text("not a directory")

    async def scenario(engine):
        await engine.start()
        assert [status.name for status in engine.statuses()] == ["model"]

    run(tmp_path, scenario)


def test_only_a_model_that_changed_on_disk_is_loaded_anew(tmp_path):
    """Any of its files counts, also one that the manifest does not name; links that lead in circles do no harm."""
    directory, log = tmp_path / "models" / "model", tmp_path / "log"
    write_fake(directory, load_log=str(log))
    (directory / "circle").symlink_to(directory)
    (directory / "nowhere").symlink_to(tmp_path / "absent")

    def loads() -> int:
        return len(log.read_text().split())

    async def scenario(engine):
        await engine.start()
        await engine.load("model")
        assert loads() == 1
        (directory / "1" / "weights.bin").write_bytes(b"1")
        await engine.load("model")
        await engine.load("model")
        assert loads() == 2
        (directory / "1" / "weights.bin").write_bytes(b"22")
        await engine.load("model")
        assert loads() == 3
        assert engine.statuses()[0].state is ModelState.READY

    run(tmp_path, scenario)
