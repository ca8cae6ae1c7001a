"""The REST codec: JSON and binary tensors to raw bytes and back."""

import base64
import json
import math
import struct

import pytest

from appliance.errors import BackendError, InvalidRequest, Overloaded
from appliance.server import rest
from appliance.server.rest_elements import elements_of, elements_to_bytes
from appliance.types import NO_OPTIONS, InferResult, Tensor, Timings
from appliance.wire.elements import split_elements


def decode(header, tail=b""):
    return rest.decode_infer("m", "", json.dumps(header).encode(), memoryview(tail), None)


def decode_input(**fields):
    (tensor,) = decode({"inputs": [{"name": "x", **fields}]}).request.inputs
    return tensor


@pytest.mark.parametrize(
    ("datatype", "values", "code"),
    [
        ("INT8", [-128, 127], "b"),
        ("INT16", [-32768, 32767], "h"),
        ("INT32", [-(2**31), 2**31 - 1], "i"),
        ("INT64", [-(2**63), 2**63 - 1], "q"),
        ("UINT8", [0, 255], "B"),
        ("UINT16", [0, 65535], "H"),
        ("UINT32", [0, 2**32 - 1], "I"),
        ("UINT64", [0, 2**64 - 1], "Q"),
        ("FP32", [1.5, -2], "f"),
        ("FP64", [1e300, 0.1], "d"),
        ("BOOL", [True, False], "?"),
    ],
)
def test_json_elements_become_little_endian_bytes_and_come_back(datatype, values, code):
    tensor = decode_input(datatype=datatype, shape=[2], data=values)
    assert tensor.content == struct.pack(f"<2{code}", *values)
    assert elements_of(tensor) == values


@pytest.mark.parametrize(
    ("datatype", "value"),
    [
        ("INT8", 128),
        ("INT16", -32769),
        ("INT32", 2**31),
        ("INT64", 2**63),
        ("INT64", 2**64),
        ("UINT8", -1),
        ("UINT16", 65536),
        ("UINT32", 2**32),
        ("UINT64", 2**64),
        ("UINT64", -1),
        ("FP32", 1e39),
        ("FP32", -1e39),
        ("INT32", 1.0),
        ("INT32", True),
        ("INT32", None),
        ("INT32", "1"),
        ("FP32", "1"),
        ("FP32", None),
        ("FP32", True),
        ("FP32", {}),
        ("BOOL", 1),
        ("BOOL", "true"),
        ("BYTES", 1),
        ("BYTES", None),
        ("FP16", 1.0),
        ("BF16", 1.0),
    ],
)
def test_wrong_elements_are_refused_by_name(datatype, value):
    with pytest.raises(InvalidRequest, match=r"cannot use data of input 'x': .+"):
        decode_input(datatype=datatype, shape=[1], data=[value])


def test_the_message_names_the_element():
    with pytest.raises(InvalidRequest, match="element 2 is null, and FP32 elements must be numbers"):
        decode_input(datatype="FP32", shape=[3], data=[1, 2, None])


def test_nested_lists_are_row_major():
    nested = decode_input(datatype="INT8", shape=[2, 3], data=[[1, 2, 3], [4, 5, 6]])
    assert nested.content == decode_input(datatype="INT8", shape=[2, 3], data=[1, 2, 3, 4, 5, 6]).content


@pytest.mark.parametrize(
    ("shape", "data"),
    [
        ([2, 3], [[1, 2], [3, 4], [5, 6]]),
        ([2, 2], [[1, 2], [3]]),
        ([3], [1, [2], 3]),
        ([3], [[1], 2, 3]),
        ([2, 2], [[1, 2, 3, 4]]),
        ([2, 1], [[[1]], [[2]]]),
        ([3], [1, 2]),
        ([], []),
        ([0], [1]),
        ([2**40, 2**40], [1]),
    ],
)
def test_lists_that_do_not_fit_the_shape_are_refused(shape, data):
    with pytest.raises(InvalidRequest, match="cannot use data of input 'x'"):
        decode_input(datatype="INT8", shape=shape, data=data)


@pytest.mark.parametrize(("shape", "data"), [([], [5]), ([0], []), ([0, 3], []), ([2, 0], [[], []])])
def test_scalars_and_empty_tensors(shape, data):
    assert len(decode_input(datatype="INT8", shape=shape, data=data).content) == math.prod(shape)


def test_strings_are_utf8_with_lengths():
    tensor = decode_input(datatype="BYTES", shape=[3], data=["", "aß", "x\0y"])
    assert split_elements(tensor.content, 3, "x") == [b"", "aß".encode(), b"x\0y"]
    assert elements_of(tensor) == ["", "aß", "x\0y"]


def test_base64_carries_any_bytes():
    data = [base64.b64encode(b"\x89PNG\xff").decode()]
    tensor = decode_input(datatype="BYTES", shape=[1], data=data, parameters={"content_encoding": "base64"})
    assert split_elements(tensor.content, 1, "x") == [b"\x89PNG\xff"]


@pytest.mark.parametrize(
    ("datatype", "encoding", "value"),
    [
        ("BYTES", "base64", "no!"),
        ("BYTES", "base64", "ä"),
        ("BYTES", "hex", "00"),
        ("INT8", "base64", 1),
        ("BYTES", 1, ""),
    ],
)
def test_wrong_encodings_are_refused(datatype, encoding, value):
    with pytest.raises(InvalidRequest):
        decode_input(datatype=datatype, shape=[1], data=[value], parameters={"content_encoding": encoding})


def test_null_parameters_are_none():
    names = ("timeout", "priority", "sequence_id", "sequence_start", "sequence_end")
    assert decode({"inputs": [], "parameters": dict.fromkeys(names)}).request.options is NO_OPTIONS


@pytest.mark.parametrize(
    ("header", "named"),
    [
        ({}, "inputs is missing"),
        ({"inputs": {}}, "inputs must be a list"),
        ({"inputs": [1]}, r"inputs\[0\] must be an object"),
        ({"inputs": [{}]}, r"inputs\[0\].name is missing"),
        ({"inputs": [{"name": 1}]}, r"inputs\[0\].name must be a string"),
        ({"inputs": [{"name": "x", "datatype": "FLOAT"}]}, r"inputs\[0\].datatype 'FLOAT'"),
        ({"inputs": [{"name": "x", "datatype": "INT8"}]}, r"inputs\[0\].shape is missing"),
        ({"inputs": [{"name": "x", "datatype": "INT8", "shape": [-1]}]}, r"inputs\[0\].shape must be"),
        ({"inputs": [{"name": "x", "datatype": "INT8", "shape": [True]}]}, r"inputs\[0\].shape must be"),
        ({"inputs": [{"name": "x", "datatype": "INT8", "shape": [2**64]}]}, r"inputs\[0\].shape must be"),
        ({"inputs": [{"name": "x", "datatype": "INT8", "shape": [1] * 33}]}, r"inputs\[0\].shape must be"),
        ({"inputs": [{"name": "x", "datatype": "INT8", "shape": [1]}]}, r"inputs\[0\].data is missing"),
        (
            {"inputs": [{"name": "x", "datatype": "INT8", "shape": [1], "data": "1"}]},
            r"inputs\[0\].data must be a list",
        ),
        ({"inputs": [], "id": 1}, "id must be a string"),
        ({"inputs": [], "id": "a\nb"}, "id may hold"),
        ({"inputs": [], "id": "a" * 257}, "id may hold 256"),
        ({"inputs": [], "parameters": []}, "parameters must be an object"),
        ({"inputs": [], "parameters": {"timeout": "1"}}, "timeout: it must be an integer"),
        ({"inputs": [], "parameters": {"timeout": -1}}, "timeout: it must not be negative"),
        ({"inputs": [], "parameters": {"timeout": True}}, "timeout: it must be an integer"),
        ({"inputs": [], "parameters": {"timeout": 1.0}}, "timeout: it must be an integer"),
        ({"inputs": [], "parameters": {"timeout": 2**64}}, "timeout: it must be an integer"),
        ({"inputs": [], "parameters": {"binary_data_output": 1}}, "binary_data_output must be true or false"),
        ({"inputs": [], "parameters": {"priority": "urgent"}}, "priority: it is none of interactive"),
        ({"inputs": [], "parameters": {"priority": {}}}, "priority: it must be an integer"),
        ({"inputs": [], "parameters": {"sequence_id": []}}, "sequence_id: it must be an integer or a string"),
        ({"inputs": [], "parameters": {"sequence_id": 4, "sequence_end": 1}}, "sequence_end: it must be true or false"),
        ({"inputs": [], "parameters": {"sequence_id": "", "sequence_start": True}}, "cannot start or end a sequence"),
        ({"inputs": [], "outputs": [3]}, r"outputs\[0\] must be an object"),
        ({"inputs": [], "outputs": [{}]}, r"outputs\[0\].name is missing"),
        ({"inputs": [], "outputs": [{"name": "y", "parameters": {"binary_data": 1}}]}, "binary_data must be true"),
        ({"inputs": [], "outputs": [{"name": "y", "parameters": {"classification": 3}}]}, "classification"),
        ({"inputs": [{}] * 1025}, "1024"),
    ],
)
def test_wrong_fields_are_named(header, named):
    with pytest.raises(InvalidRequest, match=named):
        decode(header)


@pytest.mark.parametrize("kind", ["inputs", "outputs"])
def test_shared_memory_is_refused_with_the_way_that_works(kind):
    entry = {"name": "x", "datatype": "INT8", "shape": [1], "parameters": {"shared_memory_region": "r"}}
    with pytest.raises(InvalidRequest, match="inline"):
        decode({"inputs": [], "outputs": []} | {kind: [entry]})


def binary(size):
    return {"name": "x", "datatype": "INT8", "shape": [2], "parameters": {"binary_data_size": size}}


def test_binary_tensors_are_views_taken_in_order():
    body = b"aabbb"
    first, second = decode({"inputs": [binary(2), binary(3)]}, body).request.inputs
    assert (bytes(first.content), bytes(second.content)) == (b"aa", b"bbb")
    assert first.content.obj is body


@pytest.mark.parametrize(
    ("inputs", "tail"),
    [
        ([binary(2)], b"a"),
        ([binary(2)], b"abc"),
        ([binary(-1)], b""),
        ([binary("2")], b"aa"),
        ([binary(2) | {"data": [1, 2]}], b"aa"),
        ([], b"a"),
    ],
)
def test_binary_sizes_must_be_exact(inputs, tail):
    with pytest.raises(InvalidRequest, match="cannot decode the request"):
        decode({"inputs": inputs}, tail)


def test_json_is_bounded():
    with pytest.raises(Overloaded, match="binary"):
        rest.split_body(bytes(rest.MAX_JSON_BYTES + 1), None)


def test_fp16_and_bf16_are_widened_on_the_way_out():
    assert elements_of(Tensor("y", "FP16", (2,), struct.pack("<2e", 1.5, -0.25))) == [1.5, -0.25]
    assert elements_of(Tensor("y", "BF16", (2,), b"\xc0\x3f\x80\xbe")) == [1.5, -0.25]


def test_nan_and_infinity_become_null():
    call = decode({"inputs": []})
    result = InferResult("m", "1", [Tensor("y", "FP32", (3,), struct.pack("<3f", math.nan, math.inf, 1))], Timings())
    (body,), length = rest.encode_infer(call, result)
    assert length is None
    assert json.loads(body)["outputs"][0]["data"] == [None, None, 1.0]


def test_bytes_that_are_no_text_need_binary_data():
    with pytest.raises(InvalidRequest, match="binary_data"):
        elements_of(Tensor("y", "BYTES", (1,), b"\x01\0\0\0\xff"))


@pytest.mark.parametrize(
    ("datatype", "content"),
    [("FP32", b"123"), ("FP16", b"1"), ("BF16", b"1"), ("BYTES", b"\x05\0\0\0a"), ("BYTES", b"\x05\0")],
)
def test_outputs_that_do_not_fit_their_datatype_are_a_backend_error(datatype, content):
    with pytest.raises(BackendError):
        elements_of(Tensor("y", datatype, (1,), content))


def test_data_must_be_a_list():
    with pytest.raises(InvalidRequest, match="must be a list"):
        elements_to_bytes("x", "INT8", [1], 3, False)
