"""The SQL of the registry: rows in, views out. Every function takes a connection and begins no transaction."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, Final, get_args

from adapterbay.registry.base.reference import Scheme
from adapterbay.registry.gate import Comparison, Guard
from adapterbay.registry.views import AdapterSummary, Listing, RegistryEvent, VersionRecord

_VERSION_COLUMNS: Final = (
    "v.name, v.version, v.digest, v.created_at, v.size_bytes, v.task, v.peft_type, v.rank, v.base_reference, "
    "v.base_fingerprint, v.labels, v.deprecated, v.signature IS NOT NULL, "
    "(SELECT json_group_object(key, value) FROM tags t WHERE t.name = v.name AND t.version = v.version), "
    "(SELECT json_group_object(metric, value) FROM metrics m WHERE m.name = v.name AND m.version = v.version)"
)
_EVENT_COLUMNS: Final = "sequence, kind, name, version, digest, alias, previous_version, at, by, detail"


def version_by_number(db: sqlite3.Connection, name: str, version: int) -> str | None:
    """The digest of a version that is not deleted."""
    row = db.execute(
        "SELECT digest FROM versions WHERE name = ? AND version = ? AND deleted_at IS NULL", (name, version)
    ).fetchone()
    return row[0] if row else None


def version_by_alias(db: sqlite3.Connection, name: str, alias: str) -> tuple[int, str] | None:
    """The version and digest that an alias means."""
    row = db.execute(
        "SELECT v.version, v.digest FROM aliases a JOIN versions v ON v.name = a.name AND v.version = a.version "
        "WHERE a.name = ? AND a.alias = ?",
        (name, alias),
    ).fetchone()
    return (row[0], row[1]) if row else None


def last_place(db: sqlite3.Connection, name: str, alias: str) -> tuple[int, str] | None:
    """The version and digest that an alias means, or meant before it was removed; None if that one is deleted."""
    row = db.execute(
        "SELECT v.version, v.digest, v.deleted_at FROM events e JOIN versions v ON v.name = e.name "
        "AND v.version = e.version WHERE e.name = ? AND e.alias = ? AND e.kind = 'alias_set' "
        "ORDER BY e.sequence DESC LIMIT 1",
        (name, alias),
    ).fetchone()
    return (row[0], row[1]) if row and row[2] is None else None


def is_recorded(db: sqlite3.Connection, name: str, version: int) -> bool:
    """Whether a version was ever committed, deleted or not."""
    return db.execute("SELECT 1 FROM versions WHERE name = ? AND version = ?", (name, version)).fetchone() is not None


def newest_version(db: sqlite3.Connection, name: str) -> tuple[int, str] | None:
    """The newest version that is not deleted, and its digest."""
    row = db.execute(
        "SELECT v.version, v.digest FROM adapters a JOIN versions v ON v.name = a.name AND v.version = a.newest "
        "WHERE a.name = ?",
        (name,),
    ).fetchone()
    return (row[0], row[1]) if row else None


def version_by_digest(db: sqlite3.Connection, name: str, digest: str) -> int | None:
    """The newest version with this digest that is not deleted."""
    row = db.execute(
        "SELECT MAX(version) FROM versions WHERE name = ? AND digest = ? AND deleted_at IS NULL", (name, digest)
    ).fetchone()
    return row[0] if row else None


def knows_digest(db: sqlite3.Connection, digest: str) -> bool:
    """Whether any version that is not deleted has this digest."""
    return (
        db.execute("SELECT 1 FROM versions WHERE digest = ? AND deleted_at IS NULL LIMIT 1", (digest,)).fetchone()
        is not None
    )


def places_of(db: sqlite3.Connection, digest: str) -> list[tuple[str, int, bool]]:
    """Name, version and whether it is deleted, of every version with this digest."""
    rows = db.execute("SELECT name, version, deleted_at FROM versions WHERE digest = ? ORDER BY 1, 2", (digest,))
    return [(row[0], row[1], row[2] is not None) for row in rows]


def signatures(db: sqlite3.Connection) -> dict[str, list[tuple[int, str]]]:
    """Version and digest of every signature in use, by name."""
    found: dict[str, list[tuple[int, str]]] = {}
    for name, version, digest in db.execute(
        "SELECT name, version, signature FROM versions WHERE signature IS NOT NULL AND deleted_at IS NULL"
    ):
        found.setdefault(name, []).append((version, digest))
    return found


def recorded(db: sqlite3.Connection) -> list[tuple[str, int]]:
    """Name and number of every version that was ever committed."""
    return [(row[0], row[1]) for row in db.execute("SELECT name, version FROM versions")]


def children_of(db: sqlite3.Connection, digest: str) -> list[tuple[str, int, str]]:
    """Name, version and digest of the versions that have `digest` as a parent."""
    rows = db.execute(
        "SELECT v.name, v.version, v.digest FROM versions v, json_each(v.parents) p "
        "WHERE v.parents != '[]' AND p.value = ? AND v.deleted_at IS NULL ORDER BY 1, 2",
        (digest,),
    )
    return [(row[0], row[1], row[2]) for row in rows]


def count(db: sqlite3.Connection) -> int:
    """How many adapters have a version."""
    return int(db.execute("SELECT COUNT(*) FROM adapters WHERE newest IS NOT NULL").fetchone()[0])


def names(db: sqlite3.Connection) -> list[str]:
    """The names of all adapters that have a version, sorted."""
    return [row[0] for row in db.execute("SELECT name FROM adapters WHERE newest IS NOT NULL ORDER BY name")]


def all_names(db: sqlite3.Connection) -> list[str]:
    """The names of all adapters that anything ever happened to, sorted; `EVERY_ADAPTER` is one."""
    return [row[0] for row in db.execute("SELECT DISTINCT name FROM events ORDER BY name")]


def aliases(db: sqlite3.Connection, name: str) -> dict[str, int]:
    """The aliases of an adapter and the versions they point at, sorted."""
    return dict(db.execute("SELECT alias, version FROM aliases WHERE name = ? ORDER BY alias", (name,)).fetchall())


def versions(db: sqlite3.Connection, name: str) -> list[VersionRecord]:
    """All versions of an adapter that are not deleted, the oldest first."""
    pointing = aliases(db, name)
    rows = db.execute(
        f"SELECT {_VERSION_COLUMNS} FROM versions v WHERE v.name = ? AND v.deleted_at IS NULL ORDER BY v.version",
        (name,),
    )
    return [_record(row, pointing) for row in rows]


def version(db: sqlite3.Connection, name: str, number: int) -> VersionRecord | None:
    """One version that is not deleted."""
    row = db.execute(
        f"SELECT {_VERSION_COLUMNS} FROM versions v WHERE v.name = ? AND v.version = ? AND v.deleted_at IS NULL",
        (name, number),
    ).fetchone()
    return _record(row, aliases(db, name)) if row else None


def summaries(db: sqlite3.Connection, listing: Listing) -> list[AdapterSummary]:
    """The adapters whose newest version is as `listing` asks, by name: two statements, however many there are."""
    # A range on the primary key; U+10FFFF sorts after every character of a name.
    conditions = ["a.newest IS NOT NULL", "a.name >= ?", "a.name < ?", "a.name > ?"]
    values: list[Any] = [listing.prefix, f"{listing.prefix}\U0010ffff", listing.after]
    for condition, asked in _conditions(listing):
        conditions.append(condition)
        values += asked
    limit = -1 if listing.limit is None else listing.limit
    rows = db.execute(
        f"SELECT {_VERSION_COLUMNS}, a.live FROM adapters a "
        "JOIN versions v ON v.name = a.name AND v.version = a.newest "
        f"WHERE {' AND '.join(conditions)} ORDER BY a.name LIMIT ?",
        (*values, limit),
    ).fetchall()
    pointing: dict[str, dict[str, int]] = {}
    if rows:
        for name, alias, number in db.execute(
            "SELECT name, alias, version FROM aliases WHERE name >= ? AND name <= ? ORDER BY name, alias",
            (rows[0][0], rows[-1][0]),
        ):
            pointing.setdefault(name, {})[alias] = number
    return [_summary(row, pointing.get(row[0], {})) for row in rows]


def _conditions(listing: Listing) -> Iterator[tuple[str, list[Any]]]:
    if listing.base is not None:
        spellings = [listing.base, *(f"{scheme}:{listing.base}" for scheme in get_args(Scheme))]
        marks = ", ".join("?" * len(spellings))
        # instr, not LIKE: what is asked may hold % and _.
        pinned = " OR ".join(["instr(v.base_reference, ? || '@') = 1"] * len(spellings))
        yield (
            f"(v.base_fingerprint = ? OR v.base_reference IN ({marks}) OR {pinned})",
            [listing.base, *spellings, *spellings],
        )
    if listing.task is not None:
        yield "v.task = ?", [listing.task]
    if listing.method is not None:
        yield "v.peft_type = ?", [listing.method.upper()]
    for key, value in listing.tags.items():
        found = "SELECT 1 FROM tags t WHERE t.name = v.name AND t.version = v.version AND t.key = ?"
        yield ((f"EXISTS ({found})", [key]) if value is None else (f"EXISTS ({found} AND t.value = ?)", [key, value]))
    for bound in listing.metrics:
        yield (
            "EXISTS (SELECT 1 FROM metrics m WHERE m.name = v.name AND m.version = v.version AND m.metric = ? "
            f"AND m.value {bound.relation} ?)",
            [bound.metric, bound.value],
        )


def last_sequence(db: sqlite3.Connection) -> int:
    """The sequence of the newest event; 0 before the first."""
    return int(db.execute("SELECT COALESCE(MAX(sequence), 0) FROM events").fetchone()[0])


def events(db: sqlite3.Connection, after: int, limit: int) -> list[RegistryEvent]:
    """The events after a sequence, the oldest first."""
    rows = db.execute(
        f"SELECT {_EVENT_COLUMNS} FROM events WHERE sequence > ? ORDER BY sequence LIMIT ?", (after, limit)
    )
    return [_event(row) for row in rows]


def events_of(db: sqlite3.Connection, name: str) -> list[RegistryEvent]:
    """All events of one adapter, the oldest first."""
    rows = db.execute(f"SELECT {_EVENT_COLUMNS} FROM events WHERE name = ? ORDER BY sequence", (name,))
    return [_event(row) for row in rows]


def journal_lines(db: sqlite3.Connection, name: str) -> int:
    """How many lines of the journal of an adapter were committed: so many of them count."""
    return int(db.execute("SELECT COUNT(*) FROM events WHERE name = ? AND journal = 1", (name,)).fetchone()[0])


def deletion(db: sqlite3.Connection, name: str, version: int) -> RegistryEvent | None:
    """When, by whom and why a version was deleted; None if it was not."""
    row = db.execute(
        f"SELECT {_EVENT_COLUMNS} FROM events WHERE name = ? AND version = ? AND kind = 'deleted'", (name, version)
    ).fetchone()
    return _event(row) if row else None


def guards(db: sqlite3.Connection, name: str) -> dict[str, Guard]:
    """The guarded aliases of an adapter."""
    rows = db.execute("SELECT alias, document FROM guards WHERE name = ? ORDER BY alias", (name,))
    return {alias: Guard.from_document(json.loads(document)) for alias, document in rows}


def comparisons(db: sqlite3.Connection, name: str, version: int) -> list[Comparison]:
    """The recorded comparisons of a version, the newest last."""
    rows = db.execute(
        "SELECT document FROM comparisons WHERE name = ? AND version = ? ORDER BY sequence", (name, version)
    )
    return [Comparison.from_document(json.loads(row[0])) for row in rows]


def signature(db: sqlite3.Connection, digest: str) -> str | None:
    """The digest of the signature of the version with this digest."""
    row = db.execute(
        "SELECT signature FROM versions WHERE digest = ? AND signature IS NOT NULL AND deleted_at IS NULL LIMIT 1",
        (digest,),
    ).fetchone()
    return row[0] if row else None


def next_version(db: sqlite3.Connection, name: str) -> int:
    """The number that the next push gets; numbers are never reused."""
    row = db.execute("SELECT next_version FROM adapters WHERE name = ?", (name,)).fetchone()
    return int(row[0]) if row else 1


def is_blob(db: sqlite3.Connection, digest: str) -> bool:
    """Whether anything committed refers to the blob."""
    return db.execute("SELECT 1 FROM blobs WHERE digest = ?", (digest,)).fetchone() is not None


def unreferenced(db: sqlite3.Connection, digests: Iterable[str]) -> list[str]:
    """Those of `digests` that no committed version needs."""
    return [digest for digest in digests if not is_blob(db, digest)]


def _event(row: Sequence[Any]) -> RegistryEvent:
    return RegistryEvent(
        sequence=row[0],
        kind=row[1],
        name=row[2],
        version=row[3],
        digest=row[4],
        alias=row[5],
        previous_version=row[6],
        at=datetime.fromisoformat(row[7]),
        by=row[8],
        detail=json.loads(row[9]),
    )


def _fields(row: Sequence[Any], pointing: dict[str, int]) -> dict[str, Any]:
    return {
        "name": row[0],
        "version": row[1],
        "digest": row[2],
        "created_at": datetime.fromisoformat(row[3]),
        "size_bytes": row[4],
        "aliases": tuple(alias for alias, number in pointing.items() if number == row[1]),
        "task": row[5],
        "peft_type": row[6],
        "rank": row[7],
        "base_reference": row[8],
        "base_fingerprint": row[9],
        "labels": tuple(json.loads(row[10])),
        "deprecated": row[11],
        "signed": bool(row[12]),
        "tags": json.loads(row[13]),
        "metrics": json.loads(row[14]),
    }


def _record(row: Sequence[Any], pointing: dict[str, int]) -> VersionRecord:
    return VersionRecord(**_fields(row, pointing))


def _summary(row: Sequence[Any], pointing: dict[str, int]) -> AdapterSummary:
    return AdapterSummary(**_fields(row, pointing), versions=row[15], alias_versions=pointing)
