"""Equal requests to a model with a cache: run once, kept, never mixed up, and nobody's trouble is another's."""

import asyncio
import base64
import itertools
import json
import os
import re
import shutil
import signal
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from onnx import TensorProto, helper, numpy_helper
from tritonclient.utils import InferenceServerException

sys.path.append(str(Path(__file__).parents[1] / "plugins_fake"))

from fake_backend import MAGIC

from appliance.wire.native import Frame
from appliance_client import ApplianceError, AsyncClient, Client, DeadlineExceeded, InvalidRequest, WorkerLost
from support.askers import GrpcInfer, HttpInfer
from support.daemon import FAKE_BACKEND, PATIENCE_SECONDS, start_daemon, wait_until
from support.models import Gate, save, write_fake
from support.native import Memory, Native, frame, infer_frame, request

REPOSITORY = Path(__file__).parents[2]
WAIT = MAGIC["wait"]
#: Inputs that no test has used before.
values = itertools.count(1000)


def add_cache(directory: Path, **section: float) -> None:
    """Give a model a cache of 1 MiB."""
    lines = ["", "[cache]", *(f"{key} = {value}" for key, value in ({"max_bytes": 1 << 20} | section).items())]
    with (directory / "model.toml").open("a") as manifest:
        manifest.write("\n".join([*lines, ""]))


def copy_sample(models: Path, name: str, copied: str) -> None:
    """A sample model under another name, with a cache."""
    shutil.copytree(REPOSITORY / "models" / name, models / copied)
    manifest = models / copied / "model.toml"
    manifest.write_text(manifest.read_text().replace(f'name = "{name}"', f'name = "{copied}"'))
    add_cache(models / copied)


class Served:
    def __init__(self, running, models: Path, gate: Gate) -> None:
        self.running = running
        self.models = models
        self.gate = gate

    def counts(self, model: str) -> tuple[int, int, int, int]:
        """Batches run, hits, misses and joined requests so far."""
        text = self.running.http("GET", "/metrics")[2].decode()
        names = ("batches_total", "cache_hits_total", "cache_misses_total", "cache_joined_total")
        found = [re.search(rf'^appliance_{name}{{model="{model}",version="1"}} (\d+)$', text, re.M) for name in names]
        return tuple(int(each[1]) for each in found)

    def since(self, model: str, before: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(now - then for now, then in zip(self.counts(model), before, strict=True))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.mktemp("cache")
    models = directory / "models"
    gate = Gate(directory / "open")
    gate.open()
    for name in ("echo", "plain"):
        write_fake(models / name, run_gate=str(gate))
    add_cache(models / "echo")
    copy_sample(models, "digits", "digits-cached")
    copy_sample(models, "language-id", "language-cached")
    for name in ("digits", "language-id"):
        shutil.copytree(REPOSITORY / "models" / name, models / name)
    with start_daemon(directory, models, environment=FAKE_BACKEND, access={"tcp_role": "admin"}) as running:
        yield Served(running, models, gate)


@pytest.fixture(autouse=True)
def _open_gate(served):
    yield
    served.gate.open()


def row(value: float, second: float | None = None) -> np.ndarray:
    """An input of the fake backend; `value` may be a command, `second` then tells two apart."""
    array = np.full((1, 16), value, np.float32)
    array[0, 1] = value if second is None else second
    return array


def gated() -> np.ndarray:
    """An input that runs until the gate opens."""
    return row(WAIT, next(values))


# ---------------------------------------------------------------- run once


def test_equal_requests_in_flight_run_once(served):
    """Twenty of one kind, five of another and one of a third: three rows run."""
    first, second, third = gated(), gated(), gated()

    async def scenario():
        async with AsyncClient(served.running.infer_socket, timeout=PATIENCE_SECONDS) as client:
            kinds = [first] * 20 + [second] * 5 + [third]
            tasks = [asyncio.ensure_future(client.infer("echo", {"x": kind})) for kind in kinds]
            await asyncio.to_thread(wait_until, lambda: served.since("echo", before)[2:] == (3, 23), "all wait")
            served.gate.open()
            for task, kind in zip(tasks, kinds, strict=True):
                assert (await task)["y"].tobytes() == kind.tobytes()

    served.gate.shut()
    before = served.counts("echo")
    rows = served.running.get("/v2/models/echo/stats")["model_stats"][0]["inference_count"]
    asyncio.run(scenario())
    batches, hits, _, _ = served.since("echo", before)
    assert 1 <= batches <= 3
    assert hits == 0
    after = served.running.get("/v2/models/echo/stats")["model_stats"][0]
    assert after["inference_count"] == rows + 3


def test_without_a_cache_every_request_runs(served):
    with Client(served.running.infer_socket, timeout=PATIENCE_SECONDS) as client:
        value = row(next(values))
        before = served.counts("plain")
        for _ in range(3):
            client.infer("plain", {"x": value})
    assert served.since("plain", before) == (3, 0, 0, 0)
    assert served.running.model("plain")["cache"] is None


def test_an_answer_serves_every_transport(served):
    value = float(next(values))
    before = served.counts("echo")
    with Client(served.running.infer_socket, timeout=PATIENCE_SECONDS) as client:
        assert client.infer("echo", {"x": row(value)})["y"][0, 0] == value
        answer = client.infer("echo", {"x": row(value)})
        assert answer["y"].tobytes() == row(value).tobytes()
        assert answer.timings.batch_rows == 0, "no batch ran"
    for asker in (GrpcInfer(served.running), HttpInfer(served.running)):
        assert asker("echo", value) == value
        asker.close()
    assert served.since("echo", before) == (1, 3, 1, 0)


def test_statistics_and_metrics_say_the_hit_rate(served):
    """Over Triton's client, the metrics and the command line's document alike."""
    value = row(next(values))
    before = served.counts("echo")
    with Client(served.running.infer_socket, timeout=PATIENCE_SECONDS) as client:
        (earlier,) = client.statistics("echo")
        for _ in range(4):
            client.infer("echo", {"x": value})
        (later,) = client.statistics("echo")
    assert served.since("echo", before) == (1, 3, 1, 0)
    assert later.cache_hit.count - earlier.cache_hit.count == 3
    assert later.cache_miss.count - earlier.cache_miss.count == 1
    assert later.success.count - earlier.success.count == 4
    assert later.execution_count - earlier.execution_count == 1
    with triton.InferenceServerClient(served.running.grpc_tcp) as client:
        (model,) = client.get_inference_statistics("echo").model_stats
    assert model.inference_stats.cache_hit.count == later.cache_hit.count
    assert model.inference_stats.cache_miss.count == later.cache_miss.count
    assert model.inference_stats.cache_hit.ns > 0
    _, hits, misses, joined = served.counts("echo")
    shown = served.running.model("echo")["cache"]
    assert shown["hit_rate"] == pytest.approx((hits + joined) / (hits + joined + misses))
    assert shown["answers"] > 0
    text = served.running.http("GET", "/metrics")[2].decode()
    assert f'appliance_cache_bytes{{model="echo",version="1"}} {shown["nbytes"]}\n' in text


# ---------------------------------------------------------------- the answers


def pictures() -> list[bytes]:
    lines = (REPOSITORY / "models/digits/samples/evaluation.jsonl").read_text().splitlines()[:6]
    return [base64.b64decode(json.loads(line)["inputs"]["image"]["base64"]) for line in lines]


def infer_raw(running, model: str, inputs, outputs=()) -> dict[str, tuple[str, list[int], bytes]]:
    """Datatype, shape and bytes of every output, as they come over gRPC."""
    with triton.InferenceServerClient(running.grpc_tcp) as client:
        message = client.infer(model, inputs, outputs=[triton.InferRequestedOutput(each) for each in outputs])
    answer = message.get_response()
    contents = answer.raw_output_contents
    return {
        each.name: (each.datatype, list(each.shape), content)
        for each, content in zip(answer.outputs, contents, strict=True)
    }


def triton_input(name: str, elements: list[bytes]):
    tensor = triton.InferInput(name, [len(elements), 1], "BYTES")
    tensor.set_data_from_numpy(np.array(elements, object).reshape(-1, 1))
    return tensor


@pytest.mark.parametrize("count", [1, 5])
def test_cached_answers_equal_computed_ones_byte_for_byte(served, count):
    """FP32 and BYTES, one row and several, in whatever order the outputs are wanted."""
    inputs = [triton_input("image", pictures()[:count])]
    before = served.counts("digits-cached")
    computed = infer_raw(served.running, "digits", inputs)
    first = infer_raw(served.running, "digits-cached", inputs)
    again = infer_raw(served.running, "digits-cached", inputs)
    other_way = infer_raw(served.running, "digits-cached", inputs, ["score", "label", "logits"])
    assert {datatype for datatype, _, _ in computed.values()} == {"FP32", "BYTES"}
    assert first == again == other_way == computed
    assert list(other_way) == ["score", "label", "logits"]
    assert served.since("digits-cached", before) == (1, 2, 1, 0)


def test_a_text_that_came_before_is_not_even_tokenised(served):
    def tokenised():
        (model,) = served.running.get("/v2/models/language-cached/stats")["model_stats"]
        return model["stage_stats"]["tokenise"]["count"]

    inputs = [triton_input("text", [b"Wo ist der Bahnhof?", "Où est la gare ?".encode()])]
    first = infer_raw(served.running, "language-cached", inputs)
    before = tokenised()
    assert before > 0
    assert (
        infer_raw(served.running, "language-cached", inputs)
        == first
        == infer_raw(served.running, "language-id", inputs)
    )
    assert tokenised() == before


def test_what_is_wrong_with_a_request_is_said_every_time(served):
    inputs = [triton_input("image", [b"no picture"])]
    before = served.counts("digits-cached")
    for _ in range(3):
        with pytest.raises(InferenceServerException, match=r"picture|image"):
            infer_raw(served.running, "digits-cached", inputs)
    assert served.since("digits-cached", before) == (3, 0, 3, 0)


def test_a_picture_that_is_none_fails_those_who_sent_it_alone(served):
    """Equal requests and a good one, perhaps in one batch."""

    async def scenario():
        async with AsyncClient(served.running.infer_socket, timeout=PATIENCE_SECONDS) as client:
            bad = [client.infer("digits-cached", {"image": [b"still none"]}) for _ in range(4)]
            good = client.infer("digits-cached", {"image": [pictures()[5]]})
            return await asyncio.gather(*bad, good, return_exceptions=True)

    *bad, good = asyncio.run(scenario())
    assert all(isinstance(each, InvalidRequest) for each in bad)
    assert not isinstance(good, Exception)


def test_inputs_in_a_region_are_taken_as_they_were_when_they_came(served):
    """A client may write there at any time; what it writes later must not be what others get for the earlier bytes."""
    one, two = (struct.pack("<16f", *[next(values)] * 16) for _ in range(2))
    before = served.counts("echo")
    with Native(served.running.infer_socket) as native, Memory(4096) as memory:
        native.register(1, memory.fd, 4096)
        memory.map[:64] = one
        head = request("echo", ("x", "FP32", (1, 16), (1, 0, 64)))
        native.send(infer_frame(10, head))
        assert native.read().tail == one
        native.send(infer_frame(11, head))
        assert native.read().tail == one
        memory.map[:64] = two
        native.send(infer_frame(12, head))
        assert native.read().tail == two
        native.send(infer_frame(13, request("echo", ("x", "FP32", (1, 16))), one))
        assert native.read().tail == one
    assert served.since("echo", before) == (2, 2, 2, 0)


# ---------------------------------------------------------------- everybody's own trouble


def test_the_first_may_cancel_and_the_others_are_answered(served):
    value = gated()
    head = request("echo", ("x", "FP32", (1, 16)))
    served.gate.shut()
    before = served.counts("echo")
    with Native(served.running.infer_socket) as first, Native(served.running.infer_socket) as second:
        first.send(infer_frame(1, head, value.tobytes()))
        wait_until(lambda: served.since("echo", before)[2] == 1, "the first runs")
        second.send(infer_frame(2, head, value.tobytes()))
        wait_until(lambda: served.since("echo", before)[3] == 1, "the second waits for it")
        first.send(frame(Frame.CANCEL, 1))
        assert first.read().error[0] == "cancelled"
        served.gate.open()
        assert second.read().tail == value.tobytes()
    assert served.since("echo", before) == (1, 0, 1, 1)


def test_the_first_may_hang_up_and_the_others_are_answered(served):
    value = gated()
    head = request("echo", ("x", "FP32", (1, 16)))
    served.gate.shut()
    before = served.counts("echo")
    with Native(served.running.infer_socket) as second:
        with Native(served.running.infer_socket) as first:
            first.send(infer_frame(1, head, value.tobytes()))
            wait_until(lambda: served.since("echo", before)[2] == 1, "the first runs")
            second.send(infer_frame(2, head, value.tobytes()))
            wait_until(lambda: served.since("echo", before)[3] == 1, "the second waits for it")
        served.gate.open()
        assert second.read().tail == value.tobytes()


def test_each_has_its_own_deadline(served):
    """The first gives up in time; one with a longer deadline and one with none are answered."""
    value = gated()

    async def scenario():
        async with AsyncClient(served.running.infer_socket, timeout=PATIENCE_SECONDS) as client:
            hasty = asyncio.ensure_future(client.infer("echo", {"x": value}, timeout=0.3))
            await asyncio.to_thread(wait_until, lambda: served.since("echo", before)[2] == 1, "the first runs")
            patient = asyncio.ensure_future(client.infer("echo", {"x": value}))
            brief = asyncio.ensure_future(client.infer("echo", {"x": value}, timeout=0.3))
            for each in (hasty, brief):
                with pytest.raises(DeadlineExceeded):
                    await each
            served.gate.open()
            return await patient

    served.gate.shut()
    before = served.counts("echo")
    assert asyncio.run(scenario())["y"].tobytes() == value.tobytes()
    with Client(served.running.infer_socket, timeout=PATIENCE_SECONDS) as client:
        client.infer("echo", {"x": value})
    assert served.since("echo", before) == (1, 1, 1, 2)


def test_where_deadlines_do_not_bind_those_who_wait_are_answered_late(served):
    """``timeout_action = "delay"`` holds for calls that wait for another's run, too."""
    directory = served.models / "patient"
    write_fake(directory, run_gate=str(served.gate), batch={"timeout_action": '"delay"'})
    add_cache(directory)
    value = gated().tobytes()
    head = request("patient", ("x", "FP32", (1, 16)))
    with Native(served.running.infer_socket) as native, Client(served.running.infer_socket) as client:
        client.load("patient")
        served.gate.shut()
        for number in (1, 2):
            native.send(infer_frame(number, head, value, timeout_us=1000))
        wait_until(lambda: served.counts("patient")[2:] == (1, 1), "the second waits for the first")
        with pytest.raises(DeadlineExceeded):  # by now the others' deadlines have passed
            client.infer("plain", {"x": gated()}, timeout=0.2)
        served.gate.open()
        assert [native.read().tail for _ in range(2)] == [value] * 2
    assert served.counts("patient")[0] == 1


def test_unloading_answers_all_who_wait_first(served):
    directory = served.models / "leaving"
    write_fake(directory, run_gate=str(served.gate))
    add_cache(directory)
    value = gated()

    async def scenario():
        async with AsyncClient(served.running.infer_socket, timeout=PATIENCE_SECONDS) as client:
            await client.load("leaving")
            served.gate.shut()
            tasks = [asyncio.ensure_future(client.infer("leaving", {"x": value})) for _ in range(5)]
            await asyncio.to_thread(wait_until, lambda: served.counts("leaving")[3] == 4, "all wait for one")
            unloading = asyncio.ensure_future(client.unload("leaving"))
            await asyncio.to_thread(served.running.wait_for_state, "leaving", "unloading")
            served.gate.open()
            await unloading
            return await asyncio.gather(*tasks)

    assert [each["y"].tobytes() for each in asyncio.run(scenario())] == [value.tobytes()] * 5
    assert served.counts("leaving")[0] == 1


def test_a_worker_that_dies_fails_all_who_waited_and_the_next_request_runs(served):
    """What it answered before is not kept: the files it is loaded from anew may be others."""
    value, waiting = row(next(values)), gated()

    async def scenario():
        async with AsyncClient(served.running.infer_socket, timeout=PATIENCE_SECONDS) as client:
            await client.infer("echo", {"x": value})
            before = served.counts("echo")
            served.gate.shut()
            tasks = [asyncio.ensure_future(client.infer("echo", {"x": waiting})) for _ in range(3)]
            await asyncio.to_thread(wait_until, lambda: served.since("echo", before)[3] == 2, "two wait for one")
            os.kill(served.running.model("echo")["pid"], signal.SIGKILL)
            lost = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(each) for each in lost] == [WorkerLost] * 3, lost
            await asyncio.to_thread(served.running.wait_for_state, "echo", "ready")
            before = served.counts("echo")
            await client.infer("echo", {"x": value})
            return before

    assert served.since("echo", asyncio.run(scenario())) == (1, 0, 1, 0)


# ---------------------------------------------------------------- what empties it


def write_adder(directory: Path, addend: float) -> None:
    """A model whose answers tell which one it is: y = x + `addend`."""
    float_ = [TensorProto.FLOAT, ["n", 16]]
    constant = numpy_helper.from_array(np.float32(addend), "c")
    add = helper.make_node("Add", ["x", "c"], ["y"])
    save(directory, [add], [("x", *float_)], [("y", *float_)], [constant])


def test_a_reload_empties_the_cache(served):
    directory = served.models / "adder"
    write_adder(directory, 1)
    (directory / "model.toml").write_text(
        'schema = 1\nname = "adder"\n[[artifacts]]\npath = "1/model.onnx"\nformat = "onnx"\n'
    )
    add_cache(directory)
    with Client(served.running.infer_socket, timeout=PATIENCE_SECONDS) as client:
        client.load("adder")
        for _ in range(2):
            assert client.infer("adder", {"x": row(7)})["y"][0, 0] == 8
        assert served.counts("adder")[1] == 1
        write_adder(directory, 2)
        client.load("adder")
        assert client.infer("adder", {"x": row(7)})["y"][0, 0] == 9
        assert served.running.model("adder")["cache"]["answers"] == 1
        client.unload("adder")
        assert served.running.model("adder")["cache"] is None
        with pytest.raises(ApplianceError):
            client.infer("adder", {"x": row(7)})


def test_answers_of_a_second_are_computed_anew_after_it(served):
    directory = served.models / "brief"
    write_fake(directory)
    add_cache(directory, max_age_seconds=0.5)
    value = row(next(values))
    with Client(served.running.infer_socket, timeout=PATIENCE_SECONDS) as client:
        client.load("brief")
        client.infer("brief", {"x": value})
        wait_until(lambda: client.infer("brief", {"x": value}).timings.batch_rows == 1, "it runs again")
    batches, hits, misses, _ = served.counts("brief")
    assert batches == misses == 2
    assert hits >= 0


def test_a_request_over_the_bound_runs_as_if_there_were_no_cache(served):
    directory = served.models / "small"
    write_fake(directory)
    add_cache(directory, max_request_bytes=64)
    with Client(served.running.infer_socket, timeout=PATIENCE_SECONDS) as client:
        client.load("small")
        for _ in range(2):
            client.infer("small", {"x": np.ones((2, 16), np.float32)})
        assert served.counts("small") == (2, 0, 0, 0)
        for _ in range(2):
            client.infer("small", {"x": row(1)})
        assert served.counts("small") == (3, 1, 1, 0)
