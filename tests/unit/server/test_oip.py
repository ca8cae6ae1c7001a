"""Conversions between Open Inference Protocol messages and the engine's values."""

import asyncio
import math
import resource
import struct
from dataclasses import replace

import pytest

from appliance.errors import ApplianceError, InvalidRequest, ModelNotFound, PermissionDenied, Unimplemented
from appliance.manifest import Manifest
from appliance.metrics import ModelStatistics
from appliance.server import oip
from appliance.server.access import METHOD_ROLE
from appliance.server.oip_infer import MAX_CONVERTED_ELEMENTS, MAX_ELEMENTS, MAX_RANK, MAX_TENSORS, read_parameters
from appliance.server.oip_wire import MAX_FIELDS, MAX_HEAD_BYTES, MAX_TYPED_BYTES, parse_infer, parse_message, varint
from appliance.types import (
    NO_OPTIONS,
    InferResult,
    ModelDescription,
    ModelState,
    ModelStatus,
    Peer,
    RequestOptions,
    Role,
    SequenceStep,
    Tensor,
    TensorSpec,
    Timings,
)
from appliance.wire import open_inference_pb2 as pb

PEER = Peer("grpc", Role.INFER)
ADMIN = Peer("grpc", Role.ADMIN)


def request(datatype="FP32", shape=(2,), raw=None, **contents):
    message = pb.ModelInferRequest(model_name="m")
    entry = message.inputs.add(name="x", datatype=datatype, shape=shape)
    for field, values in contents.items():
        getattr(entry.contents, field).extend(values)
    if raw is not None:
        message.raw_input_contents.append(raw)
    return message


def content(message):
    (tensor,) = oip.request_from_message(message, PEER).inputs
    return bytes(tensor.content)


def refusal(message, *args):
    with pytest.raises(InvalidRequest) as caught:
        oip.request_from_message(message, PEER, *args)
    return str(caught.value)


@pytest.mark.parametrize(
    ("datatype", "field", "values", "expected"),
    [
        ("BOOL", "bool_contents", [True, False, True], b"\x01\x00\x01"),
        ("INT8", "int_contents", [-128, 0, 127], struct.pack("<3b", -128, 0, 127)),
        ("INT16", "int_contents", [-32768, 1, 32767], struct.pack("<3h", -32768, 1, 32767)),
        ("INT32", "int_contents", [-(2**31), 1, 2**31 - 1], struct.pack("<3i", -(2**31), 1, 2**31 - 1)),
        ("INT64", "int64_contents", [-(2**63), 1, 2**63 - 1], struct.pack("<3q", -(2**63), 1, 2**63 - 1)),
        ("UINT8", "uint_contents", [0, 1, 255], b"\x00\x01\xff"),
        ("UINT16", "uint_contents", [0, 1, 65535], struct.pack("<3H", 0, 1, 65535)),
        ("UINT32", "uint_contents", [0, 1, 2**32 - 1], struct.pack("<3I", 0, 1, 2**32 - 1)),
        ("UINT64", "uint64_contents", [0, 1, 2**64 - 1], struct.pack("<3Q", 0, 1, 2**64 - 1)),
        ("FP32", "fp32_contents", [1.5, -0.0, math.inf], struct.pack("<3f", 1.5, -0.0, math.inf)),
        ("FP64", "fp64_contents", [0.1, -0.0, -math.inf], struct.pack("<3d", 0.1, -0.0, -math.inf)),
        ("BYTES", "bytes_contents", [b"", b"a\0b", b"xyz"], b"\0\0\0\0\3\0\0\0a\0b\3\0\0\0xyz"),
    ],
)
def test_typed_contents_become_the_raw_tensor(datatype, field, values, expected):
    message = pb.ModelInferRequest.FromString(request(datatype, (3,), **{field: values}).SerializeToString())
    assert content(message) == expected


def test_the_bits_of_a_nan_survive():
    bits = struct.pack("<I", 0x7FC0BEEF)
    # the NaN is put on the wire by hand, since Python has no way to hold its payload in a float
    wire = request("FP32", (1,)).SerializeToString()
    entry = b"\x0a\x01x\x12\x04FP32\x1a\x01\x01" + b"\x2a\x06\x32\x04" + bits
    wire = b"\x0a\x01m\x2a" + varint(len(entry)) + entry
    assert content(pb.ModelInferRequest.FromString(wire)) == bits


def test_unknown_fields_in_contents_do_not_end_up_in_the_tensor():
    entry = b"\x0a\x01x\x12\x04FP32\x1a\x01\x01" + b"\x2a\x0a" + b"\x32\x04\0\0\x80\x3f" + b"\xa2\x06\x01z"
    assert content(pb.ModelInferRequest.FromString(b"\x2a" + varint(len(entry)) + entry)) == struct.pack("<f", 1.0)


@pytest.mark.parametrize(
    ("datatype", "field", "value"),
    [
        ("INT8", "int_contents", 128),
        ("INT16", "int_contents", -32769),
        ("UINT8", "uint_contents", 256),
        ("UINT16", "uint_contents", 65536),
    ],
)
def test_a_typed_element_out_of_range_is_refused_and_never_wrapped(datatype, field, value):
    assert "out of the range" in refusal(request(datatype, (1,), **{field: [value]}))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_typed_contents_must_match_the_shape(count):
    assert "its shape 2" in refusal(request("FP32", (2,), fp32_contents=[1.0] * count))


def test_contents_of_another_type_are_refused_never_cast():
    assert "fp32_contents" in refusal(request("FP32", (1,), int_contents=[1]))
    assert "int_contents" in refusal(request("FP32", (1,), fp32_contents=[1.0], int_contents=[1]))


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_floats_travel_raw_only(datatype):
    assert "raw_input_contents" in refusal(request(datatype, (1,), fp32_contents=[1.0]))
    assert content(request(datatype, (1,), raw=b"\x00\x3c")) == b"\x00\x3c"


def test_raw_contents_follow_the_order_of_the_inputs():
    message = pb.ModelInferRequest(model_name="m", model_version="3")
    for name in ("a", "b"):
        message.inputs.add(name=name, datatype="UINT8", shape=(1,))
    message.raw_input_contents.extend([b"A", b"B"])
    made = oip.request_from_message(message, PEER)
    assert [(tensor.name, bytes(tensor.content)) for tensor in made.inputs] == [("a", b"A"), ("b", b"B")]
    assert (made.model, made.version, made.outputs, made.timeout_us, made.peer) == ("m", "3", (), 0, PEER)


def test_raw_and_typed_contents_cannot_be_mixed():
    assert "beside raw_input_contents" in refusal(request(raw=bytes(8), fp32_contents=[1.0, 2.0]))


@pytest.mark.parametrize("count", [1, 3])
def test_there_must_be_one_raw_content_for_each_input(count):
    message = pb.ModelInferRequest(raw_input_contents=[b""] * count)
    for name in ("a", "b"):
        message.inputs.add(name=name, datatype="UINT8", shape=(0,))
    assert f"match {count}" in refusal(message)


def test_an_empty_tensor_needs_no_content():
    assert content(request("FP32", (0, 4))) == b""
    assert content(request("FP16", (0,), raw=b"")) == b""


def test_a_scalar_has_no_dimension():
    (tensor,) = oip.request_from_message(request("FP32", (), fp32_contents=[2.0]), PEER).inputs
    assert (tensor.shape, tensor.content) == ((), struct.pack("<f", 2.0))


@pytest.mark.parametrize(
    "shape",
    [(-1,), (2, -2), (2**62, 4), (1 << 20, 1 << 20, 2), (0, -1), (0, 2**63 - 1), (1,) * (MAX_RANK + 1)],
)
def test_shapes_that_are_negative_overflow_or_have_too_many_dimensions_are_refused(shape):
    assert "cannot take input 'x'" in refusal(request("FP32", shape, raw=b""))


def test_the_largest_shape_is_left_to_the_engine():
    assert oip.request_from_message(request("UINT8", (MAX_ELEMENTS,), raw=b""), PEER).inputs[0].shape == (MAX_ELEMENTS,)


@pytest.mark.parametrize("datatype", ["", "FP8", "fp32", "STRING", "INT4"])
def test_an_unknown_datatype_is_refused(datatype):
    assert "no datatype" in refusal(request(datatype, (1,), raw=b""))


def test_inputs_are_counted_and_named_once():
    message = pb.ModelInferRequest()
    for _ in range(2):
        message.inputs.add(name="x", datatype="FP32", shape=(0,))
    assert "more than once" in refusal(message)
    for index in range(MAX_TENSORS):
        message.inputs.add(name=str(index), datatype="FP32", shape=(0,))
    assert f"limit is {MAX_TENSORS}" in refusal(message)


def test_outputs_are_counted_and_named_once():
    message = request(raw=bytes(8))
    message.outputs.add(name="a")
    message.outputs.add(name="b")
    assert oip.request_from_message(message, PEER).outputs == ("a", "b")
    message.outputs.add(name="a")
    assert "more than once" in refusal(message)
    for index in range(10_000):
        message.outputs.add(name=str(index))
    assert f"limit is {MAX_TENSORS}" in refusal(message)


def test_shared_memory_points_to_the_native_socket():
    message = request(raw=bytes(8))
    message.inputs[0].parameters["shared_memory_region"].string_param = "r"
    assert "by descriptor on infer.sock" in refusal(message)
    message = request(raw=bytes(8))
    message.outputs.add(name="y").parameters["shared_memory_region"].string_param = "r"
    assert "by descriptor on infer.sock" in refusal(message)


def test_classification_is_refused_rather_than_ignored():
    message = request(raw=bytes(8))
    message.outputs.add(name="y").parameters["classification"].int64_param = 3
    assert "classification" in refusal(message)


# ------------------------------------------------------------------ reserved parameters


def options(**values):
    """What parameters ask for; each value goes into the field of its type, as Triton's client puts it."""
    parameters = pb.ModelInferRequest().parameters
    for name, value in values.items():
        fields = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
        field = "uint64_param" if type(value) is int and value >= 2**63 else fields[type(value)]
        setattr(parameters[name], field, value)
    return read_parameters(parameters)


def test_parameters_say_how_a_request_is_scheduled():
    step = SequenceStep(2**64 - 1, True, False)
    asked = options(timeout=9, priority=3, sequence_id=2**64 - 1, sequence_start=True, sequence_end=False)
    assert asked == RequestOptions(9, 3, step)
    assert options(sequence_id="stream 7", sequence_end=True).sequence == SequenceStep("stream 7", False, True)
    assert options(priority=2**64 - 1).priority == 2**64 - 1


@pytest.mark.parametrize(("word", "level"), [("interactive", 1), ("default", 2), ("background", 3)])
def test_a_priority_may_be_a_word(word, level):
    assert options(priority=word) == RequestOptions(priority=level)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"anything_else": "ignored"},
        {"timeout": 0, "priority": 0, "sequence_id": 0, "sequence_start": False, "sequence_end": False},
        {"sequence_id": ""},
    ],
)
def test_who_asks_for_nothing_gets_the_one_object_that_says_so(values):
    """The request path tells by identity."""
    assert options(**values) is NO_OPTIONS


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"timeout": -1}, "cannot use -1 as the parameter timeout: it must not be negative"),
        ({"timeout": "9"}, "timeout: it must be an integer of microseconds"),
        ({"timeout": 9.0}, "timeout: it must be an integer of microseconds"),
        ({"timeout": True}, "timeout: it must be an integer of microseconds"),
        ({"priority": -(2**63)}, "priority: it must not be negative"),
        ({"priority": True}, "priority: it must be an integer or one of interactive, default, background"),
        ({"priority": 1.0}, "priority: it must be an integer"),
        ({"priority": "Interactive"}, "'Interactive' as the parameter priority: it is none of interactive"),
        ({"priority": ""}, "priority: it is none of"),
        ({"priority": "\x1b[2J" + "9" * 10_000}, "priority: it is none of"),
        ({"sequence_id": -1}, "sequence_id: it must not be negative"),
        ({"sequence_id": 1.5}, "sequence_id: it must be an integer or a string"),
        ({"sequence_id": "ä" * 65}, "sequence_id: it is longer than 128 bytes"),
        ({"sequence_id": "s" * 10_240}, "sequence_id: it is longer than 128 bytes"),
        ({"sequence_id": 1, "sequence_start": 1}, "sequence_start: it must be true or false"),
        ({"sequence_id": 1, "sequence_end": "true"}, "sequence_end: it must be true or false"),
        ({"sequence_start": True}, "cannot start or end a sequence: sequence_id must name it"),
        ({"sequence_id": 0, "sequence_end": True}, "cannot start or end a sequence: sequence_id must name it"),
        ({"sequence_id": "", "sequence_end": True}, "cannot start or end a sequence: sequence_id must name it"),
    ],
)
def test_parameters_that_cannot_be_meant_are_refused(values, rule):
    with pytest.raises(InvalidRequest) as caught:
        options(**values)
    message = str(caught.value)
    assert rule in message
    assert message.isprintable()
    assert len(message) < 300


@pytest.mark.parametrize("name", ["timeout", "priority", "sequence_id", "sequence_start", "sequence_end"])
def test_a_parameter_without_a_value_is_refused(name):
    parameters = pb.ModelInferRequest().parameters
    parameters[name].SetInParent()
    with pytest.raises(InvalidRequest, match=f"cannot use the parameter {name}"):
        read_parameters(parameters)


def test_a_transports_time_limit_is_kept_apart_from_the_parameter():
    """A model may ignore the one and not the other."""
    message = request(raw=bytes(8))
    message.parameters["timeout"].int64_param = 5
    made = oip.request_from_message(message, PEER, 7)
    assert (made.timeout_us, made.options.timeout_us) == (7, 5)


@pytest.mark.parametrize("request_id", ["a\r\nb", "\x1b[31m", "\0", "x" * 257, "x" * (1 << 20)])
def test_request_ids_that_could_harm_a_log_are_refused_and_not_echoed(request_id):
    message = request(raw=bytes(8))
    message.id = request_id
    text = refusal(message)
    assert len(text) < 300
    assert text.isprintable()


def test_a_request_id_of_256_printable_characters_is_fine():
    oip.check_request_id("é" * 256)


def test_error_messages_escape_and_cut_names():
    text = refusal(request("\x1b[31m" + "x" * 500, (1,), raw=b""))
    assert text.isprintable()
    assert len(text) < 400


def test_too_many_elements_to_convert_on_the_event_loop_are_refused():
    message = request("UINT8", (MAX_CONVERTED_ELEMENTS + 1,), uint_contents=bytes(MAX_CONVERTED_ELEMENTS + 1))
    assert "use raw_input_contents" in refusal(message)


# ------------------------------------------------------------------ reading serialised messages


def test_a_large_request_is_parsed_without_copying_its_tensors():
    message = request(raw=bytes(8))
    message.inputs.add(name="big", datatype="UINT8", shape=(1 << 20,))
    message.raw_input_contents.append(b"\x07" * (1 << 20))
    message.parameters["timeout"].int64_param = 3
    body = message.SerializeToString()
    parsed, raw = parse_infer(body)
    assert len(parsed.SerializeToString()) < 200
    assert isinstance(raw[1], memoryview)
    assert raw[1].obj is body
    made = oip.request_from_message(parsed, PEER, raw=raw)
    assert [bytes(tensor.content) for tensor in made.inputs] == [bytes(8), b"\x07" * (1 << 20)]
    assert made.options.timeout_us == 3


def test_a_large_typed_request_is_parsed_whole():
    count = 100_000
    parsed, raw = parse_infer(request("FP32", (count,), fp32_contents=[1.0] * count).SerializeToString())
    (tensor,) = oip.request_from_message(parsed, PEER, raw=raw).inputs
    assert tensor.content == struct.pack("<f", 1.0) * count


@pytest.mark.parametrize("body", [b"\xff", b"\x0a\x05ab", b"\x0a\x01\xff", b"\x2a\x02\x0a"])
def test_bytes_that_are_no_message_are_refused(body):
    with pytest.raises(InvalidRequest, match="cannot read the message"):
        parse_infer(body)
    padding = b"\x3a" + varint(MAX_HEAD_BYTES) + bytes(MAX_HEAD_BYTES)
    with pytest.raises(InvalidRequest, match="cannot read the message"):
        parse_infer(padding + body)


def test_every_cut_of_a_large_message_is_refused_or_shorter_never_a_crash():
    message = request(raw=bytes(MAX_HEAD_BYTES + 100))
    message.id = "abc"
    body = message.SerializeToString()
    cuts = [*range(len(body) - MAX_HEAD_BYTES - 200, len(body) - MAX_HEAD_BYTES), *range(len(body) - 50, len(body))]
    for cut in cuts:
        try:
            parse_infer(body[:cut])
        except InvalidRequest:
            continue


@pytest.mark.parametrize(
    ("flood", "rule"),
    [
        (b"\x2a\x00", "fields"),  # empty inputs
        (b"\x32\x00", "fields"),  # empty outputs
        (b"\x3a\x00", "fields"),  # empty raw contents
        (b"\x2a" + varint(32 << 20) + b"\x22\x00" * (16 << 20), "fields"),  # parameters of one input
        (b"\x22" + varint(32 << 20) + bytes(32 << 20), "names, shapes and parameters"),
        (b"\x2a" + varint((32 << 20) + 5) + b"\x2a" + varint(32 << 20) + b"\x42\x00" * (16 << 20), "typed contents"),
    ],
)
def test_a_flood_of_small_fields_is_refused_before_protobuf_makes_it_large(flood, rule):
    """16 million sub-messages would take gigabytes once parsed."""
    body = flood * (16 << 20) if len(flood) == 2 else flood
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidRequest, match=rule):
        parse_infer(body)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_limits_of_a_large_message_are_exact():
    raw = b"\x3a" + varint(MAX_HEAD_BYTES) + bytes(MAX_HEAD_BYTES)
    assert len(parse_infer(raw + b"\x3a\x00" * (MAX_FIELDS - 1))[1]) == MAX_FIELDS
    with pytest.raises(InvalidRequest, match="fields"):
        parse_infer(raw + b"\x3a\x00" * MAX_FIELDS)
    parse_infer(raw + request("UINT8", (0,), raw=b"", uint_contents=bytes(MAX_TYPED_BYTES - 10)).SerializeToString())


def test_other_messages_are_short():
    with pytest.raises(InvalidRequest, match=f"limit is {MAX_HEAD_BYTES}"):
        parse_message(pb.ModelReadyRequest, bytes(MAX_HEAD_BYTES + 1))
    with pytest.raises(InvalidRequest, match="no ModelReadyRequest"):
        parse_message(pb.ModelReadyRequest, b"\xff")


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 2**32, 2**63])
def test_varints_are_protobufs(value):
    assert b"\x28" + varint(value) == pb.InferParameter(uint64_param=value).SerializeToString()


# ------------------------------------------------------------------ answers


def result():
    outputs = [
        Tensor("y", "FP32", (1, 2), memoryview(bytes(8))),
        Tensor("labels", "BYTES", (1,), bytearray(b"\1\0\0\0a")),
        Tensor("none", "FP32", (0,), b""),
    ]
    timings = Timings(1_999, 2_000, 3_000, 4_000, 5_000, 6_000, batch_rows=8)
    return InferResult("m", "2", outputs, timings)


def test_an_answer_carries_raw_tensors_and_timings_in_microseconds():
    message = oip.message_from_result(result(), "id-1")
    assert (message.model_name, message.model_version, message.id) == ("m", "2", "id-1")
    assert [(entry.name, entry.datatype, tuple(entry.shape)) for entry in message.outputs] == [
        ("y", "FP32", (1, 2)),
        ("labels", "BYTES", (1,)),
        ("none", "FP32", (0,)),
    ]
    assert list(message.raw_output_contents) == [bytes(8), b"\1\0\0\0a", b""]
    assert {name: value.int64_param for name, value in message.parameters.items()} == {
        "decode_us": 1,
        "tokenise_us": 2,
        "queue_us": 3,
        "copy_us": 4,
        "compute_us": 5,
        "postprocess_us": 6,
        "batch_rows": 8,
    }


def test_serialising_with_appended_tensors_is_the_same_message():
    answer = result()
    whole = oip.message_from_result(answer, "i")
    body = oip.serialise_result(oip.message_from_result(answer, "i", with_content=False), answer)
    assert pb.ModelInferResponse.FromString(body) == whole


# ------------------------------------------------------------------ descriptions

UNLOADED = ModelStatus("m", "1", ModelState.UNLOADED)
STATUS = ModelStatus(
    "m",
    "2",
    ModelState.READY,
    task="embed",
    backend="onnxruntime",
    device="cpu",
    precision="FP32",
    provider="CPUExecutionProvider",
    max_batch_size=8,
    resident_bytes=5,
)
ARTIFACTS = [{"path": "2/model.onnx", "format": "onnx"}]
MANIFEST = Manifest(name="m", artifacts=ARTIFACTS)
DESCRIPTION = ModelDescription(
    "m",
    "2",
    ("1", "2"),
    "onnxruntime_onnx",
    (TensorSpec("x", "FP32", (-1, 16)), TensorSpec("text", "BYTES", (-1, 1))),
    (TensorSpec("y", "BF16", (-1, -1, 4)),),
    8,
    STATUS,
    MANIFEST,
)


def test_metadata_shows_full_shapes():
    message = oip.metadata_message(DESCRIPTION)
    assert (message.name, list(message.versions), message.platform) == ("m", ["1", "2"], "onnxruntime_onnx")
    assert [(entry.name, entry.datatype, list(entry.shape)) for entry in message.inputs] == [
        ("x", "FP32", [-1, 16]),
        ("text", "BYTES", [-1, 1]),
    ]
    assert list(message.outputs[0].shape) == [-1, -1, 4]


def test_config_shows_dims_without_the_batch_and_where_the_model_runs():
    message = oip.config_message(DESCRIPTION)
    assert (message.max_batch_size, message.backend, message.platform) == (8, "onnxruntime", "onnxruntime_onnx")
    assert [(entry.data_type, list(entry.dims)) for entry in message.input] == [
        (pb.TYPE_FP32, [16]),
        (pb.TYPE_STRING, [1]),
    ]
    assert (message.output[0].data_type, list(message.output[0].dims)) == (pb.TYPE_BF16, [-1, 4])
    assert message.version_policy.latest.num_versions == 1
    assert message.instance_group[0].kind == pb.ModelInstanceGroup.KIND_CPU
    assert message.parameters["precision"].string_value == "FP32"


def test_config_of_a_model_without_batches_keeps_all_dims():
    spec = TensorSpec("x", "INT64", (3, 4))
    plain = ModelDescription("m", "1", ("1",), "p", (spec,), (spec,), 0, UNLOADED, MANIFEST)
    message = oip.config_message(plain)
    assert list(message.input[0].dims) == [3, 4]
    assert not message.HasField("dynamic_batching")
    assert not message.instance_group


def config_of(**sections):
    """The configuration of a model whose manifest has these sections."""
    manifest = Manifest.model_validate({"name": "m", "artifacts": ARTIFACTS, **sections})
    return oip.config_message(replace(DESCRIPTION, manifest=manifest))


def test_config_of_a_manifest_that_says_nothing_shows_the_three_levels_there_are():
    batching = config_of().dynamic_batching
    assert (batching.priority_levels, batching.default_priority_level) == (3, 2)
    assert (list(batching.preferred_batch_size), batching.max_queue_delay_microseconds) == ([], 0)
    policy = batching.default_queue_policy
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (4096, 0)
    assert (policy.timeout_action, policy.allow_timeout_override) == (pb.ModelQueuePolicy.REJECT, True)
    assert not batching.priority_queue_policy


def test_config_shows_what_the_manifest_says_of_the_queue():
    message = config_of(
        batch={
            "max_queue_delay_us": 250,
            "preferred_batch_sizes": [2, 4],
            "max_queue_size": 10,
            "default_timeout_ms": 40,
            "priority_levels": 5,
            "default_priority_level": 3,
            "priority_queue_policy": {
                "1": {"max_queue_size": 3, "default_timeout_ms": 0},
                "5": {"timeout_action": "delay", "allow_timeout_override": False},
            },
        },
        cache={"max_bytes": 1},
    )
    batching = message.dynamic_batching
    assert (list(batching.preferred_batch_size), batching.max_queue_delay_microseconds) == ([2, 4], 250)
    assert (batching.priority_levels, batching.default_priority_level) == (5, 3)
    policies = {
        level: (policy.timeout_action, policy.default_timeout_microseconds, policy.allow_timeout_override,
                policy.max_queue_size)
        for level, policy in (*batching.priority_queue_policy.items(), (0, batching.default_queue_policy))
    }  # fmt: skip
    assert policies == {0: (0, 40_000, True, 10), 1: (0, 0, True, 3), 5: (1, 40_000, False, 10)}
    assert message.response_cache.enable


@pytest.mark.parametrize("strategy", ["oldest", "direct"])
def test_config_of_a_stateful_model_shows_how_its_sequences_run(strategy):
    section = {
        "strategy": strategy,
        "max_sequences": 9,
        "idle_seconds": 2.5,
        "state": [{"input": "s_in", "output": "s_out"}],
        "controls": {"start": "begins", "correlation_id": "id"},
    }
    message = config_of(sequence=section, batch={"max_queue_delay_us": 7, "preferred_batch_sizes": [3]})
    assert message.WhichOneof("scheduling_choice") == "sequence_batching"
    batching = message.sequence_batching
    assert batching.WhichOneof("strategy_choice") == strategy
    assert getattr(batching, strategy).max_queue_delay_microseconds == 7
    assert (batching.oldest.max_candidate_sequences, list(batching.oldest.preferred_batch_size)) == (
        (9, [3]) if strategy == "oldest" else (0, [])
    )
    assert batching.max_sequence_idle_microseconds == 2_500_000
    assert [(each.input_name, each.output_name) for each in batching.state] == [("s_in", "s_out")]
    kind = pb.ModelSequenceBatching.Control
    assert [(each.name, each.control[0].kind) for each in batching.control_input] == [
        ("begins", kind.CONTROL_SEQUENCE_START),
        ("id", kind.CONTROL_SEQUENCE_CORRID),
    ]


def test_triton_clients_read_the_same_configuration():
    """Field numbers are Triton's: its own message has the same in its fields."""
    service = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    batch = {"preferred_batch_sizes": [4], "priority_queue_policy": {"3": {"timeout_action": "delay"}}}
    theirs = service.ModelConfig.FromString(config_of(batch=batch, cache={"max_bytes": 1}).SerializeToString())
    batching = theirs.dynamic_batching
    assert (list(batching.preferred_batch_size), batching.priority_levels) == ([4], 3)
    assert batching.priority_queue_policy[3].timeout_action == service.ModelQueuePolicy.DELAY
    assert batching.default_queue_policy.max_queue_size == 4096
    assert theirs.response_cache.enable
    section = {"state": [{"input": "a", "output": "b"}], "controls": {"end": "last"}}
    theirs = service.ModelConfig.FromString(config_of(sequence=section).SerializeToString())
    assert theirs.sequence_batching.oldest.max_candidate_sequences == 64
    assert theirs.sequence_batching.control_input[0].control[0].kind == 2
    assert theirs.sequence_batching.state[0].output_name == "b"


def test_statistics_are_tritons():
    statistics = ModelStatistics()
    statistics.ran(4, Timings(decode_ns=1, copy_ns=2, compute_ns=30, postprocess_ns=5), wall_ms=99)
    statistics.success.add(50, 2)
    statistics.cache_hit.add(6, 3)
    statistics.cache_miss.add(7)
    message = oip.statistics_message([(STATUS, statistics)])
    (model,) = message.model_stats
    assert (model.name, model.version, model.last_inference) == ("m", "2", 99)
    assert (model.inference_count, model.execution_count) == (4, 1)
    assert (model.inference_stats.success.count, model.inference_stats.success.ns) == (2, 50)
    assert model.inference_stats.compute_infer.ns == 30
    assert [(entry.batch_size, entry.compute_infer.count) for entry in model.batch_stats] == [(4, 1)]
    assert (model.inference_stats.cache_hit.count, model.inference_stats.cache_hit.ns) == (3, 6)
    assert (model.inference_stats.cache_miss.count, model.inference_stats.cache_miss.ns) == (1, 7)
    assert model.memory_usage[0].byte_size == 5


def test_every_state_has_tritons_word():
    statuses = [ModelStatus(state.value, "1", state, reason="why") for state in ModelState]
    words = {entry.name: entry.state for entry in oip.index_message(statuses).models}
    assert set(words.values()) == {"READY", "UNAVAILABLE", "LOADING", "UNLOADING"}
    assert words["ready"] == "READY"
    assert words["failed"] == "UNAVAILABLE"
    assert oip.index_message(statuses).models[0].reason == "why"
    assert [entry.name for entry in oip.index_message(statuses, ready_only=True).models] == ["ready"]


# ------------------------------------------------------------------ calls


class FakeEngine:
    def __init__(self):
        self.loaded = []
        self.unloaded = []

    def is_ready(self):
        return True

    def model_is_ready(self, name, version=""):
        if name != "m":
            raise ModelNotFound("cannot find the model: there is none of that name")
        return version != "9"

    def describe(self, name, version=""):
        self.model_is_ready(name)
        return DESCRIPTION

    def statuses(self):
        return [STATUS]

    def statistics(self, name="", version=""):
        return [(STATUS, ModelStatistics())]

    async def load(self, name):
        self.loaded.append(name)

    async def unload(self, name):
        self.unloaded.append(name)


def call(method, message, peer=ADMIN, engine=None):
    return asyncio.run(oip.dispatch_unary(engine or FakeEngine(), peer, method, message.SerializeToString()))


def test_every_call_answers_with_its_own_message():
    assert pb.ServerLiveResponse.FromString(call("ServerLive", pb.ServerLiveRequest())).live
    assert pb.ServerReadyResponse.FromString(call("ServerReady", pb.ServerReadyRequest())).ready
    metadata = pb.ServerMetadataResponse.FromString(call("ServerMetadata", pb.ServerMetadataRequest()))
    assert "model_repository" in metadata.extensions
    assert metadata.version
    assert pb.ModelReadyResponse.FromString(call("ModelReady", pb.ModelReadyRequest(name="m"))).ready
    found = pb.ModelMetadataResponse.FromString(call("ModelMetadata", pb.ModelMetadataRequest(name="m")))
    assert found == oip.metadata_message(DESCRIPTION)
    config = pb.ModelConfigResponse.FromString(call("ModelConfig", pb.ModelConfigRequest(name="m")))
    assert config.config == oip.config_message(DESCRIPTION)
    statistics = pb.ModelStatisticsResponse.FromString(call("ModelStatistics", pb.ModelStatisticsRequest()))
    assert [model.name for model in statistics.model_stats] == ["m"]
    index = pb.RepositoryIndexResponse.FromString(call("RepositoryIndex", pb.RepositoryIndexRequest()))
    assert [model.state for model in index.models] == ["READY"]


def test_an_unknown_model_is_not_ready_rather_than_an_error():
    assert not pb.ModelReadyResponse.FromString(call("ModelReady", pb.ModelReadyRequest(name="other"))).ready
    with pytest.raises(ModelNotFound):
        call("ModelMetadata", pb.ModelMetadataRequest(name="other"))


def test_load_and_unload_reach_the_engine():
    engine = FakeEngine()
    assert call("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="m"), engine=engine) == b""
    unload = pb.RepositoryModelUnloadRequest(model_name="m")
    unload.parameters["unload_dependents"].bool_param = False
    assert call("RepositoryModelUnload", unload, engine=engine) == b""
    assert (engine.loaded, engine.unloaded) == (["m"], ["m"])


@pytest.mark.parametrize("parameter", ["config", "file:1/model.onnx", "anything"])
def test_a_load_cannot_bring_its_own_config_or_files(parameter):
    engine = FakeEngine()
    message = pb.RepositoryModelLoadRequest(model_name="m")
    message.parameters[parameter].string_param = "{}"
    with pytest.raises(InvalidRequest, match=parameter):
        call("RepositoryModelLoad", message, engine=engine)
    assert engine.loaded == []


def test_unload_refuses_unknown_parameters_and_other_repositories():
    message = pb.RepositoryModelUnloadRequest(model_name="m")
    message.parameters["other"].bool_param = True
    with pytest.raises(InvalidRequest, match="other"):
        call("RepositoryModelUnload", message)
    with pytest.raises(InvalidRequest, match="one repository"):
        call("RepositoryIndex", pb.RepositoryIndexRequest(repository_name="r"))


@pytest.mark.parametrize("method", sorted(oip.CALLS))
def test_each_call_needs_the_role_of_the_table_before_anything_else(method):
    engine = FakeEngine()
    refused = METHOD_ROLE[method] is Role.ADMIN
    try:
        asyncio.run(oip.dispatch_unary(engine, PEER, method, b""))
    except PermissionDenied:
        assert refused
    except ApplianceError:
        assert not refused
    else:
        assert not refused
    assert engine.loaded == engine.unloaded == []


@pytest.mark.parametrize("method", ["ModelInfer", "TraceSetting", "Status", "\x1b[2J" + "x" * 999])
def test_methods_that_are_no_unary_calls_are_unimplemented(method):
    with pytest.raises(Unimplemented) as caught:
        asyncio.run(oip.dispatch_unary(FakeEngine(), ADMIN, method, b""))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200
