"""One request, one answer, over the blocking client."""

import asyncio

import numpy as np
import pytest

from appliance.wire.native import Frame
from appliance_client import AsyncClient, Client, InvalidRequest, Tensor


@pytest.fixture
def client(peer):
    with Client(peer.path) as client:
        yield client


@pytest.mark.parametrize(
    ("dtype", "datatype"),
    [
        ("?", "BOOL"),
        ("u1", "UINT8"),
        ("<u2", "UINT16"),
        ("<u4", "UINT32"),
        ("<u8", "UINT64"),
        ("i1", "INT8"),
        ("<i2", "INT16"),
        ("<i4", "INT32"),
        ("<i8", "INT64"),
        ("<f2", "FP16"),
        ("<f4", "FP32"),
        ("<f8", "FP64"),
    ],
)
def test_every_numpy_type_travels_as_its_datatype_and_comes_back_unchanged(peer, client, dtype, datatype):
    seen = []
    peer.models["m"] = lambda session, request: (seen.append(request.message.inputs[0].datatype), session.echo(request))
    value = np.array([[0, 1, 1], [1, 0, 1]], dtype)
    back = client.infer("m", {"x": value})["x"]
    assert seen == [datatype]
    assert back.dtype == value.dtype
    assert back.tolist() == value.tolist()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3, 4)])
def test_every_shape_comes_back(client, shape):
    assert client.infer("m", {"x": np.ones(shape, np.float32)})["x"].shape == shape


def test_layouts_numpy_does_not_store_in_rows_travel_in_rows(client):
    value = np.arange(24, dtype=np.float32).reshape(4, 6)
    for view in (value.T, value[::2, ::-1], value.astype(">f4"), np.asfortranarray(value)):
        assert client.infer("m", {"x": view})["x"].tolist() == view.tolist()


def test_answers_own_their_memory_and_may_be_written_to(client):
    first = client.infer("m", {"x": np.full(4, 1.0, np.float32)})["x"]
    client.infer("m", {"x": np.full(4, 2.0, np.float32)})
    assert first.tolist() == [1.0] * 4
    first[0] = 5.0


def test_a_large_answer_is_writable_and_aligned_without_a_copy(client):
    value = np.arange(100_000, dtype=np.float64)
    back = client.infer("m", {"x": value})["x"]
    assert (back == value).all()
    assert back.flags.aligned
    assert back.flags.writeable


@pytest.mark.parametrize(
    ("value", "shape", "elements"),
    [
        ("grüß", [], ["grüß".encode()]),
        (b"a\0\0", [], [b"a\0\0"]),
        (["Guten Morgen", ""], [2], [b"Guten Morgen", b""]),
        ([["a", b"b\0"], [b"", "d"]], [2, 2], [b"a", b"b\0", b"", b"d"]),
        (np.array(["x", "yz"]), [2], [b"x", b"yz"]),
        (np.array([[b"x"], ["y"]], dtype=object), [2, 1], [b"x", b"y"]),
        (np.array(["x", "yz"], dtype=np.dtypes.StringDType()), [2], [b"x", b"yz"]),
        ([bytearray(b"ab"), memoryview(b"cd")], [2], [b"ab", b"cd"]),
    ],
)
def test_text_and_bytes_travel_as_bytes_with_their_trailing_zeros(peer, client, value, shape, elements):
    seen = []
    peer.models["m"] = lambda session, request: (seen.append(request.message.inputs[0]), session.echo(request))
    answer = client.infer("m", {"x": value})
    assert seen[0].datatype == "BYTES"
    assert list(seen[0].shape) == shape
    assert answer["x"].ravel().tolist() == elements
    assert list(answer["x"].shape) == shape


def test_text_decodes_bytes_outputs_in_their_shape(client):
    answer = client.infer("m", {"x": [["ä", "b"]], "y": "z", "n": np.ones(1)})
    assert answer.text("x") == [["ä", "b"]]
    assert answer.text("y") == "z"
    with pytest.raises(InvalidRequest, match="holds float64, not BYTES"):
        answer.text("n")
    with pytest.raises(KeyError, match="no output 'q'; there are x, y, n"):
        answer["q"]


def test_lists_of_numbers_take_numpys_types(peer, client):
    seen = []
    peer.models["m"] = lambda session, request: (
        seen.extend(t.datatype for t in request.message.inputs),
        session.echo(request),
    )
    client.infer("m", {"a": [1, 2], "b": [0.5], "c": [True], "d": 3, "e": 0.5})
    assert seen == ["INT64", "FP64", "BOOL", "INT64", "FP64"]


def test_bf16_travels_as_its_bits_and_comes_back_as_float32(client):
    bits = np.array([0x3F80, 0xC000, 0x7F80, 0x0001], np.uint16)
    back = client.infer("m", {"x": Tensor(bits, "BF16")})["x"]
    assert back.dtype == np.float32
    assert back[:3].tolist() == [1.0, -2.0, float("inf")]
    assert (back.view(np.uint32) >> 16).tolist() == bits.tolist()


def test_an_array_of_a_type_named_bfloat16_is_bf16(client):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert client.infer("m", {"x": np.array([1.5, -3.0], ml_dtypes.bfloat16)})["x"].tolist() == [1.5, -3.0]


def test_a_tensor_names_its_datatype(peer, client):
    seen = []
    peer.models["m"] = lambda session, request: (
        seen.extend(t.datatype for t in request.message.inputs),
        session.echo(request),
    )
    answer = client.infer(
        "m", {"a": Tensor([0.5, 1], "FP32"), "b": Tensor([1, 255], "UINT8"), "c": Tensor([["x"]], "BYTES")}
    )
    assert seen == ["FP32", "UINT8", "BYTES"]
    assert answer["b"].tolist() == [1, 255]
    assert answer.text("c") == [["x"]]


@pytest.mark.parametrize(
    ("values", "datatype", "reason"),
    [
        ([256], "UINT8", "out of its range"),
        ([-1], "UINT64", "out of its range"),
        ([0.5], "INT32", "values would be lost"),
        ([2], "BOOL", "values would be lost"),
        ([1.0], "BF16", "give its bits as uint16"),
        ([1], "FP8", "'FP8' is no datatype"),
        ([1], "BYTES", "neither str nor bytes"),
        ([["a"], ["b", "c"]], "BYTES", "differ in length"),
        ([[1], [2, 3]], "FP32", "inhomogeneous"),
    ],
)
def test_a_tensor_refuses_what_its_datatype_cannot_hold(values, datatype, reason):
    with pytest.raises(InvalidRequest, match=reason):
        Tensor(values, datatype)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.array([1j]), "complex128 has no datatype"),
        (np.array(["2020-01-01"], "M8[D]"), "has no datatype"),
        ({"a": 1}, "neither str nor bytes"),
        (None, "neither str nor bytes"),
        (["a", None], "element None is neither str nor bytes"),
        ([1, "a"], "element 1 is neither str nor bytes"),
        ({"a"}, "neither str nor bytes"),
        (["a", ["b"]], "neither str nor bytes"),
    ],
)
def test_a_value_that_is_no_tensor_is_refused_before_anything_is_sent(peer, client, value, reason):
    with pytest.raises(InvalidRequest, match=reason):
        client.infer("m", {"x": value})
    assert not peer.received(Frame.INFER)


def test_the_answer_carries_model_version_timings_and_parameters(peer, client):
    def respond(session, request):
        from appliance.wire import native
        from appliance.wire import open_inference_pb2 as pb

        message = pb.ModelInferResponse(model_name="m", model_version="3")
        message.parameters["done"].bool_param = True
        message.parameters["why"].string_param = "length"
        head = message.SerializeToString()
        session.send(Frame.RESULT, request.identifier, native.TIMINGS.pack(*range(1, 8)) + head, len(head))

    peer.models["m"] = respond
    answer = client.infer("m", {"x": np.ones(1)})
    assert (answer.model, answer.version) == ("m", "3")
    assert answer.timings._asdict() == {
        "decode_us": 1,
        "tokenise_us": 2,
        "queue_us": 3,
        "copy_us": 4,
        "compute_us": 5,
        "postprocess_us": 6,
        "batch_rows": 7,
    }
    assert answer.parameters == {"done": True, "why": "length"}
    assert len(answer) == 0


def test_model_version_outputs_and_parameters_reach_the_daemon(peer, client):
    seen = []
    peer.models["m"] = lambda session, request: (seen.append(request.message), session.echo(request))
    client.infer("m", {"x": np.ones(1)}, version="2", outputs=["x"], parameters={"a": True, "b": 1, "c": 0.5, "d": "e"})
    message = seen[0]
    assert message.model_version == "2"
    assert [output.name for output in message.outputs] == ["x"]
    choices = {name: value.WhichOneof("parameter_choice") for name, value in message.parameters.items()}
    assert choices == {"a": "bool_param", "b": "int64_param", "c": "double_param", "d": "string_param"}


def test_a_parameter_of_another_type_is_refused(client):
    with pytest.raises(InvalidRequest, match="parameter 'a': it is a list"):
        client.infer("m", {"x": np.ones(1)}, parameters={"a": [2]})


def test_the_same_shapes_give_the_same_head_bytes(peer, client):
    heads = []
    peer.models["m"] = lambda session, request: (heads.append(request.head), session.echo(request))
    for value in (1.0, 2.0):
        client.infer("m", {"x": np.full((1, 4), value, np.float32)})
    client.infer("m", {"x": np.ones((2, 4), np.float32)})
    assert heads[0] == heads[1] != heads[2]


def parameters_of(message):
    """Each parameter with the field it travels in."""
    return {
        name: (field := value.WhichOneof("parameter_choice"), getattr(value, field))
        for name, value in message.parameters.items()
    }


def one(path, **options):
    with Client(path) as client:
        client.infer("m", {"x": np.ones(1)}, **options)


def one_awaited(path, **options):
    async def run():
        async with AsyncClient(path) as client:
            await client.infer("m", {"x": np.ones(1)}, **options)

    asyncio.run(run())


@pytest.mark.parametrize("infer", [one, one_awaited])
@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({}, {}),
        ({"priority": 0, "sequence_id": 0, "sequence_end": False}, {}),
        ({"priority": 2}, {"priority": ("int64_param", 2)}),
        ({"priority": "background"}, {"priority": ("string_param", "background")}),
        ({"priority": 1, "parameters": {"a": 3}}, {"a": ("int64_param", 3), "priority": ("int64_param", 1)}),
        (
            {"sequence_id": 7, "sequence_start": True},
            {
                "sequence_id": ("int64_param", 7),
                "sequence_start": ("bool_param", True),
                "sequence_end": ("bool_param", False),
            },
        ),
        (
            {"sequence_id": 2**64 - 1, "sequence_end": True},
            {
                "sequence_id": ("uint64_param", 2**64 - 1),
                "sequence_start": ("bool_param", False),
                "sequence_end": ("bool_param", True),
            },
        ),
        (
            {"sequence_id": "call 7"},
            {
                "sequence_id": ("string_param", "call 7"),
                "sequence_start": ("bool_param", False),
                "sequence_end": ("bool_param", False),
            },
        ),
    ],
)
def test_how_a_request_is_scheduled_travels_in_tritons_parameters(peer, infer, options, parameters):
    seen = []
    peer.models["m"] = lambda session, request: (seen.append(request.message), session.echo(request))
    infer(peer.path, **options)
    assert parameters_of(seen[0]) == parameters


@pytest.mark.parametrize("options", [{"priority": 2**64}, {"sequence_id": -(2**63) - 1}, {"sequence_id": b"bytes"}])
def test_what_no_parameter_can_say_is_refused_before_it_is_sent(peer, client, options):
    with pytest.raises(InvalidRequest):
        client.infer("m", {"x": np.ones(1)}, **options)
    assert not peer.received(Frame.INFER)


def test_priorities_share_no_head_and_leave_the_plain_one_as_it_is(peer, client):
    heads = []
    peer.models["m"] = lambda session, request: (heads.append(request.head), session.echo(request))
    for _ in range(2):
        client.infer("m", {"x": np.ones(1)})
        client.infer("m", {"x": np.ones(1)}, priority=3)
    assert heads[0] == heads[2] != heads[1] == heads[3]
    assert client._codec is not None
    assert len(client._codec._heads) == 2


def test_inputs_lie_in_the_tail_in_the_callers_order(peer, client):
    answer = client.infer("m", {"b": np.arange(3, dtype=np.int16), "t": ["x", "yy"], "a": np.arange(2, dtype=np.int64)})
    assert list(answer) == ["b", "t", "a"]
    ((_, body),) = peer.received(Frame.INFER)
    tail = np.arange(3, dtype="<i2").tobytes() + b"\1\0\0\0x\2\0\0\0yy" + np.arange(2, dtype="<i8").tobytes()
    assert body.endswith(tail)


@pytest.mark.parametrize("size", [1, 16_000, 70_000, 3_000_000])
def test_inputs_of_any_size_travel_in_the_frame(peer, size):
    value = np.random.default_rng(0).integers(0, 255, size, np.uint8)
    with Client(peer.path, region_threshold=None) as client:
        for _ in range(2):
            assert (client.infer("m", {"x": value})["x"] == value).all()
    assert not peer.received(Frame.REGION)


def test_a_request_longer_than_the_daemon_takes_is_refused_and_the_connection_lives(peer):
    peer.max_frame_bytes, peer.max_regions = 1000, 0
    with Client(peer.path) as client:
        with pytest.raises(InvalidRequest, match="and the daemon takes at most 1000"):
            client.infer("m", {"x": np.ones(1000)})
        assert client.infer("m", {"x": np.ones(2)})["x"].tolist() == [1.0, 1.0]
    assert len(peer.sessions) == 1
