"""The rule of first placement: which backends are tried for a model, in which order, and why the others are not."""

from pathlib import Path

import pytest

from appliance.backend import Variant
from appliance.errors import InvalidManifest, NoPlacement
from appliance.manifest import Manifest, PlacementSection
from appliance.placement import placements
from appliance.plugins import BackendRecord, PluginStatus


def backend(name: str, formats=("onnx",), devices=("cpu",), precisions=("FP32",), options=None, **changes):
    """An available backend that offers each precision on each device for each format."""
    variants = {
        (format_, device): tuple(Variant(name, device, precision, dict(options or {})) for precision in precisions)
        for format_ in formats
        for device in devices
    }
    fields = {"status": PluginStatus.AVAILABLE, "devices": devices, "formats": formats, "variants": variants, **changes}
    return BackendRecord(name, **fields)


def records(*backends):
    return {each.name: each for each in backends}


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "model" / "1").mkdir(parents=True)
    for name in ("model.onnx", "model.xml"):
        (tmp_path / "model" / "1" / name).write_bytes(b"weights")
    return tmp_path / "model"


def manifest(*formats: str, **fields) -> Manifest:
    names = {"onnx": "1/model.onnx", "openvino-ir": "1/model.xml"}
    artifacts = [{"path": names[format_], "format": format_} for format_ in formats or ("onnx",)]
    return Manifest.model_validate({"name": "model", "artifacts": artifacts, **fields})


def place(directory: Path, manifest: Manifest, *backends):
    return placements(manifest, directory, "1", records(*backends), directory.parent / "cache")


def names(found) -> list[str]:
    return [placement.backend for placement in found]


def test_preferred_backends_come_first_and_others_by_name(directory):
    backends = [backend(name) for name in ("zeta", "openvino", "alpha", "onnxruntime")]
    assert names(place(directory, manifest(), *backends)) == ["onnxruntime", "openvino", "alpha", "zeta"]


def test_of_a_backends_variants_the_first_listed_is_tried(directory):
    found = place(directory, manifest(), backend("onnxruntime", devices=("cpu", "gpu:0"), precisions=("FP32", "BF16")))
    assert [(each.load.device, each.load.precision) for each in found] == [("cpu", "FP32")]


def test_a_placement_says_all_that_a_worker_needs(directory):
    wish = {"options": {"threads": "1", "mode": "fast"}}
    chosen = backend("onnxruntime", options={"threads": "4", "spin": "0"}, python="/env/bin/python")
    (found,) = place(directory, manifest(placement=wish), chosen)
    assert found.python == "/env/bin/python"
    load = found.load
    assert (load.backend, load.model, load.version) == ("onnxruntime", "model", "1")
    assert (load.artifact_format, load.artifact_precision, load.artifact_sha256) == ("onnx", "FP32", "")
    assert Path(load.artifact_path) == (directory / "1" / "model.onnx").resolve()
    assert dict(load.options) == {"threads": "1", "mode": "fast", "spin": "0"}
    assert Manifest.model_validate_json(load.manifest) == manifest(placement=wish)


def test_backends_read_only_their_formats(directory):
    ort, openvino = backend("onnxruntime"), backend("openvino", formats=("onnx", "openvino-ir"))
    assert names(place(directory, manifest("openvino-ir"), ort, openvino)) == ["openvino"]
    both = place(directory, manifest("openvino-ir", "onnx"), ort, openvino)
    assert [(each.backend, each.load.artifact_format) for each in both] == [
        ("onnxruntime", "onnx"),
        ("openvino", "openvino-ir"),
        ("openvino", "onnx"),
    ]


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ({"backend": "openvino"}, [("openvino", "cpu", "FP32")]),
        ({"device": "gpu:0"}, [("onnxruntime", "gpu:0", "FP32")]),
        ({"precision": "BF16"}, [("onnxruntime", "cpu", "BF16")]),
        ({"device": "gpu:0", "precision": "BF16"}, [("onnxruntime", "gpu:0", "BF16")]),
    ],
)
def test_the_manifest_narrows_the_choice(directory, wish, expected):
    backends = (backend("onnxruntime", devices=("cpu", "gpu:0"), precisions=("FP32", "BF16")), backend("openvino"))
    found = place(directory, manifest(placement=wish), *backends)
    assert [(each.backend, each.load.device, each.load.precision) for each in found] == expected


def test_where_nothing_fits_every_backend_is_told_with_its_reason(directory):
    backends = (
        backend("alpha", formats=("gguf",)),
        backend("beta", status=PluginStatus.UNSUPPORTED, reason="no device of its kind"),
        backend("gamma", status=PluginStatus.DISABLED, reason="the configuration disables it"),
        backend("delta"),
    )
    with pytest.raises(NoPlacement) as caught:
        place(directory, manifest(placement=PlacementSection(device="gpu:9").model_dump()), *backends)
    text = str(caught.value)
    assert "'model'" in text
    assert "alpha: does not read onnx" in text
    assert "beta: unsupported, no device of its kind" in text
    assert "gamma: disabled, the configuration disables it" in text
    assert "delta: offers no variant on device gpu:9" in text


def test_a_wish_for_an_unknown_backend_names_those_there_are(directory):
    with pytest.raises(NoPlacement, match="onnxruntime: the manifest asks for tensorrt"):
        place(directory, manifest(placement={"backend": "tensorrt"}), backend("onnxruntime"))


def test_without_any_backend_that_is_the_reason(directory):
    with pytest.raises(NoPlacement, match="no backend is installed"):
        place(directory, manifest())


def test_an_artifact_that_is_missing_or_leads_outside_is_the_manifests_fault(directory):
    (directory / "1" / "model.onnx").unlink()
    with pytest.raises(InvalidManifest, match="no such file"):
        place(directory, manifest(), backend("onnxruntime"))
    outside = directory.parent / "secret.onnx"
    outside.write_bytes(b"weights")
    (directory / "1" / "model.onnx").symlink_to(outside)
    with pytest.raises(InvalidManifest, match="outside"):
        place(directory, manifest(), backend("onnxruntime"))
