"""Other processes as the kernel tells of them."""

from pathlib import Path


def state(pid: int) -> str:
    """One letter of proc(5), such as T for stopped; X for a process that is no more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def is_over(pid: int) -> bool:
    """True where it has ended, even if nobody has asked how."""
    return state(pid) in "XZ"
