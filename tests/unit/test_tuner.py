"""Tuning with real worker processes of two scripted backends: what wins, what is refused, what is measured again."""

import asyncio
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))

from appliance.config import Config
from appliance.engine import Engine
from appliance.errors import Conflict, InvalidRequest, ModelNotReady, NoPlacement
from appliance.explanation import explain, explain_instances
from appliance.inventory import Device, Inventory, Rung, Step
from appliance.jobs import JobState
from appliance.types import InferRequest, ModelState, Tensor
from support.daemon import children, command_line
from support.workers import until

PLUGINS = str(Path(__file__).parents[1] / "plugins_scripted")
CPU = Device("cpu", "cpu", "a CPU", 1 << 34, features=("avx2",), cores=2)
GPU = Device("nvidia0", "gpu", "a GPU", 1 << 34, vendor="nvidia", driver="570.1", uuid="GPU-1")


@pytest.fixture(autouse=True)
def _scripted_backends(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", PLUGINS)  # for workers
    monkeypatch.syspath_prepend(PLUGINS)  # for discovery, which looks here for entry points


def write(directory: Path, manifest: str = "", int8: dict | None = None, sample: bool = True, **script) -> Path:
    """A model of the scripted backends with a sample of 40 rows; `int8` is the script of a second artifact."""
    (directory / "1").mkdir(parents=True, exist_ok=True)
    lines = ["schema = 1", f'name = "{directory.name}"', 'task = "embedding"', manifest]
    artifacts = {"model.scripted": ("FP32", script)} | ({"small.scripted": ("INT8", int8)} if int8 is not None else {})
    for name, (precision, text) in artifacts.items():
        (directory / "1" / name).write_text(json.dumps(text))
        lines += ["[[artifacts]]", f'path = "1/{name}"', 'format = "scripted"', f'precision = "{precision}"']
    if sample:
        rows = [{"inputs": {"x": [float(row + column + 1) for column in range(8)]}} for row in range(40)]
        (directory / "sample.jsonl").write_text("\n".join(map(json.dumps, rows)))
        lines += ["[samples]", 'evaluation = "sample.jsonl"']
    (directory / "model.toml").write_text("\n".join(lines))
    return directory


def run(tmp_path, scenario, devices=(CPU,), later=None, **tuning):
    """Run `scenario` with a started engine; `later` is the machine that a refresh finds."""

    async def survey(_directories, _seconds):
        return Inventory(tuple(later or devices), 2, 1 << 34)

    async def whole():
        places = {name: str(tmp_path / name) for name in ("cache", "state")}
        backends = {name: {"enabled": False} for name in ("onnxruntime", "openvino")}
        document = {
            "repository": {"path": str(tmp_path / "models"), **places},
            "tuning": {"enabled": False, "budget_seconds": 60, "resume_seconds": 0.2, "point_seconds": 0.02, **tuning},
            "backends": backends,
        }
        engine = Engine(Config.model_validate(document), Inventory(tuple(devices), 2, 1 << 34), survey)
        try:
            await engine.start()
            await scenario(engine)
        finally:
            await engine.stop(30)

    asyncio.run(whole())


async def over(job):
    await until(lambda: job.is_over, 50)
    assert job.error == ""
    return job.result


async def tuned(engine, **options):
    return await over(await engine.tuner.tune("model", **options))


async def explained(engine) -> dict:
    options = await engine.tuner.options("model")
    return explain(options, engine.chooser.decide(options), engine.model("model").status())


async def candidate(engine, name: str) -> dict:
    return next(one for one in (await explained(engine))["candidates"] if one["name"] == name)


def request() -> InferRequest:
    return InferRequest("model", "", [Tensor("x", "FP32", (1, 8), b"\x01" * 32)])


def measured_processes(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


# ---------------------------------------------------------------- what wins


def test_the_fastest_that_keeps_its_accuracy_takes_over_and_three_times_slower_loses(tmp_path):
    write(tmp_path / "models" / "model", us={"FP32": 900, "BF16": 400})

    async def scenario(engine):
        assert engine.model("model").status().variant == "quick/cpu/FP32"
        result = await tuned(engine)
        assert (result["chosen"], result["swapped"], result["complete"]) == ("quick/cpu/BF16", True, True)
        status = engine.model("model").status()
        assert (status.variant, status.chosen_by, status.state) == ("quick/cpu/BF16", "measured", ModelState.READY)
        slow = await candidate(engine, "slow/cpu/BF16")
        assert slow["verdict"] == "slower"
        assert slow["measurement"]["latency_us"] > 2 * 400

    run(tmp_path, scenario)


def test_a_bad_int8_artifact_is_refused_with_its_evidence_however_fast_it_is(tmp_path):
    """The gate looks at the sample: mean cosine here falls far below 1 %."""
    bad = {"us": {"INT8": 50}, "error": {"INT8": -30.0}}
    write(tmp_path / "models" / "model", us={"FP32": 900, "BF16": 600}, int8=bad)

    async def scenario(engine):
        await tuned(engine)
        assert engine.model("model").status().variant == "quick/cpu/BF16"
        refused = await candidate(engine, "quick/cpu/INT8@small.scripted")
        assert refused["verdict"] == "refused"
        assert (refused["evidence"]["metric"], refused["evidence"]["count"]) == ("cosine", 40)
        assert "worse, and the bound is 1.00%" in refused["reason"]

    run(tmp_path, scenario)


def test_nan_in_one_precision_is_refused(tmp_path):
    write(tmp_path / "models" / "model", us={"FP32": 900, "BF16": 200}, nan=["BF16"])

    async def scenario(engine):
        await tuned(engine)
        assert engine.model("model").status().variant == "quick/cpu/FP32"
        refused = await candidate(engine, "quick/cpu/BF16")
        assert (refused["verdict"], refused["evidence"]["not_finite"]) == ("refused", 40)

    run(tmp_path, scenario)


def test_without_a_sample_16_bits_are_checked_on_made_up_inputs_and_int8_is_not_offered(tmp_path):
    write(tmp_path / "models" / "model", us={"FP32": 900, "BF16": 400}, int8={}, sample=False)

    async def scenario(engine):
        await tuned(engine)
        document = await explained(engine)
        assert document["winner"] == "quick/cpu/BF16"
        assert not document["has_sample"]
        assert all("INT8" not in one["name"] for one in document["candidates"])
        winner = await candidate(engine, "quick/cpu/BF16")
        assert winner["evidence"]["synthetic"]
        assert "made-up inputs" in winner["reason"]

    run(tmp_path, scenario)


def test_a_sample_that_is_empty_lets_nothing_lowered_through(tmp_path):
    write(tmp_path / "models" / "model", us={"FP32": 900, "BF16": 400})
    (tmp_path / "models" / "model" / "sample.jsonl").write_text("")

    async def scenario(engine):
        await tuned(engine)
        assert engine.model("model").status().variant == "quick/cpu/FP32"
        refused = await candidate(engine, "quick/cpu/BF16")
        assert refused["verdict"] in ("refused", "failed")

    run(tmp_path, scenario)


# ---------------------------------------------------------------- what is known


def test_what_is_known_is_not_measured_again_not_even_after_a_restart(tmp_path):
    runs = tmp_path / "runs"
    write(tmp_path / "models" / "model", us={"FP32": 900, "BF16": 400}, runs=str(runs))

    async def first(engine):
        await tuned(engine)

    async def second(engine):
        assert engine.model("model").status().variant == "quick/cpu/BF16", "the choice is used from the first load on"
        loads = len(measured_processes(runs))
        document = await explained(engine)
        disturbed = sum(one["measurement"]["disturbed"] for one in document["candidates"])
        result = await tuned(engine)
        assert result["reused"] == 4 - disturbed
        if not disturbed:
            assert len(measured_processes(runs)) == loads

    run(tmp_path, first)
    run(tmp_path, second)


def test_a_changed_driver_causes_exactly_one_new_measurement_of_each_variant_on_that_device(tmp_path):
    runs = tmp_path / "runs"
    write(tmp_path / "models" / "model", us={"FP32": 900, "BF16": 400}, runs=str(runs))
    newer = replace(GPU, driver="580.2")
    on_gpu = {f"{backend}/nvidia0/{precision}" for backend in ("quick", "slow") for precision in ("FP32", "BF16")}

    async def scenario(engine):
        await tuned(engine)
        keys = {one["name"]: one["key"] for one in (await explained(engine))["candidates"]}
        await engine.hardware.refresh()
        document = await explained(engine)
        changed = {one["name"] for one in document["candidates"] if one["key"] != keys[one["name"]]}
        assert changed == on_gpu
        disturbed = {
            one["name"] for one in document["candidates"] if one["measurement"] and one["measurement"]["disturbed"]
        }
        result = await tuned(engine)
        assert set(result["measured"]) - disturbed == on_gpu, "those and no other"
        await engine.hardware.refresh()
        before = len(measured_processes(runs))
        document = await explained(engine)
        disturbed = {one["name"] for one in document["candidates"] if one["measurement"]["disturbed"]}
        result = await tuned(engine)
        assert set(result["measured"]) == disturbed, "the same driver again measures nothing anew"
        if not disturbed:
            assert len(measured_processes(runs)) == before

    run(tmp_path, scenario, devices=(CPU, GPU), later=(CPU, newer))


def test_a_cancelled_tuning_keeps_its_points_and_the_next_one_goes_on(tmp_path):
    write(tmp_path / "models" / "model", us={"FP32": 900, "BF16": 400})

    async def scenario(engine):
        job = await engine.tuner.tune("model")
        await until(lambda: any(each.is_complete for each in engine.registry.measurements("model")), 50)
        engine.jobs.cancel(job.id)
        await until(lambda: job.is_over)
        assert job.state is JobState.CANCELLED
        known = {each.measurement.key.id for each in engine.registry.measurements("model") if each.is_complete}
        assert 1 <= len(known) < 4
        await until(lambda: engine.registry.wanted() == [])
        undisturbed = [each for each in engine.registry.measurements("model") if each.is_complete]
        undisturbed = [each for each in undisturbed if not each.measurement.is_disturbed]
        result = await tuned(engine)
        assert result["complete"]
        assert result["reused"] >= len(undisturbed)

    run(tmp_path, scenario)


def test_a_tuning_that_the_daemons_end_interrupted_goes_on_after_the_restart(tmp_path):
    write(tmp_path / "models" / "model", us={"FP32": 900, "BF16": 400})

    async def first(engine):
        await engine.tuner.tune("model")
        await until(lambda: any(each.is_complete for each in engine.registry.measurements("model")), 50)

    async def second(engine):
        await until(engine.jobs.listed)
        (job,) = engine.jobs.listed()
        assert (job.kind, job.model) == ("tune", "model")
        kept = [each for each in engine.registry.measurements("model") if each.is_complete]
        kept = [each for each in kept if not each.measurement.is_disturbed]
        result = await over(job)
        assert result["reused"] >= len(kept)
        assert engine.model("model").status().variant == "quick/cpu/BF16"
        await until(lambda: engine.registry.wanted() == [])

    run(tmp_path, first)
    run(tmp_path, second)


def test_a_budget_ends_measuring_and_says_so(tmp_path):
    write(tmp_path / "models" / "model")

    async def scenario(engine):
        result = await tuned(engine, budget_seconds=0.01)
        assert not result["complete"]
        assert len(result["measured"]) < 4

    run(tmp_path, scenario)


def test_every_lowered_candidate_that_runs_is_compared_and_the_evidence_shown(tmp_path):
    write(tmp_path / "models" / "model", us={"FP32": 400, "BF16": 900, "INT8": 900}, int8={"us": {"INT8": 900}})

    async def scenario(engine):
        result = await tuned(engine)
        assert result["chosen"] == "quick/cpu/FP32"
        for one in (await explained(engine))["candidates"]:
            lowered = one["precision"] != "FP32"
            assert (one["evidence"] is not None) is lowered or one["name"] == "slow/cpu/FP32", one["name"]
            assert one["verdict"] == ("slower" if one["name"] != "quick/cpu/FP32" else "chosen")

    run(tmp_path, scenario)


def test_a_new_bound_judges_the_old_numbers_anew_and_a_new_sample_needs_new_ones(tmp_path):
    directory = write(tmp_path / "models" / "model", us={"FP32": 900, "BF16": 400}, error={"BF16": 0.5})

    async def scenario(engine):
        await tuned(engine)
        assert engine.model("model").status().variant == "quick/cpu/BF16"
        manifest = (directory / "model.toml").read_text()
        (directory / "model.toml").write_text(f"{manifest}\n[quality]\nbound = 0.000001\n")
        await engine.load("model")
        assert engine.model("model").status().variant == "quick/cpu/FP32", "the evidence is known, the bound is tighter"
        (directory / "model.toml").write_text(manifest)
        sample = (directory / "sample.jsonl").read_text().splitlines()
        (directory / "sample.jsonl").write_text("\n".join(sample[:20]))
        await engine.load("model")
        assert engine.model("model").status().variant == "quick/cpu/FP32", "nothing is proved on this sample"
        await tuned(engine)
        assert engine.model("model").status().variant == "quick/cpu/BF16"

    run(tmp_path, scenario)


def test_a_sample_that_is_gone_does_not_stop_a_load(tmp_path):
    directory = write(tmp_path / "models" / "model", us={"FP32": 900, "BF16": 400})

    async def first(engine):
        await tuned(engine)

    async def second(engine):
        status = engine.model("model").status()
        assert (status.state, status.variant) == (ModelState.READY, "quick/cpu/FP32")

    run(tmp_path, first)
    (directory / "sample.jsonl").unlink()
    run(tmp_path, second)


def test_a_measuring_process_that_somebody_ends_says_nothing_about_its_variant(tmp_path):
    write(tmp_path / "models" / "model", us={"FP32": 900, "BF16": 400})

    async def scenario(engine):
        job = await engine.tuner.tune("model")
        await until(lambda: "measuring quick/cpu/FP32 (" in job.step, 50)
        for pid in children(os.getpid()):
            if b"appliance.worker.task" in command_line(pid):
                os.kill(pid, signal.SIGKILL)
        await over(job)
        assert (await candidate(engine, "quick/cpu/FP32"))["verdict"] == "unmeasured"
        assert "quick/cpu/FP32" in (await tuned(engine))["measured"]
        assert (await candidate(engine, "quick/cpu/FP32"))["measurement"]

    run(tmp_path, scenario)


def test_a_cancelled_fresh_measurement_leaves_what_was_known(tmp_path):
    write(tmp_path / "models" / "model", us={"FP32": 900, "BF16": 400})

    async def scenario(engine):
        await tuned(engine)
        job = await engine.tuner.tune("model", is_fresh=True)
        await until(lambda: "(" in job.step, 50)
        engine.jobs.cancel(job.id)
        await until(lambda: job.is_over)
        assert all(each.is_complete for each in engine.registry.measurements("model"))
        assert len(engine.registry.measurements("model")) == 4

    run(tmp_path, scenario)


# ---------------------------------------------------------------- traffic


def test_a_request_suspends_measuring_at_once_and_the_tuning_still_ends(tmp_path):
    write(tmp_path / "models" / "model", us={"FP32": 900, "BF16": 400})

    async def scenario(engine):
        job = await engine.tuner.tune("model")
        paused = 0
        for _ in range(3):
            await until(lambda: job.state is JobState.RUNNING and "measuring" in job.step and "(" in job.step, 50)
            await engine.infer(request())
            paused += job.state is JobState.PAUSED
            await until(lambda: job.state is not JobState.PAUSED)
        assert paused == 3
        await over(job)

    run(tmp_path, scenario)


def test_a_swap_under_traffic_fails_no_request(tmp_path):
    write(tmp_path / "models" / "model", us={"FP32": 300, "BF16": 100})

    async def scenario(engine):
        await tuned(engine)
        answered = 0
        going = True

        async def client():
            nonlocal answered
            while going:
                await engine.infer(request())
                answered += 1

        clients = [asyncio.ensure_future(client()) for _ in range(8)]
        for variant in ("slow/cpu/FP32", "quick/cpu/FP32", "slow/cpu/BF16", "quick/cpu/BF16"):
            before = answered
            await engine.tuner.pin("model", variant)
            assert engine.model("model").status().variant == variant
            await until(lambda before=before: answered > before + 20)
        going = False
        await asyncio.gather(*clients)

    run(tmp_path, scenario)


# ---------------------------------------------------------------- pins, fallback


def test_a_pin_holds_against_measurements_and_restarts_until_it_is_taken_back(tmp_path):
    write(tmp_path / "models" / "model", us={"FP32": 900, "BF16": 400})

    async def first(engine):
        await engine.tuner.pin("model", "slow/cpu/FP32")
        await tuned(engine)
        status = engine.model("model").status()
        assert (status.variant, status.chosen_by) == ("slow/cpu/FP32", "pinned")
        with pytest.raises(InvalidRequest, match="the candidates of model 'model' are quick/cpu/FP32"):
            await engine.tuner.pin("model", "quick/cpu/FP4")

    async def second(engine):
        assert engine.model("model").status().variant == "slow/cpu/FP32"
        await engine.tuner.unpin("model")
        status = engine.model("model").status()
        assert (status.variant, status.chosen_by) == ("quick/cpu/BF16", "measured")

    run(tmp_path, first)
    run(tmp_path, second)


TWO = "quick/cpu/FP32/streams=2/threads=1"


async def instances(engine) -> dict:
    options = await engine.tuner.options("model")
    status = engine.model("model").status()
    return explain_instances(options, engine.chooser.decide(options, status.variant), status)


def test_streams_changed_by_hand_hold_against_measurements_and_restarts_until_they_are_taken_back(tmp_path):
    write(tmp_path / "models" / "model", us={"FP32": 400, "BF16": 900})

    async def first(engine):
        before = await instances(engine)
        assert (before["variant"], before["streams"], before["threads"]) == ("quick/cpu/FP32", 1, 2)
        await engine.tuner.split("model", 2, None)
        status = engine.model("model").status()
        assert (status.variant, status.chosen_by, status.streams) == (TWO, "pinned", 2)
        after = await instances(engine)
        assert (after["streams"], after["threads"], after["cores"]) == (2, 1, 2)
        assert [one["variant"] for one in after["splits"]] == ["quick/cpu/FP32", TWO]
        await engine.tuner.split("model", 3, 4)
        assert engine.model("model").status().variant == "quick/cpu/FP32/streams=3/threads=4"
        await engine.tuner.split("model", None, 1)
        assert engine.model("model").status().variant == TWO, "as many streams as use all cores"
        await tuned(engine)
        assert engine.model("model").status().variant == TWO
        measured = (await candidate(engine, TWO))["measurement"]
        assert measured["streams"] == 2
        assert measured["points"][0]["alone_us"] > 0

    async def second(engine):
        assert engine.model("model").status().variant == TWO
        await engine.tuner.unpin("model")
        assert engine.model("model").status().variant == "quick/cpu/FP32"
        assert TWO not in [one["name"] for one in (await explained(engine))["candidates"]]

    run(tmp_path, first)
    run(tmp_path, second)


def test_the_split_of_a_candidate_shares_its_evidence(tmp_path):
    write(tmp_path / "models" / "model", us={"FP32": 900, "BF16": 400})

    async def scenario(engine):
        assert "quick/cpu/BF16" in (await tuned(engine))["checked"]
        await engine.tuner.split("model", 2, 1)
        split = "quick/cpu/BF16/streams=2/threads=1"
        assert engine.model("model").status().variant == split
        assert split in (await tuned(engine))["measured"]
        assert (await tuned(engine))["checked"] == []
        both = [(await candidate(engine, name))["evidence"] for name in ("quick/cpu/BF16", split)]
        assert both[0] == both[1] is not None
        again = (await tuned(engine, is_fresh=True))["checked"]
        assert sorted(again) == ["quick/cpu/BF16", "slow/cpu/BF16"]

    run(tmp_path, scenario)


def test_streams_that_cannot_be_are_refused_and_nothing_changes(tmp_path):
    write(tmp_path / "models" / "model", manifest='instances.threads = 1\nplacement.backend = "quick"')

    async def scenario(engine):
        was = engine.model("model").status().variant
        with pytest.raises(InvalidRequest, match=r"\[instances\] of its manifest says threads = 1"):
            await engine.tuner.split("model", 2, 2)
        await engine.tuner.split("model", 2, 1)
        assert engine.model("model").status().variant == TWO
        await engine.tuner.unpin("model")
        assert engine.model("model").status().variant == was
        await engine.unload("model")
        with pytest.raises(ModelNotReady, match="it is unloaded"):
            await engine.tuner.split("model", 2, 1)

    run(tmp_path, scenario)


def test_a_device_without_threads_refuses_them(tmp_path):
    write(tmp_path / "models" / "model", manifest='placement.device = "nvidia0"')

    async def scenario(engine):
        with pytest.raises(InvalidRequest, match="runs on nvidia0, which has none"):
            await engine.tuner.split("model", 2, 1)
        await engine.tuner.split("model", 2, None)
        status = engine.model("model").status()
        assert (status.variant, status.streams) == ("quick/nvidia0/FP32/streams=2", 2)

    run(tmp_path, scenario, devices=(CPU, GPU))


def test_a_pinned_device_that_is_missing_at_the_start_is_no_silent_fall_back(tmp_path):
    directory = write(tmp_path / "models" / "model")

    async def first(engine):
        await engine.tuner.pin("model", "quick/nvidia0/FP32")

    async def warned(engine):
        status = engine.model("model").status()
        assert (status.state, status.device) == (ModelState.READY, "cpu")
        assert status.fallback == "nvidia0: it is not there"
        assert engine.model("model").statistics.fallbacks == 1

    async def forbidden(engine):
        status = engine.model("model").status()
        assert status.state is ModelState.FAILED
        assert "quick/nvidia0/FP32 was chosen, fallback is 'forbid', nvidia0: it is not there" in status.reason

    run(tmp_path, first, devices=(CPU, GPU))
    run(tmp_path, warned)
    manifest = (directory / "model.toml").read_text()
    (directory / "model.toml").write_text('fallback = "forbid"\n' + manifest)
    run(tmp_path, forbidden)


def test_tuning_puts_no_file_into_service_that_nobody_loaded(tmp_path):
    directory = write(tmp_path / "models" / "model", us={"FP32": 900, "BF16": 400})

    async def scenario(engine):
        write(directory, us={"FP32": 900, "BF16": 400}, error={"FP32": 5.0, "BF16": 5.0})
        result = await tuned(engine)
        assert (result["chosen"], result["swapped"]) == ("quick/cpu/BF16", False)
        answer = await engine.infer(request())
        assert bytes(answer.outputs[0].content) == b"\x01" * 32
        with pytest.raises(Conflict, match="load it again first"):
            await engine.tuner.pin("model", "slow/cpu/FP32")
        await engine.load("model")
        assert engine.model("model").status().variant == "quick/cpu/BF16"

    run(tmp_path, scenario)


LANDS = {"lands_on": {"nvidia0": "cpu"}}


def test_a_runtime_that_lands_on_the_cpu_fails_the_load_where_fallback_is_forbidden(tmp_path):
    write(tmp_path / "models" / "model", 'fallback = "forbid"', **LANDS)

    async def scenario(engine):
        status = engine.model("model").status()
        assert status.state is ModelState.FAILED
        assert "libscripted.so.9: cannot open shared object file" in status.reason
        assert engine.model("model").statistics.fallbacks == 0
        with pytest.raises(NoPlacement, match="fallback is 'forbid'"):
            await engine.load("model")

    run(tmp_path, scenario, devices=(CPU, GPU))


@pytest.mark.parametrize("policy", ["warn", "allow"])
def test_a_runtime_that_lands_on_the_cpu_is_told_and_counted(tmp_path, caplog, policy):
    write(tmp_path / "models" / "model", f'fallback = "{policy}"', **LANDS)

    async def scenario(engine):
        status = engine.model("model").status()
        assert (status.state, status.requested_device, status.device) == (ModelState.READY, "nvidia0", "cpu")
        assert "libscripted.so.9" in status.fallback
        assert engine.model("model").statistics.fallbacks == 1
        assert ("as a fallback" in caplog.text) is (policy == "warn")

    run(tmp_path, scenario, devices=(CPU, GPU))


def test_a_variant_that_lands_elsewhere_never_wins_by_measurement(tmp_path):
    write(tmp_path / "models" / "model", us={"FP32": 900, "BF16": 400}, **LANDS)

    async def scenario(engine):
        result = await tuned(engine)
        assert result["chosen"] == "quick/cpu/BF16"
        failed = await candidate(engine, "quick/nvidia0/BF16")
        assert failed["verdict"] == "failed"
        assert "ran on cpu: libscripted.so.9" in failed["reason"]

    run(tmp_path, scenario, devices=(CPU, GPU))


@pytest.mark.parametrize(
    "lost",
    [(CPU,), (CPU, replace(GPU, ladder=(Rung(Step.DRIVER, False, "GPU is lost (Xid 79)", "reboot"),)))],
    ids=["gone", "unhealthy"],
)
def test_a_model_leaves_a_device_that_is_lost_and_comes_back_to_it(tmp_path, lost):
    write(tmp_path / "models" / "model")

    async def scenario(engine):
        model = engine.model("model")
        assert model.status().device == "nvidia0"
        await engine.hardware.refresh()
        await until(lambda: model.status().device == "cpu")
        await engine.hardware.refresh()
        await engine.infer(request())
        status = model.status()
        assert (status.state, model.statistics.fallbacks) == (ModelState.READY, 1)
        assert status.fallback.startswith("nvidia0: ")
        await engine.infer(request())
        engine.hardware._survey = lambda *_: asyncio.sleep(0, Inventory((CPU, GPU), 2, 1 << 34))
        await engine.hardware.refresh()
        await until(lambda: model.status().device == "nvidia0")
        assert model.status().fallback == ""

    run(tmp_path, scenario, devices=(CPU, GPU), later=lost)


def test_a_model_that_may_not_fall_back_fails_with_its_device(tmp_path):
    write(tmp_path / "models" / "model", 'fallback = "forbid"')

    async def scenario(engine):
        await engine.hardware.refresh()
        await until(lambda: engine.model("model").state is ModelState.FAILED)
        assert "it is not there any more" in engine.model("model").status().reason
        engine.hardware._survey = lambda *_: asyncio.sleep(0, Inventory((CPU, GPU), 2, 1 << 34))
        await engine.hardware.refresh()
        await until(lambda: engine.model("model").status().device == "nvidia0")

    run(tmp_path, scenario, devices=(CPU, GPU), later=(CPU,))


# ---------------------------------------------------------------- by itself


def test_idle_time_is_used_to_measure_what_is_loaded(tmp_path):
    write(tmp_path / "models" / "model", us={"FP32": 900, "BF16": 400})

    async def scenario(engine):
        await until(lambda: engine.model("model").status().variant == "quick/cpu/BF16", 50)
        (job, *_) = engine.jobs.listed()
        assert job.by_itself

    run(tmp_path, scenario, enabled=True, idle_seconds=0.2, max_load=1000.0)
