"""The rungs of a device's ladder: what the system shows, and what backends add."""

from dataclasses import replace
from typing import Final

from appliance.inventory import Inventory, Rung, Step

_STEPS: Final = tuple(Step)

#: Why the rungs that backends fill are empty at first.
UNTRIED: Final = "no backend has tried yet"


def passed(step: Step, reason: str = "") -> Rung:
    """A rung that was climbed."""
    return Rung(step, True, reason)


def failed(step: Step, reason: str, fix: str) -> Rung:
    """A rung that was not, with what a person can do."""
    return Rung(step, False, reason, fix)


def climb(*rungs: Rung) -> tuple[Rung, ...]:
    """A whole ladder from the rungs that are known, lowest first: above the first that failed nothing is tried."""
    climbed: list[Rung] = []
    for rung in rungs:
        climbed.append(rung)
        if rung.passed is False:
            break
    known = {rung.step for rung in climbed}
    above = [step for step in (Step.LISTED, Step.SMOKE) if step not in known]
    has_failed = any(rung.passed is False for rung in climbed)
    climbed += [Rung(step, None, "" if has_failed else UNTRIED) for step in above]
    return tuple(climbed)


def with_rung(inventory: Inventory, device_id: str, rung: Rung) -> Inventory:
    """`inventory` with `rung` in the place of the device's rung of that step; unchanged without such a device."""
    devices = tuple(
        replace(
            device,
            ladder=tuple(
                sorted(
                    (*(each for each in device.ladder if each.step != rung.step), rung),
                    key=lambda each: _STEPS.index(each.step),
                )
            ),
        )
        if device.id == device_id
        else device
        for device in inventory.devices
    )
    return replace(inventory, devices=devices)
