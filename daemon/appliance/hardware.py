"""The machine and what backends make of it: surveyed at the start, on demand, and when the kernel reports a change."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

from appliance.child import ChildFailed
from appliance.errors import BackendError
from appliance.hotplug import Hotplug
from appliance.inventory import Inventory, Step
from appliance.inventory.asking import REFRESH_SECONDS, is_makeshift, take_inventory, take_recording
from appliance.inventory.ladder import failed, passed, with_rung
from appliance.plugins import BackendRecord, PluginStatus, discover, reasons_unlisted, smoke

_log = logging.getLogger("appliance.hardware")

#: Looks at the machine; is told the directories that matter and how many seconds it may take.
Survey = Callable[[Mapping[str, str], float], Awaitable[Inventory]]


class Hardware:
    """Owns the inventory and the backends' records.

    Args:
        inventory: What the first survey found.
        directories: Directories whose disks matter, by purpose.
        disabled: Backends that are not to be probed.
        pythons: Interpreter by backend name.
        survey: Looks at the machine.

    Attributes:
        inventory: The machine as it is known now.
        on_change: Called after a refresh.
    """

    def __init__(
        self,
        inventory: Inventory,
        directories: Mapping[str, str],
        disabled: Collection[str],
        pythons: Mapping[str, str],
        survey: Survey = take_inventory,
    ) -> None:
        self.inventory = inventory
        self.on_change: Callable[[], None] = lambda: None
        self._directories = directories
        self._disabled = disabled
        self._pythons = pythons
        self._survey = survey
        self._discovery: asyncio.Task[dict[str, BackendRecord]] | None = None
        self._climb: asyncio.Task[None] | None = None
        self._refresh: asyncio.Task[None] | None = None
        self._hotplug = Hotplug(self._changed)

    def watch(self) -> None:
        """Refresh whenever a device comes or goes, from now on; at once where the first survey ran out of time."""
        self._hotplug.start()
        if self.inventory.problems:
            self.doubt()

    async def stop(self) -> None:
        """End what is under way."""
        self._hotplug.stop()
        tasks = {task for task in (self._discovery, self._climb, self._refresh) if task is not None}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _changed(self) -> None:
        _log.info("a device came or went: looking at the hardware again")
        self.doubt()

    def doubt(self) -> None:
        """A device may be gone: look, unless somebody looks already."""
        self._start_refresh()

    async def backends(self) -> Mapping[str, BackendRecord]:
        """Every backend by name, probed once and on first need."""
        if self._discovery is None:
            self._discovery = asyncio.ensure_future(discover(self.inventory, self._disabled, self._pythons))
        return await asyncio.shield(self._discovery)

    async def refresh(self) -> Inventory:
        """Look at the machine and ask the backends anew; joins a refresh under way."""
        await asyncio.shield(self._start_refresh())
        return await self.climbed()

    def _start_refresh(self) -> "asyncio.Task[None]":
        if self._refresh is None or self._refresh.done():
            self._refresh = asyncio.ensure_future(self._look_again())
        return self._refresh

    async def _look_again(self) -> None:
        inventory = await self._survey(self._directories, REFRESH_SECONDS)
        if is_makeshift(inventory) and not is_makeshift(self.inventory):
            # A survey that failed says nothing about the devices it did not get to see.
            _log.warning("%s", inventory.problems[0])
            return
        records = await discover(inventory, self._disabled, self._pythons)
        self.inventory, self._climb = inventory, None
        if self._discovery is not None:
            await asyncio.wait({self._discovery})
        self._discovery = asyncio.ensure_future(_ready(records))
        self.on_change()

    async def climbed(self) -> Inventory:
        """The inventory with the rungs that backends fill: listed by a runtime, and a small computation came out right.

        The computation is run once, on first demand: it takes a process for each device of each backend.
        """
        if self._climb is None:
            self._climb = asyncio.ensure_future(self._climb_all())
        await asyncio.shield(self._climb)
        return self.inventory

    async def _climb_all(self) -> None:
        base = inventory = self.inventory
        records = [each for each in (await self.backends()).values() if each.status is PluginStatus.AVAILABLE]
        results = await asyncio.gather(*(smoke(record, base) for record in records))
        for device in inventory.devices:
            if not device.is_usable:
                continue
            listing = [record for record in records if device.id in record.devices]
            if not listing:
                reasons = reasons_unlisted(records, device.id)
                reason = reasons or "no installed backend serves devices of its kind"
                rung = failed(Step.LISTED, reason, "" if reasons else "install a backend for it")
                inventory = with_rung(inventory, device.id, rung)
                continue
            names = ", ".join(f"{record.name} ({record.runtime})" for record in listing)
            inventory = with_rung(inventory, device.id, passed(Step.LISTED, names))
            tried = {
                record.name: found[device.id]
                for record, found in zip(records, results, strict=True)
                if device.id in found
            }
            right = [name for name, problem in tried.items() if problem == ""]
            wrong = [f"{name}: {problem}" for name, problem in tried.items() if problem]
            if right:
                inventory = with_rung(inventory, device.id, passed(Step.SMOKE, ", ".join(right)))
            elif wrong:
                fix = "see the driver's log; `appliancectl backends` shows the runtimes"
                inventory = with_rung(inventory, device.id, failed(Step.SMOKE, "; ".join(wrong), fix))
        if self.inventory is base:  # else a refresh came between
            self.inventory = inventory

    async def record(self) -> dict[str, Any]:
        """Everything that a survey of the machine reads, for a bug report.

        Raises:
            BackendError: The survey did not answer.
        """
        try:
            return await take_recording(self._directories)
        except ChildFailed as error:
            raise BackendError(f"cannot record the hardware: {error}") from error


async def _ready(records: dict[str, BackendRecord]) -> dict[str, BackendRecord]:
    return records
