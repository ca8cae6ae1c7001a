"""What is mounted where, from the text of /proc/self/mountinfo."""

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo (proc_pid_mountinfo(5)).

    Attributes:
        device: ``major:minor`` of the files on it.
        root: Directory of the file system that is mounted.
        point: Where it is mounted.
        file_system: Its type.
        source: What is mounted, such as ``"/dev/nvme0n1p2"``.
        options: The file system's own options; of control groups the controllers.
    """

    device: str
    root: str
    point: str
    file_system: str
    source: str
    options: tuple[str, ...] = ()


def parse_mountinfo(text: str) -> list[Mount]:
    """Every mount, in order; lines of another shape are left out."""
    mounts = []
    for line in text.splitlines():
        before, separator, after = line.partition(" - ")
        left, right = before.split(" "), after.split(" ")
        if separator and len(left) >= 6 and len(right) >= 2:
            options = tuple(right[2].split(",")) if len(right) > 2 else ()
            mounts.append(Mount(left[2], _plain(left[3]), _plain(left[4]), right[0], _plain(right[1]), options))
    return mounts


def mount_of(mounts: Sequence[Mount], path: str) -> Mount | None:
    """The mount that `path`, absolute and without links, lies on: the deepest, and the last of those."""
    found = None
    for mount in mounts:
        point = mount.point.rstrip("/")
        if (path == point or path.startswith(f"{point}/")) and (found is None or len(mount.point) >= len(found.point)):
            found = mount
    return found


def thin_mountinfo(text: str) -> str:
    """The same without the long option lists of file systems that are no control groups."""
    lines = (line if " - cgroup" in line else re.sub(r"( - \S+ \S+) .*$", r"\1", line) for line in text.splitlines())
    return "\n".join(lines) + "\n"


def _plain(word: str) -> str:
    """Undo the octal escapes of blanks and backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), word)
