"""How the daemon gets its inventory: from a short-lived child, since drivers hang and crash."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from appliance import child
from appliance.inventory import Inventory

if TYPE_CHECKING:
    from appliance.config import Config

#: The daemon's start waits no longer for its inventory. GPUs asleep can take longer to answer: a refresh has the time.
START_SECONDS: Final = 2.0
REFRESH_SECONDS: Final = 15.0

#: What starting the child and writing its answer may take of that; drivers get the rest.
_OVERHEAD_SECONDS: Final = 0.7

#: How the problem of an inventory begins that was read without the survey.
_MAKESHIFT: Final = "cannot survey the hardware:"

#: -P: the working directory is nobody's place to import from.
_COMMAND: Final = (sys.executable, "-P", "-m", "appliance.worker.survey")


def directories_of(config: "Config") -> dict[str, str]:
    """The directories whose disks matter, by purpose."""
    return {
        "models": str(Path(config.repository.path).resolve()),
        "cache": str(config.cache_directory()),
        "state": str(config.state_directory()),
    }


def is_makeshift(inventory: Inventory) -> bool:
    """True for one that `take_inventory` made up of CPU and memory, since the survey gave no usable answer."""
    return any(problem.startswith(_MAKESHIFT) for problem in inventory.problems)


async def take_inventory(
    directories: Mapping[str, str], seconds: float = START_SECONDS, command: Sequence[str] = _COMMAND
) -> Inventory:
    """The machine; CPU and memory alone, and why among the problems, where the child gives no usable answer.

    Args:
        directories: Directories to find the disks of, by purpose: ``"models"``, ``"cache"``, ``"state"``.
        seconds: The child may take as long.
        command: The child.
    """
    try:
        answer = await _ask(directories, seconds, command, is_recorded=False)
        return Inventory.from_json(answer["inventory"])
    except child.ChildFailed as error:
        reason = str(error)
    except (KeyError, TypeError, ValueError, AttributeError):
        reason = "its answer is not an inventory"
    # Late: a daemon whose survey works never needs it.
    from appliance.inventory.cpu import read_inventory

    problem = f"{_MAKESHIFT} {reason}. CPU and memory were read without it; appliancectl hardware --refresh tries again"
    return replace(read_inventory(), problems=(problem,))


async def take_recording(
    directories: Mapping[str, str], seconds: float = REFRESH_SECONDS, command: Sequence[str] = _COMMAND
) -> dict[str, Any]:
    """Everything a survey reads, as `appliance.inventory.recording.Recorder` notes it, with the inventory it led to.

    Raises:
        ChildFailed: The child gave no usable answer.
    """
    answer = await _ask(directories, seconds, command, is_recorded=True)
    recording = answer.get("recording")
    if not isinstance(recording, dict):
        raise child.ChildFailed("its answer is not a recording")
    return {**recording, "inventory": answer.get("inventory")}


async def _ask(
    directories: Mapping[str, str], seconds: float, command: Sequence[str], *, is_recorded: bool
) -> dict[str, Any]:
    question = {
        "directories": dict(directories),
        "record": is_recorded,
        "seconds": max(seconds - _OVERHEAD_SECONDS, 0.1),
    }
    return await child.ask(command, question, seconds)
