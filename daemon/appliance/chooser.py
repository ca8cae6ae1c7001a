"""Which variants a model version has on this machine, what is known of each, and which is to serve.

Brings together what others own: the backends' offers, the inventory, the registry's measurements and evidence.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from appliance.artifacts import companions, contents_digest, fingerprint, resolve_inside
from appliance.backend import Artifact
from appliance.candidates import Candidate, Candidates, Source, list_candidates, place
from appliance.choice import Choice, choose
from appliance.errors import ArtifactCorrupt
from appliance.inventory import Inventory
from appliance.manifest import Manifest
from appliance.measurement import Measurement, VariantKey, key_of
from appliance.placement import ChosenBy, Placement
from appliance.plugins import BackendRecord
from appliance.quality import METRIC_OF_TASK, Evidence
from appliance.registry import Registry, StoredPlacement

_log = logging.getLogger("appliance.chooser")

Records = Callable[[], Awaitable[Mapping[str, BackendRecord]]]

#: In place of a sample's digest where the inputs are made up.
SYNTHETIC = "synthetic"


@dataclass(frozen=True, slots=True)
class Options:
    """What a model version can be run as, and the key of each way.

    Attributes:
        manifest: The model's.
        directory: The model's.
        version: Which version.
        candidates: Every way.
        keys: By candidate name; empty where nobody needed them (see `Chooser.options`).
        sample: Hex sha256 of the evaluation sample, or ``"synthetic"``; empty where `keys` is.
    """

    manifest: Manifest
    directory: Path
    version: str
    candidates: Candidates
    keys: Mapping[str, VariantKey]
    sample: str

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

    async def options(self, manifest: Manifest, directory: Path, version: str, with_keys: bool = True) -> Options:
        """What a model version can be run as.

        Args:
            manifest: The model's.
            directory: The model's.
            version: Which version.
            with_keys: False leaves out the keys, and with them reading the artifacts.

        Raises:
            NoPlacement, InvalidManifest: As `list_candidates`.
            ArtifactCorrupt: An artifact cannot be read.
        """
        records = await self._records()
        derived = await self._derived(manifest, directory, version) if with_keys else []
        found = await asyncio.to_thread(
            list_candidates, manifest, directory, version, records, self._inventory(), derived
        )
        options = Options(manifest, directory, version, found, {}, "")
        if not with_keys:
            return options
        artifacts = {one.source.artifact.path: one.source.artifact for one in found.found}
        digests = {path: await self._digest(path, artifact.sha256) for path, artifact in artifacts.items()}
        path = options.sample_path
        sample = SYNTHETIC if path is None else await self._digest(path)
        keys = {
            one.name: key_of(
                digests[one.source.artifact.path],
                one.variant,
                one.runtime,
                one.device.identity,
                one.device.driver_key,
            )
            for one in found.found
        }
        return replace(options, keys=keys, sample=sample)

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
        options = await self.options(manifest, directory, version, with_keys=stored is not None)
        tries = [(one, ChosenBy.RULE) for one in options.candidates.first_tries()]
        if stored is not None:
            first = self._pinned(options, stored) if stored.is_pinned else self._measured(options, stored)
            if first is not None:
                by = ChosenBy.PINNED if stored.is_pinned else ChosenBy.MEASURED
                tries = [(first, by), *((one, how) for one, how in tries if one is not first)]
        return await asyncio.to_thread(lambda: [self._place(options, one, by) for one, by in tries])

    def _pinned(self, options: Options, stored: StoredPlacement) -> Candidate | None:
        known = options.candidates.named(stored.variant)
        if known is None:
            _log.warning("%s: the pinned variant %s is not to be had", stored.model, stored.variant)
        return known

    def _measured(self, options: Options, stored: StoredPlacement) -> Candidate | None:
        """What the measurements say by the objective and bound the manifest has now, else what was chosen last."""
        choice = self.decide(options, stored.variant)
        if choice.winner is not None:
            return choice.winner
        last = next((one for one in options.candidates.found if options.keys[one.name].id == stored.key), None)
        proof = None if last is None else self.evidence(options, last)
        return None if proof is not None and proof.refusal else last

    def _place(self, options: Options, candidate: Candidate, by: ChosenBy) -> Placement:
        samples = options.manifest.samples
        recording = str(self.recording(options.manifest.name)) if samples and samples.record else ""
        return place(
            candidate,
            options.manifest,
            options.directory,
            options.version,
            self._inventory(),
            self._cache,
            recording,
            by,
        )

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
        reference = options.candidates.reference
        if reference is None:
            return None
        found = self.registry.evidence(
            options.keys[candidate.name].id, options.keys[reference.name].id, options.sample, options.metric
        )
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
