"""Writes to the registry that are not on disk yet."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

#: Changes sent together, in bytes of JSON at about most: encoding them holds up nobody.
_BATCH_BYTES: Final = 65536

Change = dict[str, Any]
Name = tuple[str, ...]


@dataclass(eq=False, slots=True)
class Pending:
    """One change that is to be written.

    Attributes:
        name: What it changes.
        change: As the registrar takes it.
        size_bytes: Of it as JSON.
        waiting: Resolved with True once it is on disk, with False when it will not be there soon.
    """

    name: Name
    change: Change
    size_bytes: int
    waiting: list[asyncio.Future[bool]] = field(default_factory=list)


class Backlog:
    """Changes in the order they were asked for; of one thing the newest alone.

    Args:
        limit: More than this are not kept: the oldest go.

    Attributes:
        dropped: Changes that went for that reason.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pending: dict[Name, Pending] = {}
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._pending)

    def __contains__(self, name: Name) -> bool:
        return name in self._pending

    def add(self, name: Name, change: Change) -> Pending:
        """Put a change at the end; one of the same name that still waits is not needed any more.

        Raises:
            TypeError, ValueError: It is not made of values of JSON.
        """
        pending = Pending(name, change, len(json.dumps(change)))
        older = self._pending.pop(name, None)
        if older is not None:
            pending.waiting.extend(older.waiting)
        self._pending[name] = pending
        if len(self._pending) > self._limit:
            self.drop(next(iter(self._pending.values())))
            self.dropped += 1
        return pending

    def batch(self) -> Sequence[Pending]:
        """The changes to write next, one at least; they stay here until they are `done`."""
        found: list[Pending] = []
        size = 0
        for pending in self._pending.values():
            size += pending.size_bytes
            if found and size > _BATCH_BYTES:
                break
            found.append(pending)
        return found

    def done(self, batch: Sequence[Pending]) -> None:
        """These are on disk."""
        for pending in batch:
            self._forget(pending)
            _resolve(pending, True)

    def drop(self, pending: Pending) -> None:
        """This one will never be."""
        self._forget(pending)
        _resolve(pending, False)

    def stop_waiting(self) -> None:
        """Nothing here will be on disk soon; it stays here all the same."""
        for pending in self._pending.values():
            _resolve(pending, False)

    def _forget(self, pending: Pending) -> None:
        if self._pending.get(pending.name) is pending:  # else something newer has taken its place meanwhile
            del self._pending[pending.name]


def _resolve(pending: Pending, is_written: bool) -> None:
    for each in pending.waiting:
        if not each.done():
            each.set_result(is_written)
    pending.waiting.clear()
