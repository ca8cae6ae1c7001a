"""What SQLite and the system say, in words for people and in kinds for programs."""

import errno
import sqlite3
from typing import Final

from appliance.errors import ApplianceError, Conflict, Overloaded

#: The low byte of a result code is the primary one (sqlite.org/rescode.html).
_PRIMARY: Final = 0xFF

_READ_ONLY: Final = frozenset({sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN})
_REFUSED: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


class Corrupt(Exception):
    """The database's file is damaged, or no database at all."""


def primary_code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; 0 where the error is not SQLite's own."""
    return (getattr(error, "sqlite_errorcode", None) or 0) & _PRIMARY


def is_corruption(error: sqlite3.Error) -> bool:
    """True where the file's contents are to blame."""
    return primary_code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def locked() -> Conflict:
    """Somebody else has the database and does not let go."""
    return Conflict("cannot use the registry: it is locked by another process")


def explain(error: sqlite3.Error | OSError) -> ApplianceError:
    """The error to answer with."""
    if isinstance(error, OSError):
        if error.errno in _REFUSED:
            return read_only()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _full()
        return ApplianceError(f"cannot use the registry: {error.strerror}")
    code = primary_code(error)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return locked()
    if code == sqlite3.SQLITE_FULL:
        return _full()
    if code in _READ_ONLY:
        return read_only()
    name = getattr(error, "sqlite_errorname", None) or type(error).__name__
    return ApplianceError(f"cannot use the registry: {error} ({name})")


def _full() -> Overloaded:
    return Overloaded("cannot write the registry: the disk is full")


def read_only() -> ApplianceError:
    """There is no writing where the database is."""
    return ApplianceError("cannot write the registry: its directory is read-only, or another user's")
