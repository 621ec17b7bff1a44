"""The schema of the index, as steps that are only ever appended. A step that was released is never changed."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Final


def m001_versions_aliases_events(connection: sqlite3.Connection) -> None:
    """Adapters, their versions and aliases, the blobs in use, and the log of what happened."""
    for statement in (
        """CREATE TABLE adapters (
            name TEXT PRIMARY KEY,
            next_version INTEGER NOT NULL
        ) STRICT, WITHOUT ROWID""",
        """CREATE TABLE versions (
            name TEXT NOT NULL,
            version INTEGER NOT NULL,
            digest TEXT NOT NULL,
            created_at TEXT NOT NULL,
            size_bytes INTEGER NOT NULL,
            task TEXT NOT NULL,
            peft_type TEXT NOT NULL,
            rank INTEGER NOT NULL,
            base_reference TEXT NOT NULL,
            base_fingerprint TEXT NOT NULL,
            labels TEXT NOT NULL,
            PRIMARY KEY (name, version)
        ) STRICT, WITHOUT ROWID""",
        "CREATE INDEX versions_by_digest ON versions (digest)",
        """CREATE TABLE aliases (
            name TEXT NOT NULL,
            alias TEXT NOT NULL,
            version INTEGER NOT NULL,
            PRIMARY KEY (name, alias)
        ) STRICT, WITHOUT ROWID""",
        """CREATE TABLE blobs (
            digest TEXT PRIMARY KEY,
            size_bytes INTEGER NOT NULL
        ) STRICT, WITHOUT ROWID""",
        """CREATE TABLE events (
            sequence INTEGER PRIMARY KEY,
            kind TEXT NOT NULL,
            name TEXT NOT NULL,
            version INTEGER NOT NULL,
            digest TEXT NOT NULL,
            alias TEXT,
            previous_version INTEGER,
            at TEXT NOT NULL
        ) STRICT""",
        "CREATE INDEX events_by_name ON events (name, sequence)",
    ):
        connection.execute(statement)


def m002_lifecycle(connection: sqlite3.Connection) -> None:
    """Who and why; tags, metrics, guards, comparisons, signatures, tombstones, commits; the newest version at hand."""
    for statement in (
        "ALTER TABLE adapters ADD COLUMN newest INTEGER",
        "ALTER TABLE adapters ADD COLUMN live INTEGER NOT NULL DEFAULT 0",
        """UPDATE adapters SET
            newest = (SELECT MAX(version) FROM versions v WHERE v.name = adapters.name),
            live = (SELECT COUNT(*) FROM versions v WHERE v.name = adapters.name)""",
        "ALTER TABLE versions ADD COLUMN deleted_at TEXT",
        "ALTER TABLE versions ADD COLUMN deprecated TEXT",
        "ALTER TABLE versions ADD COLUMN signature TEXT",
        "ALTER TABLE versions ADD COLUMN parents TEXT NOT NULL DEFAULT '[]'",
        "ALTER TABLE events ADD COLUMN by TEXT",
        "ALTER TABLE events ADD COLUMN detail TEXT NOT NULL DEFAULT '{}'",
        "ALTER TABLE events ADD COLUMN journal INTEGER NOT NULL DEFAULT 0",
        "CREATE INDEX journal_by_name ON events (name) WHERE journal = 1",
        """CREATE TABLE tags (
            name TEXT NOT NULL,
            version INTEGER NOT NULL,
            key TEXT NOT NULL,
            value TEXT NOT NULL,
            PRIMARY KEY (name, version, key)
        ) STRICT, WITHOUT ROWID""",
        "CREATE INDEX tags_by_key ON tags (key, value)",
        """CREATE TABLE metrics (
            name TEXT NOT NULL,
            version INTEGER NOT NULL,
            metric TEXT NOT NULL,
            value REAL NOT NULL,
            PRIMARY KEY (name, version, metric)
        ) STRICT, WITHOUT ROWID""",
        """CREATE TABLE guards (
            name TEXT NOT NULL,
            alias TEXT NOT NULL,
            document TEXT NOT NULL,
            PRIMARY KEY (name, alias)
        ) STRICT, WITHOUT ROWID""",
        """CREATE TABLE comparisons (
            sequence INTEGER PRIMARY KEY,
            name TEXT NOT NULL,
            version INTEGER NOT NULL,
            document TEXT NOT NULL
        ) STRICT""",
        "CREATE INDEX comparisons_by_version ON comparisons (name, version)",
        """CREATE TABLE commits (
            name TEXT NOT NULL,
            number INTEGER NOT NULL,
            sha TEXT NOT NULL,
            parent TEXT,
            version INTEGER,
            tree TEXT NOT NULL,
            title TEXT NOT NULL,
            message TEXT NOT NULL,
            author TEXT NOT NULL,
            at TEXT NOT NULL,
            PRIMARY KEY (name, number)
        ) STRICT, WITHOUT ROWID""",
        "CREATE UNIQUE INDEX commits_by_sha ON commits (name, sha)",
    ):
        connection.execute(statement)


MIGRATIONS: Final[tuple[Callable[[sqlite3.Connection], None], ...]] = (
    m001_versions_aliases_events,
    m002_lifecycle,
)
"""`PRAGMA user_version` counts how many of them a database has had."""
