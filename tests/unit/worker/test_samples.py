"""Samples: rows of inputs from files, and what is wrong with files."""

import base64
import hashlib
import io
import json

import numpy as np
import pytest
import worker_harness as harness
from PIL import Image

from appliance.errors import ArtifactCorrupt, InvalidRequest
from appliance.manifest import Manifest, read_manifest
from appliance.types import TensorSpec
from appliance.worker import samples
from appliance.worker.literals import array_of, tensor_of
from appliance.worker.samples import SampleReader, batches
from appliance.worker.tensors import narrow_to_bf16, widen_bf16

X = TensorSpec("x", "FP32", (-1, 2))
TEXT = [TensorSpec("input_ids", "INT64", (-1, -1)), TensorSpec("attention_mask", "INT64", (-1, -1))]
PIXELS = [TensorSpec("pixels", "FP32", (-1, 1, 8, 8))]


def plain_manifest(**fields):
    return harness.read_as_workers_do(Manifest(name="m", artifacts=[{"path": "1/m", "format": "onnx"}], **fields))


@pytest.fixture
def reader(tmp_path):
    """A reader for a model with one FP32 input of two numbers a row."""
    return SampleReader([X], plain_manifest(), tmp_path, is_batched=True)


def reader_of(model, specs):
    directory = harness.MODELS / model
    return SampleReader(specs, harness.read_as_workers_do(read_manifest(directory)), directory, is_batched=True)


def write_lines(path, *documents):
    path.write_text("".join(f"{json.dumps(one)}\n" for one in documents))
    return path


def picture(value, size=(8, 8)):
    out = io.BytesIO()
    Image.new("L", size, value).save(out, "PNG")
    return out.getvalue()


# ---------------------------------------------------------------- what is read


def test_a_jsonl_row_has_every_input_with_a_leading_dimension_and_its_label(reader, tmp_path):
    path = write_lines(tmp_path / "s.jsonl", {"inputs": {"x": [1, 2.5]}, "label": "a"}, {"inputs": {"x": [3, 4]}})
    first, second = reader.rows(path)
    assert first.feeds["x"].dtype == np.float32
    np.testing.assert_array_equal(first.feeds["x"], [[1, 2.5]])
    assert (first.label, second.label) == ("a", None)
    assert first.digest != second.digest
    assert reader.count(path) == 2
    assert [row.label for row in reader.rows(path, 1)] == ["a"]


def test_blank_lines_and_a_missing_last_line_end_are_no_rows(reader, tmp_path):
    (tmp_path / "s.jsonl").write_text('\n{"inputs": {"x": [1, 2]}}\n\n{"inputs": {"x": [1, 2]}}')
    assert len(list(reader.rows(tmp_path / "s.jsonl"))) == 2


def test_a_model_without_batch_dimension_gets_rows_without_one(tmp_path):
    reader = SampleReader([TensorSpec("x", "INT32", (2, -1))], plain_manifest(), tmp_path, is_batched=False)
    path = write_lines(tmp_path / "s.jsonl", {"inputs": {"x": [[1], [2]]}}, {"inputs": {"x": [[3], [4]]}})
    found = list(batches(reader.rows(path), 0))
    assert [batch.feeds["x"].tolist() for batch in found] == [[[1], [2]], [[3], [4]]]


def test_texts_become_tokens_of_a_bucket_and_take_their_place_among_equals():
    reader = reader_of("language-id", TEXT)
    path = harness.MODELS / "language-id/samples/evaluation.jsonl"
    found = list(batches(reader.rows(path), 32))
    assert sum(len(batch.rows) for batch in found) == reader.count(path) == 588
    assert sorted(place for batch in found for place in batch.places) == list(range(588))
    for batch in found:
        rows, length = batch.feeds["input_ids"].shape
        assert rows == len(batch.rows) <= 32
        assert length in (16, 32, 64, 128, 256)
        assert batch.feeds["attention_mask"].shape == (rows, length)
        assert batch.feeds["input_ids"].dtype == np.int64


def test_a_text_model_takes_tokens_as_well(tmp_path):
    path = write_lines(tmp_path / "s.jsonl", {"inputs": {"input_ids": [5, 6], "attention_mask": [1, 1]}})
    (row,) = reader_of("language-id", TEXT).rows(path)
    assert row.feeds["input_ids"].tolist() == [[5, 6]]


def test_pictures_become_what_the_worker_makes_of_them(tmp_path):
    content = base64.b64encode(picture(51)).decode()
    path = write_lines(tmp_path / "s.jsonl", {"inputs": {"image": {"base64": content}}, "label": 3})
    (row,) = reader_of("digits", PIXELS).rows(path)
    assert row.label == "3"
    np.testing.assert_allclose(row.feeds["pixels"], np.full((1, 1, 8, 8), 51 / 255), rtol=1e-6)


def test_a_directory_is_read_file_by_file(tmp_path):
    """Pictures, arrays and lines together; what is none of them is left alone."""
    (tmp_path / "b.png").write_bytes(picture(255))
    np.savez(tmp_path / "c.npz", pixels=np.full((2, 1, 8, 8), 0.5, np.float32))
    content = base64.b64encode(picture(0)).decode()
    write_lines(tmp_path / "a.jsonl", {"inputs": {"image": {"base64": content}}})
    (tmp_path / "README.md").write_text("of no use")
    found = [float(row.feeds["pixels"].mean()) for row in reader_of("digits", PIXELS).rows(tmp_path)]
    np.testing.assert_allclose(found, [0, 1, 0.5, 0.5])


def test_a_directory_of_texts_has_a_row_a_line(tmp_path):
    (tmp_path / "a.txt").write_text("Guten Tag\n\nund auf Wiedersehen\n")
    rows = list(reader_of("language-id", TEXT).rows(tmp_path))
    assert [row.feeds["input_ids"].shape for row in rows] == [(1, 16), (1, 16)]


def test_text_files_beside_the_samples_of_another_model_are_left_alone(reader, tmp_path):
    (tmp_path / "LICENSE.txt").write_text("anything")
    np.savez(tmp_path / "a.npz", x=np.zeros((1, 2), np.float32))
    assert len(list(reader.rows(tmp_path))) == 1


def test_the_digest_of_a_row_is_that_of_its_inputs_whatever_the_label(reader, tmp_path):
    path = write_lines(
        tmp_path / "s.jsonl",
        {"inputs": {"x": [1, 2]}, "label": "a"},
        {"label": "b", "inputs": {"x": [1, 2]}},
        {"inputs": {"x": [2, 1]}},
    )
    first, second, third = (row.digest for row in reader.rows(path))
    assert first == second != third


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("datatype", "value", "expected"),
    [
        ("FP32", [[1, 2], [3, 4]], [[1, 2], [3, 4]]),
        ("FP16", [[1, 2], [3, 1e9]], [[1, 2], [3, np.inf]]),
        ("FP64", [[0.1, 2], [3, 4]], [[0.1, 2], [3, 4]]),
        ("INT8", [[-128, 127], [0, 1]], [[-128, 127], [0, 1]]),
        ("UINT64", [[2**64 - 1, 0], [0, 0]], [[2**64 - 1, 0], [0, 0]]),
        ("BOOL", [[True, False], [True, True]], [[True, False], [True, True]]),
        ("BYTES", [["a", ""], ["é", {"base64": "AA=="}]], [[b"a", b""], ["é".encode(), b"\0"]]),
    ],
)
def test_nested_lists_become_tensors(datatype, value, expected):
    array = tensor_of(value, TensorSpec("x", datatype, (2, -1)))
    assert array.dtype == (object if datatype == "BYTES" else harness.NUMPY[datatype])
    assert array.tolist() == expected


def test_raw_little_endian_elements_become_tensors():
    raw = base64.b64encode(np.arange(6, dtype="<i4").tobytes()).decode()
    assert tensor_of({"base64": raw}, TensorSpec("x", "INT32", (2, -1))).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensor_of({"base64": raw, "shape": [3, 2]}, TensorSpec("x", "INT32", (-1, -1))).shape == (3, 2)


def test_a_lone_text_is_the_element_of_a_tensor_of_one():
    assert tensor_of("a", TensorSpec("x", "BYTES", (1,))).tolist() == [b"a"]
    assert tensor_of("a", TensorSpec("x", "BYTES", ())).item() == b"a"


def test_bf16_is_rounded_to_the_nearest_and_nan_stays_nan():
    values = np.array([1.0, 1.00390625, 1.01171875, -0.0, np.inf, np.nan, 3e38], np.float32)
    wide = widen_bf16(narrow_to_bf16(values))
    np.testing.assert_array_equal(wide[:5], np.float32([1.0, 1.0, 1.015625, -0.0, np.inf]))
    assert np.isnan(wide[5])
    assert abs(wide[6] / 3e38 - 1) < 1 / 256
    assert tensor_of([1, 2], TensorSpec("x", "BF16", (2,))).tolist() == [0x3F80, 0x4000]


def test_arrays_of_strings_become_bytes():
    assert array_of(np.array([b"a", b"bc"]), TensorSpec("x", "BYTES", (2,))).tolist() == [b"a", b"bc"]
    assert array_of(np.array(["é"]), TensorSpec("x", "BYTES", (1,))).tolist() == ["é".encode()]


BAD_VALUES = [
    ("FP32", (2,), [1, 2, 3], "shape [3]"),
    ("FP32", (2,), 1, "shape []"),
    ("FP32", (2, 2), [[1, 2], [3]], "unequal length"),
    ("FP32", (2,), ["a", "b"], "something else than numbers"),
    ("FP32", (2,), [None, 1], "something else than numbers"),
    ("FP32", (2,), [True, False], "is bool and must be FP32"),
    ("INT8", (2,), [1, 200], "does not fit INT8"),
    ("UINT8", (1,), [-1], "does not fit UINT8"),
    ("INT64", (1,), [2**70], "does not fit INT64"),
    ("INT32", (1,), [1.5], "is float64 and must be INT32"),
    ("BOOL", (1,), [1], "is int64 and must be BOOL"),
    ("BYTES", (2, 2), [["a"], ["b", "c"]], "unequal length|shape"),
    ("BYTES", (1,), [3], "neither a text"),
    ("BYTES", (1,), ["\ud800"], "not UTF-8"),
    ("FP32", (2,), {"base64": "AAAAAAAAAAA"}, "not base64"),
    ("FP32", (2,), {"base64": "AAAAAAAA"}, "no number of FP32"),
    ("FP32", (2,), {"base64": "AAAAAA=="}, "do not make up"),
    ("FP32", (-1, -1), {"base64": "AAAAAA=="}, "do not make up"),
    ("FP32", (-1, -1), {"base64": "AAAAAA==", "shape": [2, 2]}, "its shape is"),
    ("FP32", (-1, -1), {"base64": "AAAAAA==", "shape": [-1, -1]}, "do not make up"),
    ("FP32", (2,), {"bytes": "AAAA"}, "neither a text"),
]


@pytest.mark.parametrize(("datatype", "shape", "value", "expected"), BAD_VALUES)
def test_values_that_do_not_fit_are_refused_with_the_reason(datatype, shape, value, expected):
    with pytest.raises(InvalidRequest) as caught:
        tensor_of(value, TensorSpec("x", datatype, shape))
    assert any(part in str(caught.value) for part in expected.split("|"))


# ---------------------------------------------------------------- what is wrong with files


BAD_FILES = {
    "not JSON": (b'{"inputs": {"x": [1, 2]}}\n{"inputs": ', "line 2 is not JSON"),
    "not UTF-8": (b'{"inputs": {"x": "\xff"}}', "line 1 is not JSON"),
    "nested too deep": (b"[" * 100_000, "line 1 is not JSON"),
    "no object": (b"[1, 2]", 'line 1 has no object "inputs"'),
    "no inputs": (b'{"x": [1, 2]}', 'line 1 has no object "inputs"'),
    "unknown input": (b'{"inputs": {"y": [1, 2]}}', "line 1: the model has no input 'y'; its inputs are x"),
    "missing input": (b'{"inputs": {}}', "line 1: input 'x' is missing"),
    "wrong shape": (b'{"inputs": {"x": [1, 2, 3]}}', "line 1: input 'x' has shape [3] and must have [2]"),
    "wrong datatype": (b'{"inputs": {"x": ["a", "b"]}}', "line 1: input 'x' is something else than numbers"),
    "bad label": (b'{"inputs": {"x": [1, 2]}, "label": [1]}', "line 1 has a label that is neither"),
    "empty": (b"", "it has no rows"),
    "blank": (b"\n \n", "it has no rows"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_line_is_refused_with_its_number(reader, tmp_path, name):
    content, expected = BAD_FILES[name]
    (tmp_path / "s.jsonl").write_bytes(content)
    with pytest.raises(InvalidRequest) as caught:
        list(reader.rows(tmp_path / "s.jsonl"))
    assert str(caught.value).startswith("cannot use the sample 's.jsonl': ")
    assert expected in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_a_line_or_picture_that_is_too_long_is_refused(reader, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "MAX_ITEM_BYTES", 64)
    write_lines(tmp_path / "s.jsonl", {"inputs": {"x": [1, 2]}}, {"inputs": {"x": [1] * 40}})
    with pytest.raises(InvalidRequest, match="line 2 is longer than 64 bytes"):
        list(reader.rows(tmp_path / "s.jsonl"))
    (tmp_path / "a.png").write_bytes(picture(1) + bytes(64))
    with pytest.raises(InvalidRequest, match="longer than 64 bytes"):
        list(reader_of("digits", PIXELS).rows(tmp_path / "a.png"))


@pytest.mark.parametrize("name", ["s.jsonl", "s.npz", "s.csv"])
def test_a_missing_file_is_refused(reader, tmp_path, name):
    with pytest.raises(InvalidRequest, match=r"cannot read the sample 's\.\w+': No such file"):
        list(reader.rows(tmp_path / name))


def test_a_file_of_another_kind_is_refused(reader, tmp_path):
    (tmp_path / "s.csv").write_text("1,2\n")
    with pytest.raises(InvalidRequest, match=r"it is none of \.jsonl, \.npz"):
        list(reader.rows(tmp_path / "s.csv"))


def test_an_empty_directory_has_no_rows(reader, tmp_path):
    (tmp_path / "s").mkdir()
    with pytest.raises(InvalidRequest, match="'s': it has no rows"):
        list(reader.rows(tmp_path / "s"))


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off", b"\x93NUMPY\x01\x00"])
def test_a_damaged_archive_is_refused(reader, tmp_path, content):
    (tmp_path / "s.npz").write_bytes(content)
    with pytest.raises(InvalidRequest, match=r"cannot read the sample 's\.npz'"):
        list(reader.rows(tmp_path / "s.npz"))


def test_an_archive_of_objects_is_refused_before_one_is_made(reader, tmp_path):
    np.savez(tmp_path / "s.npz", x=np.array([{}], dtype=object))
    with pytest.raises(InvalidRequest, match="holds objects"):
        list(reader.rows(tmp_path / "s.npz"))


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"y": np.zeros((1, 2))}, "row 0: the model has no input 'y'"),
        ({"x": np.zeros((1, 3))}, "row 0: input 'x' has shape [3] and must have [2]"),
        ({"x": np.zeros((1, 2), bool)}, "row 0: input 'x' is bool and must be FP32"),
        ({"x": np.zeros((1, 2)), "y": np.zeros((2, 2))}, "differ in their first dimension"),
        ({"x": np.float32(1)}, "differ in their first dimension"),
        ({"x": np.zeros((0, 2))}, "it has no rows"),
        ({}, "it has no rows"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(reader, tmp_path, arrays, expected):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(InvalidRequest) as caught:
        list(reader.rows(tmp_path / "s.npz"))
    assert expected in str(caught.value)


def test_an_undecodable_picture_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(InvalidRequest, match=r"'a\.png': it: cannot decode the image: it is neither PNG nor JPEG"):
        list(reader_of("digits", PIXELS).rows(tmp_path))


def test_a_text_that_is_not_utf_8_is_refused_with_its_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\nnot \xff fine\n")
    with pytest.raises(InvalidRequest, match=r"'a\.txt': line 2: cannot tokenise row 0: byte 4 is not UTF-8"):
        list(reader_of("language-id", TEXT).rows(tmp_path))


def test_an_input_given_twice_is_refused(tmp_path):
    path = write_lines(tmp_path / "s.jsonl", {"inputs": {"text": "a", "input_ids": [1]}})
    with pytest.raises(InvalidRequest, match="input 'input_ids' is given twice"):
        list(reader_of("language-id", TEXT).rows(path))


def test_the_manifests_own_sample_must_have_the_manifests_digest(tmp_path):
    path = write_lines(tmp_path / "s.jsonl", {"inputs": {"x": [1, 2]}})
    for digest, is_good in ((hashlib.sha256(path.read_bytes()).hexdigest(), True), ("0" * 64, False)):
        for field in ("evaluation", "calibration"):
            manifest = plain_manifest(samples={field: "s.jsonl", f"{field}_sha256": digest})
            reader = SampleReader([X], manifest, tmp_path, is_batched=True)
            if is_good:
                assert len(list(reader.rows(path))) == 1
            else:
                with pytest.raises(ArtifactCorrupt, match=r"cannot use 's\.jsonl': its sha256 is"):
                    list(reader.rows(path))
    other = write_lines(tmp_path / "other.jsonl", {"inputs": {"x": [1, 2]}})
    assert len(list(reader.rows(other))) == 1


# ---------------------------------------------------------------- batches


def test_batches_hold_rows_of_equal_shapes_and_no_more_than_asked(tmp_path):
    reader = SampleReader([TensorSpec("x", "FP32", (-1, -1))], plain_manifest(), tmp_path, is_batched=True)
    lengths = [1, 2, 1, 2, 2, 1, 3]
    path = write_lines(
        tmp_path / "s.jsonl", *({"inputs": {"x": [place] * length}} for place, length in enumerate(lengths))
    )
    found = list(batches(reader.rows(path), 2))
    assert [batch.places for batch in found] == [(0, 2), (1, 3), (4,), (5,), (6,)]
    for batch in found:
        assert batch.feeds["x"][:, 0].tolist() == list(batch.places)
        assert batch.feeds["x"].flags.c_contiguous
