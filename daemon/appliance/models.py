"""The models of the repository: what each is, where it stands, and the instance that serves it.

One `Model` owns the changes to itself: a load or unload runs at a time, concurrent loads join the one under way, and a
reload swaps instances between two turns of the event loop, so that no request meets a gap.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

from appliance.config import WorkersSection
from appliance.deadline import Deadlines
from appliance.errors import ApplianceError, ArtifactCorrupt, Conflict, ModelNotFound, ModelNotReady, NoPlacement
from appliance.instance import Instance, Placement
from appliance.manifest import Manifest, read_manifest, resolve_inside, verify_digest
from appliance.metrics import ModelStatistics
from appliance.placement import placements
from appliance.plugins import BackendRecord
from appliance.text import TextEncoder
from appliance.types import ModelDescription, ModelState, ModelStatus

_log = logging.getLogger("appliance.models")

#: Time a replaced or unloaded instance has for the requests it admitted.
_DRAIN_SECONDS: Final = 30.0

Records = Callable[[], Awaitable[Mapping[str, BackendRecord]]]


class _Prepared:
    """What a load found on disk, before any worker runs."""

    __slots__ = ("candidates", "encoder", "fingerprint", "manifest", "version")

    def __init__(self, directory: Path, records: Mapping[str, BackendRecord], cache: Path) -> None:
        self.manifest = read_manifest(directory)
        self.version = self.manifest.versions[-1]
        self.candidates = placements(self.manifest, directory, self.version, records, cache)
        self.encoder = _read_encoder(self.manifest, directory)
        files = [Path(candidate.load.artifact_path) for candidate in self.candidates]
        stats = tuple((str(file), file.stat().st_ino, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
        self.fingerprint = (self.manifest, stats)


def _read_encoder(manifest: Manifest, directory: Path) -> TextEncoder | None:
    if manifest.text is None:
        return None
    path = resolve_inside(directory, manifest.text.tokenizer)
    verify_digest(path, manifest.text.tokenizer_sha256, manifest.text.tokenizer)
    try:
        return TextEncoder(manifest.text, path.read_bytes(), manifest.name)
    except OSError as error:
        raise ArtifactCorrupt(f"cannot read {manifest.text.tokenizer!r}: {error.strerror}") from error


class Model:
    """One model of the repository.

    Attributes:
        name: Its name.
        statistics: Counters since the daemon started.
        encoder: The tokenizer, for models with a text input that are loaded.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        cache: Path,
        settings: WorkersSection,
        deadlines: Deadlines,
        on_change: Callable[[str], None],
    ) -> None:
        self.name = name
        self._cache = cache
        self.directory = directory
        self.statistics = ModelStatistics()
        self.encoder: TextEncoder | None = None
        self._settings = settings
        self._deadlines = deadlines
        self._on_change = on_change
        self._instance: Instance | None = None
        self._prepared: _Prepared | None = None
        self._change: asyncio.Task[None] | None = None
        self._is_loading = False
        self._retiring: set[asyncio.Task[None]] = set()
        self._failure: ApplianceError | None = None

    # ---------------------------------------------------------------- what others ask

    @property
    def state(self) -> ModelState:
        """Where the model stands; a loaded model stays READY while it is reloaded."""
        if self._instance is not None:
            return self._instance.state
        if self._change is not None and self._is_loading:
            return ModelState.LOADING
        return ModelState.FAILED if self._failure is not None else ModelState.UNLOADED

    @property
    def version(self) -> str:
        """The version served, or the one last looked at."""
        return self._prepared.version if self._prepared is not None else ""

    def serving(self, version: str = "") -> Instance:
        """The instance that answers requests.

        Raises:
            ModelNotFound: `version` is not the one served.
            ModelNotReady: The model is not loaded, or not ready.
        """
        self.check_version(version)
        if self._instance is None:
            because = f": {self._failure}" if self._failure is not None else ""
            raise ModelNotReady(f"cannot run the request: model {self.name!r} is {self.state.value}{because}")
        if not self._instance.accepts:
            raise self._instance.refusal()
        return self._instance

    def check_version(self, version: str) -> None:
        """Raise `ModelNotFound` unless `version` is empty or the one served."""
        if version and version != self.version:
            raise ModelNotFound(
                f"cannot find version {version[:32]!r} of model {self.name!r}: it serves {self.version!r}"
            )

    def status(self) -> ModelStatus:
        """The model as `status` shows it."""
        instance = self._instance
        if instance is None:
            return ModelStatus(
                name=self.name,
                version=self.version,
                state=self.state,
                reason=str(self._failure) if self._failure is not None else "",
                task=self._prepared.manifest.task if self._prepared is not None else "tensor",
            )
        loaded = instance.loaded
        return ModelStatus(
            name=self.name,
            version=self.version,
            state=instance.state,
            reason=instance.reason,
            task=self._prepared.manifest.task if self._prepared is not None else "tensor",
            backend=instance.placement.backend,
            device=loaded.execution.device,
            precision=loaded.execution.precision,
            provider=loaded.execution.provider,
            runtime=loaded.runtime,
            max_batch_size=loaded.max_batch_size,
            pid=instance.pid,
            resident_bytes=loaded.resident_bytes,
            restarts=instance.restarts,
            load_ms=instance.load_ns / 1e6,
            queued=instance.queued,
            running=instance.running,
        )

    def describe(self, version: str = "") -> ModelDescription:
        """What a client must know to call the model.

        Raises:
            ModelNotFound: No such version.
            ModelNotReady: The model was never loaded, so its tensors are unknown.
        """
        self.check_version(version)
        if self._instance is None or self._prepared is None:
            raise ModelNotReady(
                f"cannot describe model {self.name!r}: it is {self.state.value}, and tensors are known once loaded"
            )
        signature = self._instance.signature
        format_ = self._instance.placement.load.artifact_format
        return ModelDescription(
            name=self.name,
            version=self.version,
            versions=tuple(self._prepared.manifest.versions),
            platform=f"{self._instance.placement.backend}_{format_.replace('-', '_')}",
            inputs=signature.public_inputs(),
            outputs=signature.public_outputs(),
            max_batch_size=signature.max_batch_size,
            status=self.status(),
        )

    @property
    def manifest(self) -> Manifest | None:
        """The manifest of the version served or last looked at."""
        return self._prepared.manifest if self._prepared is not None else None

    # ---------------------------------------------------------------- load and unload

    async def load(self, records: Records) -> None:
        """Load, or reload if the model changed on disk; joins a load under way.

        Raises:
            ApplianceError: The load failed; an instance that served before still serves.
            Conflict: The model is being unloaded.
        """
        if self._change is None:
            self._start_change(self._load(records), is_loading=True)
        elif not self._is_loading:
            raise Conflict(f"cannot load model {self.name!r}: it is being unloaded")
        await self._join()

    async def unload(self) -> None:
        """Unload, once a load under way has ended; does nothing to a model that is not loaded."""
        while self._change is not None and self._is_loading:
            await asyncio.wait({self._change})
        if self._change is None:
            if self._instance is None and self._failure is None:
                return
            self._start_change(self._unload(), is_loading=False)
        await self._join()

    def _start_change(self, change: Awaitable[None], is_loading: bool) -> None:
        self._is_loading = is_loading
        self._change = asyncio.ensure_future(change)
        self._change.add_done_callback(self._end_change)
        self._on_change(self.name)

    def _end_change(self, change: asyncio.Task[None]) -> None:
        self._change = None
        if not change.cancelled():
            change.exception()  # whoever joined has it; nobody joins a change whose caller left
        self._on_change(self.name)

    async def _join(self) -> None:
        if self._change is not None:
            await asyncio.shield(self._change)

    async def _load(self, records: Records) -> None:
        try:
            found = await records()
            prepared = await asyncio.to_thread(_Prepared, self.directory, found, self._cache)
            serving = self._instance
            if (
                serving is not None
                and self._prepared is not None
                and prepared.fingerprint == self._prepared.fingerprint
            ):
                if serving.state is ModelState.READY:
                    return
            instance = await self._first_that_loads(prepared)
        except ApplianceError as error:
            self._failure = error
            raise
        except OSError as error:
            self._failure = ArtifactCorrupt(f"cannot read model {self.name!r}: {error.strerror}")
            raise self._failure from error
        replaced, self._instance = self._instance, instance
        self._prepared, self.encoder, self._failure = prepared, prepared.encoder, None
        if replaced is not None:
            self._retire(replaced)

    async def _first_that_loads(self, prepared: _Prepared) -> Instance:
        failures: list[tuple[Placement, ApplianceError]] = []
        for candidate in prepared.candidates:
            instance = Instance(
                asyncio.get_running_loop(),
                prepared.manifest,
                candidate,
                self._settings,
                self.statistics,
                self._deadlines,
                lambda: self._on_change(self.name),
            )
            try:
                await instance.start()
            except ApplianceError as error:
                _log.warning("%s on %s: %s", self.name, candidate.backend, error)
                failures.append((candidate, error))
            except BaseException:
                await instance.close()
                raise
            else:
                return instance
        if len({type(error) for _, error in failures}) == 1 and not isinstance(failures[0][1], NoPlacement):
            raise failures[0][1]
        listed = "; ".join(f"{candidate.backend}: {error}" for candidate, error in failures)
        raise NoPlacement(f"cannot place model {self.name!r}: {listed}")

    async def _unload(self) -> None:
        instance, self._instance = self._instance, None
        self._failure = None
        if instance is not None:
            self._on_change(self.name)
            await instance.drain(_DRAIN_SECONDS)
            await instance.close()
        self.encoder = None

    def _retire(self, instance: Instance) -> None:
        async def end() -> None:
            await instance.drain(_DRAIN_SECONDS)
            await instance.close()

        task = asyncio.ensure_future(end())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def stop(self, grace_seconds: float) -> None:
        """Drain and end everything; a load under way is given up."""
        if self._change is not None:
            self._change.cancel()
            await asyncio.wait({self._change})
        if self._instance is not None:
            await self._instance.drain(grace_seconds)
            await self._instance.close()
        for task in list(self._retiring):
            task.cancel()
        if self._retiring:
            await asyncio.wait(self._retiring)
