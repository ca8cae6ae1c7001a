"""Images in, labels out."""

import io
import struct
import zlib

import numpy as np
import pytest
import worker_harness as harness
from PIL import Image

from appliance.errors import InvalidManifest
from appliance.manifest import ClassificationSection, ImageSection
from appliance.types import TensorSpec
from appliance.wire import worker as wire
from appliance.wire import worker_pb2
from appliance.worker.classification import Classifier, read_labels
from appliance.worker.image import Decoder, UndecodableImage

SIZE = (4, 4)


def png(image, **options):
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def decode(content, **section):
    decoder = Decoder(ImageSection(tensor="x", **{"width": SIZE[0], "height": SIZE[1], "scale": 1.0, **section}))
    row = np.full(decoder.shape, np.nan, np.float32)
    decoder.decode(content, row)
    return row


def grey(value=100, size=SIZE):
    return Image.new("L", size, value)


def test_layouts_channels_scale_mean_and_std():
    image = Image.new("RGB", SIZE, (10, 20, 30))
    row = decode(png(image), layout="NCHW", scale=0.5, mean=[1.0, 2.0, 3.0], std=[2.0, 4.0, 8.0])
    assert row.shape == (3, 4, 4)
    np.testing.assert_allclose(row[:, 0, 0], [(5 - 1) / 2, (10 - 2) / 4, (15 - 3) / 8])
    row = decode(png(image), layout="NHWC", mean=[1.0])
    assert row.shape == (4, 4, 3)
    np.testing.assert_allclose(row[0, 0], [9, 19, 29])


def test_pixels_keep_their_places():
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    row = decode(png(Image.fromarray(pixels)), channels=1)
    np.testing.assert_array_equal(row[0], pixels)


def test_grey_becomes_colour_and_colour_becomes_grey():
    np.testing.assert_array_equal(decode(png(grey(7)), channels=3), 7)
    np.testing.assert_array_equal(decode(png(Image.new("RGB", SIZE, (50, 50, 50))), channels=1), 50)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_flattened_onto_white(mode):
    transparent = Image.new("RGBA", SIZE, (0, 0, 0, 0)).convert(mode)
    np.testing.assert_array_equal(decode(png(transparent)), 255)
    half = Image.new("RGBA", SIZE, (0, 0, 0, 128)).convert(mode)
    np.testing.assert_allclose(decode(png(half)), 127, atol=1)


def test_a_palette_with_a_transparent_colour():
    image = Image.new("P", SIZE, 1)
    image.putpalette([0, 0, 0, 200, 10, 20])
    np.testing.assert_array_equal(decode(png(image))[:, 0, 0], [200, 10, 20])
    np.testing.assert_array_equal(decode(png(image, transparency=1)), 255)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    image = Image.fromarray(np.full((4, 4), 32896, np.uint16))
    np.testing.assert_array_equal(decode(png(image), channels=1), 128)
    image = Image.fromarray(np.full((4, 4), 65535, np.uint16))
    np.testing.assert_array_equal(decode(png(image), channels=3), 255)


def test_one_bit_images():
    np.testing.assert_array_equal(decode(png(Image.new("1", SIZE, 1)), channels=1), 255)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg(mode):
    file = io.BytesIO()
    grey(100).convert(mode).save(file, "JPEG")
    np.testing.assert_allclose(decode(file.getvalue()), 100, atol=2)


@pytest.mark.parametrize("resize", ["nearest", "bilinear", "bicubic"])
def test_other_sizes_are_resized(resize):
    np.testing.assert_array_equal(decode(png(grey(9, (31, 17))), resize=resize, channels=1), 9)


def bomb(width, height):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def gif():
    file = io.BytesIO()
    grey().save(file, "GIF")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "neither PNG nor JPEG"),
        (b"hello", "neither PNG nor JPEG"),
        (gif(), "neither PNG nor JPEG"),
        (bomb(40000, 40000), "40000 x 40000 pixels"),
        (bomb(100, 100), "damaged or truncated"),
        (png(grey(size=(64, 64)))[:-30], "damaged or truncated"),
        (png(grey())[:20], ""),
    ],
)
def test_pictures_that_cannot_be_used_say_why(content, words):
    with pytest.raises(UndecodableImage, match="cannot decode the image") as caught:
        decode(content)
    assert words in str(caught.value)


def test_random_damage_never_raises_anything_else():
    random = np.random.default_rng(3)
    file = io.BytesIO()
    Image.fromarray(random.integers(0, 255, (32, 32, 3), np.uint8)).save(file, "JPEG")
    for content in (file.getvalue(), png(Image.fromarray(random.integers(0, 255, (32, 32, 3), np.uint8)))):
        for _ in range(100):
            damaged = bytearray(content)
            for position in random.integers(0, len(content), 5):
                damaged[position] = random.integers(0, 256)
            try:
                decode(bytes(damaged))
            except UndecodableImage as error:
                assert str(error).startswith("cannot decode the image")  # noqa: PT017 - damage is not always noticed


MANIFEST = {
    "max_batch_size": 8,
    "image": {"tensor": "x", "width": 4, "height": 4, "channels": 1, "scale": 1.0},
}
SPECS = {"inputs": [["x", "FP32", [-1, 1, 4, 4]]], "outputs": [["y", "FP32", [-1, 1, 4, 4]]]}


def send_pictures(worker, contents, batch=1, shape=None):
    worker.send_run(
        worker.place([(1, "BYTES", shape or (len(contents), 1), harness.elements(*contents))]), len(contents), batch
    )


def test_the_worker_decodes_rows_and_reports_those_it_cannot(fake):
    worker = fake(MANIFEST, **SPECS)
    assert [(spec.name, spec.datatype, list(spec.shape)) for spec in worker.loaded.edge_inputs] == [
        ("image", "BYTES", [-1, 1])
    ]
    for _ in range(2):
        send_pictures(worker, [png(grey(1)), b"junk", png(grey(3)), bomb(9000, 9000)])
        done = worker.answer()
        np.testing.assert_array_equal(done.array(0)[:, 0, 0, 0], [1, 0, 3, 0])
        assert sorted(done.row_errors) == [1, 3]
        assert "neither PNG nor JPEG" in done.row_errors[1]
        assert done.durations[0] > 0
    send_pictures(worker, [png(grey(5))], shape=(1,))
    done = worker.answer()
    np.testing.assert_array_equal(done.array(0), np.full((1, 1, 4, 4), 5, np.float32))
    assert done.row_errors == {}


def test_a_tensor_may_come_in_place_of_the_picture_but_not_beside_it(fake):
    worker = fake(MANIFEST, **SPECS)
    array = np.full((1, 1, 4, 4), 2, np.float32)
    np.testing.assert_array_equal(worker.run_array(array).array(0), array)
    both = [(0, "FP32", array.shape, array.tobytes()), (1, "BYTES", (1, 1), harness.elements(png(grey())))]
    assert "comes twice" in worker.run(both, rows=1).text


def test_pictures_pings_and_faults_are_answered_in_the_order_they_came(fake):
    worker = fake(MANIFEST, **SPECS, c_us=2000)
    expected = []
    for number in range(12):
        if number % 3 == 0:
            send_pictures(worker, [png(grey(number))], batch=number)
            expected.append(number)
        elif number % 3 == 1:
            worker.send_run([wire.TensorLayout(1, "BYTES", (1, 1), 0, 0, 2)], 1, batch=number)
            expected.append(number)
        else:
            worker.socket.send(bytes([wire.Kind.PING]))
            expected.append("pong")
    answers = []
    for _ in range(12):
        packet, _ = worker.receive()
        if packet[0] == wire.Kind.PONG:
            answers.append("pong")
        else:
            assert packet[0] in (wire.Kind.DONE, wire.Kind.FAULT)
            answers.append(struct.unpack_from("<Q", packet, 8)[0])
    assert answers == expected


def test_each_stream_decodes_the_pictures_of_its_own_batch(fake, tmp_path, monkeypatch):
    """One batch runs as long as it is told to, while others of many rows, of one and of bytes that lie are answered."""
    monkeypatch.syspath_prepend(str(harness.FAKES))
    from fake_backend import MAGIC

    gate = tmp_path / "gate"
    worker = fake(MANIFEST, **SPECS, streams=2, run_gate=str(gate))
    send_pictures(worker, [png(grey(MAGIC["wait"]))], batch=1)
    worker.give_slab(1)
    for number in range(2, 12):
        contents = [png(grey(number)), b"junk", png(grey(3))][: 1 + 2 * (number % 2)]
        layout = worker.place([(1, "BYTES", (len(contents), 1), harness.elements(*contents))], 1)
        worker.send_run(layout, len(contents), number, slot=1)
        answer = worker.answer()
        assert answer.batch == number
        assert answer.array(0)[:, 0, 0, 0].tolist() == [number, 0, 3][: len(contents)]
        assert sorted(answer.row_errors) == ([1] if len(contents) > 1 else [])
        worker.send_run([wire.TensorLayout(1, "BYTES", (1, 1), 0, 0, 2)], 1, number, slot=1)
        fault = worker.answer()
        assert isinstance(fault, harness.Fault)
        assert (fault.batch, fault.slot) == (number, 1)
    gate.touch()
    np.testing.assert_array_equal(worker.answer().array(0), MAGIC["wait"])


def test_a_picture_model_ends_at_end_of_file(fake):
    worker = fake(MANIFEST, **SPECS)
    worker.socket.close()
    assert worker.wait() == 0


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_classifier_gives_labels_and_scores_with_or_without_logits(start, tmp_path, backend):
    (tmp_path / "labels.txt").write_text("zero\none\ntwo\n")
    (tmp_path / "m.onnx").write_bytes(harness.identity_model(shape=("N", 3)))
    worker = start()
    loaded = worker.load(
        tmp_path, tmp_path / "m.onnx", backend, {"max_batch_size": 4, "classification": {"logits": "y", "top_k": 2}}
    )
    assert isinstance(loaded, worker_pb2.Loaded)
    assert [(spec.name, spec.datatype, list(spec.shape)) for spec in loaded.edge_outputs] == [
        ("label", "BYTES", [-1, 2]),
        ("score", "FP32", [-1, 2]),
    ]
    worker.give_slab()
    logits = np.float32([[0, 2, 1], [5, 5, -90]])
    done = worker.run_array(logits, wanted=0b110)
    assert sorted(done.contents) == [1, 2]
    assert done.rows(1) == [[b"one", b"two"], [b"zero", b"one"]]
    np.testing.assert_allclose(done.array(2), [[0.6652, 0.2447], [0.5, 0.5]], atol=1e-4)
    done = worker.run_array(logits, wanted=0b111)
    np.testing.assert_array_equal(done.array(0), logits)


LOGITS = TensorSpec("logits", "FP32", (-1, 3))


def classify(values, datatype="FP32", top_k=1, dtype=np.float32):
    spec = TensorSpec("logits", datatype, (-1, 3))
    classifier = Classifier(ClassificationSection(top_k=top_k), ["a", "b", "c"], spec)
    return classifier.classify(np.asarray(values, dtype))


def test_softmax_survives_huge_logits_and_passes_nan_on():
    result = classify([[1e30, 0, -1e30], [np.nan, 0, 0]])
    assert result["label"][0, 0] == b"a"
    assert result["score"][0, 0] == 1
    assert np.isnan(result["score"][1, 0])


def test_half_precisions_are_widened():
    assert classify([[0, 3, 1]], "FP16", dtype=np.float16)["label"].tolist() == [[b"b"]]
    bf16 = (np.float32([[0, 3, 1]]).view(np.uint32) >> 16).astype(np.uint16)
    assert classify(bf16, "BF16", dtype=np.uint16)["label"].tolist() == [[b"b"]]


@pytest.mark.parametrize(
    ("labels", "spec", "top_k"),
    [
        (["a", "b"], LOGITS, 1),
        (["a", "b", "c"], TensorSpec("logits", "INT64", (-1, 3)), 1),
        (["a", "b", "c"], TensorSpec("logits", "FP32", ()), 1),
        (["a", "b", "c"], LOGITS, 4),
    ],
)
def test_labels_that_do_not_suit_the_logits_are_refused(labels, spec, top_k):
    with pytest.raises(InvalidManifest, match="cannot"):
        Classifier(ClassificationSection(top_k=top_k), labels, spec)


def test_labels_are_lines():
    assert read_labels("a\nb\u2028c\r\nd\n") == ["a", "b\u2028c", "d"]
