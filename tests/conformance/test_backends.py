"""What every backend must do: the same facts for each installed entry point that reads ONNX or OpenVINO IR.

An out-of-tree backend is tested by installing it beside these. What a runtime cannot do it must refuse at load; a wrong
answer is never accepted.
"""

import fcntl
import mmap
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import numpy as np
import pytest
from onnx import TensorProto, checker, helper, numpy_helper

from appliance.backend import ENTRY_POINT_GROUP, PRECISIONS, Artifact, Backend, Execution, Session, Variant
from appliance.inventory.cpu import read_inventory
from appliance.types import TensorSpec

INVENTORY = read_inventory()
POINTS = {point.name: point for point in metadata.entry_points(group=ENTRY_POINT_GROUP)}
#: A plugin of another vendor's format has nothing to load here.
READABLE = ("onnx", "openvino-ir")

CODES = {
    "BOOL": TensorProto.BOOL, "UINT8": TensorProto.UINT8, "UINT16": TensorProto.UINT16, "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64, "INT8": TensorProto.INT8, "INT16": TensorProto.INT16, "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64, "FP16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16, "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE, "BYTES": TensorProto.STRING,
}  # fmt: skip
NUMPY = {
    "BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
    "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64,
    "FP16": np.float16, "BF16": np.uint16, "FP32": np.float32, "FP64": np.float64, "BYTES": object,
}  # fmt: skip
#: Every backend must serve at least these.
COMMON = ("BOOL", "UINT8", "INT8", "INT32", "INT64", "FP16", "FP32")


def _offers():
    for name, point in sorted(POINTS.items()):
        for format_ in sorted(point.load()().formats.intersection(READABLE)):
            yield pytest.param((name, format_), id=f"{name}-{format_}")


@pytest.fixture(params=_offers())
def offer(request):
    name, format_ = request.param
    backend = POINTS[name].load()()
    if not backend.probe(INVENTORY).devices:
        pytest.skip(f"{name}: {backend.probe(INVENTORY).reason}")
    return backend, format_


def writer(format_, directory):
    """Writes a graph in a format."""

    def write_model(nodes, inputs, outputs, initializers=(), opset=17):
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info(name, CODES[datatype], shape) for name, datatype, shape in inputs],
            [helper.make_tensor_value_info(name, CODES[datatype], shape) for name, datatype, shape in outputs],
            list(initializers),
        )
        ir_version = 9 if opset == 17 else 10
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
        checker.check_model(model)
        path = directory / "model.onnx"
        path.write_bytes(model.SerializeToString())
        if format_ == "onnx":
            return path
        import openvino

        openvino.save_model(openvino.Core().read_model(path), directory / "model.xml", compress_to_fp16=False)
        return directory / "model.xml"

    return write_model


@pytest.fixture
def write(offer, tmp_path):
    """Writes a graph in the offer's format."""
    return writer(offer[1], tmp_path)


@pytest.fixture
def load(offer):
    """Loads with the backend's first choice, or a variant made from it; sessions end with the test."""
    backend, format_ = offer
    sessions = []

    def load_path(path, precision=None, **options):
        artifact = Artifact(path, format_)
        first = backend.candidates(artifact, INVENTORY.devices[0])[0]
        variant = Variant(first.backend, first.device, precision or first.precision, {**first.options, **options})
        sessions.append(backend.load(artifact, variant))
        return sessions[-1]

    yield load_path
    for session in sessions:
        session.close()


def identity(name="x", target="y"):
    return helper.make_node("Identity", [name], [target])


def samples(datatype, shape=(2, 3)):
    random = np.random.default_rng(5)
    dtype = NUMPY[datatype]
    if datatype == "BYTES":
        array = np.empty(shape, object)
        array.reshape(-1)[:] = [b"", b"a\0b\0", "grüß".encode(), b"x" * 100, b"\0", b"y"][: array.size]
        return array
    if datatype == "BF16":
        return (random.standard_normal(shape, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
    array = np.zeros(shape, dtype)
    if np.issubdtype(dtype, np.floating):
        array = random.standard_normal(shape).astype(dtype)
        array.reshape(-1)[:4] = [np.nan, np.inf, -np.inf, np.finfo(dtype).max]
    elif dtype is np.bool_:
        array.reshape(-1)[::2] = True
    else:
        # 32 bits where the type has more: beyond that a backend may refuse, which has a test of its own
        bounds = np.iinfo(np.int32 if datatype == "INT64" else dtype)
        array.reshape(-1)[:2] = [bounds.min, bounds.max]
    return array


def test_a_backend_says_what_it_is(offer):
    backend, format_ = offer
    assert isinstance(backend, Backend)
    assert POINTS[backend.name].load() is type(backend)
    support = backend.probe(INVENTORY)
    assert support.runtime.strip()
    assert support.reason == ""
    for device in support.devices:
        candidates = backend.candidates(Artifact(path=None, format=format_), INVENTORY.device(device))
        assert candidates[0].precision == "FP32" or INVENTORY.device(device).kind == "npu"
        assert {(one.backend, one.device) for one in candidates} == {(backend.name, device)}
        assert len({(one.precision, tuple(one.options.items())) for one in candidates}) == len(candidates)


def test_nothing_is_offered_for_foreign_formats(offer):
    backend, _ = offer
    assert list(backend.candidates(Artifact(path=None, format="no-such-format"), INVENTORY.devices[0])) == []


@pytest.mark.parametrize("datatype", CODES)
def test_identity_is_exact_in_every_datatype_or_refused_at_load(write, load, datatype):
    path = write([identity()], [("x", datatype, ["N", 3])], [("y", datatype, ["N", 3])])
    try:
        session = load(path)
    except Exception as error:
        if datatype in COMMON:
            raise
        pytest.skip(f"refused: {error}")
    assert isinstance(session, Session)
    assert list(session.inputs) == [TensorSpec("x", datatype, (-1, 3))]
    assert list(session.outputs) == [TensorSpec("y", datatype, (-1, 3))]
    array = samples(datatype)
    result = session.run({"x": array}, ["y"])["y"]
    assert result.dtype == array.dtype
    assert result.shape == array.shape
    if datatype == "BYTES":
        assert result.tolist() == array.tolist()
    else:
        assert np.array_equal(result, array, equal_nan=datatype.startswith("FP"))


def test_integers_beyond_32_bits_are_exact_or_refused(write, load):
    path = write([identity()], [("x", "INT64", ["N", 2])], [("y", "INT64", ["N", 2])])
    session = load(path)
    for values in ([2**40 + 1, 1], [0, -(2**40) - 1]):
        array = np.array([values], np.int64)
        try:
            result = session.run({"x": array}, ["y"])["y"]
        except ValueError as error:
            assert "32 bits" in str(error)  # noqa: PT017 - exact is as good as refused
        else:
            np.testing.assert_array_equal(result, array)
    small = np.array([[1, 2]], np.int64)
    np.testing.assert_array_equal(session.run({"x": small}, ["y"])["y"], small)


@pytest.mark.parametrize(
    ("declared", "actual"),
    [
        ([], ()),
        ([4], (4,)),
        (["N", 4], (0, 4)),
        (["N", "M"], (3, 5)),
        ([1, 2, 3, 4, 5], (1, 2, 3, 4, 5)),
        (["N", 0], (2, 0)),
    ],
)
def test_shapes(write, load, declared, actual):
    path = write([identity()], [("x", "FP32", declared)], [("y", "FP32", declared)])
    session = load(path)
    expected = tuple(-1 if isinstance(size, str) else size for size in declared)
    assert session.inputs[0].shape == expected
    assert session.outputs[0].shape == expected
    array = np.random.default_rng(1).standard_normal(actual).astype(np.float32).reshape(actual)
    result = session.run({"x": array}, ["y"])["y"]
    assert result.shape == actual
    np.testing.assert_array_equal(result, array)


@pytest.fixture
def dense(write):
    random = np.random.default_rng(2)
    weights = random.standard_normal((32, 8)).astype(np.float32)
    path = write(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Tanh", ["h"], ["y"])],
        [("x", "FP32", ["N", 32])],
        [("y", "FP32", ["N", 8])],
        [helper.make_tensor("w", TensorProto.FLOAT, weights.shape, weights.reshape(-1).tolist())],
    )
    return path, lambda x: np.tanh(x @ weights)


def test_rows_do_not_depend_on_their_batch(dense, load):
    path, reference = dense
    session = load(path)
    batch = np.random.default_rng(3).standard_normal((16, 32)).astype(np.float32)
    together = np.array(session.run({"x": batch}, ["y"])["y"])
    np.testing.assert_allclose(together, reference(batch), rtol=1e-4, atol=1e-5)
    for row in range(16):
        alone = session.run({"x": batch[row : row + 1].copy()}, ["y"])["y"]
        np.testing.assert_allclose(alone[0], together[row], rtol=1e-4, atol=1e-5)


def test_the_same_array_is_read_anew_at_every_run(dense, load):
    """The daemon overwrites one shared slab and runs again."""
    path, reference = dense
    session = load(path)
    array = np.zeros((2, 32), np.float32)
    for seed in range(5):
        array[...] = np.random.default_rng(seed).standard_normal(array.shape)
        np.testing.assert_allclose(session.run({"x": array}, ["y"])["y"], reference(array), rtol=1e-4, atol=1e-5)


def test_arrays_on_shared_memory_are_read_and_left_as_they_are(dense, load):
    path, reference = dense
    session = load(path)
    fd = os.memfd_create("slab", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    slab = np.frombuffer(mmap.mmap(fd, 4096), np.float32)
    os.close(fd)
    for start in (0, 16, 1):  # elements: aligned for vectors, and not
        array = slab[start : start + 64].reshape(2, 32)
        array[...] = np.random.default_rng(start).standard_normal((2, 32))
        before = array.copy()
        np.testing.assert_allclose(session.run({"x": array}, ["y"])["y"], reference(before), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(array, before)


def test_several_inputs_and_outputs_keep_their_order_and_names(write, load):
    path = write(
        [
            helper.make_node("Add", ["z", "a"], ["sum"]),
            helper.make_node("Sub", ["z", "a"], ["difference"]),
            helper.make_node("Cast", ["m"], ["also"], to=TensorProto.INT32),
        ],
        [("z", "FP32", ["N", 4]), ("a", "FP32", ["N", 4]), ("m", "INT64", ["N"])],
        [("sum", "FP32", ["N", 4]), ("difference", "FP32", ["N", 4]), ("also", "INT32", ["N"])],
    )
    session = load(path)
    assert [spec.name for spec in session.inputs] == ["z", "a", "m"]
    assert [spec.name for spec in session.outputs] == ["sum", "difference", "also"]
    z, a, m = np.full((2, 4), 5, np.float32), np.full((2, 4), 2, np.float32), np.array([7, 8])
    feeds = {"m": m, "a": a, "z": z}
    results = session.run(feeds, ["also", "sum"])
    np.testing.assert_array_equal(results["sum"], 7)
    np.testing.assert_array_equal(results["also"], [7, 8])
    np.testing.assert_array_equal(session.run(feeds, ["difference"])["difference"], 3)


def test_an_output_whose_shape_depends_on_values(write, load):
    path = write([helper.make_node("NonZero", ["x"], ["y"])], [("x", "FP32", ["N"])], [("y", "INT64", [1, "K"])])
    session = load(path)
    for values, expected in (([0, 1, 1], [[1, 2]]), ([0, 0, 0], [[]]), ([1, 0, 0], [[0]])):
        result = session.run({"x": np.array(values, np.float32)}, ["y"])["y"]
        np.testing.assert_array_equal(result, np.array(expected).reshape(1, -1))


def test_a_run_that_fails_raises_and_the_next_one_works(write, load):
    path = write(
        [helper.make_node("Reshape", ["x", "s"], ["y"])],
        [("x", "FP32", ["N"])],
        [("y", "FP32", ["M", 4])],
        [helper.make_tensor("s", TensorProto.INT64, [2], [-1, 4])],
    )
    session = load(path)
    with pytest.raises(Exception, match=r"."):
        session.run({"x": np.zeros(7, np.float32)}, ["y"])
    assert session.run({"x": np.zeros(8, np.float32)}, ["y"])["y"].shape == (2, 4)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_an_error_at_load(dense, load, share):
    path, _ = dense
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(Exception, match=r"."):
        load(path)


def test_truncated_weights_are_an_error_at_load(offer, dense, load):
    if offer[1] != "openvino-ir":
        pytest.skip("the format keeps its weights in the same file")
    path, _ = dense
    weights = path.with_suffix(".bin")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(Exception, match=r"."):
        load(path)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_bytes_are_an_error_at_load(dense, load, seed):
    path, _ = dense
    path.write_bytes(np.random.default_rng(seed).bytes(5000))
    with pytest.raises(Exception, match=r"."):
        load(path)


def test_a_missing_file_is_an_error_at_load(dense, load, tmp_path):
    with pytest.raises(Exception, match=r"."):
        load(tmp_path / f"nowhere{dense[0].suffix}")


def test_an_unknown_operator_is_an_error_at_load(offer, load, tmp_path):
    if offer[1] != "onnx":
        pytest.skip("such a model cannot be converted")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Teleport", ["x"], ["y"])], "g", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(Exception, match="Teleport"):
        load(tmp_path / "model.onnx")


OUTSIDE = ["../secret.bin", "a/../../secret.bin", "{outside}/secret.bin", "link.bin", "linked/secret.bin"]


@pytest.fixture
def write_external(offer, tmp_path):
    """Writes an ONNX model whose weights lie in another file, with all that a hostile one may name beside it."""
    if offer[1] != "onnx":
        pytest.skip("the format names no files")
    outside, inside = tmp_path / "outside", tmp_path / "outside" / "model"
    (inside / "a").mkdir(parents=True)
    for directory, name in ((outside, "secret.bin"), (inside, "own.bin")):
        (directory / name).write_bytes(np.arange(4, dtype=np.float32).tobytes())
    (inside / "link.bin").symlink_to(outside / "secret.bin")
    (inside / "linked").symlink_to(outside)

    def write_model(location, **keys):
        weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
        for key, value in {"location": location.format(outside=outside), **keys}.items():
            weights.external_data.add(key=key, value=value)
        value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
        graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", value[:1], value[1:], [weights])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        (inside / "model.onnx").write_bytes(model.SerializeToString())
        return inside / "model.onnx"

    return write_model


def test_external_weights_beside_the_model_are_read(write_external, load):
    """The control of the refusals below."""
    session = load(write_external("own.bin"))
    result = session.run({"x": np.zeros(4, np.float32)}, ["y"])["y"]
    np.testing.assert_array_equal(result, [0, 1, 2, 3])


@pytest.mark.parametrize("location", OUTSIDE)
def test_external_weights_outside_the_models_directory_are_refused(write_external, load, location):
    """ONNX lets a model name any file as its weights; a hostile model must not read another's."""
    path = write_external(location)
    with pytest.raises(Exception, match=r"."):
        load(path)


@pytest.mark.parametrize("keys", [{"offset": "-16"}, {"offset": "8"}, {"length": "4096"}, {"length": str(2**50)}])
def test_external_weights_beyond_their_file_are_refused(write_external, load, keys):
    path = write_external("own.bin", **keys)
    with pytest.raises(Exception, match=r"."):
        load(path)


def test_unknown_options_and_precisions_are_refused(dense, load):
    path, _ = dense
    for arguments in ({"no_such_option": "1"}, {"threads": "many"}, {"threads": "0"}, {"precision": "FP1"}):
        with pytest.raises(ValueError, match=r"option|precision"):
            load(path, **arguments)


def test_threads_are_an_option(dense, load):
    path, reference = dense
    array = np.ones((1, 32), np.float32)
    for threads in ("1", "2"):
        session = load(path, threads=threads)
        np.testing.assert_allclose(session.run({"x": array}, ["y"])["y"], reference(array), rtol=1e-4, atol=1e-5)
        assert f"threads={threads}" in session.executed_on().detail


WEIGHTS = (np.random.default_rng(6).standard_normal((32, 8)) / np.sqrt(32)).astype(np.float32)
#: What a result in (-1, 1) may be off by, by the precision of weights or computation that is the coarser. Weights in
#: integers count as what they stand for, so what is left is how a runtime rounds on the way.
TOLERANCES = {"FP32": 1e-4, "FP16": 5e-3, "BF16": 0.03, "INT8-WEIGHTS": 0.03, "INT4-WEIGHTS": 0.03, "INT8": 0.05}
FINEST_FIRST = tuple(TOLERANCES)


def quantised(array, bits):
    """Integers, symmetric, and their scales: one for each column."""
    scales = (np.abs(array).max(axis=0) / (2 ** (bits - 1) - 1)).astype(np.float32)
    return np.round(array / scales), scales


def cast_initializer(precision):
    if precision == "FP16":
        return numpy_helper.from_array(WEIGHTS.astype(np.float16), "w")
    raw = (WEIGHTS.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return helper.make_tensor("w", TensorProto.BFLOAT16, WEIGHTS.shape, raw, raw=True)


def stored_in(precision):
    """Nodes from ``x`` to ``h`` = x W and initializers, with W stored in `precision`, and what W is then."""
    product = helper.make_node("MatMul", ["x", "w"], ["h"])
    if precision == "FP32":
        return [product], [numpy_helper.from_array(WEIGHTS, "w")], WEIGHTS
    if precision == "FP16":
        return (
            [
                helper.make_node("Cast", ["x"], ["x16"], to=TensorProto.FLOAT16),
                helper.make_node("MatMul", ["x16", "w"], ["h16"]),
                helper.make_node("Cast", ["h16"], ["h"], to=TensorProto.FLOAT),
            ],
            [cast_initializer("FP16")],
            WEIGHTS,
        )
    if precision == "BF16":
        cast = helper.make_node("Cast", ["w"], ["w32"], to=TensorProto.FLOAT)
        return [cast, helper.make_node("MatMul", ["x", "w32"], ["h"])], [cast_initializer("BF16")], WEIGHTS
    bits = 4 if precision == "INT4-WEIGHTS" else 8
    integers, scales = quantised(WEIGHTS, bits)
    code = TensorProto.INT4 if bits == 4 else TensorProto.INT8
    initializers = [
        helper.make_tensor("q", code, WEIGHTS.shape, integers.astype(int).reshape(-1).tolist()),
        numpy_helper.from_array(scales, "scales"),
    ]
    nodes = [helper.make_node("DequantizeLinear", ["q", "scales"], ["w"], axis=1)]
    if precision != "INT8":
        return [*nodes, product], initializers, integers * scales
    initializers += [numpy_helper.from_array(np.float32(8 / 255), "s"), numpy_helper.from_array(np.uint8(128), "z")]
    nodes += [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("MatMul", ["xd", "w"], ["h"]),
    ]
    return nodes, initializers, integers * scales


def _variants():
    for name, point in sorted(POINTS.items()):
        backend = point.load()()
        devices = backend.probe(INVENTORY).devices
        for format_ in sorted(backend.formats.intersection(READABLE)):
            for precision in PRECISIONS:
                for device in devices:
                    for variant in backend.candidates(Artifact(None, format_, precision), INVENTORY.device(device)):
                        options = ",".join(f"{key}={value}" for key, value in variant.options.items() if value)
                        parts = (name, format_, precision, device, variant.precision, options)
                        yield pytest.param((backend, format_, precision, variant), id="-".join(filter(None, parts)))


@pytest.mark.parametrize("case", list(_variants()))
def test_every_offer_answers_rightly_and_proves_where_and_how_precisely_it_runs(case, tmp_path):
    backend, format_, precision, variant = case
    nodes, initializers, weights = stored_in(precision)
    path = writer(format_, tmp_path)(
        [*nodes, helper.make_node("Tanh", ["h"], ["y"])],
        [("x", "FP32", ["N", 32])],
        [("y", "FP32", ["N", 8])],
        initializers,
        opset=21 if precision == "INT4-WEIGHTS" else 17,
    )
    session = backend.load(Artifact(path, format_, precision), variant)
    tolerance = TOLERANCES[max(precision, variant.precision, *floats_of(variant), key=FINEST_FIRST.index)]
    for rows in (4, 1, 4):
        array = np.random.default_rng(rows).standard_normal((rows, 32)).astype(np.float32)
        expected = np.tanh(array @ weights)
        deadline = time.monotonic() + 30
        while True:
            result = session.run({"x": array}, ["y"])["y"]
            assert result.dtype == np.float32
            np.testing.assert_allclose(result, expected, atol=tolerance)
            if getattr(session, "is_settled", True):
                break
            assert time.monotonic() < deadline, "the session settles"
        np.testing.assert_allclose(session.run({"x": array}, ["y"])["y"], expected, atol=tolerance)
    execution = session.executed_on()
    assert isinstance(execution, Execution)
    assert (execution.device, execution.precision) == (variant.device, variant.precision)
    assert execution.provider
    assert execution.reason == ""
    session.close()


def _split_variants():
    """The offers for FP32 that take several runs at a time."""
    for parameter in _variants():
        _, _, precision, variant = parameter.values[0]
        if precision == "FP32" and "streams" in variant.options:
            yield parameter


@pytest.mark.parametrize("case", list(_split_variants()))
def test_runs_at_the_same_time_answer_rightly_and_leave_each_others_outputs_alone(case, tmp_path):
    """In rounds: all threads run batches of different sizes, then all but one run again while that one looks."""
    backend, format_, precision, variant = case
    path = writer(format_, tmp_path)(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Tanh", ["h"], ["y"])],
        [("x", "FP32", ["N", 32])],
        [("y", "FP32", ["N", 8])],
        [numpy_helper.from_array(WEIGHTS, "w")],
    )
    session = backend.load(Artifact(path, format_, precision), variant)
    streams = session.streams
    assert streams == int(variant.options["streams"])
    together = threading.Barrier(streams, timeout=60)

    def run_in_rounds(own):
        random = np.random.default_rng(own)
        for number in range(6 * streams):
            x = random.standard_normal((1 + (own + number) % 5, 32)).astype(np.float32)
            result = session.run({"x": x}, ["y"])["y"]
            together.wait()
            if number % streams != own:
                other = random.standard_normal((1 + number % 5, 32)).astype(np.float32)
                np.testing.assert_allclose(
                    session.run({"x": other}, ["y"])["y"], np.tanh(other @ WEIGHTS), atol=TOLERANCES[variant.precision]
                )
            together.wait()
            if number % streams == own:
                np.testing.assert_allclose(result, np.tanh(x @ WEIGHTS), atol=TOLERANCES[variant.precision])

    with ThreadPoolExecutor(streams) as threads:
        for ended in [threads.submit(run_in_rounds, own) for own in range(streams)]:
            try:
                ended.result()
            except BaseException:
                together.abort()  # the others wait for this one
                raise
    assert f"streams={streams}" in session.executed_on().detail
    session.close()


@pytest.mark.parametrize("case", list(_split_variants()))
def test_a_run_that_fails_fails_no_other_that_goes_on(case, tmp_path):
    backend, format_, precision, variant = case
    path = writer(format_, tmp_path)(
        [helper.make_node("Reshape", ["x", "s"], ["y"])],
        [("x", "FP32", ["N"])],
        [("y", "FP32", ["M", 4])],
        [helper.make_tensor("s", TensorProto.INT64, [2], [-1, 4])],
    )
    session = backend.load(Artifact(path, format_, precision), variant)

    def answers(length):
        try:
            return [session.run({"x": np.full(length, 1.0, np.float32)}, ["y"])["y"].shape for _ in range(200)]
        except Exception:
            return None

    with ThreadPoolExecutor(2) as threads:
        bad, good = threads.submit(lambda: [answers(7) for _ in range(200)]), threads.submit(answers, 8)
        assert good.result() == [(2, 4)] * 200
        assert bad.result() == [None] * 200
    session.close()


def floats_of(variant):
    """What a quantised model leaves in floating point."""
    words = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}
    return [words[value] for name, value in variant.options.items() if name == "float"]


def test_options_of_two_offers_differ(offer):
    backend, format_ = offer
    for precision in PRECISIONS:
        offered = backend.candidates(Artifact(None, format_, precision), INVENTORY.devices[0])
        assert len({(one.precision, tuple(sorted(one.options.items()))) for one in offered}) == len(offered)


def test_two_sessions_side_by_side_do_not_disturb_each_other(dense, load):
    path, reference = dense
    first, second = load(path), load(path)
    one, two = np.ones((1, 32), np.float32), np.full((3, 32), 0.5, np.float32)
    kept = np.array(first.run({"x": one}, ["y"])["y"])
    second.run({"x": two}, ["y"])
    np.testing.assert_allclose(kept, reference(one), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(first.run({"x": one}, ["y"])["y"], kept)
