"""Values of ``--input``."""

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from appliance_client.calls import ModelMetadata, TensorMetadata
from appliance_client.tensors import DTYPES
from appliancectl.failure import InputError
from appliancectl.inputs import gather_inputs, grey_png, sample_inputs


def model(*inputs):
    return ModelMetadata("m", ("1",), "", tuple(TensorMetadata(*each) for each in inputs), ())


TEXT = model(("text", "BYTES", (-1,)))
VECTOR = model(("x", "FP32", (-1, 3)))


def elements(tensor):
    content = bytes(tensor.content)
    found = []
    while content:
        length = int.from_bytes(content[:4], "little")
        found.append(content[4 : 4 + length])
        content = content[4 + length :]
    return found


def test_text_is_taken_as_it_is():
    tensor = gather_inputs(TEXT, ["a=b, naïve?"], False)["text"]
    assert (tensor.shape, elements(tensor)) == ((1,), ["a=b, naïve?".encode()])


def test_a_name_before_the_value_is_taken_off_where_it_is_an_input():
    assert elements(gather_inputs(TEXT, ["text=hello"], False)["text"]) == [b"hello"]


def test_several_values_are_rows():
    tensor = gather_inputs(TEXT, ["one", "two"], False)["text"]
    assert (tensor.shape, elements(tensor)) == ((2,), [b"one", b"two"])
    rows = gather_inputs(VECTOR, ["[1,2,3]", "[[4,5,6],[7,8,9]]"], False)["x"]
    assert rows.content.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


def test_a_text_file_loses_its_last_line_break_and_a_picture_nothing(tmp_path):
    (tmp_path / "text").write_bytes(b"hello\r\n")
    (tmp_path / "picture").write_bytes(grey_png(2, 2) + b"\n")
    given = gather_inputs(TEXT, [str(tmp_path / "text"), str(tmp_path / "picture")], False)["text"]
    assert elements(given) == [b"hello", grey_png(2, 2) + b"\n"]


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"from a pipe\n")))
    assert elements(gather_inputs(TEXT, ["-"], False)["text"]) == [b"from a pipe"]


def test_npy_files_and_json_files(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((2, 3)))
    (tmp_path / "a.json").write_text("[1, 2, 3]")
    assert gather_inputs(VECTOR, [str(tmp_path / "a.npy")], False)["x"].shape == (2, 3)
    tensor = gather_inputs(VECTOR, [str(tmp_path / "a.json")], False)["x"]
    assert (tensor.datatype, tensor.content.dtype, tensor.content.tolist()) == ("FP32", np.float32, [[1, 2, 3]])


def test_pickled_arrays_are_not_read(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="cannot use"):
        gather_inputs(VECTOR, [str(tmp_path / "a.npy")], False)


def test_bf16_keeps_the_upper_half():
    tensor = gather_inputs(model(("x", "BF16", (-1,))), ["[1.5, -2]"], False)["x"]
    assert tensor.content.tolist() == [0x3FC0, 0xC000]


@pytest.mark.parametrize(
    ("metadata", "given", "is_image", "reason"),
    [
        (VECTOR, ["nowhere.npy"], False, "no such file"),
        (VECTOR, ["[1, 2"], False, "neither .npy nor JSON"),
        (VECTOR, ['["a"]'], False, "cannot use the value of x"),
        (VECTOR, ["[[1], [2, 3]]"], False, "neither .npy nor JSON"),
        (VECTOR, ["[1,2,3]", "[1,2]"], False, "cannot use the value of x"),
        (model(("x", "INT8", (-1,))), ["[1.5]"], False, "cannot use the value of x"),
        (model(("x", "INT8", (-1,))), ["[300]"], False, "cannot use the value of x"),
        (model(("image", "BYTES", (-1,))), ["nowhere.png"], True, "no such file"),
        (model(("a", "INT8", (1,)), ("b", "INT8", (1,))), ["[1]"], False, "write NAME=VALUE"),
        (model(("a", "INT8", (1,)), ("b", "INT8", (1,))), ["a=[1]"], False, "no --input for b"),
    ],
)
def test_values_that_cannot_be_used_are_refused(metadata, given, is_image, reason):
    with pytest.raises(InputError, match="cannot ") as refusal:
        gather_inputs(metadata, given, is_image)
    assert reason in refusal.value.message


def test_made_up_inputs_have_one_row_of_the_right_type():
    made = sample_inputs(model(("t", "BYTES", (-1, 1)), ("i", "INT64", (-1, -1)), ("f", "FP32", (4,))), False)
    assert (made["t"].shape, made["i"].shape, made["f"].shape) == ((1, 1), (1, 16), (4,))
    assert made["i"].content.dtype == DTYPES["INT64"]


def test_the_made_up_picture_is_a_picture():
    from PIL import Image

    image = Image.open(io.BytesIO(grey_png(5, 3)))
    image.load()
    assert (image.size, image.getpixel((0, 0))) == ((5, 3), 128)
