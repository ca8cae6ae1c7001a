"""Checks of the models: whether they serve, where, and whether that is well founded."""

from collections.abc import Iterator
from typing import Final

from appliance.doctor import Finding, Severity
from appliance.doctor.facts import Facts, ModelFacts
from appliance.types import ModelState

#: Below this nobody notices.
_SWAPPED_BYTES: Final = 64 << 20
_SWAPPED_SHARE: Final = 0.1


def _log(facts: Facts) -> str:
    return "journalctl -u applianced" if facts.is_unit else "the daemon's log"


def model(facts: Facts) -> Iterator[Finding]:
    """A model that was to serve does not."""
    for each in facts.models:
        status = each.status
        if status.state is ModelState.FAILED:
            yield Finding(
                "model",
                Severity.ERROR,
                f"model {status.name} cannot be loaded",
                status.reason,
                f"mend what the reason names, then appliancectl load {status.name}",
            )
        elif status.state in (ModelState.QUARANTINED, ModelState.RESTARTING):
            is_quarantined = status.state is ModelState.QUARANTINED
            yield Finding(
                "model",
                Severity.ERROR if is_quarantined else Severity.WARNING,
                f"model {status.name} is {status.state.value}",
                status.reason + (f"; last it {status.last_crash}" if is_quarantined and status.last_crash else ""),
                f"{_log(facts)} has what its worker said; appliancectl explain {status.name} shows other ways to run "
                f"it and appliancectl pin {status.name} VARIANT chooses one; once mended, appliancectl unload "
                f"{status.name} and load it again",
            )


def crashes(facts: Facts) -> Iterator[Finding]:
    """A model serves, and its worker has crashed."""
    for each in facts.models:
        status = each.status
        if status.state is ModelState.READY and status.restarts:
            times = "once" if status.restarts == 1 else f"{status.restarts} times"
            yield Finding(
                "crashes",
                Severity.WARNING,
                f"the worker of model {status.name} was restarted {times}",
                f"the last one {status.last_crash or 'ended'}; it ran {status.runtime} on {status.device}",
                f"{_log(facts)} has what it said; where it happens again, appliancectl pin {status.name} VARIANT "
                "chooses another way to run it",
            )


def fallback(facts: Facts) -> Iterator[Finding]:
    """A model serves, but not on the device of the first choice."""
    for each in facts.models:
        status = each.status
        if status.state is ModelState.READY and status.fallback and status.device == status.requested_device:
            yield _elsewhere(
                each, "fallback", f"model {status.name} runs on {status.device} as a fallback", status.fallback
            )


def placement(facts: Facts) -> Iterator[Finding]:
    """A session was asked for one device and executes on another."""
    for each in facts.models:
        status = each.status
        if status.state is ModelState.READY and status.device != status.requested_device:
            title = f"model {status.name} was to run on {status.requested_device} and runs on {status.device}"
            reason = status.fallback or f"{status.runtime} says that {status.provider} executes it, and not why"
            yield _elsewhere(each, "placement", title, reason)


def _elsewhere(each: ModelFacts, check: str, title: str, reason: str) -> Finding:
    name = each.status.name
    return Finding(
        check,
        Severity.NOTE if each.fallback_policy == "allow" else Severity.WARNING,
        title,
        reason,
        f"mend what the reason names, then appliancectl unload {name} and appliancectl load {name}; in the model's "
        'model.toml fallback = "forbid" has it fail instead, and fallback = "allow" accepts it',
    )


def pin(facts: Facts) -> Iterator[Finding]:
    """A variant is pinned and another serves."""
    for each in facts.models:
        status = each.status
        if status.state is ModelState.READY and each.pinned and each.pinned != status.variant:
            yield Finding(
                "pin",
                Severity.WARNING,
                f"model {status.name} does not run as {each.pinned}, which is pinned",
                f"it runs as {status.variant}"
                + (f": {status.fallback}" if status.fallback else ", since the pinned variant is not to be had"),
                f"appliancectl explain {status.name} says what became of it; appliancectl pin {status.name} VARIANT "
                f"chooses another, appliancectl unpin {status.name} leaves it to the measurements",
            )


def measurements(facts: Facts) -> Iterator[Finding]:
    """What a choice rests on is missing, or holds no more."""
    for each in facts.models:
        name = each.status.name
        if not each.unmeasured:
            continue
        how_many = f"{each.unmeasured} of {each.ways} ways to run it"
        if each.outdated:
            yield Finding(
                "measurements",
                Severity.WARNING,
                f"measurements of model {name} are out of date",
                f"{each.outdated} were made with another driver, runtime, device or artifact than there is now; "
                f"{how_many} have none that holds",
                f"appliancectl tune {name}",
            )
        else:
            yield Finding(
                "measurements",
                Severity.NOTE,
                f"model {name} is not fully measured",
                f"{how_many} have no measurement yet, so the choice rests on a rule or on part of the numbers",
                f"appliancectl tune {name}; or wait, since the daemon measures while it is idle, unless "
                "tuning.enabled is false",
            )


def swapped(facts: Facts) -> Iterator[Finding]:
    """The kernel has moved a loaded model to disk."""
    for each in facts.models:
        whole = each.status.resident_bytes + each.swapped_bytes
        if each.swapped_bytes >= max(_SWAPPED_BYTES, _SWAPPED_SHARE * whole):
            yield Finding(
                "swapped",
                Severity.WARNING,
                f"model {each.status.name} is partly swapped out",
                f"{each.swapped_bytes >> 20} MiB of its worker's memory are on disk, so the next requests wait for it",
                "unload models nobody needs (appliancectl unload NAME) or add memory; "
                + facts.in_unit("MemorySwapMax=0", "or turn swap off (sudo swapoff -a)"),
            )
