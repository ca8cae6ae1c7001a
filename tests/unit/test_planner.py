"""What a request's head must say about a model, checked before a byte of a tensor is looked at."""

import contextlib
import random
import struct
from types import SimpleNamespace

import pytest

from appliance.errors import InvalidRequest
from appliance.manifest import ArtifactEntry, ClassificationSection, ImageSection, Manifest, TextSection
from appliance.planner import MAX_BYTES_ELEMENTS, TEXT_INDEX, check_contents, make_plan, signature_of
from appliance.types import ITEM_BYTES
from appliance.wire import worker_pb2
from appliance.wire.elements import join_elements


def loaded(rows, inputs, outputs, edge_inputs=(), edge_outputs=()):
    """What a worker reports; each tensor is (name, datatype, shape)."""

    def specs(entries):
        return [worker_pb2.TensorSpec(name=name, datatype=datatype, shape=shape) for name, datatype, shape in entries]

    return worker_pb2.Loaded(
        inputs=specs(inputs),
        outputs=specs(outputs),
        edge_inputs=specs(edge_inputs),
        edge_outputs=specs(edge_outputs),
        max_batch_size=rows,
    )


def signature(rows, inputs, outputs, edge_inputs=(), edge_outputs=(), **sections):
    manifest = Manifest(name="m", artifacts=[ArtifactEntry(path="1/m.onnx", format="onnx")], **sections)
    return signature_of(loaded(rows, inputs, outputs, edge_inputs, edge_outputs), manifest)


PAIR = signature(
    8,
    [("a", "FP32", (-1, 4)), ("b", "INT64", (-1, -1))],
    [("c", "FP32", (-1, 4)), ("d", "INT64", (-1, -1)), ("e", "FP32", (-1,))],
)
WHOLE = signature(0, [("x", "UINT8", (-1, -1))], [("y", "UINT8", (-1, -1))])
SCALAR = signature(0, [("x", "FP64", ())], [("y", "FP64", ())])
WORDS = signature(8, [("x", "BYTES", (-1, 2))], [("y", "BYTES", (-1, 2))])
TEXT = signature(
    8,
    [("input_ids", "INT64", (-1, -1)), ("attention_mask", "INT64", (-1, -1)), ("extra", "FP32", (-1, 2))],
    [("logits", "FP32", (-1, 3))],
    text=TextSection(),
)
PICTURE = signature(
    8,
    [("pixels", "FP32", (-1, 3, 8, 8))],
    [("logits", "FP32", (-1, 3))],
    edge_inputs=[("image", "BYTES", (-1, 1))],
    edge_outputs=[("label", "BYTES", (-1, 1)), ("score", "FP32", (-1, 1))],
    image=ImageSection(tensor="pixels", width=8, height=8),
    classification=ClassificationSection(),
)


def plan(of, inputs, outputs=()):
    return make_plan(SimpleNamespace(), of, inputs, outputs)


def refusal(of, inputs, outputs=()) -> str:
    with pytest.raises(InvalidRequest) as caught:
        plan(of, inputs, outputs)
    return str(caught.value)


A, B = ("a", "FP32", (2, 4)), ("b", "INT64", (2, 7))


def test_a_plan_keeps_the_clients_order_and_the_workers_places():
    made = plan(PAIR, [B, A], ["e", "c"])
    assert [(tensor.place, tensor.row_shape, tensor.byte_length) for tensor in made.tensors] == [
        (1, (7,), 112),
        (0, (4,), 32),
    ]
    assert (made.rows, made.byte_length, made.has_bytes, made.is_text) == (2, 144, False, False)
    assert (made.outputs, made.wanted) == ((2, 0), 0b101)


def test_without_outputs_all_are_wanted():
    made = plan(PAIR, [A, B])
    assert (made.outputs, made.wanted) == ((0, 1, 2), 0b111)


def test_outputs_beyond_the_masks_width_share_its_last_bit():
    names = [(f"o{number}", "FP32", (-1,)) for number in range(70)]
    many = signature(8, [("x", "FP32", (-1,))], names)
    assert plan(many, [("x", "FP32", (1,))], ["o69"]).wanted == 1 << 63
    assert plan(many, [("x", "FP32", (1,))], ["o63", "o2"]).wanted == 1 << 63 | 1 << 2


def test_equal_signatures_mean_equal_rows_whatever_the_number_and_the_outputs():
    one = plan(PAIR, [("a", "FP32", (1, 4)), ("b", "INT64", (1, 7))], ["c"])
    assert one.signature == plan(PAIR, [A, B], ["d"]).signature
    assert one.signature != plan(PAIR, [A, ("b", "INT64", (2, 8))]).signature
    assert one.signature != plan(PAIR, [B, A]).signature


def test_a_model_without_batches_has_one_row_of_the_full_shape():
    made = plan(WHOLE, [("x", "UINT8", (3, 5))])
    assert (made.rows, made.tensors[0].row_shape, made.byte_length) == (1, (3, 5), 15)
    assert plan(SCALAR, [("x", "FP64", ())]).byte_length == 8


def test_empty_dimensions_are_a_tensor_of_no_bytes():
    assert plan(WHOLE, [("x", "UINT8", (0, 5))]).tensors[0].byte_length == 0
    assert plan(PAIR, [("a", "FP32", (1, 4)), ("b", "INT64", (1, 0))]).tensors[1].byte_length == 0


@pytest.mark.parametrize(
    ("inputs", "outputs", "says"),
    [
        ([], [], "'a' is missing"),
        ([A], [], "'b' is missing"),
        ([A, B, ("z", "FP32", (2, 4))], [], "the model takes 'a', 'b'"),
        ([A, A, B], [], "'a': it is given twice"),
        ([("a", "FP64", (2, 4)), B], [], "'FP64' and must be 'FP32'"),
        ([("a", "FP32", (2,)), B], [], "dimensions [-1, 4]"),
        ([("a", "FP32", ()), B], [], "dimensions [-1, 4]"),
        ([("a", "FP32", (2, 5)), B], [], "must be [-1, 4]"),
        ([("a", "FP32", (-2, 4)), B], [], "negative"),
        ([A, ("b", "INT64", (2, -1))], [], "negative"),
        ([("a", "FP32", (0, 4)), ("b", "INT64", (0, 7))], [], "batch dimension is 0 and must be 1 to 8"),
        ([("a", "FP32", (9, 4)), ("b", "INT64", (9, 7))], [], "batch dimension is 9 and must be 1 to 8"),
        ([A, ("b", "INT64", (3, 7))], [], "batch dimension is 3 and another input's is 2"),
        ([A, ("b", "INT64", (2, 2**62))], [], "2^40"),
        ([A, ("b", "INT64", (2, 2**40))], [], "2^40"),
        ([A, B], ["f"], "the model gives 'c', 'd', 'e'"),
        ([A, B], ["c", "c"], "more than once"),
        ([A, B], ["c", "d", "e", "c"], "4 outputs"),
        ([A, B], [""], "the model gives"),
    ],
)
def test_what_does_not_suit_the_model_is_refused_with_the_rule(inputs, outputs, says):
    message = refusal(PAIR, inputs, outputs)
    assert message.startswith("cannot ")
    assert says in message


def test_names_and_shapes_in_messages_are_short():
    assert len(refusal(PAIR, [("n" * 10**6, "FP32", (1,))])) < 200
    assert len(refusal(PAIR, [("a", "D" * 10**6, (1,))])) < 200
    assert len(refusal(PAIR, [("a", "FP32", (1,) * 10**5)])) < 300
    assert len(refusal(PAIR, [A, B], ["o" * 10**6])) < 200


@pytest.mark.parametrize(
    "shape", [(2**32, 2**32), (2**62, 4), (2**63, 2**63), (0, 2**41), (2**41, 0), (2**20 + 1, 2**20), (1, 2**64)]
)
def test_products_of_dimensions_never_overflow_and_a_zero_hides_nothing(shape):
    assert "2^40" in refusal(WHOLE, [("x", "UINT8", shape)])


def test_strings_are_counted_before_they_are_walked():
    made = plan(WORDS, [("x", "BYTES", (3, 2))])
    assert (made.has_bytes, made.tensors[0].elements, made.tensors[0].byte_length) == (True, 6, -1)
    long = signature(0, [("x", "BYTES", (-1,))], [("y", "BYTES", (-1,))])
    assert plan(long, [("x", "BYTES", (MAX_BYTES_ELEMENTS,))]).has_bytes
    assert str(MAX_BYTES_ELEMENTS) in refusal(long, [("x", "BYTES", (MAX_BYTES_ELEMENTS + 1,))])


# ---------------------------------------------------------------- texts and pictures


def test_a_text_stands_in_the_place_of_its_tokens():
    extra = ("extra", "FP32", (2, 2))
    made = plan(TEXT, [("text", "BYTES", (2, 1)), extra])
    assert made.is_text
    assert made.tensors[0].place == TEXT_INDEX
    ids, mask = ("input_ids", "INT64", (2, 5)), ("attention_mask", "INT64", (2, 5))
    assert not plan(TEXT, [ids, mask, extra]).is_text
    assert "'extra' is missing" in refusal(TEXT, [("text", "BYTES", (2, 1))])
    assert "or 'text'" in refusal(TEXT, [extra, ids])
    assert "it is made from 'text'" in refusal(TEXT, [("text", "BYTES", (2, 1)), extra, ids])
    assert [spec.name for spec in TEXT.public_inputs()] == ["extra", "text"]


def test_a_picture_stands_in_the_place_of_its_pixels():
    made = plan(PICTURE, [("image", "BYTES", (2, 1))], ["label"])
    assert (made.tensors[0].place, made.outputs) == (1, (1,))
    assert plan(PICTURE, [("pixels", "FP32", (2, 3, 8, 8))], ["score", "logits"]).outputs == (2, 0)
    both = [("image", "BYTES", (2, 1)), ("pixels", "FP32", (2, 3, 8, 8))]
    assert "it is made from 'image'" in refusal(PICTURE, both)
    assert "or 'image'" in refusal(PICTURE, [])
    assert [spec.name for spec in PICTURE.public_inputs()] == ["image"]


# ---------------------------------------------------------------- contents


def test_contents_are_as_long_as_their_shapes_say():
    made = plan(PAIR, [A, B])
    assert check_contents(made, ["a", "b"], [bytes(32), bytes(112)]) == 144
    for wrong in ([bytes(31), bytes(112)], [bytes(33), bytes(112)], [bytes(112), bytes(32)], [b"", bytes(112)]):
        with pytest.raises(InvalidRequest, match="its shape and datatype need"):
            check_contents(made, ["a", "b"], wrong)


GOOD = join_elements([b"one", b"", b"three", b"\0"])


@pytest.mark.parametrize(
    "content",
    [
        b"", GOOD[:-1], GOOD + b"\0", GOOD[:3], GOOD[:4], b"\xff\xff\xff\xff" + GOOD[4:], GOOD * 2, bytes(15),
        bytes(17), struct.pack("<I", 2**31) * 4,
    ],
)  # fmt: skip
def test_strings_must_fill_their_content_exactly(content):
    made = plan(WORDS, [("x", "BYTES", (2, 2))])
    assert check_contents(made, ["x"], [GOOD]) == len(GOOD)
    for kind in (bytes, bytearray, memoryview):
        with pytest.raises(InvalidRequest, match="'x'"):
            check_contents(made, ["x"], [kind(content)])


def check_plan(of, inputs, made):
    assert len(made.tensors) == len(inputs)
    assert 1 <= made.rows <= max(of.max_batch_size, 1)
    assert made.byte_length == sum(tensor.byte_length for tensor in made.tensors if tensor.byte_length > 0)
    assert made.wanted
    for tensor in made.tensors:
        if ITEM_BYTES[tensor.datatype]:
            assert tensor.byte_length == tensor.elements * ITEM_BYTES[tensor.datatype]


@pytest.mark.parametrize("seed", range(40))
def test_random_heads_are_planned_or_refused_and_nothing_else(seed):
    """Names, datatypes, shapes and outputs at random: a plan's numbers agree with one another."""
    chance = random.Random(seed)
    models = (PAIR, WHOLE, SCALAR, WORDS, TEXT, PICTURE)
    for _ in range(200):
        of = chance.choice(models)
        names = [*of.inputs, "", "z"]
        inputs = []
        for _ in range(chance.randrange(4)):
            shape = tuple(chance.choice([-1, 0, 1, 2, 3, 4, 8, 2**31, 2**63]) for _ in range(chance.randrange(5)))
            inputs.append((chance.choice(names), chance.choice([*ITEM_BYTES, "FP8", ""]), shape))
        if chance.random() < 0.5:
            inputs = [
                (name, spec.datatype, tuple(2 if length < 0 else length for length in spec.shape))
                for name, (_, spec) in of.inputs.items()
                if chance.random() < 0.8
            ]
        outputs = chance.choices([*of.output_names, "z"], k=chance.randrange(3))
        with contextlib.suppress(InvalidRequest):
            check_plan(of, inputs, plan(of, inputs, outputs))
