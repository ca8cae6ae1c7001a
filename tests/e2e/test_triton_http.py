"""An unmodified Triton client speaks to the daemon over HTTP; so does curl on the Unix socket."""

import json
import struct
import subprocess

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

ROW = np.linspace(-1, 1, 16, dtype=np.float32).reshape(1, 16)


@pytest.fixture
def client(daemon):
    client = triton.InferenceServerClient(daemon.http_tcp)
    yield client
    client.close()


@pytest.fixture(scope="module")
def picture():
    """A black PNG with a white stroke."""
    import io

    from PIL import Image, ImageDraw

    image = Image.new("L", (28, 28), 0)
    ImageDraw.Draw(image).line((14, 4, 14, 24), fill=255, width=3)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def tensor(name, datatype, array, binary=True):
    value = triton.InferInput(name, list(array.shape), datatype)
    value.set_data_from_numpy(array, binary_data=binary)
    return value


def identity_names(client):
    metadata = client.get_model_metadata("identity")
    return metadata["inputs"][0]["name"], metadata["outputs"][0]["name"]


def test_health(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert client.is_model_ready("digits", "1")
    assert not client.is_model_ready("no-such-model")


def test_metadata_and_configuration(client):
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata("identity")
    assert (metadata["name"], metadata["inputs"][0]["datatype"], metadata["inputs"][0]["shape"]) == (
        "identity",
        "FP32",
        [-1, 16],
    )
    config = client.get_model_config("identity")
    assert (config["input"][0]["data_type"], config["input"][0]["dims"]) == ("TYPE_FP32", [16])
    assert config["max_batch_size"] > 0


def test_statistics_count_what_was_answered(client):
    def successes():
        (row,) = client.get_inference_statistics("identity")["model_stats"]
        return row["inference_stats"]["success"]["count"]

    before = successes()
    client.infer("identity", [tensor(identity_names(client)[0], "FP32", ROW)])
    assert successes() == before + 1
    assert {row["name"] for row in client.get_inference_statistics()["model_stats"]} >= {"digits", "identity"}


def test_the_repository_lists_unloads_and_loads(client):
    assert {entry["name"] for entry in client.get_model_repository_index()} >= {"digits", "language-id", "identity"}
    client.unload_model("identity")
    assert not client.is_model_ready("identity")
    with pytest.raises(InferenceServerException) as refusal:
        client.infer("identity", [tensor("x", "FP32", ROW)])
    assert refusal.value.status() == "503"
    client.load_model("identity")
    assert client.is_model_ready("identity")


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_tensors_travel_as_binary_data_and_as_json(client, binary_in, binary_out):
    given, taken = identity_names(client)
    outputs = [triton.InferRequestedOutput(taken, binary_data=binary_out)]
    answer = client.infer("identity", [tensor(given, "FP32", ROW, binary_in)], outputs=outputs, request_id="mine")
    assert np.array_equal(answer.as_numpy(taken), ROW)
    assert answer.get_response()["id"] == "mine"
    assert answer.get_response()["parameters"]["batch_rows"] >= 1


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests(client, algorithm):
    given, taken = identity_names(client)
    answer = client.infer("identity", [tensor(given, "FP32", ROW)], request_compression_algorithm=algorithm)
    assert np.array_equal(answer.as_numpy(taken), ROW)


def test_requests_at_once(daemon):
    with triton.InferenceServerClient(daemon.http_tcp, concurrency=8) as client:
        given, taken = identity_names(client)
        pending = [client.async_infer("identity", [tensor(given, "FP32", ROW * n)]) for n in range(32)]
        for n, request in enumerate(pending):
            assert np.array_equal(request.get_result().as_numpy(taken), ROW * n)


@pytest.mark.parametrize("binary", [True, False])
def test_text_is_bytes(client, binary):
    given = client.get_model_metadata("language-id")["inputs"][0]["name"]
    texts = np.array(["Wo ist der Bahnhof, bitte?", "Where is the station, please?"], dtype=object)
    shape = client.get_model_metadata("language-id")["inputs"][0]["shape"]
    texts = texts.reshape([2] + [1] * (len(shape) - 1))
    outputs = [triton.InferRequestedOutput("label", binary_data=binary)]
    answer = client.infer("language-id", [tensor(given, "BYTES", texts, binary)], outputs=outputs)
    labels = answer.as_numpy("label").reshape(-1)
    assert len(labels) == 2
    assert labels[0] != labels[1]


def test_pictures_are_bytes(client, picture):
    given = client.get_model_metadata("digits")["inputs"][0]
    pictures = np.array([picture], dtype=object).reshape([1] * len(given["shape"]))
    answer = client.infer("digits", [tensor(given["name"], "BYTES", pictures)])
    assert answer.as_numpy("label").reshape(-1)[0] == b"1"


def test_a_wrong_datatype_or_shape_is_refused(client):
    given, _ = identity_names(client)
    for wrong in (
        tensor(given, "FP16", ROW.astype(np.float16)),
        tensor(given, "FP32", ROW[:, :3]),
        tensor("nothing", "FP32", ROW),
    ):
        with pytest.raises(InferenceServerException, match="cannot ") as refusal:
            client.infer("identity", [wrong])
        assert refusal.value.status() == "400"


def test_an_unknown_model_is_404(client):
    with pytest.raises(InferenceServerException) as refusal:
        client.infer("no-such-model", [tensor("x", "FP32", ROW)])
    assert refusal.value.status() == "404"


def test_a_timeout_that_cannot_be_met_is_504(client):
    given, _ = identity_names(client)
    with pytest.raises(InferenceServerException) as refusal:
        client.infer("identity", [tensor(given, "FP32", ROW)], timeout=1)
    assert refusal.value.status() == "504"


def test_priorities_and_timeouts_are_taken_and_sequences_refused_without_state(client):
    given, made = identity_names(client)
    inputs = [tensor(given, "FP32", ROW)]
    for options in ({"priority": 1}, {"priority": 3, "timeout": 60_000_000}, {"priority": 1 << 40}):
        assert client.infer("identity", inputs, **options).as_numpy(made).tolist() == ROW.tolist()
    assert client.infer("identity", inputs, parameters={"priority_class": "unknown parameters do nothing"})
    for options in (
        {"priority": -1},
        {"sequence_id": 5, "sequence_start": True},
        {"sequence_id": "five", "sequence_end": True},
    ):
        with pytest.raises(InferenceServerException) as refusal:
            client.infer("identity", inputs, **options)
        assert refusal.value.status() == "400"


def test_what_is_not_offered_is_501_and_inference_goes_on(client):
    for refused in (
        client.get_system_shared_memory_status,
        client.get_cuda_shared_memory_status,
        client.get_log_settings,
    ):
        with pytest.raises(InferenceServerException) as refusal:
            refused()
        assert refusal.value.status() == "501"
    assert client.is_server_ready()


def curl(daemon, path, *arguments):
    command = ["curl", "--silent", "--show-error", "--unix-socket", daemon.http_socket, *arguments]
    return subprocess.run([*command, f"http://localhost{path}"], capture_output=True, check=True, timeout=30).stdout


def test_curl_on_the_unix_socket(daemon):
    assert json.loads(curl(daemon, "/v2/health/live")) == {"live": True}
    status = json.loads(curl(daemon, "/admin/status"))
    assert (status["pid"], status["ready"]) == (daemon.pid, True)


def test_curl_sends_a_picture_in_base64(daemon, picture, tmp_path):
    import base64

    given = json.loads(curl(daemon, "/v2/models/digits"))["inputs"][0]
    entry = {
        "name": given["name"],
        "datatype": "BYTES",
        "shape": [1] * len(given["shape"]),
        "data": [base64.b64encode(picture).decode()],
        "parameters": {"content_encoding": "base64"},
    }
    body = tmp_path / "body"
    body.write_text(json.dumps({"inputs": [entry]}))
    answer = json.loads(curl(daemon, "/v2/models/digits/infer", "--data-binary", f"@{body}"))
    assert {output["name"]: output["data"] for output in answer["outputs"]}["label"] == ["1"]


def test_curl_sends_binary_tensors(daemon, tmp_path):
    given = json.loads(curl(daemon, "/v2/models/identity"))["inputs"][0]["name"]
    raw = struct.pack("<16f", *range(16))
    entry = {"name": given, "datatype": "FP32", "shape": [1, 16], "parameters": {"binary_data_size": 64}}
    head = json.dumps({"inputs": [entry]}).encode()
    body = tmp_path / "body"
    body.write_bytes(head + raw)
    header = f"Inference-Header-Content-Length: {len(head)}"
    answer = json.loads(curl(daemon, "/v2/models/identity/infer", "-H", header, "--data-binary", f"@{body}"))
    assert answer["outputs"][0]["data"] == [float(n) for n in range(16)]


def test_metrics_are_prometheus_text(daemon, client):
    client.infer("identity", [tensor(identity_names(client)[0], "FP32", ROW)])
    text = curl(daemon, "/metrics").decode()
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert samples["appliance_ready"] == "1"
    assert float(samples['appliance_requests_succeeded_total{model="identity",version="1"}']) >= 1
    assert float(samples['appliance_compute_seconds_total{model="identity",version="1"}']) > 0


def test_a_foreign_host_is_refused(daemon):
    assert json.loads(curl(daemon, "/v2", "-H", "Host: evil.example"))["kind"] == "permission-denied"


@pytest.mark.parametrize("binary", [True, False])
def test_half_precision_travels(own_daemon, tmp_path, binary):
    """FP16 and BF16 go in as binary data and come back as binary data or as JSON numbers."""
    import ml_dtypes
    from onnx import TensorProto

    from support.models import write_identity

    models = tmp_path / "models"
    kinds = {
        "half": ("FP16", TensorProto.FLOAT16, np.float16),
        "brain": ("BF16", TensorProto.BFLOAT16, ml_dtypes.bfloat16),
    }
    for name, (_, element_type, _) in kinds.items():
        write_identity(models / name, element_type=element_type)
    with triton.InferenceServerClient(own_daemon(models).http_tcp) as client:
        for name, (datatype, _, dtype) in kinds.items():
            row = ROW.astype(dtype)
            outputs = [triton.InferRequestedOutput("y", binary_data=binary)]
            answer = client.infer(name, [tensor("x", datatype, row)], outputs=outputs)
            assert np.array_equal(answer.as_numpy("y").astype(np.float32), row.astype(np.float32))
