"""The SQLite index: connections, transactions, migrations. What is in the tables is the store's business.

WAL mode, so readers never wait for a writer; `BEGIN IMMEDIATE` is the one write lock of the registry, across threads
and processes, and the system releases it when its holder is killed. `synchronous=FULL`: what was committed survives a
power cut.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from adapterbay.registry.errors import AdapterbayError, Corrupted, StorageFull, Unavailable
from adapterbay.registry.local.migrations import MIGRATIONS

BUSY_SECONDS: Final = 60.0
_inherited: list[sqlite3.Connection] = []
"""Connections of a parent process: never used and never closed here, as SQLite asks after a fork."""


class Index:
    """Connections to one index file; used by any number of threads at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._idle: list[sqlite3.Connection] = []
        self._pid = os.getpid()

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A connection whose every statement sees the newest committed state."""
        with self._errors():
            connection = self._take()
            try:
                yield connection
            finally:
                self._give(connection)

    @contextmanager
    def read_at_once(self) -> Iterator[sqlite3.Connection | None]:
        """A connection whose reads raise sqlite3.OperationalError instead of waiting; None if none is open and idle."""
        with self._lock:
            connection = self._idle.pop() if self._idle and self._pid == os.getpid() else None
        if connection is None:
            yield None
            return
        try:
            connection.execute("PRAGMA busy_timeout = 0")
            yield connection
        finally:
            connection.execute(f"PRAGMA busy_timeout = {round(BUSY_SECONDS * 1000)}")
            self._give(connection)

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction that holds the registry's write lock; committed at the end, rolled back on any error."""
        with self.read() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def migrate(
        self, fill: Callable[[sqlite3.Connection], None], backfill: Callable[[sqlite3.Connection, int], None]
    ) -> None:
        """Brings the schema up to date, and fills a new database by `fill` in the same transaction.

        An older one keeps its rows; `backfill` adds what its schema, given by number, did not have.

        Raises Unavailable if a newer adapterbay made it.
        """
        with self.write() as connection:
            done = _user_version(connection)
            if done > len(MIGRATIONS):
                raise Unavailable(
                    f"{self.path} was made by a newer adapterbay (schema {done}, this one knows {len(MIGRATIONS)}): "
                    "update adapterbay."
                )
            for step in MIGRATIONS[done:]:
                step(connection)
            connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
            if done == 0:
                fill(connection)
            elif done < len(MIGRATIONS):
                backfill(connection, done)

    def is_current(self) -> bool:
        """Whether the schema is up to date, without a lock."""
        with self.read() as connection:
            return _user_version(connection) == len(MIGRATIONS)

    def close(self) -> None:
        """Closes the connections that no thread uses now."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _take(self) -> sqlite3.Connection:
        with self._lock:
            if self._pid != os.getpid():
                _inherited.extend(self._idle)
                self._idle = []
                self._pid = os.getpid()
            if self._idle:
                return self._idle.pop()
        return self._connect()

    def _give(self, connection: sqlite3.Connection) -> None:
        with self._lock:
            self._idle.append(connection)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=64
        )
        try:
            _use_wal(connection)
            connection.execute("PRAGMA synchronous = FULL")
        except BaseException:
            connection.close()
            raise
        return connection

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except AdapterbayError:
            raise
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_FULL:
                raise StorageFull(
                    f"No space left for the registry's index at {self.path}; nothing was kept of this write."
                ) from error
            if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:
                raise Unavailable(
                    f"The registry at {self.path.parent} was busy for {BUSY_SECONDS:.0f} seconds: try again."
                ) from error
            raise Unavailable(f"The registry's index {self.path} cannot be used: {error}.") from error
        except sqlite3.DatabaseError as error:
            raise Corrupted(
                f"The registry's index {self.path} is damaged: {error}. Move it away (with its -wal and -shm); it is "
                "built again from the records on disk."
            ) from error


def _user_version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _use_wal(connection: sqlite3.Connection) -> None:
    # Switching to WAL needs a moment alone, and SQLite does not wait for it by itself.
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            if connection.execute("PRAGMA journal_mode = WAL").fetchone()[0] == "wal":
                return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                raise
        if time.monotonic() > deadline:
            raise Unavailable("The registry's index cannot be opened in WAL mode: is it on a network file system?")
        time.sleep(0.01)
