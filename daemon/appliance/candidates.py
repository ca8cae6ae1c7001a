"""Every way to run a model on this machine, in the order of the written rule, and every way that is barred, with why.

The rule gives a model its first placement, before anything is measured: full precision first; a discrete GPU, then the
CPU, then an integrated GPU, then an NPU (either may well be slower than the CPU, so it must show by measurement that it
is not); backends in the order of `PREFERENCE`; a backend's own order last. The manifest's
``[placement]``, ``[instances]`` and ``[quality]`` narrow the choice.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Final

from appliance.artifacts import fingerprint, resolve_inside
from appliance.backend import Artifact, Variant
from appliance.errors import NoPlacement
from appliance.inventory import Device, Inventory
from appliance.manifest import ArtifactEntry, Manifest
from appliance.measurement import canonical_options
from appliance.placement import ChosenBy, Placement
from appliance.plugins import BackendRecord, PluginStatus, reasons_unlisted
from appliance.quality import WITHOUT_SAMPLE
from appliance.split import pinned, refusal, split_in, split_options, streams_of, threads_of, with_split
from appliance.wire import worker_pb2

#: Order of backends for one artifact; any other backend comes after these.
PREFERENCE: Final = ("onnxruntime", "openvino")

#: Full precision, and what counts as it.
_AS_FULL: Final = {"FP64": "FP32"}
_FULL: Final = frozenset({"FP32", "FP64"})

#: Precisions that `manifest.QualitySection.lowest` lets in.
_ALLOWED: Final = {
    "FP32": frozenset({"FP32"}),
    "BF16": frozenset({"FP32", "BF16", "FP16"}),
    "INT8": frozenset({"FP32", "BF16", "FP16", "INT8", "INT8-WEIGHTS"}),
    "INT4": frozenset({"FP32", "BF16", "FP16", "INT8", "INT8-WEIGHTS", "INT4-WEIGHTS"}),
}


@dataclass(frozen=True, slots=True)
class Source:
    """An artifact that variants are made of.

    Attributes:
        artifact: The file.
        name: What tells it from the model's other artifacts, for people; empty for the one in full precision.
        version: The model version.
    """

    artifact: Artifact
    name: str = ""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run a model.

    Attributes:
        name: For people and for ``appliancectl pin``: ``"openvino/cpu/INT8/float=bf16"``.
        source: The artifact.
        variant: The way to run it.
        runtime: The backend's runtime and version.
        python: Interpreter of its workers.
        device: Where it runs.
    """

    name: str
    source: Source
    variant: Variant
    runtime: str
    python: str
    device: Device

    @property
    def is_exact(self) -> bool:
        """True where nothing is lowered: it computes in FP32 what is stored in FP32."""
        return {self.variant.precision, self.source.artifact.precision} <= _FULL

    @property
    def computation(self) -> str:
        """Its name without `SPLIT`: candidates that share it compute the same."""
        return _name(with_split(self.variant, {}), self.source)

    @property
    def streams(self) -> int:
        """Runs at the same time."""
        return streams_of(self.variant.options)

    @property
    def threads(self) -> int:
        """Cores that each run may use; 0 where that means nothing, on devices other than CPUs."""
        return threads_of(self.variant.options, self.device)

    def split(self, streams: int, threads: int) -> "Candidate":
        """The same with so many runs at the same time, of so many cores each; 0 cores on devices other than CPUs."""
        variant = with_split(self.variant, split_options(streams, threads, self.device))
        return replace(self, name=_name(variant, self.source), variant=variant)


@dataclass(frozen=True, slots=True)
class Barred:
    """A backend or device that yields no candidate, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Candidates:
    """What a model version can be run as.

    Attributes:
        found: In the order of the rule.
        barred: What is out of the question.
        reference: What the others' outputs are compared with: full precision on the CPU by the preferred backend, even
            where the manifest's ``[placement]`` leaves it out; of a model without an FP32 artifact the first in order.
    """

    found: tuple[Candidate, ...]
    barred: tuple[Barred, ...]
    reference: Candidate

    def named(self, name: str) -> Candidate | None:
        """The candidate called `name`, or None."""
        return next((one for one in self.found if one.name == name), None)

    def first_tries(self) -> tuple[Candidate, ...]:
        """What to load before anything is measured: of each artifact, backend and device the first in the order.

        Nothing lowered is tried unproved, unless there is nothing else.
        """
        tried: dict[tuple[Path, str, str], Candidate] = {}
        for one in [one for one in self.found if one.is_exact] or self.found:
            tried.setdefault((one.source.artifact.path, one.variant.backend, one.device.id), one)
        return tuple(tried.values())


def list_candidates(
    manifest: Manifest,
    directory: Path,
    version: str,
    records: Mapping[str, BackendRecord],
    inventory: Inventory,
    derived: Sequence[Source] = (),
    asked_for: str = "",
) -> Candidates:
    """Every way to run a model version.

    Args:
        manifest: The model's.
        directory: The model's.
        version: Which version.
        records: Every backend by name.
        inventory: The machine.
        derived: Artifacts made from the version's own, by quantising.
        asked_for: Name of a candidate that no backend offers; it is added if it differs from another in how cores are
            split alone.

    Raises:
        NoPlacement: There is no candidate; the message gives every backend with its reason.
        InvalidManifest: An artifact is missing or leads outside the model's directory.
    """
    sources = _sources(manifest, directory, version)
    is_full = any(source.artifact.precision in _FULL for source in sources)
    ranked: list[tuple[tuple[bool, int, int, int], Candidate]] = []
    found: dict[str, Candidate] = {}
    barred: dict[str, str] = {}
    for source in (*sources, *derived):
        for name, record in sorted(records.items()):
            reason = _unfit(source, record)
            if reason:
                barred[name] = reason
                continue
            rank = PREFERENCE.index(name) if name in PREFERENCE else len(PREFERENCE)
            for position, one in enumerate(_offers(source, record, inventory)):
                ranked.append(((not one.is_exact, _device_rank(one.device), rank, position), one))
    ranked.sort(key=lambda pair: pair[0])
    for _, one in ranked:
        narrowed = _narrowed(one, manifest)
        if isinstance(narrowed, str):
            barred.setdefault(one.variant.backend, narrowed)
        elif reason := _lowered_too_far(manifest, narrowed, is_full=is_full):
            barred[narrowed.name] = reason
        else:
            found.setdefault(narrowed.name, narrowed)
    if asked_for and asked_for not in found:
        other = _split_as(asked_for, found.values(), manifest)
        found |= {other.name: other} if other is not None else {}
    _bar_idle_devices(records, inventory, barred)
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in barred.items())
        listed = reasons if records else "no backend is installed"
        raise NoPlacement(f"cannot place model {manifest.name!r}: {listed}")
    offering = {one.variant.backend for one in found.values()}
    told = tuple(Barred(name, why) for name, why in barred.items() if name not in offering)
    return Candidates(tuple(found.values()), told, _reference([one for _, one in ranked]))


def _reference(ranked: Sequence[Candidate]) -> Candidate:
    exact = [one for one in ranked if one.is_exact] or ranked
    return next((one for one in exact if one.device.kind == "cpu"), exact[0])


def _sources(manifest: Manifest, directory: Path, version: str) -> list[Source]:
    entries = manifest.artifacts_of(version)
    plain = [entry for entry in entries if entry.precision in _FULL]
    sources = []
    for entry in entries:
        artifact = Artifact(resolve_inside(directory, entry.path), entry.format, entry.precision, entry.sha256 or "")
        is_main = len(plain) == 1 and entry is plain[0]
        sources.append(Source(artifact, "" if is_main or len(entries) == 1 else _short(entry, entries)))
    return sources


def _short(entry: ArtifactEntry, entries: Sequence[ArtifactEntry]) -> str:
    """The artifact's file name, or its path below the version where another has the same."""
    path = PurePosixPath(entry.path)
    is_unique = sum(PurePosixPath(each.path).name == path.name for each in entries) == 1
    return path.name if is_unique else str(path.relative_to(entry.version))


def _unfit(source: Source, record: BackendRecord) -> str:
    """Why a backend has nothing to do with an artifact; empty where it has."""
    if record.status is not PluginStatus.AVAILABLE:
        return f"{record.status.value}, {record.reason}"
    if source.artifact.format not in record.formats:
        return f"does not read {source.artifact.format}"
    return ""


def _offers(source: Source, record: BackendRecord, inventory: Inventory) -> Iterator[Candidate]:
    for device_id in record.devices:
        device = inventory.device(device_id)
        if device is None:
            continue
        for variant in record.candidates(source.artifact.format, source.artifact.precision, device_id):
            yield Candidate(_name(variant, source), source, variant, record.runtime, record.python, device)


def _narrowed(one: Candidate, manifest: Manifest) -> Candidate | str:
    """A candidate as the manifest's ``[placement]`` wants it, or why it does not want it."""
    wish, variant = manifest.placement, one.variant
    if wish.backend not in (None, variant.backend):
        return f"the manifest asks for {wish.backend}"
    if wish.device not in (None, variant.device) or wish.precision not in (None, variant.precision):
        where = f" on device {wish.device}" if wish.device else ""
        how = f" with precision {wish.precision}" if wish.precision else ""
        return f"offers no variant{where}{how}"
    options = pinned({**variant.options, **wish.options}, manifest.instances, one.device)
    if options is None:
        return "takes more cores than there are with the streams or threads that the manifest asks for"
    full = replace(variant, options=options)
    return replace(one, name=_name(full, one.source), variant=full)


def _split_as(name: str, found: Iterable[Candidate], manifest: Manifest) -> Candidate | None:
    """The candidate of that name, if one of `found` differs from it in `SPLIT` alone and the manifest allows it."""
    for one in found:
        variant = with_split(one.variant, split_in(name))
        if _name(variant, one.source) == name and not refusal(variant, one.device, manifest):
            return replace(one, name=name, variant=variant)
    return None


def _lowered_too_far(manifest: Manifest, one: Candidate, *, is_full: bool) -> str:
    """Why a candidate's precision is out of the question; empty where it is not, or where the manifest asks for it.

    Where a version has no FP32 artifact (`is_full` is False) computing what is stored lowers nothing.
    """
    stored, computed = (_AS_FULL.get(each, each) for each in (one.source.artifact.precision, one.variant.precision))
    if manifest.placement.precision == computed or (not is_full and stored == computed):
        return ""
    precisions = {stored, computed}
    if not precisions <= _ALLOWED[manifest.quality.lowest]:
        return f"the manifest allows no precision below {manifest.quality.lowest} (quality.lowest)"
    if not precisions <= WITHOUT_SAMPLE and not (manifest.samples and manifest.samples.evaluation):
        return (
            f"{computed} needs an evaluation sample to prove its accuracy on, and the manifest names none "
            "(samples.evaluation)"
        )
    return ""


def _name(variant: Variant, source: Source) -> str:
    options = json.loads(canonical_options(variant.options))
    parts = [variant.backend, variant.device, variant.precision, *(f"{key}={options[key]}" for key in options)]
    return "/".join(parts) + (f"@{source.name}" if source.name else "")


def _device_rank(device: Device) -> int:
    if device.kind == "cpu":
        return 1
    if device.kind == "gpu":
        return 2 if device.is_integrated else 0
    return 3


def _bar_idle_devices(records: Mapping[str, BackendRecord], inventory: Inventory, barred: dict[str, str]) -> None:
    """Say of every device that no backend uses why it stays idle."""
    used = {device for record in records.values() for device in record.devices}
    for device in inventory.devices:
        rung = device.failed
        if rung is not None:
            barred[device.id] = f"{rung.step.value} failed: {rung.reason}{f'; {rung.fix}' if rung.fix else ''}"
        elif device.id not in used:
            barred[device.id] = reasons_unlisted(records.values(), device.id) or "no installed backend runs on it"


def place(
    candidate: Candidate,
    manifest: Manifest,
    directory: Path,
    version: str,
    inventory: Inventory,
    cache: Path,
    record_path: str = "",
    chosen_by: ChosenBy = ChosenBy.RULE,
) -> Placement:
    """What a worker needs to load `candidate`.

    A variant that lists the option ``cache_dir`` gets a directory below `cache` for what it compiles.
    """
    artifact, variant = candidate.source.artifact, candidate.variant
    options = dict(variant.options)
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
        inventory=_inventory_json(inventory, (candidate.device,)),
        record_path=record_path,
    )
    return Placement(variant.backend, candidate.python, load, candidate.name, chosen_by)


def _inventory_json(inventory: Inventory, devices: Iterable[Device]) -> str:
    return json.dumps(asdict(replace(inventory, devices=tuple(devices), disks=(), host={}, problems=())))
