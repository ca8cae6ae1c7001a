"""The written rule that gives a model its first placement.

An artifact goes to the backends that read its format, those of `PREFERENCE` first; among a backend's variants the one
it lists first (its full precision). The manifest's ``[placement]`` narrows the choice.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from appliance.artifacts import fingerprint, resolve_inside
from appliance.backend import Artifact, Variant
from appliance.errors import NoPlacement
from appliance.instance import Placement
from appliance.manifest import Manifest
from appliance.plugins import BackendRecord, PluginStatus
from appliance.wire import worker_pb2

#: Order of backends for one artifact; any other backend comes after these.
PREFERENCE: Final = ("onnxruntime", "openvino")


def placements(
    manifest: Manifest,
    directory: Path,
    version: str,
    records: Mapping[str, BackendRecord],
    cache: Path,
) -> list[Placement]:
    """Candidates for a model version, the one to try first at the front.

    A variant that lists the option ``cache_dir`` gets a directory below `cache` for what it compiles.

    Raises:
        NoPlacement: There is none; the message gives every backend with its reason.
        InvalidManifest: An artifact is missing or leads outside the model's directory.
    """
    found: list[tuple[int, Placement]] = []
    reasons: list[str] = []
    wish = manifest.placement
    for entry in manifest.artifacts_of(version):
        path = resolve_inside(directory, entry.path)
        artifact = Artifact(path, entry.format, entry.precision, entry.sha256 or "")
        for name, record in sorted(records.items()):
            if wish.backend not in (None, name):
                reasons.append(f"{name}: the manifest asks for {wish.backend}")
            elif record.status is not PluginStatus.AVAILABLE:
                reasons.append(f"{name}: {record.status.value}, {record.reason}")
            elif entry.format not in record.formats:
                reasons.append(f"{name}: does not read {entry.format}")
            else:
                variants = [
                    variant
                    for device in record.devices
                    for variant in record.candidates(entry.format, device)
                    if wish.device in (None, variant.device) and wish.precision in (None, variant.precision)
                ]
                if not variants:
                    where = f" on device {wish.device}" if wish.device else ""
                    how = f" with precision {wish.precision}" if wish.precision else ""
                    reasons.append(f"{name}: offers no variant{where}{how}")
                rank = PREFERENCE.index(name) if name in PREFERENCE else len(PREFERENCE)
                found.extend(
                    (rank, _placement(manifest, directory, version, artifact, variant, record.python, cache))
                    for variant in variants[:1]
                )
    if not found:
        listed = "; ".join(dict.fromkeys(reasons)) or "no backend is installed"
        raise NoPlacement(f"cannot place model {manifest.name!r}: {listed}")
    return [placement for _, placement in sorted(found, key=lambda pair: pair[0])]


def _placement(
    manifest: Manifest,
    directory: Path,
    version: str,
    artifact: Artifact,
    variant: Variant,
    python: str,
    cache: Path,
) -> Placement:
    options = {**variant.options, **manifest.placement.options}
    if options.get("cache_dir") == "":
        # OpenVINO tells files apart by size and second only, so what it compiles gets a place by a finer identity.
        options["cache_dir"] = str(cache / variant.backend / fingerprint(artifact.path))
    load = worker_pb2.Load(
        backend=variant.backend,
        model=manifest.name,
        version=version,
        directory=str(directory),
        artifact_path=str(artifact.path),
        artifact_format=artifact.format,
        artifact_precision=artifact.precision,
        artifact_sha256=artifact.sha256,
        device=variant.device,
        precision=variant.precision,
        options=options,
        manifest=manifest.model_dump_json(by_alias=True),
    )
    return Placement(backend=variant.backend, python=python, load=load)
