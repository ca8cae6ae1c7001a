"""Models that keep state between requests, through real workers, over every transport."""

import asyncio
import os
import queue
import signal
import subprocess
import sys

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from appliance_client import AsyncClient, Client, Conflict, InvalidRequest
from support.daemon import PATIENCE_SECONDS, start_daemon, wait_until
from support.models import write_accumulator

SEATS = 4


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    models = tmp_path_factory.mktemp("stateful-models")
    batched = "max_batch_size = 8"
    large = f"{batched}\nbatch.preferred_batch_sizes = [8]"  # whatever batching gains with so small a model
    write_accumulator(models / "oldest", large, f"max_sequences = {SEATS}")
    write_accumulator(models / "direct", batched, f'max_sequences = {SEATS}\nstrategy = "direct"')
    write_accumulator(models / "words", batched, "max_sequences = 64", controls=False)
    write_accumulator(models / "brief", batched, f"max_sequences = {SEATS}\nidle_seconds = 0.2")
    write_accumulator(models / "single", "max_batch_size = 0", "", batch_dimension=False)
    return models


@pytest.fixture(scope="module")
def daemon(tmp_path_factory, repository):
    run = tmp_path_factory.mktemp("stateful-run")
    with start_daemon(run, repository, access={"tcp_role": "admin"}) as running:
        yield running


@pytest.fixture
def client(daemon):
    with Client(daemon.infer_socket) as client:
        yield client


def step(client, model, id, x, start=False, end=False):
    """Send one step of four equal numbers; gives the first of the answer's."""
    answer = client.infer(
        model,
        {"x": np.full((1, 4), x, np.float32)},
        sequence_id=id,
        sequence_start=start,
        sequence_end=end,
        timeout=PATIENCE_SECONDS,
    )
    return answer["y"][0, 0].item()


class Reference:
    """What the model gives for one sequence."""

    def __init__(self):
        self.state = np.float32(0)

    def step(self, x):
        self.state = self.state * np.float32(0.5) + np.float32(x)
        return self.state.item()


# ---------------------------------------------------------------- the native socket


@pytest.mark.parametrize("model", ["oldest", "direct", "words", "single"])
def test_interleaved_sequences_over_the_native_socket(client, model):
    references = {id: Reference() for id in (11, 12, 13, 14)}
    random = np.random.default_rng(1)
    for number in range(40):
        for id in random.permutation(list(references)).tolist():
            x = random.integers(-8, 8).item()
            given = step(client, model, id, x, start=number == 0, end=number == 39)
            assert given == references[id].step(x)
    with pytest.raises(InvalidRequest, match="sequence_start"):
        step(client, model, 11, 1)


def test_a_model_that_is_told_no_id_takes_words(client):
    reference = Reference()
    assert step(client, "words", "e333c95a-07fc", 3, start=True) == reference.step(3)
    assert step(client, "words", "e333c95a-07fc", 4, end=True) == reference.step(4)
    with pytest.raises(InvalidRequest, match="must be a number"):
        step(client, "oldest", "word", 1, start=True)


def test_the_model_is_told_what_the_controls_are_for(client):
    for flags, seen in (
        ((True, False), [1, 0, 1, 21]),
        ((False, False), [0, 0, 1, 21]),
        ((False, True), [0, 1, 1, 21]),
    ):
        answer = client.infer(
            "direct",
            {"x": np.zeros((1, 4), np.float32)},
            outputs=["seen"],
            sequence_id=21,
            sequence_start=flags[0],
            sequence_end=flags[1],
        )
        assert answer["seen"].tolist() == [seen]


def test_what_is_made_here_is_neither_shown_nor_taken(daemon, client):
    metadata = daemon.get("/v2/models/oldest")
    assert [tensor["name"] for tensor in metadata["inputs"]] == ["x"]
    assert [tensor["name"] for tensor in metadata["outputs"]] == ["y", "seen"]
    row = np.zeros((1, 4), np.float32)
    for name in ("state_in", "START"):
        with pytest.raises(InvalidRequest, match="the model takes 'x'"):
            client.infer("oldest", {"x": row, name: row[:, :1]}, sequence_id=1, sequence_start=True)
    with pytest.raises(InvalidRequest, match="a sequence takes one"):
        client.infer("oldest", {"x": np.zeros((2, 4), np.float32)}, sequence_id=1, sequence_start=True)
    with pytest.raises(InvalidRequest, match="sequence_id"):
        client.infer("oldest", {"x": row})


def test_sequences_that_idle_end_and_make_way_for_one_that_waits(daemon, client):
    for id in range(1, SEATS + 1):
        step(client, "brief", id, 1, start=True)
    with triton_grpc.InferenceServerClient(daemon.grpc_tcp) as other:
        result = other.infer("brief", [tensor(6)], sequence_id=1, sequence_start=True)
        assert result.as_numpy("y")[0, 0] == 6
    with pytest.raises(Conflict, match=r"it had no request for 0.2 s; start it again"):
        step(client, "brief", 1, 1)


# ---------------------------------------------------------------- who may go on


PROGRAM = """
import sys, numpy
from appliance_client import Client, ApplianceError
with Client(sys.argv[1]) as client:
    for start in (False, True):
        try:
            row = numpy.full((1, 4), 5, "float32")
            answer = client.infer("oldest", {"x": row}, sequence_id=41, sequence_start=start)
            print(answer["y"][0, 0].item())
        except ApplianceError as error:
            print(error.kind)
"""


def test_another_process_with_the_same_id_has_another_sequence(daemon, client):
    step(client, "oldest", 41, 16, start=True)
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, daemon.infer_socket], capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert ended.stdout.split() == ["invalid-request", "5.0"], ended.stderr
    assert step(client, "oldest", 41, 1, end=True) == 9


def test_a_client_that_leaves_gives_its_seats_back(daemon, client):
    """Over TCP every connection is a client of its own."""
    row = tensor(1)
    for _ in range(3):
        with triton_grpc.InferenceServerClient(daemon.grpc_tcp) as other:
            for id in range(1, SEATS + 1):
                other.infer("oldest", [row], sequence_id=id, sequence_start=True)
    assert step(client, "oldest", 42, 2, start=True, end=True) == 2


# ---------------------------------------------------------------- Triton's clients


def tensor(x, module=triton_grpc):
    value = module.InferInput("x", [1, 4], "FP32")
    value.set_data_from_numpy(np.full((1, 4), x, np.float32))
    return value


@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_an_unmodified_triton_client_over_grpc(daemon, transport):
    address = daemon.grpc_tcp if transport == "tcp" else f"unix:{daemon.grpc_socket}"
    with triton_grpc.InferenceServerClient(address) as client:
        references = {1001: Reference(), 1002: Reference()}
        for number in range(10):
            for id, reference in references.items():
                result = client.infer(
                    "oldest",
                    [tensor(number + id % 10)],
                    sequence_id=id,
                    sequence_start=number == 0,
                    sequence_end=number == 9,
                )
                assert result.as_numpy("y")[0, 0] == reference.step(number + id % 10)
        with pytest.raises(InferenceServerException) as caught:
            client.infer("oldest", [tensor(1)], sequence_id=1001)
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_sequences_pipelined_on_a_triton_stream_keep_their_order(daemon, transport):
    address = daemon.grpc_tcp if transport == "tcp" else f"unix:{daemon.grpc_socket}"
    answers: queue.SimpleQueue = queue.SimpleQueue()
    steps = 8
    references = {
        id: Reference() for id in range(1, 9)
    }  # more than there are seats; 64 requests, as many as a stream takes
    expected, given = {}, {}
    with triton_grpc.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for number in range(steps):
            for id, reference in references.items():
                expected[f"{id}-{number}"] = reference.step(number * id % 13)
                client.async_stream_infer(
                    "oldest",
                    [tensor(number * id % 13)],
                    request_id=f"{id}-{number}",
                    sequence_id=id,
                    sequence_start=number == 0,
                    sequence_end=number == steps - 1,
                )
        for _ in expected:
            result, error = answers.get(timeout=PATIENCE_SECONDS)
            assert error is None, error
            given[result.get_response().id] = result.as_numpy("y")[0, 0].item()
        client.stop_stream()
    assert given == expected
    order = [key for key in given if key.startswith("3-")]
    assert order == [f"3-{number}" for number in range(steps)]


def test_an_unmodified_triton_client_over_http(daemon):
    with triton_http.InferenceServerClient(daemon.http_tcp) as client:
        reference = Reference()
        for number in range(5):
            result = client.infer(
                "direct",
                [tensor(number, triton_http)],
                sequence_id=7,
                sequence_start=number == 0,
                sequence_end=number == 4,
            )
            assert result.as_numpy("y")[0, 0] == reference.step(number)
        with pytest.raises(InferenceServerException, match="sequence_start"):
            client.infer("direct", [tensor(1, triton_http)], sequence_id=7)


def test_the_configuration_says_how_sequences_are_scheduled(daemon):
    with triton_grpc.InferenceServerClient(daemon.grpc_tcp) as client:
        config = client.get_model_config("oldest").config
        assert config.WhichOneof("scheduling_choice") == "sequence_batching"
        assert config.sequence_batching.oldest.max_candidate_sequences == SEATS
        assert [state.input_name for state in config.sequence_batching.state] == ["state_in"]
        assert [tensor.name for tensor in config.input] == ["x"]


# ---------------------------------------------------------------- what can happen


def test_with_its_worker_a_sequence_is_lost_and_its_client_told_to_start_again(daemon, client):
    step(client, "oldest", 51, 1, start=True)
    os.kill(daemon.model("oldest")["pid"], signal.SIGKILL)
    wait_until(lambda: daemon.model("oldest")["state"] != "ready", "the loss is noticed")
    daemon.wait_for_state("oldest", "ready")
    with pytest.raises(Conflict, match="lost with the worker; start it again") as caught:
        step(client, "oldest", 51, 1)
    assert caught.value.is_retryable
    assert step(client, "oldest", 51, 4, start=True) == 4
    assert step(client, "oldest", 51, 1, end=True) == 3


def test_after_a_reload_a_client_is_told_to_start_again(daemon, repository, client):
    step(client, "words", 61, 1, start=True)
    manifest = repository / "words" / "model.toml"
    manifest.write_text(manifest.read_text() + "\n")
    os.utime(manifest, ns=(0, manifest.stat().st_mtime_ns + 1_000_000_000))
    client.load("words")
    with pytest.raises(Conflict, match="loaded anew"):
        step(client, "words", 61, 1)
    assert step(client, "words", 61, 8, start=True, end=True) == 8


def test_sequences_pipelined_on_the_native_socket_share_batches_and_keep_their_order(daemon):
    references = {id: Reference() for id in range(1, 17)}  # more than there are seats

    async def pipelined() -> tuple[list, list]:
        async with AsyncClient(daemon.infer_socket) as client:
            expected, calls = [], []
            for number in range(30):
                for id, reference in references.items():
                    x = (number + 1) * id % 13
                    expected.append(reference.step(x))
                    calls.append(
                        client.infer(
                            "oldest",
                            {"x": np.full((1, 4), x, np.float32)},
                            sequence_id=id,
                            sequence_start=number == 0,
                            sequence_end=number == 29,
                            timeout=PATIENCE_SECONDS,
                        )
                    )
            return expected, await asyncio.gather(*calls)

    expected, answers = asyncio.run(pipelined())
    assert [answer["y"][0, 0].item() for answer in answers] == expected
    assert max(answer.timings.batch_rows for answer in answers) > 1
