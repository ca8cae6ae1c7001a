"""What the appliance has learned, in memory for reading at once, and in the registrar's database for ever.

Reading never waits. Writing changes memory at once and the database soon; where the database cannot be written, for
whatever reason, the daemon goes on with what it has in memory, and every later write tries again.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

from appliance.backlog import Backlog, Change, Name
from appliance.conversation import MAX_QUESTION_BYTES
from appliance.measurement import Measurement
from appliance.quality import Evidence
from appliance.registry_link import RegistryFailed, RegistryLink, registrar_command
from appliance.stored import (
    RECORDS,
    DerivedVariant,
    Event,
    Record,
    StoredDigest,
    StoredEvidence,
    StoredMeasurement,
    StoredPlacement,
    WantedJob,
)

__all__ = ["DerivedVariant", "Event", "Registry", "RegistryHealth", "StoredMeasurement", "StoredPlacement", "WantedJob"]

_log = logging.getLogger("appliance.registry")

_R = TypeVar("_R", bound=Record)

#: The database's name in the state directory.
FILE_NAME: Final = "registry.db"
#: Writes kept for a database that cannot be written.
_MAX_BACKLOG: Final = 10_000
#: What one change may take, with room for the words around it.
_MAX_CHANGE_BYTES: Final = MAX_QUESTION_BYTES - 1024


@dataclass(frozen=True, slots=True)
class RegistryHealth:
    """What a close look at the registry finds.

    Attributes:
        reason: Why it cannot be used; empty where it can. The rest is known only where it can.
        problems: What the integrity check complains about.
        schema: Name of the newest change of its tables.
        size_bytes: Of the database and all beside it: its log, backups, damaged predecessors.
        rows: By table.
        moved_aside: Names of damaged predecessors.
        backups: Names of copies made before its tables were changed.
    """

    reason: str = ""
    problems: tuple[str, ...] = ()
    schema: str = ""
    size_bytes: int = 0
    rows: Mapping[str, int] = field(default_factory=dict)
    moved_aside: tuple[str, ...] = ()
    backups: tuple[str, ...] = ()


class Registry:
    """The front-end's registry.

    The methods that write return True once what they wrote is on disk, and False where it is in memory alone for now;
    they raise nothing.

    Args:
        directory: The state directory, made where it is missing.
        command: Starts a registrar; None for the usual one.
        idle_seconds: The registrar's process ends after as long without work.
        now: The date and time for people, ISO 8601 in UTC.

    Attributes:
        problem: Why the database cannot be used; empty where it can, as far as is known.
        moved_aside: Name of a damaged database that was replaced by a new one since the start; else empty.
    """

    def __init__(
        self,
        directory: Path,
        *,
        command: Sequence[str] | None = None,
        idle_seconds: float = 10.0,
        now: Callable[[], str] = lambda: datetime.now(UTC).isoformat(timespec="seconds"),
    ) -> None:
        self._link = RegistryLink(command or registrar_command(directory / FILE_NAME), idle_seconds)
        self._now = now
        self._tables: dict[str, dict[tuple[str, ...], Record]] = {table: {} for table in RECORDS}
        self._backlog = Backlog(_MAX_BACKLOG)
        self._flushing: asyncio.Task[None] | None = None
        self._is_closed = False
        self._is_read = False
        self._identity = ""
        self.problem = ""
        self.moved_aside = ""

    # ------------------------------------------------------------ life

    async def open(self) -> None:
        """Read what is known. Where that fails `problem` says why, and the next write tries again."""
        try:
            await self._read()
        except RegistryFailed as error:
            self._fail(str(error))

    async def close(self, seconds: float = 15.0) -> None:
        """Write what is not on disk yet, if that works within `seconds`, and end the registrar."""
        try:
            async with asyncio.timeout(seconds):
                if self._flushing is not None and not self._flushing.done():
                    await self._flushing
                elif self._backlog:
                    await self._flush()
        except TimeoutError:
            self._fail("cannot write the registry: it took too long")
        self._is_closed = True
        if self._backlog:
            _log.error("%d changes of the registry are lost: %s", len(self._backlog), self.problem)
        self._backlog.stop_waiting()
        await self._link.end()

    @property
    def registrar_pid(self) -> int | None:
        """The registrar's process id while there is one."""
        return self._link.pid

    @property
    def unwritten(self) -> int:
        """Changes that are in memory alone."""
        return len(self._backlog)

    async def check(self) -> RegistryHealth:
        """Look closely."""
        try:
            found = (await self._ask({"do": "check"}))["result"]
        except RegistryFailed as error:
            return RegistryHealth(reason=str(error))
        return RegistryHealth(
            problems=tuple(found["problems"]),
            schema=found["schema"],
            size_bytes=found["size_bytes"],
            rows=found["rows"],
            moved_aside=tuple(found["moved_aside"]),
            backups=tuple(found["backups"]),
        )

    # ------------------------------------------------------------ reading

    def measurement(self, key: str) -> Measurement | None:
        """The complete measurement of the variant with this `VariantKey.id`."""
        stored = self._get(StoredMeasurement, key)
        return stored.measurement if stored is not None and stored.is_complete else None

    def partial(self, key: str) -> Measurement | None:
        """What an interrupted measurement of the variant found out before; None where there is none."""
        stored = self._get(StoredMeasurement, key)
        return stored.measurement if stored is not None and not stored.is_complete else None

    def measurements(self, model: str) -> list[StoredMeasurement]:
        """All of a model's, of every version, complete or not, the oldest first."""
        return [each for each in self._all(StoredMeasurement) if each.model == model]

    def evidence(self, key: str, reference: str, sample: str, metric: str) -> Evidence | None:
        """The verdict on a variant: by the `VariantKey.id` of both, and the sample's digest."""
        stored = self._get(StoredEvidence, key, reference, sample, metric)
        return stored.evidence if stored is not None else None

    def variants(self, model: str, version: str | None = None) -> list[DerivedVariant]:
        """What was made of a model's artifacts, the oldest first; of every version where None is named."""
        made = (each for each in self._all(DerivedVariant) if each.model == model)
        return [each for each in made if version in (None, each.version)]

    def placement(self, model: str, version: str) -> StoredPlacement | None:
        """The variant that was chosen."""
        return self._get(StoredPlacement, model, version)

    def digest(self, fingerprint: str) -> str | None:
        """Hex sha256 of the artifact with this fingerprint."""
        stored = self._get(StoredDigest, fingerprint)
        return stored.sha256 if stored is not None else None

    def wanted(self) -> list[WantedJob]:
        """Jobs that were asked for and have not finished, in the order asked."""
        return self._all(WantedJob)

    async def events(self, limit: int = 100, model: str = "") -> list[Event]:
        """The newest events, newest first; of one model, or of all.

        Raises:
            ApplianceError: The registry cannot be read.
        """
        found: list[Event] = []

        def take(part: Mapping[str, Any]) -> None:
            found.extend(Event.from_row(row) for row in part["rows"])

        try:
            await self._ask({"do": "events", "limit": limit, "model": model}, take)
        except RegistryFailed as error:
            raise error.error from error
        return found

    # ------------------------------------------------------------ writing

    async def put_measurement(
        self, model: str, version: str, measurement: Measurement, is_complete: bool = True
    ) -> bool:
        """Keep a measurement in place of the variant's former one."""
        return await self._put(StoredMeasurement(model, version, measurement, is_complete))

    async def put_evidence(self, model: str, version: str, metric: str, evidence: Evidence) -> bool:
        """Keep a verdict in place of the former one of the same variant, reference, sample and metric."""
        return await self._put(StoredEvidence(model, version, metric, evidence))

    async def put_variant(self, variant: DerivedVariant) -> bool:
        """Keep what was made of a model."""
        return await self._put(variant)

    async def remove_variant(self, variant: DerivedVariant) -> bool:
        """Forget it; its file is not touched."""
        return await self._remove(variant.table, *variant.row_key)

    async def put_placement(self, placement: StoredPlacement) -> bool:
        """Keep a choice in place of the former one; one without a date gets it."""
        return await self._put(placement if placement.at else replace(placement, at=self._now()))

    async def remove_placement(self, model: str, version: str) -> bool:
        """Forget a choice; one that was pinned is pinned no more."""
        return await self._remove(StoredPlacement.table, model, version)

    async def put_digest(self, fingerprint: str, sha256: str) -> bool:
        """Keep a digest."""
        return await self._put(StoredDigest(fingerprint, sha256))

    async def put_wanted(self, job: WantedJob) -> bool:
        """Keep a job until it is removed, in place of a former one of that kind; one without a date gets it."""
        return await self._put(job if job.requested_at else replace(job, requested_at=self._now()))

    async def remove_wanted(self, model: str, kind: str) -> bool:
        """The job is done, or nobody wants it any more."""
        return await self._remove(WantedJob.table, model, kind)

    async def add_event(self, kind: str, model: str, text: str) -> bool:
        """Say that something happened now."""
        event = Event(secrets.token_hex(8), self._now(), kind, model, text)
        return await self._write((event.table, *event.row_key), _change_of(event))

    async def forget(self, model: str) -> bool:
        """Forget all that is known of a model, but for events and digests of its files."""
        for table in self._tables.values():
            for key in [key for key, record in table.items() if getattr(record, "model", None) == model]:
                del table[key]
        return await self._write(("forget", model), {"do": "forget", "model": model})

    # ------------------------------------------------------------ inside

    def _get(self, kind: type[_R], *key: str) -> _R | None:
        found = self._tables[kind.table].get(key)
        return found if isinstance(found, kind) else None

    def _all(self, kind: type[_R]) -> list[_R]:
        return [each for each in self._tables[kind.table].values() if isinstance(each, kind)]

    async def _put(self, record: Record) -> bool:
        table = self._tables[record.table]
        table.pop(record.row_key, None)
        table[record.row_key] = record  # the newest at the end, as in the database
        return await self._write((record.table, *record.row_key), _change_of(record))

    async def _remove(self, table: str, *key: str) -> bool:
        self._tables[table].pop(key, None)
        return await self._write((table, *key), {"do": "remove", "table": table, "keys": key})

    async def _write(self, name: Name, change: Change) -> bool:
        if self._is_closed:
            return False
        dropped = self._backlog.dropped
        pending = self._backlog.add(name, change)
        if pending.size_bytes > _MAX_CHANGE_BYTES:
            self._backlog.drop(pending)
            _log.error("a change of %s is kept in memory alone: it takes %d bytes", name[0], pending.size_bytes)
            return False
        if dropped == 0 < self._backlog.dropped:
            _log.error("changes of the registry are kept in memory alone from now on: more than %d wait", _MAX_BACKLOG)
        written: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        pending.waiting.append(written)
        self._begin_flush()
        return await written

    def _begin_flush(self) -> None:
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.ensure_future(self._flush())

    async def _flush(self) -> None:
        """Write all there is. Where that fails it stays in the backlog, and whoever waits is told."""
        try:
            while self._backlog:
                if not self._is_read:
                    await self._read()
                batch = self._backlog.batch()
                try:
                    await self._ask({"do": "write", "changes": [pending.change for pending in batch]})
                except RegistryFailed as error:
                    if error.index is None:
                        raise
                    _log.error("a change of %s is kept in memory alone: %s", batch[error.index].name[0], error)
                    self._backlog.drop(batch[error.index])
                else:
                    self._backlog.done(batch)
        except RegistryFailed as error:
            self._fail(str(error))
        finally:
            self._backlog.stop_waiting()

    async def _read(self) -> None:
        """Take in what the database has; what memory has, or a pending change took away, is newer.

        Raises:
            RegistryFailed: The database cannot be read.
        """
        await self._ask({"do": "read"}, self._merge)
        self._is_read = True

    def _merge(self, part: Mapping[str, Any]) -> None:
        kind = RECORDS[part["table"]]
        table = self._tables[kind.table]
        for row in part["rows"]:
            try:
                record = kind.from_row(row)
            except (KeyError, TypeError, ValueError):
                _log.warning("a row of %s in the registry cannot be understood and is left out", kind.table)
                continue
            newer = (kind.table, *record.row_key), ("forget", row.get("model", ""))
            if not any(name in self._backlog for name in newer):
                table.setdefault(record.row_key, record)

    async def _ask(self, question: Change, take_part: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
        """Ask the registrar, and notice where the database is not the one it was.

        Raises:
            RegistryFailed: It cannot do it.
        """
        answer = await self._link.ask(question, take_part)
        if self.problem:
            _log.info("the registry can be used again")
            self.problem = ""
        if (aside := answer.get("moved_aside", "")) and aside != self.moved_aside:
            self.moved_aside = aside
            _log.error("the registry was damaged; it is now %s, and a new one was begun", aside)
        if self._identity and answer["identity"] != self._identity:
            for table in self._tables.values():  # what is known is not lost with the file
                for record in table.values():
                    if (name := (record.table, *record.row_key)) not in self._backlog:
                        self._backlog.add(name, _change_of(record))
            self._begin_flush()
        self._identity = answer["identity"]
        return answer

    def _fail(self, problem: str) -> None:
        if problem != self.problem:
            _log.error("%s; the daemon goes on with what it has in memory", problem)
        self.problem = problem


def _change_of(record: Record | Event) -> Change:
    return {"do": "put", "table": record.table, "row": record.as_row()}
