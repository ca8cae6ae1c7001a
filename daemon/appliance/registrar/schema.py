"""The registry's tables, and how an older database becomes a newer one.

A migration, once released, is never changed: a change of the tables is a new migration at the end.
"""

import secrets
from contextlib import closing
from typing import Any, Final

from sqlite_utils import Database, Migrations

#: One set of migrations is this program's; the table of the library that records them tells its name.
_NAME: Final = "inference-appliance"

#: Documents are JSON. What a key is made of stands in columns of its own, for people who look with SQL.
_FIRST: Final[dict[str, tuple[dict[str, Any], tuple[str, ...]]]] = {
    "measurements": (
        {
            "key": str, "model": str, "version": str, "artifact": str, "backend": str, "runtime": str, "device": str,
            "driver": str, "precision": str, "options": str, "is_complete": int, "measured_at": str, "document": str,
        },
        ("key",),
    ),
    "evidence": (
        {
            "key": str, "reference": str, "sample": str, "metric": str, "model": str, "version": str,
            "judged_at": str, "document": str,
        },
        ("key", "reference", "sample", "metric"),
    ),
    "variants": (
        {
            "id": str, "model": str, "version": str, "source": str, "method": str, "format": str, "precision": str,
            "path": str, "sha256": str, "bytes": int, "calibration_rows": int, "created_at": str,
        },
        ("model", "version", "id"),
    ),
    "placements": (
        {
            "model": str, "version": str, "key": str, "variant": str, "chosen_by": str, "reason": str,
            "is_pinned": int, "at": str,
        },
        ("model", "version"),
    ),
    "digests": ({"fingerprint": str, "sha256": str}, ("fingerprint",)),
    "wanted": ({"model": str, "kind": str, "question": str, "requested_at": str}, ("model", "kind")),
    "events": ({"id": str, "at": str, "kind": str, "model": str, "text": str}, ("id",)),
    "registry": ({"name": str, "value": str}, ("name",)),
}  # fmt: skip

#: The table of facts about the database itself; not for records.
OWN_TABLE: Final = "registry"


def migrations() -> Migrations:
    """All that there are, oldest first."""
    known = Migrations(_NAME)
    known(name="1 first tables")(_create_first_tables)
    return known


def names_of(known: Migrations) -> set[str]:
    """Names of all migrations of a set."""
    with closing(Database(memory=True)) as empty:
        return {each.name for each in known.pending(empty)}


def _create_first_tables(db: Database) -> None:
    for name, (columns, keys) in _FIRST.items():
        db.table(name).create(columns, pk=keys if len(keys) > 1 else keys[0], not_null=columns, strict=True)
    db.table("measurements").create_index(["model"])
    db.table("evidence").create_index(["model"])
    db.table(OWN_TABLE).insert({"name": "identity", "value": secrets.token_hex(8)})


def identity_of(db: Database) -> str:
    """Tells one database from another in its place."""
    return str(db.table(OWN_TABLE).get("identity")["value"])


def version_of(db: Database) -> str:
    """Name of the newest migration that has been applied; empty for a database without."""
    applied = migrations().applied(db)
    return applied[-1].name if applied else ""
