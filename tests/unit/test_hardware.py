"""The machine and what the installed backends make of it, with their real probes."""

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))

from appliance.hardware import Hardware
from appliance.inventory import Device, Inventory, Rung, Step
from appliance.inventory.cpu import read_inventory
from appliance.inventory.ladder import climb, passed
from support.workers import until

CARD = Device(
    "nvidia0", "gpu", "A card", 1 << 34, ("sm_89",), "nvidia", "570.1", "GPU-1",
    ladder=climb(passed(Step.PRESENT), passed(Step.DRIVER, "570.1"), passed(Step.OPENABLE)),
)  # fmt: skip


def machine(*devices: Device) -> Inventory:
    own = read_inventory()
    return replace(own, devices=(*own.devices, *devices))


def run(scenario, first: Inventory, *later: Inventory, disabled=()):
    """Run `scenario` with hardware whose refreshes find `later`, one after the other."""
    found = iter(later)

    async def survey(_directories, _seconds):
        return next(found)

    async def whole():
        hardware = Hardware(first, {}, disabled, {}, survey)
        try:
            await scenario(hardware)
        finally:
            await hardware.stop()

    asyncio.run(whole())


def rungs(inventory: Inventory, device: str) -> dict[Step, Rung]:
    return {rung.step: rung for rung in inventory.device(device).ladder}


def test_the_cpu_is_listed_and_computes_rightly_by_every_backend():
    async def scenario(hardware):
        found = rungs(await hardware.climbed(), "cpu")
        assert (found[Step.LISTED].passed, found[Step.SMOKE].passed) == (True, True)
        assert "onnxruntime" in found[Step.SMOKE].reason
        assert "openvino" in found[Step.SMOKE].reason
        assert hardware.inventory.devices[0].is_usable

    run(scenario, machine())


def test_a_card_that_no_runtime_lists_stops_at_that_rung_with_the_runtimes_reason():
    async def scenario(hardware):
        found = rungs(await hardware.climbed(), "nvidia0")
        assert found[Step.LISTED].passed is False
        assert "onnxruntime-gpu" in found[Step.LISTED].reason
        assert found[Step.SMOKE].passed is None

    run(scenario, machine(CARD))


def test_a_refresh_finds_what_came_and_what_went_and_tells():
    async def scenario(hardware):
        told = []
        hardware.on_change = lambda: told.append(1)
        await hardware.backends()
        assert (await hardware.refresh()).device("nvidia0") is not None
        assert (await hardware.backends())["onnxruntime"].unlisted.keys() == {"nvidia0"}
        assert (await hardware.refresh()).device("nvidia0") is None
        assert told == [1, 1]

    run(scenario, machine(), machine(CARD), machine())


def test_refreshes_at_the_same_time_are_one():
    async def scenario(hardware):
        first, second = await asyncio.gather(hardware.refresh(), hardware.refresh())
        assert first is second

    run(scenario, machine(), machine(CARD))


def test_a_first_survey_that_ran_out_of_time_is_made_again():
    async def scenario(hardware):
        hardware.watch()
        await until(lambda: hardware.inventory.device("nvidia0") is not None)

    run(scenario, replace(machine(), problems=("cannot survey the hardware: it took too long",)), machine(CARD))


@pytest.mark.parametrize("disabled", [("onnxruntime", "openvino")])
def test_without_backends_the_cpu_is_listed_by_nobody(disabled):
    async def scenario(hardware):
        found = rungs(await hardware.climbed(), "cpu")
        assert found[Step.LISTED].passed is False
        assert found[Step.LISTED].fix == "install a backend for it"

    run(scenario, machine(), disabled=disabled)
