"""How a device is split among runs at the same time, as options, the manifest's ``[instances]`` and people say it."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from appliance.backend import SPLIT, Variant
from appliance.inventory import Device
from appliance.manifest import InstancesSection, Manifest

#: An option of `SPLIT` in a candidate's name.
_IN_NAME: Final = re.compile(rf"/({'|'.join(SPLIT)})=([1-9][0-9]{{0,3}})(?=/|$)")


def streams_of(options: Mapping[str, str]) -> int:
    """Runs at the same time."""
    return _number(options, "streams") or 1


def threads_of(options: Mapping[str, str], device: Device) -> int:
    """Cores that each run may use; 0 on a device that is no CPU, or whose cores nobody knows."""
    if device.kind != "cpu":
        return 0
    return _number(options, "threads") or threads_for(streams_of(options), device)


def threads_for(streams: int, device: Device) -> int:
    """Cores that each of so many runs gets where all are used, one at least; 0 as `threads_of`."""
    return max(device.cores // streams, 1) if device.kind == "cpu" and device.cores else 0


def split_options(streams: int, threads: int, device: Device) -> dict[str, str]:
    """The options for so many runs of so many cores; none for what a backend does by itself."""
    options = {"streams": str(streams)} if streams > 1 else {}
    if threads and (streams > 1 or threads != device.cores):
        options["threads"] = str(threads)
    return options


def split_in(name: str) -> dict[str, str]:
    """The options of `SPLIT` in a candidate's name."""
    return dict(_IN_NAME.findall(name.partition("@")[0]))


def with_split(variant: Variant, split: Mapping[str, str]) -> Variant:
    """`variant` with these options of `SPLIT` and no others."""
    others = {name: value for name, value in variant.options.items() if name not in SPLIT}
    return replace(variant, options={**others, **split})


def pinned(options: Mapping[str, str], wish: InstancesSection, device: Device) -> dict[str, str] | None:
    """A backend's offer as the manifest wants it, or None where what that leaves open does not go with it."""
    found = dict(options)
    if wish.streams is not None:
        found.pop("streams", None)
        found |= {"streams": str(wish.streams)} if wish.streams > 1 else {}
    if wish.threads is not None and device.kind == "cpu":
        found["threads"] = str(wish.threads)
    if found == options or device.kind != "cpu":
        return found
    streams, threads = streams_of(found), _number(found, "threads")
    if streams > 1 and not threads and (each := threads_for(streams, device)):
        found["threads"] = str(each)
    is_all_pinned = wish.streams is not None and wish.threads is not None
    return None if not is_all_pinned and threads > 1 and 0 < device.cores < streams * threads else found


def refusal(variant: Variant, device: Device, manifest: Manifest) -> str:
    """Why the manifest does not allow a variant's split; empty where it does."""
    wishes = {
        ("instances", "streams"): manifest.instances.streams,
        ("instances", "threads"): manifest.instances.threads if device.kind == "cpu" else None,
        **{("placement", name): manifest.placement.options.get(name) for name in SPLIT},
    }
    has = {"streams": streams_of(variant.options), "threads": threads_of(variant.options, device)}
    for (section, name), wish in wishes.items():
        if wish is not None and str(wish) != str(has[name]):
            return f"[{section}] of its manifest says {name} = {wish}"
    return ""


def _number(options: Mapping[str, str], name: str) -> int:
    """A number among the options; 0 where there is none, or something else, of which the backend will complain."""
    text = options.get(name, "")
    return int(text) if text.isdecimal() else 0
