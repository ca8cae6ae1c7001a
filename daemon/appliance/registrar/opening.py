"""Opening the registry whatever state its file is in: missing, damaged, locked, older, newer or somebody else's.

Nothing is ever deleted, and a file that this program does not understand is not written to.
"""

import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from sqlite_utils import Database, Migrations

from appliance.errors import ApplianceError
from appliance.registrar.failures import Corrupt, explain, is_corruption, locked, read_only
from appliance.registrar.schema import identity_of, migrations, names_of

_PAUSE_SECONDS: Final = 0.02
#: What SQLite keeps beside a database.
_BESIDE: Final = ("", "-wal", "-shm")
_Mode = Literal["rw", "ro", "ro&immutable=1"]


@dataclass(frozen=True, slots=True)
class Opened:
    """An open registry.

    Attributes:
        db: The database.
        identity: Tells it from any other.
        moved_aside: Name that a damaged predecessor was given just now; empty where there was none.
    """

    db: Database
    identity: str
    moved_aside: str = ""


def open_registry(path: Path, busy_seconds: float, known: Migrations | None = None) -> Opened:
    """Open the database at `path`, make it where there is none, and bring it up to date after a backup.

    Args:
        path: Its directory is made where it is missing.
        busy_seconds: Wait as long for another process.
        known: The program's migrations.

    Raises:
        ApplianceError: It cannot be used; `Conflict` where another process has it locked.
    """
    known = known or migrations()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _alone(path.parent, busy_seconds):
            try:
                return Opened(*_open(path, busy_seconds, known))
            except Corrupt as error:
                name = _move_aside(path)
                db, identity = _open(path, busy_seconds, known)
                _record(db, f"the registry was damaged ({error}); it is now {name}, and a new one was begun")
                return Opened(db, identity, name)
    except (sqlite3.Error, OSError) as error:
        raise explain(error) from error


@contextmanager
def _alone(directory: Path, seconds: float) -> Iterator[None]:
    """Keep other registrars from opening meanwhile: a database must not be moved away from under one of them."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise locked() from None
                time.sleep(_PAUSE_SECONDS)
        yield
    finally:
        os.close(handle)


def _open(path: Path, busy_seconds: float, known: Migrations) -> tuple[Database, str]:
    log, index = (path.with_name(path.name + name) for name in _BESIDE[1:])
    mode: _Mode = "rw"
    if path.exists():
        if path.stat().st_size == 0:
            raise Corrupt("its file is empty")
        if not os.access(path.parent, os.W_OK):  # no place for SQLite's log; what is there can be read where none is
            if log.exists() and log.stat().st_size:
                raise read_only()
            mode = "ro&immutable=1"
    elif log.exists() or index.exists():  # they would be taken for the new database's
        raise Corrupt("its file is missing")
    else:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
    try:
        if path.stat().st_size:
            with closing(_connect(path, busy_seconds, mode if mode != "rw" else "ro")) as db:
                _inspect(db, known)
        db = _connect(path, busy_seconds, mode)
        try:
            _make_ready(db, path, known, mode)
            return db, identity_of(db)
        except BaseException:
            db.close()
            raise
    except sqlite3.Error as error:
        if is_corruption(error):
            raise Corrupt(str(error)) from error
        raise


def _inspect(db: Database, known: Migrations) -> None:
    """Look at a database without writing to it.

    Raises:
        Corrupt: It is damaged.
        ApplianceError: It is not for this program.
    """
    said = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if said != "ok":
        raise Corrupt(" ".join(str(said).split()))
    applied = [each.name for each in known.applied(db)]
    if not applied and db.table_names():
        raise ApplianceError("cannot use the registry: the file in its place is another program's database")
    if set(applied) - names_of(known):
        raise ApplianceError(
            f"cannot use the registry: its schema is {applied[-1]!r}, which this version of the appliance does not "
            "know; a newer version has used it"
        )


def _make_ready(db: Database, path: Path, known: Migrations, mode: _Mode) -> None:
    if mode != "rw":
        if known.pending(db):
            raise read_only()
        return
    with suppress(PermissionError):  # another user's file: what it allows is that user's choice
        path.chmod(0o600)
    db.enable_wal()
    db.execute("PRAGMA synchronous=FULL")
    _migrate(db, path, known)


def _connect(path: Path, busy_seconds: float, mode: _Mode) -> Database:
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=busy_seconds)
    return Database(connection, recursive_triggers=False, execute_plugins=False)


def _migrate(db: Database, path: Path, known: Migrations) -> None:
    if not known.pending(db):
        return
    applied = known.applied(db)
    if applied:
        _back_up(db, path, f"before-{len(applied) + 1}")
    with db.atomic():  # each migration is a savepoint in it
        known.apply(db)


def _back_up(db: Database, path: Path, suffix: str) -> None:
    copy = _free_name(path, suffix)
    partial = path.with_name(f"{copy.name}.partial")
    partial.unlink(missing_ok=True)
    with closing(sqlite3.connect(partial)) as target:
        db.conn.backup(target)
    partial.chmod(0o600)
    partial.rename(copy)
    _sync(path.parent)


def _move_aside(path: Path) -> str:
    aside = _free_name(path, "corrupt")
    for name in _BESIDE:
        with suppress(FileNotFoundError):
            path.with_name(path.name + name).rename(aside.with_name(aside.name + name))
    _sync(path.parent)
    return aside.name


def _free_name(path: Path, suffix: str) -> Path:
    taken = {each.name for each in path.parent.iterdir()}
    number = 1
    while any(f"{path.name}.{suffix}-{number}{beside}" in taken for beside in _BESIDE):
        number += 1
    return path.with_name(f"{path.name}.{suffix}-{number}")


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _record(db: Database, text: str) -> None:
    db.table("events").insert(
        {"id": os.urandom(8).hex(), "at": _now(db), "kind": "registry-damaged", "model": "", "text": text}
    )


def _now(db: Database) -> str:
    return str(db.execute("SELECT strftime('%Y-%m-%dT%H:%M:%S+00:00', 'now')").fetchone()[0])
