"""Candidates: which ways there are to run a model, in the order of the written rule, and why the others are barred."""

import json
from pathlib import Path

import pytest

from appliance.backend import Artifact, Variant
from appliance.candidates import Source, list_candidates, place
from appliance.errors import InvalidManifest, NoPlacement
from appliance.inventory import Device, Inventory, Rung, Step
from appliance.manifest import Manifest, PlacementSection
from appliance.plugins import BackendRecord, PluginStatus

CPU = Device("cpu", "cpu", "a CPU", 1 << 34, cores=4)
GPU = Device("nvidia0", "gpu", "a GPU", 1 << 34, vendor="nvidia", driver="570.1", uuid="GPU-1")
IGPU = Device("intel-gpu0", "gpu", "a small GPU", 1 << 34, vendor="intel", is_integrated=True)
NPU = Device("intel-npu0", "npu", "an NPU", 1 << 34, vendor="intel")
MACHINE = Inventory((CPU, GPU, IGPU, NPU), cores=4, memory_bytes=1 << 34)


def backend(
    name: str, formats=("onnx",), devices=("cpu",), precisions=("FP32",), options=None, stored=("FP32",), **changes
):
    """An available backend that offers each precision on each device for artifacts of each format and precision."""
    variants = {
        (format_, artifact, device): tuple(
            Variant(name, device, precision, dict(options or {})) for precision in precisions
        )
        for format_ in formats
        for artifact in stored
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


def candidates(directory: Path, manifest: Manifest, *backends, inventory=MACHINE, derived=()):
    return list_candidates(manifest, directory, "1", records(*backends), inventory, derived)


def names(found) -> list[str]:
    return [one.name for one in found.first_tries()]


def test_preferred_backends_come_first_and_others_by_name(directory):
    backends = [backend(name) for name in ("zeta", "openvino", "alpha", "onnxruntime")]
    assert names(candidates(directory, manifest(), *backends)) == [
        "onnxruntime/cpu/FP32", "openvino/cpu/FP32", "alpha/cpu/FP32", "zeta/cpu/FP32",
    ]  # fmt: skip


def test_full_precision_comes_first_then_discrete_gpu_cpu_integrated_gpu_npu(directory):
    devices = ("intel-npu0", "intel-gpu0", "cpu", "nvidia0")
    found = candidates(directory, manifest(), backend("onnxruntime", devices=devices, precisions=("BF16", "FP32")))
    assert [one.name for one in found.found] == [
        f"onnxruntime/{device}/{precision}"
        for precision in ("FP32", "BF16")
        for device in ("nvidia0", "cpu", "intel-gpu0", "intel-npu0")
    ]


def test_only_the_first_offer_for_a_device_is_tried_before_anything_is_measured(directory):
    found = candidates(directory, manifest(), backend("onnxruntime", precisions=("FP32", "BF16")))
    assert names(found) == ["onnxruntime/cpu/FP32"]
    assert len(found.found) == 2


def test_the_reference_is_full_precision_on_the_cpu(directory):
    backends = (backend("onnxruntime", devices=("nvidia0",)), backend("openvino", precisions=("BF16", "FP32")))
    assert candidates(directory, manifest(), *backends).reference.name == "openvino/cpu/FP32"
    on_gpu = candidates(directory, manifest(), backend("onnxruntime", devices=("nvidia0",)))
    assert on_gpu.reference.name == "onnxruntime/nvidia0/FP32"
    lowered = candidates(directory, manifest(), backend("onnxruntime", precisions=("BF16",)))
    assert lowered.reference.name == "onnxruntime/cpu/BF16", "nothing is nearer to full precision"


@pytest.mark.parametrize("wish", [{"precision": "BF16"}, {"device": "nvidia0"}, {"options": {"threads": "1"}}])
def test_what_the_manifest_leaves_out_can_still_be_compared_with(directory, wish):
    chosen = backend("onnxruntime", devices=("cpu", "nvidia0"), precisions=("FP32", "BF16"))
    found = candidates(directory, manifest(placement=wish), chosen)
    assert found.reference.name == "onnxruntime/cpu/FP32"
    assert found.reference.name not in [one.name for one in found.found]


def test_options_of_the_manifest_that_make_two_offers_one_leave_one(directory):
    one = backend("onnxruntime")
    offers = (Variant("onnxruntime", "cpu", "FP32"), Variant("onnxruntime", "cpu", "FP32", {"threads": "1"}))
    one = backend("onnxruntime", variants={("onnx", "FP32", "cpu"): offers})
    found = candidates(directory, manifest(placement={"options": {"threads": "1"}}), one)
    assert [each.name for each in found.found] == ["onnxruntime/cpu/FP32/threads=1"]


def test_a_model_that_is_stored_in_int8_alone_is_served_as_it_is(directory):
    small = {"name": "model", "artifacts": [{"path": "1/model.onnx", "format": "onnx", "precision": "INT8"}]}
    found = candidates(directory, Manifest.model_validate(small), quantising())
    assert names(found) == ["onnxruntime/cpu/INT8"]
    assert found.reference.name == "onnxruntime/cpu/INT8"


SAMPLED = {"samples": {"evaluation": "samples.jsonl"}}


def with_int8(directory, **fields) -> Manifest:
    (directory / "1" / "model.int8.onnx").write_bytes(b"small weights")
    artifacts = [
        {"path": "1/model.onnx", "format": "onnx"},
        {"path": "1/model.int8.onnx", "format": "onnx", "precision": "INT8"},
    ]
    return Manifest.model_validate({"name": "model", "artifacts": artifacts, **fields})


def quantising(name="onnxruntime"):
    one = backend(name)
    int8 = {("onnx", "INT8", "cpu"): (Variant(name, "cpu", "INT8", {}),)}
    return backend(name, variants={**one.variants, **int8})


def test_a_quantised_artifact_is_never_the_first_try_and_is_named_after_its_file(directory):
    found = candidates(directory, with_int8(directory, **SAMPLED), quantising())
    assert [one.name for one in found.found] == ["onnxruntime/cpu/FP32", "onnxruntime/cpu/INT8@model.int8.onnx"]
    assert names(found) == ["onnxruntime/cpu/FP32"], "not even where that one fails"
    assert found.reference.name == "onnxruntime/cpu/FP32"


def test_without_a_sample_nothing_below_16_bits_is_offered_and_the_reason_is_told(directory):
    found = candidates(directory, with_int8(directory), quantising(), backend("openvino", precisions=("FP32", "BF16")))
    assert [one.variant.precision for one in found.found] == ["FP32", "FP32", "BF16"]
    (barred,) = [each for each in found.barred if "INT8" in each.name]
    assert "evaluation sample" in barred.reason


@pytest.mark.parametrize(
    ("lowest", "expected"), [("FP32", {"FP32"}), ("BF16", {"FP32", "BF16"}), ("INT8", {"FP32", "BF16", "INT8"})]
)
def test_the_manifest_bounds_how_low_precision_goes(directory, lowest, expected):
    backends = (quantising(), backend("openvino", precisions=("FP32", "BF16")))
    found = candidates(directory, with_int8(directory, quality={"lowest": lowest}, **SAMPLED), *backends)
    assert {one.variant.precision for one in found.found} == expected


def test_a_derived_variant_stands_beside_the_original(directory, tmp_path):
    made = tmp_path / "made.onnx"
    made.write_bytes(b"small")
    derived = [Source(Artifact(made, "onnx", "INT8"), "int8-0123abcd")]
    found = candidates(directory, manifest(**SAMPLED), quantising(), derived=derived)
    assert [one.name for one in found.found] == ["onnxruntime/cpu/FP32", "onnxruntime/cpu/INT8@int8-0123abcd"]


def test_options_are_part_of_the_name_but_places_are_not(directory):
    found = candidates(directory, manifest(), backend("openvino", options={"threads": "2", "cache_dir": ""}))
    assert names(found) == ["openvino/cpu/FP32/threads=2"]


SPLITS = ({}, {"spin": "9"}, {"threads": "1"}, {"streams": "4", "threads": "1"}, {"streams": "2", "threads": "2"})


def splitting(*devices):
    """A backend that offers `SPLITS` on a CPU of 4 cores, and plain variants elsewhere."""
    variants = {
        ("onnx", "FP32", device): tuple(
            Variant("ort", device, "FP32", options) for options in (SPLITS if device == "cpu" else SPLITS[:1])
        )
        for device in devices
    }
    return backend("ort", devices=devices, variants=variants)


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ({}, ["", "/spin=9", "/threads=1", "/streams=4/threads=1", "/streams=2/threads=2"]),
        ({"weight": 3.0}, ["", "/spin=9", "/threads=1", "/streams=4/threads=1", "/streams=2/threads=2"]),
        ({"streams": 1}, ["", "/spin=9", "/threads=1", "/threads=2"]),
        ({"streams": 2}, ["/streams=2/threads=2", "/spin=9/streams=2/threads=2", "/streams=2/threads=1"]),
        ({"streams": 9}, ["/streams=9/threads=1", "/spin=9/streams=9/threads=1"]),
        ({"threads": 1}, ["/threads=1", "/spin=9/threads=1", "/streams=4/threads=1", "/streams=2/threads=1"]),
        ({"threads": 2}, ["/threads=2", "/spin=9/threads=2", "/streams=2/threads=2"]),
        ({"threads": 4}, ["/threads=4", "/spin=9/threads=4"]),
        ({"streams": 3, "threads": 4}, ["/streams=3/threads=4", "/spin=9/streams=3/threads=4"]),
    ],
)
def test_the_manifest_pins_streams_and_threads_and_leaves_out_what_does_not_go_with_them(directory, wish, expected):
    found = candidates(directory, manifest(instances=wish), splitting("cpu"))
    assert [one.name.removeprefix("ort/cpu/FP32") for one in found.found] == expected
    assert names(found) == [f"ort/cpu/FP32{expected[0]}"], "the first by the rule is the first offer"
    assert found.reference.name == "ort/cpu/FP32"


def test_other_devices_have_streams_and_no_threads(directory):
    wish = manifest(instances={"streams": 2, "threads": 3})
    found = candidates(directory, wish, splitting("nvidia0", "cpu"))
    assert [one.name for one in found.found] == [
        "ort/nvidia0/FP32/streams=2", "ort/cpu/FP32/streams=2/threads=3", "ort/cpu/FP32/spin=9/streams=2/threads=3"
    ]  # fmt: skip
    assert [(one.streams, one.threads) for one in found.found] == [(2, 0), (2, 3), (2, 3)]


def test_streams_and_threads_are_told_where_the_backend_chooses_them(directory):
    found = candidates(directory, manifest(), splitting("cpu", "nvidia0")).found
    shown = {one.name.partition("FP32")[2]: (one.streams, one.threads) for one in found if one.device.kind == "cpu"}
    assert shown == {
        "": (1, 4), "/spin=9": (1, 4), "/threads=1": (1, 1), "/streams=4/threads=1": (4, 1),
        "/streams=2/threads=2": (2, 2),
    }  # fmt: skip
    assert {one.computation for one in found} == {"ort/cpu/FP32", "ort/cpu/FP32/spin=9", "ort/nvidia0/FP32"}


def test_a_candidate_is_split_into_one_that_has_one_name_only(directory):
    plain, spinning, *_, pairs = candidates(directory, manifest(), splitting("cpu")).found
    for one in (plain, pairs):
        assert one.split(3, 1).name == "ort/cpu/FP32/streams=3/threads=1"
        assert one.split(1, 2).name == "ort/cpu/FP32/threads=2"
        assert one.split(1, 4) == plain
        assert one.split(2, 2).name == pairs.name
    assert spinning.split(2, 1).variant.options == {"spin": "9", "streams": "2", "threads": "1"}


def asked_for(directory, name, manifest, *backends):
    found = list_candidates(manifest, directory, "1", records(*backends), MACHINE, (), name)
    return found.named(name)


def test_a_split_that_nobody_offers_is_a_candidate_once_it_is_asked_for(directory):
    odd = asked_for(directory, "ort/cpu/FP32/spin=9/streams=3/threads=1", manifest(), splitting("cpu"))
    assert odd.variant.options == {"spin": "9", "streams": "3", "threads": "1"}
    offered = candidates(directory, manifest(), splitting("cpu"))
    listed = list_candidates(manifest(), directory, "1", records(splitting("cpu")), MACHINE, (), odd.name)
    assert listed.found == (*offered.found, odd), "the others keep their places"
    assert names(listed) == names(offered)


@pytest.mark.parametrize(
    "name",
    [
        "ort/cpu/FP32/spin=7/streams=3/threads=1",
        "ort/cpu/BF16/streams=3",
        "other/cpu/FP32/streams=3",
        "ort/cpu/FP32/streams=0",
        "ort/cpu/FP32/streams=03",
        "ort/cpu/FP32/threads=1/streams=3",
        "ort/cpu/FP32@x/streams=3",
        "streams=3",
    ],
)
def test_what_differs_in_anything_else_stays_unknown(directory, name):
    assert asked_for(directory, name, manifest(), splitting("cpu")) is None


@pytest.mark.parametrize(
    ("wish", "name", "is_allowed"),
    [
        ({"instances": {"streams": 2}}, "ort/cpu/FP32/streams=3/threads=1", False),
        ({"instances": {"streams": 3}}, "ort/cpu/FP32/streams=3/threads=4", True),
        ({"instances": {"threads": 1}}, "ort/cpu/FP32/streams=3/threads=2", False),
        ({"instances": {"threads": 1}}, "ort/cpu/FP32/streams=3/threads=1", True),
        ({"instances": {"threads": 3}}, "ort/nvidia0/FP32/streams=3", True),
        ({"placement": {"options": {"streams": "2"}}}, "ort/cpu/FP32/streams=3/threads=1", False),
        ({"placement": {"options": {"threads": "2"}}}, "ort/cpu/FP32/streams=3/threads=2", True),
    ],
)
def test_a_split_that_the_manifest_excludes_is_no_candidate_even_if_asked_for(directory, wish, name, is_allowed):
    found = asked_for(directory, name, manifest(**wish), splitting("cpu", "nvidia0"))
    assert (found is not None) is is_allowed


def test_a_device_that_cannot_be_used_is_barred_with_the_rung_and_the_fix(directory):
    rung = Rung(Step.OPENABLE, False, "no permission on /dev/dri/renderD128", "sudo usermod -aG render appliance")
    broken = Device("intel-gpu0", "gpu", "a small GPU", 0, is_integrated=True, ladder=(Rung(Step.PRESENT, True), rung))
    found = candidates(directory, manifest(), backend("onnxruntime"), inventory=Inventory((CPU, broken), 4, 1 << 34))
    (barred,) = found.barred
    assert barred.name == "intel-gpu0"
    assert barred.reason.startswith("openable failed: no permission")
    assert "usermod -aG render" in barred.reason


def test_a_usable_device_that_no_backend_uses_is_barred_with_each_backends_reason(directory):
    ort = backend("onnxruntime", unlisted={"nvidia0": "this build has no CUDA provider"})
    found = candidates(directory, manifest(), ort, backend("openvino", devices=("cpu", "intel-gpu0", "intel-npu0")))
    assert {each.name: each.reason for each in found.barred} == {
        "nvidia0": "onnxruntime: this build has no CUDA provider"
    }


def test_a_placement_says_all_that_a_worker_needs(directory):
    wish = {"options": {"threads": "1", "mode": "fast"}}
    chosen = backend("onnxruntime", options={"threads": "4", "spin": "0"}, python="/env/bin/python")
    (one,) = candidates(directory, manifest(placement=wish), chosen).found
    found = place(one, manifest(placement=wish), directory, "1", MACHINE, directory.parent / "cache")
    assert found.python == "/env/bin/python"
    load = found.load
    assert (load.backend, load.model, load.version) == ("onnxruntime", "model", "1")
    assert (load.artifact_format, load.artifact_precision, load.artifact_sha256) == ("onnx", "FP32", "")
    assert Path(load.artifact_path) == (directory / "1" / "model.onnx").resolve()
    assert dict(load.options) == {"threads": "1", "mode": "fast", "spin": "0"}
    assert Inventory.from_json(json.loads(load.inventory)).devices == (CPU,)
    assert Manifest.model_validate_json(load.manifest) == manifest(placement=wish)


def test_backends_read_only_their_formats(directory):
    ort, openvino = backend("onnxruntime"), backend("openvino", formats=("onnx", "openvino-ir"))
    assert names(candidates(directory, manifest("openvino-ir"), ort, openvino)) == ["openvino/cpu/FP32"]
    both = candidates(directory, manifest("openvino-ir", "onnx"), ort, openvino)
    assert [(each.variant.backend, each.source.artifact.format) for each in both.found] == [
        ("onnxruntime", "onnx"),
        ("openvino", "openvino-ir"),
        ("openvino", "onnx"),
    ]


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ({"backend": "openvino"}, [("openvino", "cpu", "FP32")]),
        ({"device": "nvidia0"}, [("onnxruntime", "nvidia0", "FP32")]),
        ({"precision": "BF16"}, [("onnxruntime", "nvidia0", "BF16"), ("onnxruntime", "cpu", "BF16")]),
        ({"device": "nvidia0", "precision": "BF16"}, [("onnxruntime", "nvidia0", "BF16")]),
    ],
)
def test_the_manifest_narrows_the_choice(directory, wish, expected):
    backends = (backend("onnxruntime", devices=("cpu", "nvidia0"), precisions=("FP32", "BF16")), backend("openvino"))
    found = candidates(directory, manifest(placement=wish), *backends).first_tries()
    assert [(each.variant.backend, each.variant.device, each.variant.precision) for each in found] == expected


def test_where_nothing_fits_every_backend_is_told_with_its_reason(directory):
    backends = (
        backend("alpha", formats=("gguf",)),
        backend("beta", status=PluginStatus.UNSUPPORTED, reason="no device of its kind"),
        backend("gamma", status=PluginStatus.DISABLED, reason="the configuration disables it"),
        backend("delta"),
    )
    with pytest.raises(NoPlacement) as caught:
        candidates(directory, manifest(placement=PlacementSection(device="nvidia9").model_dump()), *backends)
    text = str(caught.value)
    assert "'model'" in text
    assert "alpha: does not read onnx" in text
    assert "beta: unsupported, no device of its kind" in text
    assert "gamma: disabled, the configuration disables it" in text
    assert "delta: offers no variant on device nvidia9" in text


def test_a_wish_for_an_unknown_backend_names_those_there_are(directory):
    with pytest.raises(NoPlacement, match="onnxruntime: the manifest asks for tensorrt"):
        candidates(directory, manifest(placement={"backend": "tensorrt"}), backend("onnxruntime"))


def test_without_any_backend_that_is_the_reason(directory):
    with pytest.raises(NoPlacement, match="no backend is installed"):
        candidates(directory, manifest())


def test_an_artifact_that_is_missing_or_leads_outside_is_the_manifests_fault(directory):
    (directory / "1" / "model.onnx").unlink()
    with pytest.raises(InvalidManifest, match="no such file"):
        candidates(directory, manifest(), backend("onnxruntime"))
    outside = directory.parent / "secret.onnx"
    outside.write_bytes(b"weights")
    (directory / "1" / "model.onnx").symlink_to(outside)
    with pytest.raises(InvalidManifest, match="outside"):
        candidates(directory, manifest(), backend("onnxruntime"))
