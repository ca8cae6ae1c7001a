"""The models of the repository: what each is, where it stands, and the instance that serves it.

One `Model` owns the changes to itself: a load or unload runs at a time, concurrent loads join the one under way, and a
reload swaps instances between two turns of the event loop, so that no request meets a gap.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from appliance import heap
from appliance.activity import Activity
from appliance.artifacts import resolve_inside, verify_digest
from appliance.chooser import Chooser
from appliance.clients import Client
from appliance.config import WorkersSection
from appliance.deadline import Deadlines
from appliance.errors import (
    ApplianceError,
    ArtifactCorrupt,
    BackendError,
    Conflict,
    DeviceLost,
    ModelNotFound,
    ModelNotReady,
    NoPlacement,
    ShuttingDown,
)
from appliance.instance import Instance
from appliance.manifest import Manifest, read_manifest
from appliance.measurement import Measurement
from appliance.metrics import ModelStatistics
from appliance.placement import ChosenBy, Placement
from appliance.shares import Shares
from appliance.text import TextEncoder
from appliance.types import ModelDescription, ModelState, ModelStatus

_log = logging.getLogger("appliance.models")

#: Time a replaced or unloaded instance has for the requests it admitted.
_DRAIN_SECONDS: Final = 30.0


class _Prepared:
    """What a load found on disk, before any worker runs."""

    __slots__ = ("encoder", "fingerprint", "manifest", "placements", "version")

    def __init__(self, directory: Path, manifest: Manifest, placements: Sequence[Placement]) -> None:
        self.manifest = manifest
        self.version = manifest.versions[-1]
        self.placements = placements
        self.encoder = _read_encoder(manifest, directory)
        self.fingerprint = (manifest, _files(directory, [each.load.artifact_path for each in placements]))

    @classmethod
    async def read(cls, directory: Path, chooser: Chooser) -> "_Prepared":
        """Read a model's directory and decide what to try.

        Raises:
            ApplianceError: It cannot be used, or nothing can run it.
        """
        manifest = await asyncio.to_thread(read_manifest, directory)
        placements = await chooser.placements(manifest, directory, manifest.versions[-1])
        return await asyncio.to_thread(cls, directory, manifest, placements)


def _files(directory: Path, artifacts: Sequence[str]) -> tuple[tuple[str, int, int, int], ...]:
    """Every file of a model with what changes when it does: weights beside the artifact, tokenizers and labels too.

    Links to directories are not followed, since they may lead in circles; `artifacts` are named for that.
    """
    paths = {os.path.join(folder, name) for folder, _, names in os.walk(directory) for name in names}
    found = []
    for path in sorted(paths | set(artifacts)):
        with contextlib.suppress(FileNotFoundError):  # a link to nowhere; whoever needs it says so
            status = os.stat(path)
            found.append((path, status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)


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
        chooser: Chooser,
        settings: WorkersSection,
        deadlines: Deadlines,
        activity: Activity,
        shares: Shares,
        on_change: Callable[[str], None],
    ) -> None:
        self.name = name
        self._chooser = chooser
        self._activity = activity
        self._shares = shares
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
        if self._change is not None:
            return ModelState.LOADING if self._is_loading else ModelState.UNLOADING
        return ModelState.FAILED if self._failure is not None else ModelState.UNLOADED

    @property
    def is_idle(self) -> bool:
        """True while nothing of it runs or changes."""
        return self._instance is None and self._change is None and not self._retiring

    @property
    def version(self) -> str:
        """The version served, or the one last looked at."""
        return self._prepared.version if self._prepared is not None else ""

    @property
    def variant(self) -> str:
        """Name of the candidate that serves; empty while none does."""
        return self._instance.placement.variant if self._instance is not None else ""

    @property
    def chosen_by(self) -> str:
        """What the choice of `variant` rests on; empty while nothing serves."""
        return self._instance.placement.chosen_by if self._instance is not None else ""

    @property
    def requested_device(self) -> str:
        """The device that `variant` is placed on; empty while nothing serves."""
        return self._instance.placement.load.device if self._instance is not None else ""

    @property
    def has_lost_its_device(self) -> bool:
        """True where it failed since the device it must run on is gone."""
        return isinstance(self._failure, DeviceLost)

    def note_choice(self, by: ChosenBy, measurement: Measurement | None) -> None:
        """What serves is now somebody's choice: by measuring, or by hand."""
        if self._instance is not None:
            self._instance.placement = replace(self._instance.placement, chosen_by=by, measurement=measurement)
            self._instance.cost_model.seed(measurement)

    @property
    def is_displaced(self) -> bool:
        """True where it runs elsewhere than it should."""
        return self._instance is not None and bool(self._instance.placement.fallback)

    @property
    def is_busy(self) -> bool:
        """True while requests wait or run."""
        return self._instance is not None and bool(self._instance.queued or self._instance.running)

    def forget(self, client: Client) -> None:
        """A client is gone."""
        if self._instance is not None:
            self._instance.forget(client)

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
            variant=instance.placement.variant,
            chosen_by=instance.placement.chosen_by,
            requested_device=instance.placement.load.device,
            fallback=instance.fallback,
            device=loaded.execution.device,
            precision=loaded.execution.precision,
            provider=loaded.execution.provider,
            runtime=loaded.runtime,
            max_batch_size=loaded.max_batch_size,
            pid=instance.pid,
            resident_bytes=loaded.resident_bytes,
            restarts=instance.restarts,
            last_crash=instance.last_crash,
            load_ms=instance.load_ns / 1e6,
            queued=instance.queued,
            queued_by_priority=instance.queued_by_priority,
            queued_bytes=instance.queued_bytes,
            running=instance.running,
            streams=max(loaded.streams, 1),
            cache=instance.single_flight.status() if instance.single_flight is not None else None,
            costs=instance.cost_model.describe(max(loaded.max_batch_size, 1)),
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
            manifest=self._prepared.manifest,
        )

    @property
    def manifest(self) -> Manifest | None:
        """The manifest of the version served or last looked at."""
        return self._prepared.manifest if self._prepared is not None else None

    # ---------------------------------------------------------------- load and unload

    async def load(self) -> None:
        """Load, or reload if the model changed on disk; joins a load under way and waits for an unload.

        Raises:
            ApplianceError: The load failed; an instance that served before still serves.
        """
        while self._change is not None and not self._is_loading:
            await asyncio.wait({self._change})
        if self._change is None:
            self._start_change(self._load(), is_loading=True)
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
        change = self._change
        if change is None:
            return
        await asyncio.wait({change})  # a caller that leaves does not end the change for others
        if change.cancelled():
            raise ShuttingDown(f"cannot finish changing model {self.name!r}: the daemon is stopping")
        change.result()

    async def _load(self) -> None:
        try:
            if not self.directory.is_dir():
                raise ModelNotFound(f"cannot load model {self.name!r}: the repository has it no more")
            prepared = await _Prepared.read(self.directory, self._chooser)
            serving = self._instance
            is_same = self._prepared is not None and prepared.fingerprint == self._prepared.fingerprint
            if is_same and serving is not None and serving.state is ModelState.READY:
                self._failure = None
                return
            instance = await self._first_that_loads(prepared.manifest, prepared.placements)
        except ApplianceError as error:
            self._failure = error
            raise
        except OSError as error:
            self._failure = ArtifactCorrupt(f"cannot read model {self.name!r}: {error.strerror}")
            raise self._failure from error
        except Exception as error:  # our bug must not take the daemon's start with it
            _log.exception("loading %s failed", self.name)
            self._failure = BackendError(f"cannot load model {self.name!r}: an internal error; the log has it")
            raise self._failure from error
        replaced, self._instance = self._instance, instance
        self._prepared, self.encoder, self._failure = prepared, prepared.encoder, None
        if replaced is not None:
            instance.inherit(replaced)
            self._retire(replaced)
        heap.trim()  # reading a tokenizer frees megabytes

    async def _first_that_loads(self, manifest: Manifest, placements: Sequence[Placement]) -> Instance:
        failures: list[tuple[Placement, ApplianceError]] = []
        first = placements[0]
        for each in placements:
            placement = each
            if failures:
                if each.load.device != first.load.device:
                    if manifest.fallback == "forbid":
                        continue
                    placement = replace(each, fallback=_fallback_reason(failures))
                elif first.chosen_by is ChosenBy.PINNED:
                    placement = replace(each, fallback=_fallback_reason(failures))
            instance = self._new_instance(manifest, placement)
            try:
                await instance.start()
            except ApplianceError as error:
                _log.warning("%s as %s: %s", self.name, placement.variant, error)
                failures.append((placement, error))
            except BaseException:
                await instance.close()
                raise
            else:
                return instance
        if len({type(error) for _, error in failures}) == 1 and not isinstance(failures[0][1], NoPlacement):
            raise failures[0][1]
        listed = "; ".join(f"{placement.variant}: {error}" for placement, error in failures)
        if len(failures) < len(placements):
            listed += "; fallback is 'forbid', so no other device is tried"
        raise NoPlacement(f"cannot place model {self.name!r}: {listed}")

    def _new_instance(self, manifest: Manifest, placement: Placement) -> Instance:
        return Instance(
            asyncio.get_running_loop(),
            manifest,
            placement,
            self._settings,
            self.statistics,
            self._deadlines,
            lambda: self._on_change(self.name),
            activity=self._activity,
            shares=self._shares,
        )

    async def move(self, placement: Placement) -> None:
        """Have another variant of the version that is loaded take over; no request meets a gap.

        Raises:
            ModelNotReady: The model is not loaded.
            Conflict: Its files changed since it was loaded, so the variant may be one of another model; or sequences
                live, whose state a change that nobody asked for must not cost.
            ApplianceError: The variant cannot be loaded; what served before still serves.
        """
        while self._change is not None:
            await asyncio.wait({self._change})
        self._start_change(self._move(placement), is_loading=True)
        await self._join()

    async def _move(self, placement: Placement) -> None:
        if self._instance is None or self._prepared is None:
            raise ModelNotReady(f"cannot change how model {self.name!r} runs: it is {self.state.value}")
        prepared = self._prepared
        if placement.load.version != prepared.version:
            raise ModelNotReady(
                f"cannot change how model {self.name!r} runs: it serves version {prepared.version!r} now"
            )
        artifacts = [each.load.artifact_path for each in prepared.placements]
        fingerprint = (
            await asyncio.to_thread(read_manifest, self.directory),
            await asyncio.to_thread(_files, self.directory, artifacts),
        )
        if fingerprint != prepared.fingerprint:
            raise Conflict(f"cannot change how model {self.name!r} runs: its files changed; load it again first")
        self._spare_sequences(placement)
        instance = self._new_instance(prepared.manifest, placement)
        await instance.start()
        try:
            self._spare_sequences(placement)
        except Conflict:
            await instance.close()
            raise
        replaced, self._instance = self._instance, instance
        if replaced is not None:
            instance.inherit(replaced)
            self._retire(replaced)

    def _spare_sequences(self, placement: Placement) -> None:
        """Refuse a change that is not an administrator's wish while sequences live.

        Raises:
            Conflict: Some do.
        """
        live = self._instance.live_sequences if self._instance is not None else 0
        if live and placement.chosen_by is ChosenBy.MEASURED:
            raise Conflict(f"cannot change how model {self.name!r} runs: the state of {live} sequences would be lost")

    async def displace(self, lost: str, reason: str) -> None:
        """Leave a device that is gone: run elsewhere as far as the manifest's fallback allows, else fail.

        Args:
            lost: The device; a model that runs elsewhere by the time it is asked stays where it is.
            reason: What is the matter with the device.

        Raises:
            ApplianceError: The model runs nowhere now.
        """
        while self._change is not None:
            await asyncio.wait({self._change})
        self._start_change(self._displace(lost, reason), is_loading=True)
        await self._join()

    async def _displace(self, lost: str, reason: str) -> None:
        instance, prepared = self._instance, self._prepared
        if instance is None or prepared is None or instance.placement.load.device != lost:
            return
        error = DeviceLost(f"cannot run model {self.name!r} on {lost!r}: {reason}")
        try:
            if prepared.manifest.fallback == "forbid":
                raise error
            found = await self._chooser.placements(prepared.manifest, self.directory, prepared.version)
            others = [replace(each, fallback=f"{lost}: {reason}") for each in found if each.load.device != lost]
            if not others:
                raise error
            self._instance = await self._first_that_loads(prepared.manifest, others)
        except ApplianceError as failure:
            self._failure, self._instance = failure, None
            raise
        finally:
            if self._instance is not instance:
                await _end(instance, 0, error)

    async def _unload(self) -> None:
        instance, self._instance = self._instance, None
        self._failure = None
        if instance is not None:
            self._on_change(self.name)
            await _end(instance, _DRAIN_SECONDS)
        self.encoder = None

    def _retire(self, instance: Instance) -> None:
        task = asyncio.ensure_future(_end(instance, _DRAIN_SECONDS))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def stop(self, grace_seconds: float) -> None:
        """Drain and end everything within the grace; a load under way is given up."""
        if self._change is not None and self._is_loading:
            self._change.cancel()
            await asyncio.wait({self._change})
        ending = self._retiring | ({self._change} if self._change is not None else set())
        tasks = set(ending)
        if self._instance is not None:
            stopping = ShuttingDown("cannot finish the request: the daemon is stopping")
            tasks.add(asyncio.ensure_future(_end(self._instance, grace_seconds, stopping)))
        if ending:
            _, late = await asyncio.wait(ending, timeout=grace_seconds)
            for task in late:
                task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _fallback_reason(failures: Sequence[tuple[Placement, ApplianceError]]) -> str:
    return "; ".join(f"{placement.variant}: {error}" for placement, error in failures)


async def _end(instance: Instance, grace_seconds: float, error: ApplianceError | None = None) -> None:
    """Drain and close; being cancelled cuts the grace short."""
    with contextlib.suppress(asyncio.CancelledError):
        await instance.drain(grace_seconds)
    await instance.close(error)
