"""Ties a child process to the daemon: it never outlives it, and it is the one the kernel takes when memory runs out."""

import contextlib
import ctypes
import os
import signal
from pathlib import Path
from typing import Final

_PR_SET_PDEATHSIG: Final = 1

#: Added to the badness the kernel counts: a child is replaceable, the front-end is not.
_OOM_SCORE_ADJUSTMENT: Final = "500"


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends (prctl(2), PR_SET_PDEATHSIG).

    A parent that was gone before the call leaves no signal behind; the end of file on what it held open tells.

    Raises:
        OSError: The kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def volunteer_for_oom_kill() -> None:
    """Raise this process's own OOM score; needs no privilege and is no loss where it fails."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE_ADJUSTMENT)
