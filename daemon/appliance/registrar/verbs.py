"""What the registrar can be asked to do."""

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sqlite_utils import Database

from appliance.errors import ApplianceError, InvalidRequest
from appliance.registrar.failures import explain, is_corruption, primary_code
from appliance.registrar.opening import Opened, open_registry
from appliance.registrar.schema import OWN_TABLE, version_of

#: Rows in one part of an answer, in bytes of JSON at about most: so little that taking one in holds up nobody.
_PART_BYTES: Final = 65536
#: Rows kept of tables that would grow for ever, the newest.
KEPT: Final = {"measurements": 5_000, "evidence": 5_000, "digests": 10_000, "events": 10_000}
#: Columns that the daemon wants at start; tables that are not here it does not want.
READ: Final = {
    "measurements": ("model", "version", "is_complete", "document"),
    "evidence": ("model", "version", "metric", "document"),
    "variants": ("*",),
    "placements": ("*",),
    "digests": ("*",),
    "wanted": ("*",),
}
#: Tables with rows of a model that are gone with it. Events stay: they say what happened.
_OF_MODEL: Final = ("measurements", "evidence", "variants", "placements", "wanted")
_MOST_EVENTS: Final = 500
#: SQLite's codes for a change that is at fault itself; 0 where the driver refuses a value before SQLite sees it.
_ITS_OWN_FAULT: Final = frozenset({0, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_TOOBIG})

_Part = Callable[[dict[str, Any]], None]


class InvalidChange(InvalidRequest):
    """A change that can never be made, whatever is tried.

    Attributes:
        index: Its place among the changes asked for; none of them has been made.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"cannot write to the registry: change {index} is invalid: {reason}")
        self.index = index


class Verbs:
    """The registry's verbs over a database that is opened when the first one needs it.

    Args:
        path: The database.
        busy_seconds: Wait as long where another process has it locked.
    """

    def __init__(self, path: Path, busy_seconds: float) -> None:
        self._path = path
        self._busy_seconds = busy_seconds
        self._opened: Opened | None = None
        self._moved_aside = ""
        self._verbs = {"read": self._read, "write": self._write, "events": self._events, "check": self._check}

    def answer(self, question: Mapping[str, Any], take_part: _Part) -> dict[str, Any]:
        """Do what `question` asks for.

        Returns:
            The answer but for its id: ``result`` or ``failed``, and of the database ``identity`` and ``moved_aside``,
            the name given to a damaged one, if any was found since this process began.
        """
        try:
            result = self._do(question, take_part)
            return {"result": result, "moved_aside": self._moved_aside, "identity": self._open().identity}
        except ApplianceError as error:
            failed: dict[str, Any] = {"kind": error.kind, "message": str(error)}
            if isinstance(error, InvalidChange):
                failed["index"] = error.index
            return {"failed": failed}

    def close(self) -> None:
        """Let go of the database."""
        if self._opened is not None:
            self._opened.db.close()
            self._opened = None

    def _do(self, question: Mapping[str, Any], take_part: _Part) -> dict[str, Any]:
        verb = self._verbs.get(str(question.get("do")))
        if verb is None:
            raise InvalidRequest(f"cannot answer: {question.get('do')!r} is not a verb of the registry")
        try:
            try:
                return verb(question, take_part)
            except sqlite3.Error as error:
                if not is_corruption(error):
                    raise
                self.close()  # opening it looks closely, moves it aside if it is damaged and begins a new one
                return verb(question, take_part)
        except (sqlite3.Error, OSError) as error:
            self.close()  # the next one begins anew, so that what was mended outside is noticed
            raise explain(error) from error

    def _open(self) -> Opened:
        if self._opened is None:
            self._opened = open_registry(self._path, self._busy_seconds)
            self._moved_aside = self._opened.moved_aside or self._moved_aside
        return self._opened

    def _read(self, question: Mapping[str, Any], take_part: _Part) -> dict[str, Any]:
        """All that the daemon keeps in memory, in parts of rows of one table, oldest first."""
        db = self._open().db
        rows = 0
        with _transaction(db, "BEGIN"):
            for table, columns in READ.items():
                part: list[dict[str, Any]] = []
                size = 0
                for row in db.query(f"SELECT {', '.join(columns)} FROM {table} ORDER BY rowid"):  # noqa: S608 ours
                    part.append(row)
                    rows += 1
                    size += sum(len(str(value)) + 16 for value in row.values())
                    if size > _PART_BYTES:
                        take_part({"table": table, "rows": part})
                        part, size = [], 0
                if part:
                    take_part({"table": table, "rows": part})
        return {"rows": rows}

    def _write(self, question: Mapping[str, Any], take_part: _Part) -> dict[str, Any]:
        """Make ``changes`` in their order, all or none."""
        db = self._open().db
        changes = question.get("changes")
        if not isinstance(changes, list):
            raise InvalidRequest("cannot write to the registry: there is no list of changes")
        with _transaction(db, "BEGIN IMMEDIATE"):  # a lock taken later would not be waited for
            for index, change in enumerate(changes):
                try:
                    _apply(db, change)
                except (ArithmeticError, LookupError, TypeError, ValueError) as error:
                    raise InvalidChange(index, str(error)) from error
                except sqlite3.Error as error:
                    if primary_code(error) in _ITS_OWN_FAULT:
                        raise InvalidChange(index, str(error)) from error
                    raise
            for table in {change.get("table") for change in changes} & set(KEPT):
                _prune(db, table, KEPT[table])
        return {"changes": len(changes)}

    def _events(self, question: Mapping[str, Any], take_part: _Part) -> dict[str, Any]:
        """The newest ``limit`` events, newest first; of one ``model`` where that is not empty."""
        limit = min(int(question.get("limit", _MOST_EVENTS)), _MOST_EVENTS)
        model = str(question.get("model", ""))
        rows = self._open().db.query(
            "SELECT * FROM events WHERE ? IN ('', model) ORDER BY rowid DESC LIMIT ?", [model, limit]
        )
        for row in rows:
            take_part({"table": "events", "rows": [row]})
        return {}

    def _check(self, question: Mapping[str, Any], take_part: _Part) -> dict[str, Any]:
        """The state of the database and of its files."""
        db = self._open().db
        names = sorted(each.name for each in self._path.parent.iterdir() if each.name.startswith(self._path.name))
        return {
            "problems": [row[0] for row in db.execute("PRAGMA integrity_check").fetchall() if row[0] != "ok"]
            + [f"a row of {row[0]} refers to nothing" for row in db.execute("PRAGMA foreign_key_check").fetchall()],
            "schema": version_of(db),
            "size_bytes": sum((self._path.parent / name).stat().st_size for name in names),
            "rows": {name: db.table(name).count for name in (*READ, "events")},
            "moved_aside": [name for name in names if ".corrupt-" in name and not name.endswith(("-wal", "-shm"))],
            "backups": [name for name in names if ".before-" in name],
        }


@contextmanager
def _transaction(db: Database, begin: str) -> Iterator[None]:
    db.execute(begin)
    try:
        yield
        db.commit()
    except BaseException:
        db.rollback()
        raise


def _apply(db: Database, change: Mapping[str, Any]) -> None:
    """Make one change.

    Raises:
        ArithmeticError, LookupError, TypeError, ValueError, sqlite3.Error: It cannot be made.
    """
    verb = change["do"]
    if verb == "forget":
        for table in _OF_MODEL:
            db.table(table).delete_where("model = ?", [change["model"]])
        return
    name = change["table"]
    if name == OWN_TABLE or name not in (*READ, "events"):
        raise ValueError(f"{name!r} is no table of records")
    table_ = db.table(name)
    if verb == "put":
        row = change["row"]
        wrong = set(row) ^ set(table_.columns_dict)
        if wrong:
            raise ValueError(f"a row of {name} has other columns: {', '.join(sorted(wrong))}")
        is_log = name == "events"  # written twice, an event keeps its place
        if not is_log or not table_.count_where("id = ?", [row["id"]]):
            table_.insert(row, replace=not is_log)
    elif verb == "remove":
        keys = change["keys"]
        if len(keys) != len(table_.pks):
            raise ValueError(f"the key of {name} is {', '.join(table_.pks)}")
        table_.delete_where(" AND ".join(f"{column} = ?" for column in table_.pks), keys)
    else:
        raise ValueError(f"{json.dumps(verb)} is no kind of change")


def _prune(db: Database, table: str, kept: int) -> None:
    if db.table(table).count > kept:
        newest = f"SELECT rowid FROM {table} ORDER BY rowid DESC LIMIT ?"  # noqa: S608 a name of ours
        db.table(table).delete_where(f"rowid NOT IN ({newest})", [kept])
