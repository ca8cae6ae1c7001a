"""Outputs kept and compared."""

import errno
import hashlib
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from appliance.errors import ArtifactCorrupt, BackendError, InvalidRequest
from appliance.worker.comparing import compare
from appliance.worker.outputs import Outputs


def outputs(*rows, classes=None, dtype=np.float32):
    arrays = [np.array(row, dtype) for row in rows]
    digests = [hashlib.sha256(str(place).encode()).digest() for place in range(len(rows))]
    return Outputs(arrays, digests, classes or len(rows[0]), 8)


def compared(metric, variant, reference, labels=None):
    return compare(metric, variant, reference, labels, is_synthetic=False)


def test_accuracy_counts_labels_and_agreement_stands_beside_it():
    reference = outputs([1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0])
    variant = outputs([2, 0, 0], [0, 0, 5], [0, 0, 1], [0, 9, 0])
    found = compared("accuracy", variant, reference, [0, 1, 2, 1])
    assert (found.metric, found.value, found.reference, found.worst, found.count) == ("accuracy", 0.75, 0.75, 0.5, 4)
    assert found.loss == 0


def test_accuracy_without_labels_becomes_agreement():
    found = compared("accuracy", outputs([1, 0], [0, 1]), outputs([1, 0], [1, 0]))
    assert (found.metric, found.value, found.reference, found.worst) == ("agreement", 0.5, 1.0, 0.5)


def test_a_row_of_several_positions_agrees_where_all_do():
    reference = outputs([1, 0, 0, 1], [1, 0, 0, 1], classes=2)
    variant = outputs([2, 0, 0, 2], [2, 0, 2, 0], classes=2)
    assert compared("agreement", variant, reference).value == 0.5


def test_cosine_is_the_mean_and_the_worst():
    found = compared("cosine", outputs([1, 0], [3, 4]), outputs([2, 0], [4, 3]))
    assert found.value == pytest.approx((1 + 24 / 25) / 2)
    assert found.worst == pytest.approx(24 / 25)
    assert (found.reference, found.not_finite) == (1.0, 0)


def test_relative_l2_is_the_mean_and_the_worst():
    found = compared("relative-l2", outputs([1, 0], [3, 4.5]), outputs([1, 0], [3, 4]))
    assert found.value == pytest.approx(0.05)
    assert found.worst == pytest.approx(0.1)
    assert (found.reference, found.loss) == (0.0, found.value)


@pytest.mark.parametrize(
    ("variant", "reference", "cosine", "l2"),
    [([0, 0], [0, 0], 1, 0), ([1, 0], [0, 0], 0, 1), ([0, 0], [1, 0], 0, 1), ([1e30, 0], [1e30, 0], 1, 0)],
)
def test_zeros_and_large_numbers_divide_nothing_by_zero(variant, reference, cosine, l2):
    assert compared("cosine", outputs(variant), outputs(reference)).value == cosine
    assert compared("relative-l2", outputs(variant), outputs(reference)).value == l2


def test_rows_of_no_outputs_are_equal():
    assert compared("cosine", outputs([], classes=1), outputs([], classes=1)).value == 1
    assert compared("agreement", outputs([], classes=1), outputs([], classes=1)).value == 1


@pytest.mark.parametrize(("metric", "value"), [("cosine", 0.5), ("relative-l2", 0.5), ("agreement", 0.5)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_counted_and_is_the_worst_there_is(metric, value, bad):
    found = compared(metric, outputs([1, 0], [bad, 0]), outputs([1, 0], [1, 0]))
    assert (found.not_finite, found.value, found.count) == (1, value, 2)
    assert found.worst == {"cosine": 0, "relative-l2": 1, "agreement": 0.5}[metric]


@pytest.mark.parametrize("metric", ["cosine", "relative-l2", "agreement"])
def test_what_is_not_finite_in_the_reference_is_left_out(metric):
    """Such as a mask of minus infinities, which a lower precision writes as its own smallest number."""
    found = compared(metric, outputs([1, -3e38], [2, -np.inf]), outputs([1, -np.inf], [2, np.nan]))
    assert (found.not_finite, found.loss) == (0, 0)


def test_a_label_is_missed_by_a_row_that_is_not_finite():
    found = compared("accuracy", outputs([np.nan, 0]), outputs([1, 0]), [0])
    assert (found.value, found.reference, found.not_finite) == (0, 1, 1)


def test_a_reference_of_other_inputs_is_refused():
    one = outputs([1, 0], [0, 1])
    other = Outputs(one.rows, [bytes(32), bytes(32)], 2, 8)
    with pytest.raises(InvalidRequest, match="it was made with other inputs"):
        compared("cosine", one, other)
    with pytest.raises(InvalidRequest, match="it was made with other inputs"):
        compared("cosine", one, outputs([1, 0]))


def test_a_reference_may_have_more_rows():
    assert compared("cosine", outputs([1, 0]), outputs([1, 0], [5, 6])).count == 1


def test_outputs_of_another_size_are_refused():
    with pytest.raises(BackendError, match="row 1 has 3 outputs in 2 classes, the reference 2"):
        compared("cosine", outputs([1, 0], [1, 2, 3]), outputs([1, 0], [0, 1]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_outputs_of_any_length_come_back_as_they_were_saved(tmp_path, dtype):
    saved = outputs([1.25, 2], [], [3], classes=1, dtype=dtype)
    saved.save(tmp_path / "reference.bin")
    found = Outputs.read(tmp_path / "reference.bin")
    assert [row.tolist() for row in found.rows] == [[1.25, 2], [], [3]]
    assert {row.dtype for row in found.rows} == {np.dtype(dtype)}
    assert (found.inputs, found.classes, found.length) == (saved.inputs, 1, 8)


@pytest.mark.parametrize("is_there", [False, True])
def test_a_reference_that_cannot_be_written_in_full_leaves_what_was_there(tmp_path, monkeypatch, is_there):
    path = tmp_path / "r.npz"
    if is_there:
        outputs([1, 2]).save(path)
    before = [(one.name, one.read_bytes()) for one in tmp_path.iterdir()]

    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        outputs([3, 4]).save(path)
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == before


SAVE_AND_DIE = """
import os, signal, sys
from pathlib import Path
import numpy as np
from appliance.worker.outputs import Outputs
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
Outputs([np.ones(1000, np.float32)], [bytes(32)], 1, 8).save(Path(sys.argv[1]))
"""


def test_a_kill_while_a_reference_is_written_leaves_nothing_under_its_name(tmp_path):
    path = tmp_path / "r.npz"
    for _ in range(2):
        ended = subprocess.run([sys.executable, "-c", SAVE_AND_DIE, str(path)], check=False)
        assert ended.returncode == -signal.SIGKILL
        assert [one.name for one in tmp_path.iterdir()] == [".r.npz.part"], "one, however often"
    outputs([1, 2]).save(path)
    assert [one.name for one in tmp_path.iterdir()] == ["r.npz"]
    assert [row.tolist() for row in Outputs.read(path).rows] == [[1, 2]]


def test_a_missing_reference_is_refused(tmp_path):
    with pytest.raises(InvalidRequest, match="No such file"):
        Outputs.read(tmp_path / "r.npz")


def test_a_damaged_reference_is_refused(tmp_path):
    path = tmp_path / "r.npz"
    outputs([1, 2], [3, 4]).save(path)
    content = path.read_bytes()
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(ArtifactCorrupt):
            Outputs.read(path)


GOOD = {
    "values": np.zeros(3, np.float32), "offsets": np.array([0, 3]), "inputs": np.zeros((1, 32), np.uint8),
    "fixed": np.array([3, 8]),
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"offsets": np.array([0, 4])},
        {"offsets": np.array([1, 3])},
        {"offsets": np.array([0, 5, 3])},
        {"offsets": np.array([[0, 3]])},
        {"offsets": np.array(3)},
        {"offsets": np.array(["a", "b"])},
        {"inputs": np.zeros((1, 31), np.uint8)},
        {"inputs": np.zeros((2, 32), np.uint8)},
        {"values": np.zeros((3, 1), np.float32)},
        {"values": np.array(["a", "b", "c"])},
        {"fixed": np.array([1])},
        {"fixed": np.array(["a", "b"])},
        {"values": None},
        {"values": np.array([{}, {}, {}], dtype=object)},
    ],
)
def test_a_reference_whose_parts_do_not_belong_together_is_refused(tmp_path, change):
    np.savez(tmp_path / "r.npz", **{name: array for name, array in {**GOOD, **change}.items() if array is not None})
    with pytest.raises(ArtifactCorrupt):
        Outputs.read(tmp_path / "r.npz")
