"""The file systems that hold models and what is made of them."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from appliance.inventory import Disk
from appliance.inventory.fork import NoAnswer
from appliance.inventory.mounts import Mount, mount_of, parse_mountinfo
from appliance.inventory.system import System, Waiter, peek


def measure_space(path: str) -> dict[str, Any]:
    """Where `path` really lies and how much room there is; of what does not exist yet, the nearest directory that does.

    May hang on a file server that is gone: a question for `Live.ask`.

    Raises:
        OSError: It cannot be read.
    """
    real = os.path.realpath(path)
    while not os.path.exists(real) and real != "/":
        real = os.path.dirname(real)
    space = os.statvfs(real)
    return {"path": real, "total": space.f_blocks * space.f_frsize, "free": space.f_bavail * space.f_frsize}


def begin(system: System, directories: Mapping[str, str]) -> dict[str, Waiter]:
    """Begin to measure each directory, by purpose."""
    return {purpose: system.ask("space", path) for purpose, path in directories.items()}


def finish(system: System, directories: Mapping[str, str], asked: Mapping[str, Waiter]) -> tuple[list[Disk], list[str]]:
    """The disks, and what could not be read, in sentences."""
    mounts = parse_mountinfo(peek(system, "/proc/self/mountinfo"))
    disks: list[Disk] = []
    problems: list[str] = []
    for purpose, waiter in asked.items():
        try:
            disks.append(_disk(system, purpose, directories[purpose], mounts, waiter()))
        except NoAnswer as silence:
            problems.append(f"cannot read the file system of the {purpose}: {silence}")
    return disks, problems


def _disk(system: System, purpose: str, path: str, mounts: Sequence[Mount], space: Mapping[str, Any]) -> Disk:
    mount = mount_of(mounts, space["path"])
    name = _block_device(system, mount) if mount else ""
    file_system = mount.file_system if mount else ""
    return Disk(
        purpose=purpose,
        path=path,
        device=name or file_system,
        file_system=file_system,
        total_bytes=space["total"],
        free_bytes=space["free"],
        is_rotational=_is_rotational(system, name) if name else None,
    )


def _block_device(system: System, mount: Mount) -> str:
    """Name of the block device, or nothing for a file system without one; btrfs has numbers of its own."""
    try:
        return system.link(f"/sys/dev/block/{mount.device}")
    except OSError:
        name = mount.source.removeprefix("/dev/")
        return name if name != mount.source and "/" not in name else ""


def _is_rotational(system: System, name: str) -> bool | None:
    """Whether the disk turns; of a partition, the disk it is on. Virtual disks say they do, and nobody knows."""
    if name.startswith(("vd", "xvd")):
        return None
    for directory in ("queue", "../queue"):
        if (text := peek(system, f"/sys/class/block/{name}/{directory}/rotational")) in ("0", "1"):
            return text == "1"
    return None
