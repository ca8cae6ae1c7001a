"""Databases of another version or of another program: brought up to date after a backup, or left as they are."""

import asyncio
import contextlib
import fcntl
import os
import sqlite3
import stat

import pytest

from appliance.errors import ApplianceError, Conflict
from appliance.registrar import verbs
from appliance.registrar.opening import open_registry
from appliance.registrar.schema import migrations, version_of
from appliance.registry import FILE_NAME
from support.registry import measurement, registry, rows


def newer_migrations(change=None):
    """What a later version of the program may know: one migration more."""
    known = migrations()
    known(name="2 remarks")(
        change or (lambda db: db.table("measurements").add_column("remark", str, not_null_default=""))
    )
    return known


def make_registry(directory, known=None) -> None:
    """A database with one measurement."""
    with contextlib.closing(open_registry(directory / FILE_NAME, 5.0, known).db):
        pass

    async def fill():
        opened = registry(directory)
        await opened.put_measurement("model", "1", measurement())
        await opened.close()

    if known is None:
        asyncio.run(fill())


def test_an_older_database_is_backed_up_and_brought_up_to_date(tmp_path):
    make_registry(tmp_path)
    before = rows(tmp_path, "measurements")
    with contextlib.closing(open_registry(tmp_path / FILE_NAME, 5.0, newer_migrations()).db) as db:
        assert [{**row, "remark": ""} for row in before] == list(db.table("measurements").rows)
    backup = tmp_path / f"{FILE_NAME}.before-2-1"
    assert stat.S_IMODE(backup.stat().st_mode) == 0o600
    with contextlib.closing(sqlite3.connect(backup)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert "remark" not in [row[1] for row in connection.execute("PRAGMA table_info(measurements)")]
        assert connection.execute("SELECT count(*) FROM measurements").fetchone() == (1,)
    with contextlib.closing(open_registry(tmp_path / FILE_NAME, 5.0, newer_migrations()).db):
        assert len(list(tmp_path.glob(f"{FILE_NAME}.before-*"))) == 1


def test_a_migration_that_fails_changes_nothing(tmp_path):
    def change(db):
        db.execute("DELETE FROM measurements")
        db.execute("ALTER TABLE no_such_table ADD COLUMN remark")

    make_registry(tmp_path)
    before = rows(tmp_path, "measurements")
    with pytest.raises(ApplianceError, match="no such table"):
        open_registry(tmp_path / FILE_NAME, 5.0, newer_migrations(change))
    assert rows(tmp_path, "measurements") == before
    with contextlib.closing(open_registry(tmp_path / FILE_NAME, 5.0).db) as db:
        assert version_of(db) == "1 first tables"


def test_a_newer_database_is_refused_and_not_touched(tmp_path):
    make_registry(tmp_path, newer_migrations())
    path = tmp_path / FILE_NAME
    before = path.read_bytes(), path.stat().st_mtime_ns

    async def scenario():
        opened = registry(tmp_path)
        await opened.open()
        assert "its schema is '2 remarks', which this version of the appliance does not know" in opened.problem
        assert not await opened.put_measurement("model", "1", measurement())
        assert opened.measurement(measurement().key.id) == measurement()
        assert "does not know" in (await opened.check()).reason
        await opened.close()

    asyncio.run(scenario())
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert not list(tmp_path.glob("*.corrupt-*"))


def test_another_programs_database_is_refused_and_not_touched(tmp_path):
    path = tmp_path / FILE_NAME
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    before = path.read_bytes()
    with pytest.raises(ApplianceError, match="another program's database"):
        open_registry(path, 5.0)
    assert path.read_bytes() == before


def test_a_start_that_was_cut_short_is_finished(tmp_path):
    """The file is there and a database, and has no tables yet."""
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
    opened = open_registry(tmp_path / FILE_NAME, 5.0)
    with contextlib.closing(opened.db) as db:
        assert opened.moved_aside == ""
        assert db.table("measurements").count == 0
    assert not list(tmp_path.glob("*.before-*"))


def test_a_log_without_its_database_is_not_taken_for_a_new_ones(tmp_path):
    (tmp_path / f"{FILE_NAME}-wal").write_bytes(b"the log of another")
    opened = open_registry(tmp_path / FILE_NAME, 5.0)
    opened.db.close()
    assert opened.moved_aside == f"{FILE_NAME}.corrupt-1"
    assert (tmp_path / f"{FILE_NAME}.corrupt-1-wal").read_bytes() == b"the log of another"


def test_two_registrars_open_one_after_the_other(tmp_path):
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(Conflict, match="locked by another process"):
            open_registry(tmp_path / FILE_NAME, 0.01)
    finally:
        os.close(handle)
    open_registry(tmp_path / FILE_NAME, 0.01).db.close()


def test_commits_wait_for_the_disk_and_readers_for_nobody(tmp_path):
    with contextlib.closing(open_registry(tmp_path / FILE_NAME, 5.0).db) as db:
        assert db.journal_mode == "wal"
        assert db.execute("PRAGMA synchronous").fetchone() == (2,)


# ---------------------------------------------------------------- verbs on a database in this process


def change(name: str, text: str = "") -> dict:
    row = {"id": name, "at": "now", "kind": "swap", "model": "", "text": text}
    return {"do": "put", "table": "events", "row": row}


def answer(asked: verbs.Verbs, **question) -> dict:
    return asked.answer(question, lambda part: None)


def test_a_full_disk_undoes_the_transaction_and_heals_by_itself(tmp_path):
    asked = verbs.Verbs(tmp_path / FILE_NAME, 5.0)
    assert "result" in answer(asked, do="write", changes=[change("first")])
    db = asked._open().db
    pages = db.execute("PRAGMA page_count").fetchone()[0]
    db.execute(f"PRAGMA max_page_count={pages + 4}")
    too_much = [change("small"), *(change(f"large{n}", "x" * 5000) for n in range(100))]
    assert answer(asked, do="write", changes=too_much)["failed"] == {
        "kind": "overloaded",
        "message": "cannot write the registry: the disk is full",
    }
    assert [row["id"] for row in rows(tmp_path, "events")] == ["first"]
    assert "result" in answer(asked, do="write", changes=too_much)
    asked.close()


def test_the_newest_rows_are_kept_of_tables_that_grow(tmp_path, monkeypatch):
    monkeypatch.setitem(verbs.KEPT, "events", 10)
    asked = verbs.Verbs(tmp_path / FILE_NAME, 5.0)
    for first in range(0, 30, 6):
        answer(asked, do="write", changes=[change(str(number)) for number in range(first, first + 6)])
    asked.close()
    assert [row["id"] for row in rows(tmp_path, "events")] == [str(number) for number in range(20, 30)]


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        "put",
        {},
        {"do": "sing"},
        {"do": "forget"},
        {"do": "put", "table": "registry", "row": {"name": "identity", "value": ""}},
        {"do": "put", "table": "sqlite_master", "row": {}},
        {"do": "put", "table": "events", "row": {"id": "1"}},
        {"do": "put", "table": "events", "row": {**change("a")["row"], "text": None}},
        {"do": "put", "table": "events", "row": {**change("a")["row"], "more": 1}},
        {"do": "put", "table": "variants", "row": dict.fromkeys(("id", "model"), "x")},
        {"do": "remove", "table": "placements", "keys": ["one"]},
        {"do": "remove", "table": "events", "keys": [{"a": 1}]},
        {"do": "remove", "table": ["events"], "keys": ["a"]},
    ],
)  # fmt: skip
def test_of_changes_with_an_invalid_one_none_is_made(tmp_path, wrong):
    asked = verbs.Verbs(tmp_path / FILE_NAME, 5.0)
    failed = answer(asked, do="write", changes=[change("first"), wrong])["failed"]
    assert (failed["kind"], failed["index"]) == ("invalid-request", 1)
    asked.close()
    assert rows(tmp_path, "events") == []


def test_an_unknown_verb_is_refused(tmp_path):
    asked = verbs.Verbs(tmp_path / FILE_NAME, 5.0)
    for question in ({}, {"do": "sing"}, {"do": "write"}, {"do": "write", "changes": 1}):
        assert answer(asked, **question)["failed"]["kind"] == "invalid-request"
    asked.close()


def test_an_event_written_twice_is_there_once_at_its_place(tmp_path):
    asked = verbs.Verbs(tmp_path / FILE_NAME, 5.0)
    for name in ("first", "second", "first"):
        answer(asked, do="write", changes=[change(name)])
    asked.close()
    assert [row["id"] for row in rows(tmp_path, "events")] == ["first", "second"]
