"""The document, the vectors, the daemon's codec and the client's codec agree."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import appliance.errors
import appliance.wire.native as daemon
from appliance.server.access import METHOD_ROLE
from appliance.server.oip_infer import read_parameters
from appliance.types import NO_OPTIONS, RequestOptions, SequenceStep
from appliance.wire import open_inference_pb2 as pb
from appliance_client import Tensor, calls
from appliance_client.frames import FrameReader
from appliance_client.messages import Codec
from appliance_client.scheduling import scheduled
from appliance_client.wire import native as client

REPOSITORY = Path(__file__).parents[3]
DOCUMENT = (REPOSITORY / "docs" / "protocol.md").read_text()
VECTORS = {
    vector["name"]: vector
    for vector in json.loads((REPOSITORY / "tests" / "vectors" / "native.json").read_text())["vectors"]
}
every = pytest.mark.parametrize("name", VECTORS)


def content(name):
    return bytes.fromhex(VECTORS[name]["hex"])


def body(name):
    return memoryview(content(name))[daemon.HEADER.size :]


def received(name):
    """The vector as the client reads it."""
    reader = FrameReader(1 << 20)
    frame = content(name)
    reader.space()[: len(frame)] = frame
    reader.received(len(frame))
    result = reader.next()
    assert result is not None
    assert reader.is_empty
    return result


@every
def test_the_document_shows_the_vector(name):
    vector = VECTORS[name]
    lines = [f"### `{name}`", "", f"{vector['meaning']} From the {vector['from']}.", "", "```text"]
    for digits, meaning in vector["parts"]:
        first, *rest = [digits[begin : begin + 32] for begin in range(0, len(digits), 32)]
        lines += [f"{first:<32}  {meaning}", *rest]
    assert "\n".join([*lines, "```"]) in DOCUMENT


def test_the_document_shows_no_other_vector():
    shown = re.findall(r"^### `([a-z-]+)`$", DOCUMENT, re.MULTILINE)
    assert shown == list(VECTORS)


@every
def test_a_vector_is_the_sum_of_its_parts(name):
    assert "".join(digits for digits, _ in VECTORS[name]["parts"]) == VECTORS[name]["hex"]


@every
def test_the_daemons_codec_reads_the_header(name):
    length, kind, flags, descriptors, identifier, head, timeout_us = daemon.HEADER.unpack_from(content(name))
    assert VECTORS[name]["frame"] == {
        "length": length,
        "type": daemon.Frame(kind).name,
        "flags": flags,
        "descriptors": descriptors,
        "id": identifier,
        "head": head,
        "timeout_us": timeout_us,
    }
    assert len(body(name)) == length
    assert VECTORS[name]["from"] == ("client" if kind < 16 else "server")


def test_there_is_a_vector_for_every_type_of_frame():
    assert {vector["frame"]["type"] for vector in VECTORS.values()} == {frame.name for frame in daemon.Frame}


def test_both_codecs_have_the_same_numbers():
    for frame in daemon.Frame:
        assert getattr(client, frame.name) == frame
    assert (client.MAGIC, client.VERSION, client.FLAG_MORE) == (daemon.MAGIC, daemon.VERSION, daemon.FLAG_MORE)
    assert (client.HEADER.format, client.TIMINGS.format) == (daemon.HEADER.format, daemon.TIMINGS.format)


@pytest.mark.parametrize("name", [name for name, vector in VECTORS.items() if vector["from"] == "server"])
def test_the_client_reads_the_servers_frames(name):
    frame = received(name)
    expected = VECTORS[name]["frame"]
    assert (frame.kind, frame.flags, frame.identifier, frame.head) == (
        daemon.Frame[expected["type"]],
        expected["flags"],
        expected["id"],
        expected["head"],
    )
    assert frame.body == body(name)


def test_hello():
    assert client.pack_hello() == content("hello")
    assert daemon.HELLO.unpack(body("hello")) == (daemon.MAGIC, daemon.VERSION, 0)


def test_welcome():
    welcome = client.unpack_welcome(received("welcome").body)
    assert welcome == client.Welcome(1, 67108864, 1024, 64, 1, 1 << 30, "0.1.0")
    packed = daemon.WELCOME.pack(daemon.MAGIC, 1, 0, 67108864, 1024, 64, 1, 1 << 30) + b"0.1.0"
    assert packed == body("welcome")


@pytest.mark.parametrize(
    ("name", "model", "inputs", "parameters"),
    [
        ("infer", "identity", {"x": np.array([[1.0, -2.0]], np.float32)}, None),
        ("infer", "identity", {"x": Tensor([[1.0, -2.0]], "FP32")}, None),
        ("infer-text", "language-id", {"text": [["Guten Morgen"]]}, None),
        ("infer-priority", "identity", {"x": np.array([[1.0, -2.0]], np.float32)}, scheduled(None, 3)),
        ("infer-sequence", "identity", {"x": np.array([[1.0, -2.0]], np.float32)}, scheduled(None, 0, 7, True)),
    ],
)
def test_infer(name, model, inputs, parameters):
    request = Codec().request(model, inputs, (), "", parameters)
    frame = VECTORS[name]["frame"]
    length = len(request.head) + request.byte_size
    header = client.HEADER.pack(length, client.INFER, 0, 0, frame["id"], len(request.head), frame["timeout_us"])
    assert header + request.head + request.tail() == content(name)
    assert b"".join(bytes(buffer) for buffer in request.buffers()) == request.tail()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("infer", NO_OPTIONS),
        ("infer-priority", RequestOptions(priority=3)),
        ("infer-sequence", RequestOptions(sequence=SequenceStep(7, True, False))),
    ],
)
def test_the_daemon_reads_how_a_request_is_scheduled(name, options):
    head = bytes(body(name)[: VECTORS[name]["frame"]["head"]])
    assert read_parameters(pb.ModelInferRequest.FromString(head).parameters) == options


def test_infer_from_a_region():
    codec = Codec()
    request = codec.request("identity", {"x": np.zeros((1, 150_000), np.float32)}, (), "", None)
    head = codec.region_head(request, 4, request.region_offsets()[0])
    assert client.HEADER.pack(len(head), client.INFER, 0, 0, 5, len(head), 0) + head == content("infer-region")


def test_infer_in_the_message():
    head = VECTORS["infer-in-message"]["frame"]["head"]
    assert head == len(body("infer-in-message"))
    message = pb.ModelInferRequest.FromString(bytes(body("infer-in-message")))
    assert list(message.raw_input_contents) == [np.array([1.0, -2.0], "<f4").tobytes()]


def test_result():
    frame = received("result")
    answer = Codec().answer(frame.head, frame.body, frame.is_owned)
    assert (answer.model, answer.version, answer["y"].tolist()) == ("identity", "1", [[1.0, -2.0]])
    assert answer.timings == daemon.TIMINGS.unpack_from(body("result")) == (0, 0, 12, 3, 40, 0, 4)


def test_several_results():
    codec, more, last = Codec(), received("result-more"), received("result-last")
    assert codec.answer(more.head, more.body, False)["token"].tolist() == [42]
    assert len(codec.answer(last.head, last.body, False)) == 0
    assert (more.flags, last.flags) == (client.FLAG_MORE, 0)


@pytest.mark.parametrize("name", ["error-cancelled", "error-retryable", "error-connection"])
def test_error(name):
    kind, message, is_retryable = daemon.unpack_error(body(name))
    error = client.unpack_error(received(name).body)
    assert (error.kind, str(error), error.is_retryable) == (kind, message, is_retryable)
    assert daemon.pack_error(kind, message, is_retryable) == body(name)


def test_region_release_cancel():
    assert client.pack_region(4, 1 << 20) == content("region")
    assert daemon.REGION_SIZE.unpack(body("region")) == (1 << 20,)
    assert client.pack_release(4) == content("release")
    assert client.pack_cancel(5) == content("cancel")


def test_call_and_reply():
    call = calls.model_ready("digits", "")
    assert client.pack_call(7, call.method, call.message) == content("call")
    assert call.read(bytes(received("reply").body)) is True


def test_the_document_lists_every_kind_with_its_retryability():
    rows = re.findall(r"^\| `([a-z-]+)` \| .* \| (yes|no) \|$", DOCUMENT, re.MULTILINE)
    assert dict(rows) == {kind: "yes" if error.is_retryable else "no" for kind, error in appliance.errors.KINDS.items()}


def test_the_document_lists_every_type_of_frame():
    rows = re.findall(r"^\| (\d+) \| `([A-Z_]+)` \|", DOCUMENT, re.MULTILINE)
    assert [(int(number), name) for number, name in rows] == [(frame.value, frame.name) for frame in daemon.Frame]


def test_the_document_lists_methods_with_the_roles_they_need():
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)Request`, `(\w+)Response` \| (\w+) \|$", DOCUMENT, re.MULTILINE)
    assert len(rows) == 10
    for method, request, response, role in rows:
        assert method == request == response
        assert METHOD_ROLE[method].value == role
        assert hasattr(pb, f"{method}Request")


def test_the_client_in_the_document_works(peer, tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    (tmp_path / "client.py").write_text(program)
    messages = Path(pb.__file__).parent
    output = subprocess.run(
        [sys.executable, str(tmp_path / "client.py")],
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": str(messages), "APPLIANCE_SOCKET": str(peer.path)},
    )
    assert output.stdout == f"x {tuple(float(each) for each in range(16))}\n"
