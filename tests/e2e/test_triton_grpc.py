"""An unmodified Triton client speaks to the daemon over gRPC, on TCP and on the Unix socket."""

import asyncio
import queue
import shutil

import grpc
import ml_dtypes
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from onnx import TensorProto
from tritonclient.utils import InferenceServerException

from appliance.wire import open_inference_pb2 as pb
from support.daemon import PATIENCE_SECONDS, start_daemon
from support.models import write_identity

ROW = np.linspace(-1, 1, 16, dtype=np.float32).reshape(1, 16)
HEALTH = "/grpc.health.v1.Health/"


@pytest.fixture(params=["tcp", "unix"])
def client(daemon, request):
    address = daemon.grpc_tcp if request.param == "tcp" else f"unix:{daemon.grpc_socket}"
    with triton.InferenceServerClient(address) as client:
        yield client


@pytest.fixture
def admin(daemon):
    with triton.InferenceServerClient(daemon.grpc_tcp) as client:
        yield client


@pytest.fixture(scope="module")
def typed(tmp_path_factory):
    """A daemon with identities of the datatypes that have no model of their own; its TCP clients only infer."""
    models = tmp_path_factory.mktemp("typed-models")
    for name, element_type in (
        ("fp16", TensorProto.FLOAT16),
        ("bf16", TensorProto.BFLOAT16),
        ("bytes", TensorProto.STRING),
        ("int8", TensorProto.INT8),
        ("uint8", TensorProto.UINT8),
        ("bool", TensorProto.BOOL),
        ("int64", TensorProto.INT64),
        ("uint64", TensorProto.UINT64),
        ("fp64", TensorProto.DOUBLE),
    ):
        write_identity(models / name, ("batch", 3), element_type)
    with start_daemon(tmp_path_factory.mktemp("typed-run"), models) as running:
        yield running


def tensor(datatype, array, name="x"):
    value = triton.InferInput(name, list(array.shape), datatype)
    value.set_data_from_numpy(array)
    return value


def refusal(call, *args, **options):
    with pytest.raises(InferenceServerException) as caught:
        call(*args, **options)
    return caught.value.status(), caught.value.message()


# ------------------------------------------------------------------ server and models


def test_health(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("identity")
    assert client.is_model_ready("identity", "1")
    assert not client.is_model_ready("no-such-model")


def test_server_metadata(client):
    metadata = client.get_server_metadata()
    assert metadata.name == "inference-appliance"
    assert "model_repository" in metadata.extensions


def test_model_metadata_and_configuration(client):
    metadata = client.get_model_metadata("identity")
    assert (metadata.name, list(metadata.versions)) == ("identity", ["1"])
    assert [(each.name, each.datatype, list(each.shape)) for each in metadata.inputs] == [("x", "FP32", [-1, 16])]
    assert [(each.name, each.datatype, list(each.shape)) for each in metadata.outputs] == [("y", "FP32", [-1, 16])]
    config = client.get_model_config("identity", as_json=True)["config"]
    assert config["max_batch_size"] > 0
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": ["16"]}]
    assert config["backend"]
    assert "dynamic_batching" in config


def test_a_text_and_an_image_model_show_what_clients_send(client):
    assert client.get_model_metadata("language-id").inputs[0].datatype == "BYTES"
    assert client.get_model_config("language-id").config.input[0].data_type == pb.TYPE_STRING
    assert client.get_model_metadata("digits").inputs[0].name == "image"


def test_statistics_count_inferences(client):
    def count():
        (statistics,) = client.get_inference_statistics("identity").model_stats
        return statistics.inference_stats.success.count, statistics.inference_count

    requests, rows = count()
    client.infer("identity", [tensor("FP32", np.repeat(ROW, 3, axis=0))])
    assert count() == (requests + 1, rows + 3)
    names = {statistics.name for statistics in client.get_inference_statistics().model_stats}
    assert {"identity", "digits", "language-id"} <= names


def test_repository_index(client):
    index = {model.name: model.state for model in client.get_model_repository_index().models}
    assert index["identity"] == "READY"


def test_load_and_unload(admin, daemon, model_repository):
    write_identity(model_repository / "extra")
    try:
        admin.load_model("extra")
        assert admin.is_model_ready("extra")
        assert admin.infer("extra", [tensor("FP32", ROW)]).as_numpy("y").tolist() == ROW.tolist()
        admin.unload_model("extra")
        assert not admin.is_model_ready("extra")
        states = {model.name: model.state for model in admin.get_model_repository_index().models}
        assert states["extra"] == "UNAVAILABLE"
        status, _ = refusal(admin.infer, "extra", [tensor("FP32", ROW)])
        assert status == "StatusCode.UNAVAILABLE"
    finally:
        shutil.rmtree(model_repository / "extra")


def test_load_takes_neither_config_nor_files_from_the_request(admin):
    status, message = refusal(admin.load_model, "identity", config="{}")
    assert (status, "config" in message) == ("StatusCode.INVALID_ARGUMENT", True)
    status, _ = refusal(admin.load_model, "identity", config="{}", files={"file:1/model.onnx": b"x"})
    assert status == "StatusCode.INVALID_ARGUMENT"


def test_the_unix_socket_knows_its_clients_and_tcp_does_not(typed):
    with triton.InferenceServerClient(f"unix:{typed.grpc_socket}") as client:
        client.unload_model("fp64")
        client.load_model("fp64")
        assert client.is_model_ready("fp64")
    with triton.InferenceServerClient(typed.grpc_tcp) as client:
        for call in (client.load_model, client.unload_model):
            assert refusal(call, "fp64")[0] == "StatusCode.PERMISSION_DENIED"


def test_methods_that_are_not_offered_say_so(admin):
    for call in (admin.get_trace_settings, admin.get_log_settings, admin.get_system_shared_memory_status):
        assert refusal(call)[0] == "StatusCode.UNIMPLEMENTED"


# ------------------------------------------------------------------ inference


def test_infer_returns_the_tensor_the_id_and_the_timings(client):
    result = client.infer("identity", [tensor("FP32", ROW)], request_id="r-7", model_version="1")
    assert result.as_numpy("y").tolist() == ROW.tolist()
    response = result.get_response()
    assert (response.model_name, response.model_version, response.id) == ("identity", "1", "r-7")
    assert response.parameters["compute_us"].int64_param >= 0
    assert response.parameters["batch_rows"].int64_param >= 1


def test_infer_with_outputs_asked_for_timeout_and_priority(client):
    outputs = [triton.InferRequestedOutput("y")]
    result = client.infer("identity", [tensor("FP32", ROW)], outputs=outputs, timeout=30_000_000, priority=1)
    assert result.as_numpy("y").shape == (1, 16)
    result = client.infer("identity", [tensor("FP32", ROW)], client_timeout=PATIENCE_SECONDS)
    assert result.as_numpy("y").shape == (1, 16)


def test_a_large_batch_goes_through(client):
    rows = np.arange(64 * 16, dtype=np.float32).reshape(64, 16)
    assert np.array_equal(client.infer("identity", [tensor("FP32", rows)]).as_numpy("y"), rows)


def test_compressed_requests_are_understood(client):
    result = client.infer("identity", [tensor("FP32", ROW)], compression_algorithm="gzip")
    assert result.as_numpy("y").tolist() == ROW.tolist()


@pytest.mark.parametrize(
    ("model", "datatype", "values"),
    [
        ("fp16", "FP16", np.array([[1.5, -0.0, np.inf]], np.float16)),
        ("bf16", "BF16", np.array([[1.5, -2.0, 0.0]], ml_dtypes.bfloat16)),
        ("bytes", "BYTES", np.array([[b"", b"a\0b", "žluť".encode()]], np.object_)),
        ("int8", "INT8", np.array([[-128, 0, 127]], np.int8)),
        ("uint8", "UINT8", np.array([[0, 1, 255]], np.uint8)),
        ("bool", "BOOL", np.array([[True, False, True]])),
        ("int64", "INT64", np.array([[-(2**63), 0, 2**63 - 1]], np.int64)),
        ("uint64", "UINT64", np.array([[0, 1, 2**64 - 1]], np.uint64)),
        ("fp64", "FP64", np.array([[0.1, -np.inf, 2.5]], np.float64)),
    ],
)
def test_raw_tensors_of_every_kind_come_back_unchanged(typed, model, datatype, values):
    with triton.InferenceServerClient(typed.grpc_tcp) as client:
        result = client.infer(model, [tensor(datatype, values)]).as_numpy("y")
    assert np.array_equal(result, values)


def call_infer(address, message):
    """A request made by hand, as clients without numpy make it."""
    with grpc.insecure_channel(address) as channel:
        body = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(message.SerializeToString())
    return pb.ModelInferResponse.FromString(body)


@pytest.mark.parametrize(
    ("model", "datatype", "field", "values"),
    [
        ("bytes", "BYTES", "bytes_contents", [b"", b"a\0b", b"xyz"]),
        ("int8", "INT8", "int_contents", [-128, 0, 127]),
        ("uint8", "UINT8", "uint_contents", [0, 1, 255]),
        ("bool", "BOOL", "bool_contents", [True, False, True]),
        ("int64", "INT64", "int64_contents", [-(2**63), 0, 5]),
        ("uint64", "UINT64", "uint64_contents", [0, 1, 2**64 - 1]),
        ("fp64", "FP64", "fp64_contents", [0.1, -1.0, 2.5]),
    ],
)
def test_typed_contents_give_the_same_as_raw(typed, model, datatype, field, values):
    message = pb.ModelInferRequest(model_name=model)
    entry = message.inputs.add(name="x", datatype=datatype, shape=(1, 3))
    getattr(entry.contents, field).extend(values)
    array = np.array([values], np.object_ if datatype == "BYTES" else datatype.lower().replace("fp", "float"))
    with triton.InferenceServerClient(typed.grpc_tcp) as client:
        raw = client.infer(model, [tensor(datatype, array)]).get_response().raw_output_contents[0]
    assert call_infer(typed.grpc_tcp, message).raw_output_contents[0] == raw


def test_half_floats_have_no_typed_contents(typed):
    message = pb.ModelInferRequest(model_name="fp16")
    message.inputs.add(name="x", datatype="FP16", shape=(1, 3)).contents.fp32_contents.extend([1.0, 2.0, 3.0])
    with pytest.raises(grpc.RpcError) as caught:
        call_infer(typed.grpc_tcp, message)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_text_is_classified(client):
    texts = np.array([[b"Where is the nearest station, please?"], ["Où est la gare, s'il vous plaît ?".encode()]])
    result = client.infer("language-id", [tensor("BYTES", texts.astype(np.object_), "text")])
    metadata = client.get_model_metadata("language-id")
    labels = next(each.name for each in metadata.outputs if each.datatype == "BYTES")
    assert [label.decode() for label in result.as_numpy(labels).reshape(-1)] == ["en", "fr"]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"model": "no-such-model"}, "NOT_FOUND"),
        ({"model": "../identity"}, "INVALID_ARGUMENT"),
        ({"version": "9"}, "NOT_FOUND"),
        ({"name": "z"}, "INVALID_ARGUMENT"),
        ({"datatype": "FP64"}, "INVALID_ARGUMENT"),
        ({"shape": (1, 15)}, "INVALID_ARGUMENT"),
        ({"shape": (1, -16)}, "INVALID_ARGUMENT"),
        ({"shape": (0, 16)}, "INVALID_ARGUMENT"),
        ({"shape": (16,)}, "INVALID_ARGUMENT"),
        ({"content": bytes(60)}, "INVALID_ARGUMENT"),
        ({"output": "z"}, "INVALID_ARGUMENT"),
        ({"timeout": -1}, "INVALID_ARGUMENT"),
    ],
)
def test_bad_requests_have_their_code(daemon, change, code):
    message = pb.ModelInferRequest(model_name=change.get("model", "identity"), model_version=change.get("version", ""))
    message.inputs.add(
        name=change.get("name", "x"), datatype=change.get("datatype", "FP32"), shape=change.get("shape", (1, 16))
    )
    message.raw_input_contents.append(change.get("content", bytes(64)))
    if "output" in change:
        message.outputs.add(name=change["output"])
    if "timeout" in change:
        message.parameters["timeout"].int64_param = change["timeout"]
    with pytest.raises(grpc.RpcError) as caught:
        call_infer(daemon.grpc_tcp, message)
    assert caught.value.code() is grpc.StatusCode[code]
    assert caught.value.details().startswith("cannot ")
    assert dict(caught.value.trailing_metadata())["appliance-kind"]


def test_what_triton_offers_and_the_daemon_does_not_is_refused_clearly(client):
    value = triton.InferInput("x", [1, 16], "FP32")
    value.set_shared_memory("region", 64)
    status, message = refusal(client.infer, "identity", [value])
    assert (status, "infer.sock" in message) == ("StatusCode.INVALID_ARGUMENT", True)
    outputs = [triton.InferRequestedOutput("y", class_count=2)]
    status, message = refusal(client.infer, "identity", [tensor("FP32", ROW)], outputs=outputs)
    assert (status, "classification" in message) == ("StatusCode.INVALID_ARGUMENT", True)
    status, _ = refusal(client.infer, "identity", [tensor("FP32", ROW)], sequence_id=5, sequence_start=True)
    assert status == "StatusCode.INVALID_ARGUMENT"


def test_priorities_and_timeouts_are_taken_and_sequences_refused_without_state(client):
    inputs = [tensor("FP32", ROW)]
    for options in ({"priority": 1}, {"priority": 3, "timeout": 60_000_000}, {"priority": 2**64 - 1}):
        assert client.infer("identity", inputs, **options).as_numpy("y").tolist() == ROW.tolist()
    status, message = refusal(client.infer, "identity", inputs, timeout=-1)
    assert (status, "negative" in message) == ("StatusCode.INVALID_ARGUMENT", True)
    for options in ({"sequence_id": 5}, {"sequence_id": 2**63 - 1, "sequence_start": True}, {"sequence_id": "five"}):
        status, message = refusal(client.infer, "identity", inputs, **options)
        assert (status, "not stateful" in message) == ("StatusCode.INVALID_ARGUMENT", True)


def test_the_configuration_says_how_requests_are_scheduled(client):
    batching = client.get_model_config("identity").config.dynamic_batching
    assert (batching.priority_levels, batching.default_priority_level) == (3, 2)
    assert batching.default_queue_policy.max_queue_size > 0
    assert {"schedule_policy", "sequence"} <= set(client.get_server_metadata().extensions)


def test_async_infer_answers_each_request_with_its_own_tensor(client):
    answers = queue.Queue()
    for index in range(50):
        client.async_infer(
            "identity",
            [tensor("FP32", np.full((1, 16), index, np.float32))],
            lambda result, error: answers.put((result, error)),
            request_id=str(index),
        )
    for _ in range(50):
        result, error = answers.get(timeout=PATIENCE_SECONDS)
        assert error is None
        assert result.as_numpy("y")[0, 0] == int(result.get_response().id)


# ------------------------------------------------------------------ streams


def test_a_stream_answers_in_order_and_survives_a_bad_request(client):
    answers = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for index in range(10):
        client.async_stream_infer(
            "identity",
            [tensor("FP32", np.full((1, 16 if index != 4 else 15), index, np.float32))],
            request_id=str(index),
            enable_empty_final_response=True,
        )
    for index in range(10):
        result, error = answers.get(timeout=PATIENCE_SECONDS)
        if index == 4:
            assert "cannot" in error.message()
        else:
            response = result.get_response()
            assert (response.id, result.as_numpy("y")[0, 0]) == (str(index), index)
            assert response.parameters["triton_final_response"].bool_param
    client.stop_stream()
    assert answers.empty()


# ------------------------------------------------------------------ asyncio client


def test_the_asyncio_client_infers_and_streams(daemon):
    async def requests():
        for index in range(5):
            yield {"model_name": "identity", "inputs": [tensor("FP32", ROW * index)], "request_id": str(index)}

    async def run():
        async with triton_aio.InferenceServerClient(daemon.grpc_tcp) as client:
            assert await client.is_server_ready()
            assert (await client.get_model_metadata("identity")).name == "identity"
            results = await asyncio.gather(*(client.infer("identity", [tensor("FP32", ROW * i)]) for i in range(20)))
            for index, result in enumerate(results):
                assert np.array_equal(result.as_numpy("y"), ROW * index)
            with pytest.raises(InferenceServerException):
                await client.infer("no-such-model", [tensor("FP32", ROW)])
            ids = [result.get_response().id async for result, error in client.stream_infer(requests()) if error is None]
            assert ids == ["0", "1", "2", "3", "4"]

    asyncio.run(asyncio.wait_for(run(), PATIENCE_SECONDS))


# ------------------------------------------------------------------ grpc.health.v1


def health_status(body):
    return pb.HealthCheckResponse.ServingStatus.Name(pb.HealthCheckResponse.FromString(body).status)


def ask(name):
    return pb.HealthCheckRequest(service=name).SerializeToString()


def test_health_check_by_service(daemon):
    with grpc.insecure_channel(f"unix:{daemon.grpc_socket}") as channel:
        check = channel.unary_unary(HEALTH + "Check")
        assert health_status(check(ask(""))) == "SERVING"
        assert health_status(check(ask("digits"))) == "SERVING"
        with pytest.raises(grpc.RpcError) as caught:
            check(ask("no-such-model"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_health_watch_follows_a_model_and_hears_of_the_end_first(own_daemon, tmp_path):
    write_identity(tmp_path / "models" / "identity")
    running = own_daemon(tmp_path / "models", access={"tcp_role": "admin"})
    with (
        grpc.insecure_channel(running.grpc_tcp) as channel,
        triton.InferenceServerClient(running.grpc_tcp) as client,
    ):
        model = channel.unary_stream(HEALTH + "Watch")(ask("identity"), timeout=PATIENCE_SECONDS)
        server = channel.unary_stream(HEALTH + "Watch")(ask(""), timeout=PATIENCE_SECONDS)
        assert health_status(next(model)) == "SERVING"
        assert health_status(next(server)) == "SERVING"
        client.unload_model("identity")
        assert health_status(next(model)) == "NOT_SERVING"
        client.load_model("identity")
        assert health_status(next(model)) == "SERVING"
        running.process.terminate()
        assert health_status(next(server)) == "NOT_SERVING"
        assert list(server) == []
    assert running.stop() == 0
