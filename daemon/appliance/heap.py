"""The C library's heap: what it frees it keeps, which on a machine with little memory is too much."""

import ctypes
from typing import Final

#: mallopt(3): at most this many arenas. Each thread would otherwise get one, and each keeps what it once needed.
_M_ARENA_MAX: Final = -8
_ARENAS: Final = 2


def limit_arenas() -> None:
    """Let threads share arenas; to be called before there are threads. Does nothing where it is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, _ARENAS)


def trim() -> None:
    """Give free memory back to the kernel. Does nothing where it is not glibc."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
