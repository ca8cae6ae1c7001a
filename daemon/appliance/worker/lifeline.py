"""Ties a child process to the daemon: it never outlives it, and it is the one the kernel takes when memory runs out."""

import contextlib
import ctypes
import os
import signal
import socket
import struct
from pathlib import Path
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_UCRED: Final = struct.Struct("3i")

#: Added to the badness the kernel counts: a worker is replaceable, the front-end is not.
_OOM_SCORE_ADJUSTMENT: Final = "500"


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends (prctl(2), PR_SET_PDEATHSIG).

    A parent that was gone before the call leaves no signal behind; see `parent_is_gone`.

    Raises:
        OSError: The kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def parent_is_gone(link: socket.socket) -> bool:
    """True where the process that made `link`, a socketpair inherited from the parent, is not the parent any more.

    The credentials of a socketpair's end are those of its maker (unix(7), SO_PEERCRED).
    """
    pid, _, _ = _UCRED.unpack(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return bool(os.getppid() != pid)


def volunteer_for_oom_kill() -> None:
    """Raise this process's own OOM score; needs no privilege and is no loss where it fails."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE_ADJUSTMENT)
