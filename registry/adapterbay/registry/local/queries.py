"""The SQL of the registry: rows in, views out. Every function takes a connection and begins no transaction."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, Final

from adapterbay.registry.digest import canonical_json
from adapterbay.registry.local.records import AliasLine, VersionFile
from adapterbay.registry.manifest import Manifest
from adapterbay.registry.views import AdapterSummary, RegistryEvent, VersionRecord

_VERSION_COLUMNS: Final = (
    "v.name, v.version, v.digest, v.created_at, v.size_bytes, v.task, v.peft_type, v.rank, v.base_reference, "
    "v.base_fingerprint, v.labels"
)
_EVENT_COLUMNS: Final = "sequence, kind, name, version, digest, alias, previous_version, at"


def version_by_number(db: sqlite3.Connection, name: str, version: int) -> str | None:
    """The digest of a version."""
    row = db.execute("SELECT digest FROM versions WHERE name = ? AND version = ?", (name, version)).fetchone()
    return row[0] if row else None


def version_by_alias(db: sqlite3.Connection, name: str, alias: str) -> tuple[int, str] | None:
    """The version and digest that an alias means."""
    row = db.execute(
        "SELECT v.version, v.digest FROM aliases a JOIN versions v ON v.name = a.name AND v.version = a.version "
        "WHERE a.name = ? AND a.alias = ?",
        (name, alias),
    ).fetchone()
    return (row[0], row[1]) if row else None


def newest_version(db: sqlite3.Connection, name: str) -> tuple[int, str] | None:
    """The newest version and its digest."""
    row = db.execute(
        "SELECT version, digest FROM versions WHERE name = ? ORDER BY version DESC LIMIT 1", (name,)
    ).fetchone()
    return (row[0], row[1]) if row else None


def version_by_digest(db: sqlite3.Connection, name: str, digest: str) -> int | None:
    """The newest version with this digest."""
    row = db.execute("SELECT MAX(version) FROM versions WHERE name = ? AND digest = ?", (name, digest)).fetchone()
    return row[0] if row else None


def knows_digest(db: sqlite3.Connection, digest: str) -> bool:
    """Whether any version has this digest."""
    return db.execute("SELECT 1 FROM versions WHERE digest = ? LIMIT 1", (digest,)).fetchone() is not None


def names(db: sqlite3.Connection) -> list[str]:
    """All adapter names, sorted."""
    return [row[0] for row in db.execute("SELECT name FROM adapters ORDER BY name")]


def aliases(db: sqlite3.Connection, name: str) -> dict[str, int]:
    """The aliases of an adapter and the versions they point at, sorted."""
    return dict(db.execute("SELECT alias, version FROM aliases WHERE name = ? ORDER BY alias", (name,)).fetchall())


def versions(db: sqlite3.Connection, name: str) -> list[VersionRecord]:
    """All versions of an adapter, the oldest first."""
    pointing = aliases(db, name)
    rows = db.execute(f"SELECT {_VERSION_COLUMNS} FROM versions v WHERE v.name = ? ORDER BY v.version", (name,))
    return [_record(row, pointing) for row in rows]


def version(db: sqlite3.Connection, name: str, number: int) -> VersionRecord | None:
    """One version."""
    row = db.execute(
        f"SELECT {_VERSION_COLUMNS} FROM versions v WHERE v.name = ? AND v.version = ?", (name, number)
    ).fetchone()
    return _record(row, aliases(db, name)) if row else None


def summaries(db: sqlite3.Connection, prefix: str) -> list[AdapterSummary]:
    """All adapters whose name begins with `prefix`, by name: two statements, however many there are."""
    # A range on the primary key; U+10FFFF sorts after every character of a name.
    bounds = (prefix, f"{prefix}\U0010ffff")
    pointing: dict[str, dict[str, int]] = {}
    for name, alias, number in db.execute(
        "SELECT name, alias, version FROM aliases WHERE name >= ? AND name < ? ORDER BY name, alias", bounds
    ):
        pointing.setdefault(name, {})[alias] = number
    rows = db.execute(
        f"SELECT {_VERSION_COLUMNS}, newest.count FROM "
        "(SELECT name, MAX(version) AS version, COUNT(*) AS count FROM versions "
        " WHERE name >= ? AND name < ? GROUP BY name) AS newest "
        "JOIN versions v ON v.name = newest.name AND v.version = newest.version ORDER BY v.name",
        bounds,
    )
    return [_summary(row, pointing.get(row[0], {})) for row in rows]


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


def alias_moves(db: sqlite3.Connection, name: str) -> int:
    """How many moves of aliases of an adapter were committed: so many lines of its log count."""
    return int(db.execute("SELECT COUNT(*) FROM events WHERE name = ? AND alias IS NOT NULL", (name,)).fetchone()[0])


def next_version(db: sqlite3.Connection, name: str) -> int:
    """The number that the next push gets; numbers are never reused."""
    row = db.execute("SELECT next_version FROM adapters WHERE name = ?", (name,)).fetchone()
    return int(row[0]) if row else 1


def unreferenced(db: sqlite3.Connection, digests: Iterable[str]) -> list[str]:
    """Those of `digests` that no committed version needs."""
    return [
        digest for digest in digests if db.execute("SELECT 1 FROM blobs WHERE digest = ?", (digest,)).fetchone() is None
    ]


def insert_version(db: sqlite3.Connection, record: VersionFile, manifest: Manifest, manifest_size: int) -> None:
    """A pushed version with its event and its blobs."""
    db.execute(
        "INSERT INTO adapters (name, next_version) VALUES (?, ?) "
        "ON CONFLICT (name) DO UPDATE SET next_version = MAX(next_version, excluded.next_version)",
        (record.name, record.version + 1),
    )
    db.execute(
        "INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            record.name,
            record.version,
            record.digest,
            record.created_at,
            manifest.size_bytes,
            manifest.task,
            manifest.peft_type,
            manifest.rank,
            manifest.base_reference,
            manifest.base_fingerprint,
            canonical_json(manifest.labels).decode(),
        ),
    )
    blobs = [(entry.digest, entry.size) for entry in manifest.files]
    db.executemany("INSERT OR IGNORE INTO blobs VALUES (?, ?)", [*blobs, (record.digest, manifest_size)])
    _insert_event(
        db,
        (record.sequence, "pushed", record.name, record.version, record.digest, None, None, record.created_at),
    )


def insert_alias(db: sqlite3.Connection, line: AliasLine, digest: str) -> None:
    """A move of an alias with its event; `digest` is that of the version it points at, or pointed at."""
    if line.version is None:
        db.execute("DELETE FROM aliases WHERE name = ? AND alias = ?", (line.name, line.alias))
    else:
        db.execute("INSERT OR REPLACE INTO aliases VALUES (?, ?, ?)", (line.name, line.alias, line.version))
    kind = "alias_removed" if line.version is None else "alias_set"
    number = line.version if line.version is not None else line.previous_version
    _insert_event(db, (line.sequence, kind, line.name, number, digest, line.alias, line.previous_version, line.at))


def _insert_event(db: sqlite3.Connection, row: Sequence[Any]) -> None:
    db.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)


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
    }


def _record(row: Sequence[Any], pointing: dict[str, int]) -> VersionRecord:
    return VersionRecord(**_fields(row, pointing))


def _summary(row: Sequence[Any], pointing: dict[str, int]) -> AdapterSummary:
    return AdapterSummary(**_fields(row, pointing), versions=row[11], alias_versions=pointing)
