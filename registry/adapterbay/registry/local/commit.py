"""Writing to the registry: files first, the index last. SQLite's COMMIT is the one instant at which a write happens.

Before it, what is on disk is a leftover that nobody sees; after it, everything is durable. All of it is done under
the index's write lock, which the system releases if the process dies.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterbay.registry import durable
from adapterbay.registry.errors import AdapterbayError, NotFound, StaleAlias
from adapterbay.registry.local import queries
from adapterbay.registry.local.blobs import BlobStore, Staged, Staging
from adapterbay.registry.local.index import Index
from adapterbay.registry.local.records import AliasLine, Records, VersionFile, now
from adapterbay.registry.manifest import Manifest
from adapterbay.registry.nearest import nearest_numbers, nearest_words
from adapterbay.registry.views import ANY, AliasMove, AnyVersion


@dataclass(slots=True)
class _Written:
    """What a write put on disk before its commit, to be taken back if the commit does not come."""

    placed: list[str] = field(default_factory=list)
    record: tuple[str, int] | None = None
    alias_logs: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Committed:
    """A committed push. `new_bytes` were not stored before."""

    version: int
    same_as: int | None
    new_bytes: int


class Writer:
    """The three writes of a registry: a push, and setting and removing an alias."""

    def __init__(self, root: Path, blobs: BlobStore, records: Records, index: Index) -> None:
        self._root = root
        self._blobs = blobs
        self._records = records
        self._index = index

    def push(
        self, staging: Staging, files: Sequence[Staged], name: str, manifest: Manifest, aliases: Iterable[str]
    ) -> Committed:
        """Makes staged files the next version of `name` and moves `aliases` to it. `files` begins with the manifest."""
        written = _Written()
        try:
            with durable.storage_errors(self._root), self._index.write() as db:
                # Noted before anything moves, so that a half-done placement is taken back too. A blob that was there
                # already is not this push's to remove, even if no version refers to it.
                written.placed = [staged.digest for staged in files if not staged.stored]
                placed = self._blobs.place(files)
                version = queries.next_version(db, name)
                same_as = queries.version_by_digest(db, name, manifest.digest)
                at = now()
                sequence = queries.last_sequence(db) + 1
                record = VersionFile(name, version, manifest.digest, at, sequence)
                written.record = (name, version)
                self._records.write_version(record, staging.temporary())
                queries.insert_version(db, record, manifest, files[0].size)
                for alias in aliases:
                    previous = queries.aliases(db, name).get(alias)
                    self._move(db, AliasLine(name, alias, version, previous, at, 0), manifest.digest, written)
        except BaseException as error:
            self._take_back(written, error)
            raise
        return Committed(version, same_as, sum(staged.size for staged in placed))

    def set_alias(self, name: str, alias: str, version: int, expected: int | AnyVersion | None) -> AliasMove:
        """Compare-and-swap; see `Registry.set_alias`."""
        written = _Written()
        try:
            with durable.storage_errors(self._root), self._index.write() as db:
                digest = queries.version_by_number(db, name, version)
                if digest is None:
                    raise self._unknown_version(db, name, version)
                current = queries.aliases(db, name).get(alias)
                _check_expected(name, alias, expected, current)
                if current != version:
                    self._move(db, AliasLine(name, alias, version, current, now(), 0), digest, written)
        except BaseException as error:
            self._take_back(written, error)
            raise
        return AliasMove(alias, current, version)

    def remove_alias(self, name: str, alias: str, expected: int | AnyVersion | None) -> AliasMove:
        """Compare-and-swap; see `Registry.remove_alias`."""
        written = _Written()
        try:
            with durable.storage_errors(self._root), self._index.write() as db:
                pointing = queries.aliases(db, name)
                current = pointing.get(alias)
                if current is None:
                    if queries.newest_version(db, name) is None:
                        raise unknown_name(db, name)
                    raise NotFound(f"{name} has no alias {alias}.", near=nearest_words(alias, pointing))
                _check_expected(name, alias, expected, current)
                digest = queries.version_by_number(db, name, current) or ""
                self._move(db, AliasLine(name, alias, None, current, now(), 0), digest, written)
        except BaseException as error:
            self._take_back(written, error)
            raise
        return AliasMove(alias, current, None)

    def _move(self, db: sqlite3.Connection, line: AliasLine, digest: str, written: _Written) -> None:
        fields = {key: getattr(line, key) for key in ("name", "alias", "version", "previous_version", "at")}
        numbered = AliasLine(**fields, sequence=queries.last_sequence(db) + 1)
        written.alias_logs.add(line.name)
        self._records.append_alias(numbered, queries.alias_moves(db, line.name))
        queries.insert_alias(db, numbered, digest)

    def _unknown_version(self, db: sqlite3.Connection, name: str, version: int) -> NotFound:
        newest = queries.newest_version(db, name)
        if newest is None:
            return unknown_name(db, name)
        return unknown_version(db, name, version, newest[0])

    def _take_back(self, written: _Written, cause: BaseException) -> None:
        """Removes what was written, as far as the index, read anew under the lock, does not know it."""
        if not written.placed and written.record is None and not written.alias_logs:
            return
        try:
            with self._index.write() as db:
                for digest in queries.unreferenced(db, written.placed):
                    self._blobs.remove(digest)
                if written.record and queries.version_by_number(db, *written.record) is None:
                    self._records.remove_version(*written.record)
                for name in written.alias_logs:
                    self._records.keep_aliases(name, queries.alias_moves(db, name))
        except (OSError, AdapterbayError) as error:
            # The leftovers are no part of the registry; the error that led here is the one to report.
            cause.add_note(f"What was written before could not be removed: {error}")


def _check_expected(name: str, alias: str, expected: Any, current: int | None) -> None:
    if expected is ANY or expected == current:
        return
    there = "is not set" if current is None else f"points at version {current}"
    wanted = "not to be set" if expected is None else f"version {expected}"
    error = StaleAlias(f"{name}@{alias} {there}, but {wanted} was expected: read it again and decide anew.")
    error.metadata.update(
        {"alias": alias, "current_version": str(current or ""), "expected_version": str(expected or "")}
    )
    raise error


def unknown_name(db: sqlite3.Connection, name: str) -> NotFound:
    """The error for an adapter that is not there."""
    return NotFound(f"There is no adapter {name} in the registry.", near=nearest_words(name, queries.names(db)))


def unknown_version(db: sqlite3.Connection, name: str, version: int, newest: int) -> NotFound:
    """The error for a version that is not there."""
    there = [record.version for record in queries.versions(db, name)]
    near = [f"{name}@{number}" for number in nearest_numbers(version, there)]
    return NotFound(f"{name} has no version {version}; its newest is {newest}.", near=near)
