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


MIGRATIONS: Final[tuple[Callable[[sqlite3.Connection], None], ...]] = (m001_versions_aliases_events,)
"""`PRAGMA user_version` counts how many of them a database has had."""
