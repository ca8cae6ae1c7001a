"""The client library against the real daemon with real models."""

import asyncio
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import appliance_client
from appliance_client import (
    AdminClient,
    ApplianceError,
    AsyncClient,
    Client,
    ConnectionLost,
    DaemonUnreachable,
    InvalidRequest,
    ModelNotFound,
    Tensor,
)
from support.daemon import start_daemon
from support.models import write_identity


@pytest.fixture
def client(daemon):
    with Client(daemon.infer_socket, timeout=30) as client:
        yield client


def row(value):
    return np.full((1, 16), value, np.float32)


def test_a_tensor_goes_through_a_model_and_back(client):
    answer = client.infer("identity", {"x": row(0.5)})
    assert answer["y"].tolist() == row(0.5).tolist()
    assert (answer.model, answer.version) == ("identity", "1")
    assert answer.timings.batch_rows >= 1


def test_text_goes_in_and_labels_come_out(client):
    answer = client.infer("language-id", {"text": [["Wo ist der nächste Bahnhof?"], ["Where is the next station?"]]})
    assert np.ravel(answer.text("label")).tolist() == ["de", "en"]


def test_the_example_in_the_packages_docstring_runs(daemon, monkeypatch, capsys):
    monkeypatch.setenv("APPLIANCE_SOCKET", daemon.infer_socket)
    lines = [line[4:] for line in (appliance_client.__doc__ or "").splitlines() if line.startswith("    ")]
    exec("\n".join(lines), {})
    assert "Timings(" in capsys.readouterr().out


def test_rows_of_a_request_come_back_in_order(client):
    values = np.arange(8 * 16, dtype=np.float32).reshape(8, 16)
    assert (client.infer("identity", {"x": values})["y"] == values).all()


@pytest.mark.parametrize(
    ("model", "inputs", "options", "error"),
    [
        ("nothing", {"x": row(1)}, {}, ModelNotFound),
        ("identity", {"x": row(1)}, {"version": "9"}, ModelNotFound),
        ("identity", {"z": row(1)}, {}, InvalidRequest),
        ("identity", {"x": row(1).astype(np.float64)}, {}, InvalidRequest),
        ("identity", {"x": np.ones(16, np.float32)}, {}, InvalidRequest),
        ("identity", {"x": np.ones((1, 17), np.float32)}, {}, InvalidRequest),
        ("identity", {}, {}, InvalidRequest),
        ("identity", {"x": row(1)}, {"outputs": ["z"]}, InvalidRequest),
    ],
)
def test_what_the_daemon_refuses_is_raised_and_the_connection_lives(client, model, inputs, options, error):
    with pytest.raises(error):
        client.infer(model, inputs, **options)
    assert client.infer("identity", {"x": row(2)})["y"][0, 0] == 2


def test_a_stream_comes_back_in_order(client):
    answers = client.stream("identity", ({"x": row(number)} for number in range(300)), max_in_flight=32)
    assert [float(answer["y"][0, 0]) for answer in answers] == list(range(300))


def test_a_stream_gives_errors_in_place(client):
    inputs = [{"x": row(0)}, {"x": np.ones(3, np.float32)}, {"x": row(2)}]
    kinds = [
        each.kind if isinstance(each, ApplianceError) else float(each["y"][0, 0])
        for each in client.stream("identity", inputs, return_errors=True)
    ]
    assert kinds == [0.0, "invalid-request", 2.0]


def test_threads_share_a_client(client):
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda number: client.infer("identity", {"x": row(number)})["y"][0, 0], range(400))
        assert [float(each) for each in answers] == list(range(400))


def test_concurrent_calls_each_get_their_own_answer(daemon):
    async def run():
        async with AsyncClient(daemon.infer_socket, timeout=30) as client:
            calls = (client.infer("identity", {"x": row(number)}) for number in range(500))
            return [float(answer["y"][0, 0]) for answer in await asyncio.gather(*calls)]

    assert asyncio.run(run()) == list(range(500))


def test_large_inputs_travel_in_regions_and_come_back_whole(own_daemon, tmp_path):
    write_identity(tmp_path / "models" / "wide", ("batch", 150_000))
    running = own_daemon(tmp_path / "models", limits={"max_regions": 2})
    generator = np.random.default_rng(0)
    with Client(running.infer_socket, timeout=30) as client:
        for _ in range(5):
            value = generator.random((1, 150_000), np.float32)
            assert (client.infer("wide", {"x": value})["y"] == value).all()
        inputs = [generator.random((1 + number % 3, 150_000), np.float32) for number in range(12)]
        answers = client.stream("wide", ({"x": value} for value in inputs), max_in_flight=6)
        assert all((answer["y"] == value).all() for answer, value in zip(answers, inputs, strict=True))
        small = Client(running.infer_socket, region_threshold=None, timeout=30)
        with small:
            assert (small.infer("wide", {"x": inputs[0]})["y"] == inputs[0]).all()

    async def run():
        async with AsyncClient(running.infer_socket, timeout=30) as client:
            return await asyncio.gather(*(client.infer("wide", {"x": value}) for value in inputs))

    assert all((answer["y"] == value).all() for answer, value in zip(asyncio.run(run()), inputs, strict=True))


def test_a_daemon_without_regions_gets_large_inputs_in_the_frame(own_daemon, tmp_path):
    write_identity(tmp_path / "models" / "wide", ("batch", 150_000))
    running = own_daemon(tmp_path / "models", limits={"max_regions": 0, "max_request_bytes": 1_000_000})
    with Client(running.infer_socket, timeout=30) as client:
        assert client.infer("wide", {"x": np.ones((1, 150_000), np.float32)})["y"].sum() == 150_000
        with pytest.raises(InvalidRequest, match="takes at most 1000000"):
            client.infer("wide", {"x": np.ones((2, 150_000), np.float32)})


def test_cancelled_tasks_leave_the_connection_in_order(daemon):
    async def run():
        async with AsyncClient(daemon.infer_socket, timeout=30) as client:
            for round_ in range(20):
                calls = [asyncio.ensure_future(client.infer("identity", {"x": row(number)})) for number in range(32)]
                for _ in range(round_ % 5):
                    await asyncio.sleep(0)
                for call in calls[::2]:
                    call.cancel()
                answers = await asyncio.gather(*calls, return_exceptions=True)
                kept = [float(answer["y"][0, 0]) for answer in answers[1::2]]
                assert kept == [float(number) for number in range(1, 32, 2)]

    asyncio.run(run())


def test_everything_but_inference(client):
    assert client.server_live()
    assert client.server_ready()
    assert client.server_metadata().name
    assert client.model_ready("identity")
    metadata = client.model_metadata("identity")
    assert (metadata.inputs[0].name, metadata.inputs[0].datatype, metadata.inputs[0].shape) == ("x", "FP32", (-1, 16))
    assert {row.name for row in client.repository_index()} >= {"digits", "identity", "language-id"}
    before = client.statistics("identity")[0].inference_count
    client.infer("identity", {"x": row(1)})
    assert client.statistics("identity")[0].inference_count == before + 1
    with pytest.raises(ModelNotFound):
        client.model_metadata("nothing")


def test_load_and_unload(own_daemon, tmp_path):
    write_identity(tmp_path / "models" / "identity")
    running = own_daemon(tmp_path / "models")
    with Client(running.infer_socket, timeout=30) as client:
        client.unload("identity")
        assert not client.model_ready("identity")
        with pytest.raises(ApplianceError) as caught:
            client.infer("identity", {"x": row(1)})
        assert caught.value.kind == "model-not-ready"
        client.load("identity")
        assert client.infer("identity", {"x": row(1)})["y"][0, 0] == 1
        with pytest.raises(ModelNotFound):
            client.load("nothing")


def test_a_restarted_daemon_is_found_again(tmp_path):
    write_identity(tmp_path / "models" / "identity")
    with start_daemon(tmp_path, tmp_path / "models") as running:
        client = Client(running.infer_socket, timeout=30)
        client.infer("identity", {"x": row(1)})
    with client:
        with pytest.raises(DaemonUnreachable):
            client.infer("identity", {"x": row(1)})
        with start_daemon(tmp_path, tmp_path / "models"):
            assert client.infer("identity", {"x": row(3)})["y"][0, 0] == 3


def test_a_killed_daemon_is_a_lost_connection_and_no_hang(own_daemon, tmp_path):
    write_identity(tmp_path / "models" / "identity")
    running = own_daemon(tmp_path / "models")
    with Client(running.infer_socket) as client:
        client.infer("identity", {"x": row(1)})
        os.kill(running.pid, signal.SIGKILL)
        running.process.wait()
        for _ in range(2):
            with pytest.raises((ConnectionLost, DaemonUnreachable)):
                client.infer("identity", {"x": row(1)})


def test_a_tensor_names_its_datatype(client):
    assert client.infer("identity", {"x": Tensor([[1] * 16], "FP32")})["y"].sum() == 16


def test_the_administrative_client_reads_the_same_daemon(daemon):
    admin = AdminClient(daemon.http_socket)
    assert admin.get("/v2")["name"]
    assert admin.get("/admin/models/identity")["state"] == "ready"
    with pytest.raises(ModelNotFound):
        admin.get("/admin/models/nothing")
