"""What a client may get wrong in a request, over every transport: it is refused by kind, and nobody else notices."""

import struct

import numpy as np
import pytest
from onnx import TensorProto, helper

from appliance.wire.elements import join_elements
from appliance.wire.native import Frame
from support.daemon import FAKE_BACKEND, resident_bytes, start_daemon
from support.errors import check_message
from support.models import save, write_fake, write_identity
from support.native import Native, frame, infer_frame, request
from support.transports import OK, TRANSPORTS, HttpTransport, Input, NativeTransport, Request

ROW = struct.pack("<16f", *range(16))
WORDS = join_elements([b"one", b"two"])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory):
    """Models of every kind: batched, of two inputs, of any shape, of strings, a scalar."""
    models = tmp_path_factory.mktemp("models")
    write_identity(models / "identity")
    save(
        models / "nonzero",
        [helper.make_node("NonZero", ["x"], ["y"])],
        [("x", TensorProto.FLOAT, ["n"])],
        [("y", TensorProto.INT64, [1, "m"])],
    )
    row = [-1, 4]
    write_fake(
        models / "two",
        inputs=[["a", "FP32", row], ["b", "INT64", row]],
        outputs=[["c", "FP32", row], ["d", "INT64", row]],
    )
    write_fake(
        models / "any",
        "max_batch_size = 0",
        inputs=[["x", "UINT8", [-1, -1]]],
        outputs=[["y", "UINT8", [-1, -1]]],
    )
    write_fake(models / "wide", inputs=[["x", "UINT8", [-1, -1]]], outputs=[["y", "UINT8", [-1, -1]]])
    write_fake(models / "words", inputs=[["x", "BYTES", [-1, 2]]], outputs=[["y", "BYTES", [-1, 2]]])
    write_fake(models / "wordlist", "max_batch_size = 0", inputs=[["x", "BYTES", [-1]]], outputs=[["y", "BYTES", [-1]]])
    write_fake(models / "scalar", "max_batch_size = 0", inputs=[["x", "FP32", []]], outputs=[["y", "FP32", []]])
    with start_daemon(tmp_path_factory.mktemp("run"), models, environment=FAKE_BACKEND) as running:
        yield running


@pytest.fixture(params=TRANSPORTS, ids=lambda transport: transport.name)
def transport(request, served):
    opened = request.param(served)
    yield opened
    opened.close()


def x(shape=(1, 16), content: bytes = ROW, datatype: str = "FP32", name: str = "x") -> Input:
    return Input(name, datatype, shape, content)


def two(*inputs: Input, outputs: tuple[str, ...] = ()) -> Request:
    return Request("two", list(inputs), list(outputs))


A = Input("a", "FP32", (1, 4), bytes(16))
B = Input("b", "INT64", (1, 4), bytes(32))

BAD = {
    "no inputs": two(),
    "an input is missing": two(A),
    "an input the model has not": Request("identity", [x(), x(name="z")]),
    "an input twice": Request("identity", [x(), x()]),
    "an input twice, another missing": two(A, A),
    "an input without a name": Request("identity", [x(name="")]),
    "an input of a very long name": Request("identity", [x(name="n" * 50_000)]),
    "an output twice": two(A, B, outputs=("c", "c")),
    "an output the model has not": Request("identity", [x()], ["nothing"]),
    "an output without a name": Request("identity", [x()], [""]),
    "ten thousand outputs": Request("identity", [x()], ["y"] * 10_000),
    "ten thousand different outputs": Request("identity", [x()], [f"{n}" for n in range(10_000)]),
    "a dimension too few": Request("identity", [x((16,))]),
    "a dimension too many": Request("identity", [x((1, 16, 1))]),
    "no dimension": Request("identity", [x((), bytes(4))]),
    "a hundred dimensions": Request("identity", [x((1,) * 100, bytes(4))]),
    "a dimension of another length": Request("identity", [x((1, 15), bytes(60))]),
    "a negative dimension": Request("identity", [x((-1, 16))]),
    "a negative dimension where any is allowed": Request("any", [x((-2, -2), bytes(4), "UINT8")]),
    "dimensions whose product overflows 64 bits": Request("any", [x((2**33, 2**33), b"", "UINT8")]),
    "dimensions whose product wraps to what is sent": Request("any", [x((2**32, 2**32 + 1), bytes(4), "UINT8")]),
    "a zero beside a huge dimension": Request("any", [x((0, 2**62), b"", "UINT8")]),
    "the largest dimension there is": Request("any", [x((1, 2**63 - 1), b"", "UINT8")]),
    "more bytes promised than a machine has": Request("any", [x((2**20, 2**20), b"12", "UINT8")]),
    "a byte too few": Request("identity", [x(content=ROW[:-1])]),
    "a byte too many": Request("identity", [x(content=ROW + b"\0")]),
    "bytes of one tensor in another": two(A._replace(content=bytes(32)), B._replace(content=bytes(16 - 4))),
    "no bytes": Request("identity", [x(content=b"")]),
    "another datatype of the same size": Request("identity", [x(datatype="INT32")]),
    "a wider datatype": Request("identity", [x((1, 16), bytes(128), "FP64")]),
    "a datatype nobody knows": Request("identity", [x((1, 16), bytes(16), "FP8")]),
    "a datatype in small letters": Request("identity", [x(datatype="fp32")]),
    "no datatype": Request("identity", [x(datatype="")]),
    "no rows": Request("identity", [x((0, 16), b"")]),
    "more rows than a batch": Request("identity", [x((65, 16), ROW * 65)]),
    "different rows": two(A, B._replace(shape=(2, 4), content=bytes(64))),
    "a string longer than its bytes": Request("words", [x((1, 2), b"\3\0\0\0one\4\0\0\0two", "BYTES")]),
    "a string of four gigabytes": Request("words", [x((1, 2), b"\xff\xff\xff\xffone\3\0\0\0two", "BYTES")]),
    "a string too few": Request("words", [x((1, 2), b"\3\0\0\0one", "BYTES")]),
    "a string too many": Request("words", [x((1, 2), WORDS + b"\0\0\0\0", "BYTES")]),
    "half a string's length": Request("words", [x((1, 2), b"\3\0\0\0one\3\0", "BYTES")]),
    "millions of strings": Request("wordlist", [x((1 << 22,), bytes(8), "BYTES")]),
    "strings where numbers belong": Request("identity", [x((1, 16), WORDS, "BYTES")]),
    "an empty tensor with a byte": Request("any", [x((1, 0), b"\0", "UINT8")]),
    "a scalar with a dimension": Request("scalar", [x((1,), bytes(4))]),
    "a tensor in shared memory of a name": Request("identity", [x()], input_parameters={"shared_memory_region": "me"}),
    "a sequence": Request("identity", [x()], parameters={"sequence_id": 7}),
    "a timeout before now": Request("identity", [x()], parameters={"timeout": -1}),
    "a timeout in words": Request("identity", [x()], parameters={"timeout": "soon"}),
    "half a timeout": Request("identity", [x()], parameters={"timeout": 0.5}),
    "a priority below nought": Request("identity", [x()], parameters={"priority": -1}),
    "the lowest priority there is": Request("identity", [x()], parameters={"priority": -(2**63)}),
    "a priority in a word nobody knows": Request("identity", [x()], parameters={"priority": "urgent"}),
    "a priority in an empty word": Request("identity", [x()], parameters={"priority": ""}),
    "a priority of a very long word": Request("identity", [x()], parameters={"priority": "\x1b[2J" * 10_000}),
    "a priority that is true": Request("identity", [x()], parameters={"priority": True}),
    "half a priority": Request("identity", [x()], parameters={"priority": 1.5}),
    "a sequence by name": Request("identity", [x()], parameters={"sequence_id": "s", "sequence_start": True}),
    "a sequence of the largest number": Request("identity", [x()], parameters={"sequence_id": 2**64 - 1}),
    "a sequence below nought": Request("identity", [x()], parameters={"sequence_id": -1}),
    "a sequence of a very long name": Request("identity", [x()], parameters={"sequence_id": "s" * 10_240}),
    "a sequence that is true": Request("identity", [x()], parameters={"sequence_id": True}),
    "a sequence begun without a name": Request("identity", [x()], parameters={"sequence_start": True}),
    "a sequence ended without a name": Request("identity", [x()], parameters={"sequence_id": 0, "sequence_end": True}),
    "a sequence begun by a number": Request("identity", [x()], parameters={"sequence_id": 0, "sequence_start": 1}),
    "a line feed in the id": Request("identity", [x()], id="1\r\nforged: yes"),
    "an escape sequence in the id": Request("identity", [x()], id="\x1b[2J"),
    "a very long id": Request("identity", [x()], id="i" * 30_000),
}

GOOD = Request("identity", [x()])


def check_served(transport) -> None:
    """A right request is answered, on the same connection."""
    good = transport.send(GOOD)
    assert (good.kind, good.outputs) == (OK, {"y": ROW})


@pytest.mark.parametrize("what", BAD)
def test_a_bad_request_is_refused_and_the_next_one_is_served(transport, what):
    outcome = transport.send(BAD[what])
    assert outcome.kind == "invalid-request", outcome
    assert outcome.code in (None, "INVALID_ARGUMENT", 400)
    check_message(outcome.message)
    check_served(transport)


NAMES = [
    "", " ", "Identity", "identity ", "ident\u0456ty", "../identity", "identity/../identity", "./identity", "..",
    "/etc/passwd", "identity\0", "identity\n", "x" * 300, "-identity", ".identity", "identity%2f1", "identity;x",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_cannot_be_a_models_is_refused_everywhere(transport, served, name):
    """On inference over every transport, and on every other method that takes a name."""
    outcome = transport.send(Request(name, [x()]))
    if isinstance(transport, HttpTransport):  # a slash in a name makes another path, which does not exist
        assert outcome.code in (400, 404), outcome
    else:
        assert outcome.kind == "invalid-request", outcome
    check_message(outcome.message)
    check_served(transport)


@pytest.mark.parametrize("name", NAMES)
def test_no_method_takes_a_name_that_cannot_be_a_models(served, name):
    from appliance.wire import open_inference_pb2 as pb

    with Native(served.infer_socket) as client:
        bodies = {
            "ModelReady": pb.ModelReadyRequest(name=name),
            "ModelMetadata": pb.ModelMetadataRequest(name=name),
            "ModelConfig": pb.ModelConfigRequest(name=name),
            "RepositoryModelLoad": pb.RepositoryModelLoadRequest(model_name=name),
            "RepositoryModelUnload": pb.RepositoryModelUnloadRequest(model_name=name),
        }
        if name:  # for statistics no name means all models
            bodies["ModelStatistics"] = pb.ModelStatisticsRequest(name=name)
        for number, (method, message) in enumerate(bodies.items(), 1):
            kind, text = client.call(number, method, message.SerializeToString()).error
            assert kind == "invalid-request", method
            check_message(text)


@pytest.mark.parametrize("version", ["2", "0", "01", "abc", "../1", "1/..", "9" * 200, "1\n", " 1"])
def test_only_the_version_served_is_found(transport, version):
    outcome = transport.send(Request("identity", [x()], version=version))
    if isinstance(transport, HttpTransport):
        assert outcome.code == 404, outcome
    else:
        assert outcome.kind == "model-not-found", outcome
    check_message(outcome.message)
    assert transport.send(Request("identity", [x()], version="1")).kind == OK


def test_an_unknown_model_is_not_found(transport):
    assert transport.send(Request("nobody", [x()])).kind == "model-not-found"
    check_served(transport)


def test_refusing_costs_no_memory(served):
    """Every bad request many times over leaves the daemon as large as it was."""
    with Native(served.infer_socket):
        transport = NativeTransport(served)
        for bad in BAD.values():
            transport.send(bad)
        before = resident_bytes(served.pid)
        for _ in range(20):
            for bad in BAD.values():
                transport.send(bad)
        check_served(transport)
        transport.close()
    assert resident_bytes(served.pid) - before < 16 << 20


# ---------------------------------------------------------------- what is odd and right

FLOATS = np.array(
    [0x7FC00001, 0xFFC12345, 0x7F800001, 0x7F800000, 0xFF800000, 0x80000000, 0x00000001, 0x807FFFFF] * 2, np.uint32
).tobytes()


def test_every_bit_of_nan_infinity_and_subnormals_survives(transport):
    assert transport.send(Request("identity", [x(content=FLOATS)])).outputs == {"y": FLOATS}


def test_nan_in_json_is_null_and_json_stays_json(served):
    import json

    head = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "parameters": {"binary_data_size": 64}}]}
    json_bytes = json.dumps(head).encode()
    headers = {"Inference-Header-Content-Length": str(len(json_bytes))}
    status, _, body = served.http("POST", "/v2/models/identity/infer", json_bytes + FLOATS, headers)
    assert status == 200

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    values = json.loads(body, parse_constant=refuse)["outputs"][0]["data"]
    assert values[:5] == [None] * 5
    assert values[5:8] == [-0.0, 1.401298464324817e-45, -1.1754942106924411e-38]
    status, _, body = served.http("POST", "/v2/models/identity/infer", b'{"inputs": [NaN]}')
    assert (status, json.loads(body)["kind"]) == (400, "invalid-request")


def test_a_scalar_goes_through(transport):
    assert transport.send(Request("scalar", [x((), b"\0\0\x80?")])).outputs == {"y": b"\0\0\x80?"}


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0)])
def test_an_empty_tensor_goes_through_a_model_that_takes_any(transport, shape):
    outcome = transport.send(Request("any", [x(shape, b"", "UINT8")]))
    assert (outcome.kind, outcome.outputs) == (OK, {"y": b""})


def test_strings_may_hold_anything(transport):
    content = join_elements([b"\0nul\0", b"\xff\xfe not UTF-8 \x80"])
    assert transport.send(Request("words", [x((1, 2), content, "BYTES")])).outputs == {"y": content}


def test_outputs_come_in_the_order_asked_for(transport):
    a, b = np.arange(4, dtype=np.float32).tobytes(), np.arange(4, dtype=np.int64).tobytes()
    inputs = [Input("b", "INT64", (1, 4), b), Input("a", "FP32", (1, 4), a)]
    outcome = transport.send(Request("two", inputs, ["d", "c"]))
    assert list(outcome.outputs.items()) == [("d", b), ("c", a)]
    assert transport.send(Request("two", inputs, ["d"])).outputs == {"d": b}


def test_the_largest_batch_goes_through(transport):
    content = ROW * 64
    assert transport.send(Request("identity", [x((64, 16), content)])).outputs == {"y": content}


def test_tensors_inside_a_native_message_may_be_large(served):
    content = bytes(range(256)) * 4096
    message = request("any", ("x", "UINT8", (1024, 1024)))
    message.raw_input_contents.append(content)
    with Native(served.infer_socket) as client:
        assert client.infer(1, message).tail == content
        answer = client.infer(2, message, tail=b"\0")
        assert answer.error[0] == "invalid-request"


def test_shapes_never_mix_in_a_batch(served):
    """Requests of many shapes and strings, all at once on one connection: each gets its own back."""
    with Native(served.infer_socket) as client:
        expected, frames = {}, []
        for number in range(1, 301):
            if number % 3:
                shape = (number % 7 + 1, number % 5 + 1)
                content = bytes([number % 100]) * (shape[0] * shape[1])  # from 101 on the fake backend obeys
                model = "wide" if number % 2 else "any"
                frames.append(infer_frame(number, request(model, ("x", "UINT8", shape)), content))
            else:
                content = join_elements([b"%d" % number, b"w" * (number % 50)])
                frames.append(infer_frame(number, request("words", ("x", "BYTES", (1, 2))), content))
            expected[number] = content
        client.send(b"".join(frames))
        got = {answer.id: answer.tail for answer in (client.read() for _ in expected)}
    assert got == expected


def test_outputs_may_change_their_shape_with_every_request(served):
    """More shapes than heads of answers are kept."""
    with Native(served.infer_socket) as client:
        for number in range(1, 101):
            content = np.tile(np.array([0, 1], np.float32), number)
            answer = client.infer(number, request("nonzero", ("x", "FP32", (2 * number,))), content.tobytes())
            assert list(answer.response.outputs[0].shape) == [1, number]
            assert np.frombuffer(answer.tail, np.int64).tolist() == list(range(1, 2 * number, 2))


def test_calls_are_checked_like_requests(served):
    """CALL: unknown and hidden methods, bodies that are no message, empty and truncated names."""
    with Native(served.infer_socket) as client:
        for number, method in enumerate(("", "ModelInfer", "ModelStreamInfer", "Nothing", "x" * 255), 1):
            assert client.call(number, method).error[0] == "unimplemented"
        kind, text = client.call(9, "ModelMetadata", b"\xff\xff\xff").error
        assert kind == "invalid-request"
        check_message(text)
        assert client.call(10, "ModelMetadata", bytes(100_000)).error[0] == "invalid-request"
        assert client.call(11, "ServerLive").kind == Frame.REPLY
    with Native(served.infer_socket) as client:
        client.send(frame(Frame.CALL, 1, b"\x20Server"))
        assert client.read_to_end()[0].error[0] == "invalid-request"


def test_a_request_and_a_head_that_is_no_message(served):
    with Native(served.infer_socket) as client:
        for number, head in enumerate((b"\xff" * 20, b"\x0a\xff\xff\xff\xff\x0f", b"\x2a\x02\x08"), 1):
            client.send(frame(Frame.INFER, number, head, head=len(head)))
            kind, text = client.read().error
            assert kind == "invalid-request"
            check_message(text)
        assert client.infer(9, request("identity", ("x", "FP32", (1, 16))), ROW).tail == ROW


def test_a_float_overflowing_timeout_is_no_timeout_at_all(served):
    """The largest timeouts that can be written are taken for what they are."""
    with Native(served.infer_socket) as client:
        for number, value in enumerate((2**63 - 1, 2**62, 1 << 40), 1):
            message = request("identity", ("x", "FP32", (1, 16)))
            message.parameters["timeout"].int64_param = value
            assert client.infer(number, message, ROW).tail == ROW
        message.parameters["timeout"].uint64_param = 2**64 - 1
        assert client.infer(9, message, ROW, timeout_us=2**32 - 1).tail == ROW


def test_vectors_of_the_sample_models_are_checked_too(daemon):
    """A text that is not UTF-8 and a picture that is none are the request's fault."""
    transport = NativeTransport(daemon)
    try:
        outcome = transport.send(Request("language-id", [Input("text", "BYTES", (1, 1), join_elements([b"\xff\xfe"]))]))
        assert outcome.kind == "invalid-request", outcome
        check_message(outcome.message)
        outcome = transport.send(Request("digits", [Input("image", "BYTES", (1, 1), join_elements([b"no picture"]))]))
        assert outcome.kind == "invalid-request", outcome
        check_message(outcome.message)
    finally:
        transport.close()
