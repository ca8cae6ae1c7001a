"""Which variants a model version has on this machine, what is known of each, and which is to serve.

Brings together what others own: the backends' offers, the inventory, the registry's measurements and evidence.
"""

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from appliance.artifacts import companions, contents_digest, fingerprint, resolve_inside
from appliance.backend import Artifact
from appliance.candidates import Candidate, Candidates, Source, list_candidates, place
from appliance.choice import Choice, choose
from appliance.errors import ArtifactCorrupt, InvalidManifest, NoPlacement
from appliance.inventory import Inventory
from appliance.manifest import Manifest
from appliance.measurement import Measurement, VariantKey, key_of
from appliance.placement import ChosenBy, Placement
from appliance.plugins import BackendRecord
from appliance.quality import METRIC_OF_TASK, Evidence
from appliance.registry import Registry, StoredPlacement

_log = logging.getLogger("appliance.chooser")

Records = Callable[[], Awaitable[Mapping[str, BackendRecord]]]


@dataclass(frozen=True, slots=True)
class Options:
    """What a model version can be run as, and the key of each way.

    Attributes:
        manifest: The model's.
        directory: The model's.
        version: Which version.
        candidates: Every way.
        keys: By candidate name, the reference's too; empty where nobody needed them (see `Chooser.options`).
        trial: Names what accuracy is judged on: the sample or made-up inputs, how many rows, and all that turns them
            into the session's inputs and labels; empty where `keys` is.
    """

    manifest: Manifest
    directory: Path
    version: str
    candidates: Candidates
    keys: Mapping[str, VariantKey]
    trial: str

    def computation(self, candidate: Candidate) -> VariantKey:
        """What evidence of a candidate's accuracy is kept under."""
        return self.keys[candidate.name].computation

    @property
    def sample_path(self) -> Path | None:
        """The evaluation sample, or None."""
        samples = self.manifest.samples
        return resolve_inside(self.directory, samples.evaluation) if samples and samples.evaluation else None

    @property
    def metric(self) -> str:
        """What variants are compared by."""
        chosen = self.manifest.quality.metric
        if chosen != "auto":
            return chosen
        return "agreement" if self.sample_path is None and self.manifest.classification else self._metric_of_task()

    def _metric_of_task(self) -> str:
        if self.manifest.classification is not None:
            return "accuracy"
        found = METRIC_OF_TASK[self.manifest.task]
        return "relative-l2" if found == "accuracy" else found


class Chooser:
    """Decides for any model; keeps nothing of its own.

    Args:
        records: Every backend, probed once.
        inventory: The machine as it is now.
        registry: What is known.
        cache: Directory for what backends compile.
        state: Directory of derived variants and recorded inputs.
    """

    def __init__(
        self, records: Records, inventory: Callable[[], Inventory], registry: Registry, cache: Path, state: Path
    ) -> None:
        self._records = records
        self._inventory = inventory
        self._cache = cache
        self.registry = registry
        self.state = state

    async def options(
        self, manifest: Manifest, directory: Path, version: str, with_keys: bool = True, asked_for: str | None = None
    ) -> Options:
        """What a model version can be run as.

        Args:
            manifest: The model's.
            directory: The model's.
            version: Which version.
            with_keys: False leaves out the keys, and with them reading the artifacts.
            asked_for: Name of a candidate that no backend need offer, see `list_candidates`; None for what is pinned.

        Raises:
            NoPlacement, InvalidManifest: As `list_candidates`.
            ArtifactCorrupt: An artifact cannot be read.
        """
        records = await self._records()
        derived = await self._derived(manifest, directory, version) if with_keys else []
        if asked_for is None:
            stored = self.registry.placement(manifest.name, version)
            asked_for = stored.variant if stored is not None and stored.is_pinned else ""
        found = await asyncio.to_thread(
            list_candidates, manifest, directory, version, records, self._inventory(), derived, asked_for
        )
        options = Options(manifest, directory, version, found, {}, "")
        if not with_keys:
            return options
        considered = (*found.found, found.reference)
        artifacts = {one.source.artifact.path: one.source.artifact for one in considered}
        digests = {path: await self._digest(path, artifact.sha256) for path, artifact in artifacts.items()}
        trial = await self._trial(options)
        workload = trial[:8] if manifest.text is not None else ""  # lengths come from the sample
        keys = {
            one.name: key_of(
                digests[one.source.artifact.path],
                one.variant,
                one.runtime,
                one.device.identity,
                one.device.driver_key,
                workload,
            )
            for one in considered
        }
        return replace(options, keys=keys, trial=trial)

    async def _trial(self, options: Options) -> str:
        manifest = options.manifest
        parts = [str(manifest.quality.limit)]
        for section in (manifest.text, manifest.image, manifest.classification):
            parts.append(section.model_dump_json() if section is not None else "")
        if manifest.sequence is not None:
            parts.append(manifest.sequence.model_dump_json())
        parts += [entry.model_dump_json() for entry in (*manifest.inputs, *manifest.outputs)]
        files = [manifest.samples.evaluation] if manifest.samples else []
        files += [manifest.text.tokenizer] if manifest.text else []
        files += [manifest.classification.labels] if manifest.classification else []
        for name in files:
            parts.append(await self._digest(resolve_inside(options.directory, name)) if name else "")
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    async def _derived(self, manifest: Manifest, directory: Path, version: str) -> list[Source]:
        """Variants made of an artifact that the version still has."""
        known = [one for one in self.registry.variants(manifest.name, version) if (self.state / one.path).exists()]
        if not known:
            return []
        own = {
            await self._digest(resolve_inside(directory, entry.path), entry.sha256 or "")
            for entry in manifest.artifacts_of(version)
        }
        return [
            Source(Artifact(self.state / one.path, one.format, one.precision, one.sha256), one.id)
            for one in known
            if one.source in own
        ]

    async def _digest(self, path: Path, sha256: str = "") -> str:
        """The digest of a file's or artifact's contents; `sha256` is what the manifest says of the file itself."""
        try:
            if sha256 and await asyncio.to_thread(companions, path) == [path]:
                return sha256
            state = await asyncio.to_thread(fingerprint, path)
            known = self.registry.digest(state)
            if known is None:
                known = await asyncio.to_thread(contents_digest, path)
                await self.registry.put_digest(state, known)
        except OSError as error:
            raise ArtifactCorrupt(f"cannot read {path.name!r}: {error.strerror}") from error
        return known

    # ---------------------------------------------------------------- what to load

    async def placements(self, manifest: Manifest, directory: Path, version: str) -> list[Placement]:
        """What to try to load, the best that is known at the front.

        Raises:
            NoPlacement, InvalidManifest, ArtifactCorrupt: As `options`.
        """
        await self._records()  # before them the registry may not have been read
        stored = self.registry.placement(manifest.name, version)
        options, stored = await self._options_to_load(manifest, directory, version, stored)
        tries = [(one, ChosenBy.RULE) for one in options.candidates.first_tries()]
        missing = ""
        if stored is not None:
            is_there = options.candidates.named(stored.variant)
            first = is_there if stored.is_pinned else self._measured(options, stored)
            if first is not None:
                by = ChosenBy.PINNED if stored.is_pinned else ChosenBy.MEASURED
                tries = [(first, by), *((one, how) for one, how in tries if one is not first)]
            if is_there is None:
                missing = self._missing(manifest, stored, tries[0][0])
        placements = await asyncio.to_thread(lambda: [self._place(options, one, by) for one, by in tries])
        return [replace(each, fallback=missing) for each in placements] if missing else placements

    async def _options_to_load(
        self, manifest: Manifest, directory: Path, version: str, stored: StoredPlacement | None
    ) -> tuple[Options, StoredPlacement | None]:
        """Keys are needed only where something is known; what cannot be read of the sample must not stop a load."""
        if stored is not None:
            try:
                return await self.options(manifest, directory, version), stored
            except (InvalidManifest, ArtifactCorrupt) as error:
                _log.warning("%s: what was measured is not used: %s", manifest.name, error)
        return await self.options(manifest, directory, version, with_keys=False), None

    def _missing(self, manifest: Manifest, stored: StoredPlacement, instead: Candidate) -> str:
        """Why what was chosen is not served, where that means another device; empty where it does not.

        Raises:
            NoPlacement: The manifest forbids it.
        """
        lost = stored.variant.split("/")[1] if stored.variant.count("/") > 1 else ""
        if lost == instead.device.id:
            _log.warning("%s: %s, which was chosen, is not to be had", stored.model, stored.variant)
            return ""
        device = self._inventory().device(lost)
        rung = device.failed if device is not None else None
        why = "it is not there" if device is None else rung.reason if rung is not None else "no backend offers it"
        if manifest.fallback == "forbid":
            raise NoPlacement(
                f"cannot place model {stored.model!r}: {stored.variant} was chosen, fallback is 'forbid', {lost}: {why}"
            )
        return f"{lost}: {why}"

    def _measured(self, options: Options, stored: StoredPlacement) -> Candidate | None:
        """What the measurements say by the objective and bound the manifest has now, else what was chosen last."""
        last = options.candidates.named(stored.variant)
        if last is not None and self.measurement(options, last) is None:
            # Its driver or runtime is another than when it was measured. Where it ran it may run again, in full
            # precision: its accuracy is not proved for the new one.
            on_device = [one for one in options.candidates.first_tries() if one.device.id == last.device.id]
            return last if last.is_exact else next((one for one in on_device if one.is_exact), None)
        choice = self.decide(options, stored.variant)
        if choice.winner is not None:
            return choice.winner
        proof = None if last is None else self.evidence(options, last)
        return last if proof is not None and not proof.refusal else None

    def _place(self, options: Options, candidate: Candidate, by: ChosenBy) -> Placement:
        samples = options.manifest.samples
        recording = str(self.recording(options.manifest.name)) if samples and samples.record else ""
        placement = place(
            candidate,
            options.manifest,
            options.directory,
            options.version,
            self._inventory(),
            self._cache,
            recording,
            by,
        )
        key = options.keys.get(candidate.name)
        return placement if key is None else replace(placement, measurement=self.registry.measurement(key.id))

    async def placement(self, options: Options, candidate: Candidate, by: ChosenBy) -> Placement:
        """What a worker needs to load `candidate`."""
        return await asyncio.to_thread(self._place, options, candidate, by)

    def recording(self, model: str) -> Path:
        """Where live inputs of a model are recorded, for models that ask for it."""
        return self.state / "recordings" / model

    # ---------------------------------------------------------------- what is known

    def measurement(self, options: Options, candidate: Candidate) -> Measurement | None:
        """The numbers of a candidate, if it was measured to the end."""
        return self.registry.measurement(options.keys[candidate.name].id)

    def evidence(self, options: Options, candidate: Candidate) -> Evidence | None:
        """How a candidate compares with the reference, judged by the bound the manifest has now."""
        key, reference = options.computation(candidate).id, options.computation(options.candidates.reference).id
        found = self.registry.evidence(key, reference, options.trial, options.metric)
        return None if found is None else replace(found, bound=options.manifest.quality.bound)

    def decide(self, options: Options, incumbent: str = "") -> Choice:
        """Choose by what is known; `incumbent` is the name of what serves now."""
        return choose(
            options.manifest.objective,
            options.candidates.found,
            lambda one: self.measurement(options, one),
            lambda one: self.evidence(options, one),
            options.candidates.reference,
            options.candidates.named(incumbent),
        )
