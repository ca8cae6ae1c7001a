"""The one door to the machine: whatever the inventory reads, it reads through a `System`.

So a recorded machine can stand in for a real one, and a real one can be recorded.
"""

import grp
import os
import pwd
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from errno import errorcode
from typing import Any, Final, Protocol

from appliance.inventory.fork import Fork, NoAnswer

#: Nothing worth reading is longer: /proc/cpuinfo of 1024 threads has 2 MB.
_MAX_TEXT_BYTES: Final = 4 << 20

_LEAST_SECONDS: Final = 0.2

Waiter = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the daemon is.

    Attributes:
        uid: Effective user id.
        user: Its name, or the number where it has none.
        groups: Names of the groups the process has.
        member_of: Names of the groups the user has joined; the process gets new ones when it is started again.
    """

    uid: int
    user: str
    groups: tuple[str, ...] = ()
    member_of: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Node:
    """A device node.

    Attributes:
        mode: Permission bits.
        user: Owner's name.
        group: Group's name.
        refusal: Why the process may not read and write it, such as ``"EACCES"``; empty where its mode lets it.
        is_readable: Whether its mode lets the process at least read it.
    """

    mode: int
    user: str
    group: str
    refusal: str = ""
    is_readable: bool = True


class System(Protocol):
    """A machine. Every method but `ask` answers at once."""

    def read(self, path: str) -> str:
        """A file's text.

        Raises:
            OSError: It cannot be read.
        """
        ...

    def names(self, path: str) -> tuple[str, ...]:
        """Names in a directory, sorted.

        Raises:
            OSError: It cannot be listed.
        """
        ...

    def link(self, path: str) -> str:
        """Last name of what a symbolic link points to.

        Raises:
            OSError: There is no such link.
        """
        ...

    def node(self, path: str) -> Node:
        """A device node.

        Raises:
            OSError: There is none.
        """
        ...

    def identity(self) -> Identity:
        """Who asks."""
        ...

    def affinity(self) -> tuple[int, ...]:
        """Ids of the cores the scheduler lets this process use."""
        ...

    def kernel(self) -> tuple[str, str]:
        """The kernel's release and the machine's architecture, as uname(2) has them."""
        ...

    def ask(self, question: str, argument: str = "") -> Waiter:
        """Begin to ask what may hang or crash; the returned function waits for the answer, a JSON value.

        The function raises `NoAnswer`.
        """
        ...


def peek(system: System, path: str) -> str:
    """A small file's text without the white space and NULs around it; empty where it cannot be read."""
    try:
        return system.read(path).strip(" \t\n\0")
    except OSError:
        return ""


def names_of(system: System, path: str) -> tuple[str, ...]:
    """Names in a directory; none where it cannot be listed."""
    try:
        return system.names(path)
    except OSError:
        return ()


class Live:
    """The machine this runs on.

    Args:
        questions: What `ask` knows, by name; runs in a process of its own, with the argument.
        seconds: All answers must have come after as long.
        at_start: Runs first in each of those processes.
    """

    def __init__(
        self,
        questions: Mapping[str, Callable[[str], Any]] | None = None,
        seconds: float = 1.0,
        at_start: Callable[[], None] = lambda: None,
    ) -> None:
        self._questions = questions or {}
        self._deadline = time.monotonic() + seconds
        self._at_start = at_start

    def read(self, path: str) -> str:
        """As `System.read`."""
        with open(path, "rb") as file:
            return file.read(_MAX_TEXT_BYTES).decode("utf-8", "replace")

    def names(self, path: str) -> tuple[str, ...]:
        """As `System.names`."""
        return tuple(sorted(os.listdir(path)))

    def link(self, path: str) -> str:
        """As `System.link`."""
        return os.path.basename(os.readlink(path))

    def node(self, path: str) -> Node:
        """As `System.node`."""
        found = os.stat(path)
        may_read, may_write = (os.access(path, mode, effective_ids=True) for mode in (os.R_OK, os.W_OK))
        return Node(
            found.st_mode & 0o7777,
            _user_name(found.st_uid),
            _group_name(found.st_gid),
            "" if may_read and may_write else "EACCES",
            may_read,
        )

    def identity(self) -> Identity:
        """As `System.identity`."""
        uid, gid = os.geteuid(), os.getegid()
        user = _user_name(uid)
        groups = {gid, *os.getgroups()}
        joined = set(groups)
        try:
            joined.update(os.getgrouplist(user, gid))
        except (OSError, KeyError):
            joined = groups
        return Identity(uid, user, tuple(map(_group_name, sorted(groups))), tuple(map(_group_name, sorted(joined))))

    def affinity(self) -> tuple[int, ...]:
        """As `System.affinity`."""
        return tuple(sorted(os.sched_getaffinity(0)))

    def kernel(self) -> tuple[str, str]:
        """As `System.kernel`."""
        name = os.uname()
        return name.release, name.machine

    def ask(self, question: str, argument: str = "") -> Waiter:
        """As `System.ask`."""
        work = self._questions.get(question)
        if work is None:
            return _unasked
        fork = Fork(lambda: work(argument), self._at_start)
        # What is asked late, since something else took its time, gets some all the same.
        deadline = max(self._deadline, time.monotonic() + _LEAST_SECONDS)
        return lambda: fork.answer(deadline)


def _unasked() -> Any:
    raise NoAnswer("it was not asked")


def open_error(path: str) -> str:
    """Why a node cannot be opened, such as ``"EPERM"``; empty where it can. May hang: a question for `Live.ask`."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        return errorcode.get(error.errno or 0, "EIO")
    return ""


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
