"""What a write does to the tables of the index: the same for a new change and for one read back from disk."""

from __future__ import annotations

import sqlite3

from adapterbay.registry.digest import canonical_json
from adapterbay.registry.local import queries
from adapterbay.registry.local.records import Change, VersionFile
from adapterbay.registry.manifest import Manifest
from adapterbay.registry.metrics import metrics_of


def insert_version(db: sqlite3.Connection, record: VersionFile, manifest: Manifest, manifest_size: int) -> None:
    """A pushed version with its metrics, its event and its blobs."""
    db.execute(
        "INSERT INTO adapters (name, next_version, newest, live) VALUES (?, ?, ?, 1) ON CONFLICT (name) DO UPDATE SET "
        "next_version = MAX(next_version, excluded.next_version), newest = MAX(COALESCE(newest, 0), excluded.newest), "
        "live = live + 1",
        (record.name, record.version + 1, record.version),
    )
    db.execute(
        "INSERT INTO versions (name, version, digest, created_at, size_bytes, task, peft_type, rank, base_reference, "
        "base_fingerprint, labels, parents, signature) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
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
            canonical_json(manifest.parents).decode(),
            queries.signature(db, record.digest),  # a signature is of the content
        ),
    )
    insert_metrics(db, record.name, record.version, manifest)
    for entry in manifest.files:
        _insert_blob(db, entry.digest, entry.size)
    _insert_blob(db, record.digest, manifest_size)
    db.execute(
        "INSERT INTO events (sequence, kind, name, version, digest, at, by) VALUES (?, 'pushed', ?, ?, ?, ?, ?)",
        (record.sequence, record.name, record.version, record.digest, record.created_at, record.by),
    )


def insert_metrics(db: sqlite3.Connection, name: str, version: int, manifest: Manifest) -> None:
    """The numbers among the metrics of the training record; what is nested gets a dotted name."""
    db.executemany(
        "INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, ?)",
        [(name, version, metric, value) for metric, value in metrics_of(manifest).items()],
    )


def digest_of(db: sqlite3.Connection, name: str, version: int) -> str:
    """The digest of a version, deleted or not; empty if `version` is 0."""
    row = db.execute("SELECT digest FROM versions WHERE name = ? AND version = ?", (name, version)).fetchone()
    return row[0] if row else ""


def apply(db: sqlite3.Connection, change: Change, digest: str) -> None:
    """A change with its event. `digest` is that of the version it is about; empty if it is of the whole adapter."""
    place = (change.name, change.version)
    detail = change.detail
    if change.kind == "alias_set":
        db.execute("INSERT OR REPLACE INTO aliases VALUES (?, ?, ?)", (change.name, change.alias, change.version))
    elif change.kind == "alias_removed":
        db.execute("DELETE FROM aliases WHERE name = ? AND alias = ?", (change.name, change.alias))
    elif change.kind == "tagged":
        db.executemany(
            "DELETE FROM tags WHERE name = ? AND version = ? AND key = ?",
            [(*place, key) for key in detail.get("removed", ())],
        )
        db.executemany(
            "INSERT OR REPLACE INTO tags VALUES (?, ?, ?, ?)",
            [(*place, key, value) for key, value in detail.get("set", {}).items()],
        )
    elif change.kind == "deprecated":
        db.execute("UPDATE versions SET deprecated = ? WHERE name = ? AND version = ?", (detail.get("reason"), *place))
    elif change.kind == "deleted":
        _delete(db, change)
    elif change.kind == "guard_set":
        document = canonical_json(dict(detail)).decode()
        db.execute("INSERT OR REPLACE INTO guards VALUES (?, ?, ?)", (change.name, change.alias, document))
    elif change.kind == "guard_removed":
        db.execute("DELETE FROM guards WHERE name = ? AND alias = ?", (change.name, change.alias))
    elif change.kind == "compared":
        document = canonical_json(dict(detail)).decode()
        db.execute("INSERT INTO comparisons VALUES (?, ?, ?, ?)", (change.sequence, *place, document))
    elif change.kind == "signed":
        _insert_blob(db, detail["signature"], detail["size"])
        # A signature is of the content: of every version with this digest, and of those to come (`insert_version`).
        db.execute("UPDATE versions SET signature = ? WHERE digest = ?", (detail["signature"], digest))
    elif change.kind == "committed":
        _insert_commit(db, change)
    db.execute(
        "INSERT INTO events (sequence, kind, name, version, digest, alias, previous_version, at, by, detail, journal) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            change.sequence,
            change.kind,
            change.name,
            change.subject,
            digest,
            change.alias,
            change.previous_version,
            change.at,
            change.by,
            canonical_json(dict(detail)).decode(),
            int(change.journal),
        ),
    )


def _delete(db: sqlite3.Connection, change: Change) -> None:
    db.execute(
        "UPDATE versions SET deleted_at = ? WHERE name = ? AND version = ?", (change.at, change.name, change.version)
    )
    for table in ("tags", "metrics"):
        db.execute(f"DELETE FROM {table} WHERE name = ? AND version = ?", (change.name, change.version))
    db.execute(
        "UPDATE adapters SET live = live - 1, newest = "
        "(SELECT MAX(version) FROM versions v WHERE v.name = adapters.name AND v.deleted_at IS NULL) WHERE name = ?",
        (change.name,),
    )


def _insert_commit(db: sqlite3.Connection, change: Change) -> None:
    detail = change.detail
    for digest, size in detail["tree"].values():
        _insert_blob(db, digest, size)
    db.execute(
        "INSERT INTO commits VALUES (?, (SELECT COALESCE(MAX(number), 0) + 1 FROM commits WHERE name = ?), "
        "?, ?, ?, ?, ?, ?, ?, ?)",
        (
            change.name,
            change.name,
            detail["sha"],
            detail.get("parent"),
            change.version,
            canonical_json(detail["tree"]).decode(),
            detail["title"],
            detail.get("message", ""),
            change.by or "",
            change.at,
        ),
    )


def _insert_blob(db: sqlite3.Connection, digest: str, size: int) -> None:
    db.execute("INSERT OR IGNORE INTO blobs VALUES (?, ?)", (digest, size))
