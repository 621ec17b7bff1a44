"""Comparing what is in a registry with what should be, and building the index again from the files on disk."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from adapterbay.registry.errors import Corrupted, Rejected
from adapterbay.registry.local import queries
from adapterbay.registry.local.blobs import BlobStore
from adapterbay.registry.local.index import Index
from adapterbay.registry.local.records import AliasLine, Records, VersionFile
from adapterbay.registry.manifest import Manifest
from adapterbay.registry.views import Problem, RegistryEvent, VerifyReport, VersionRecord


class _Verification:
    def __init__(self, blobs: BlobStore, records: Records) -> None:
        self._blobs = blobs
        self._records = records
        self._checked: dict[str, str | None] = {}  # digest → what is wrong with the blob, or None
        self.problems: list[Problem] = []
        self.versions = 0

    @property
    def checked_blobs(self) -> int:
        return len(self._checked)

    def version(self, record: VersionRecord, sequence: int) -> None:
        self.versions += 1
        subject = f"{record.name}@{record.version}"
        if self._blob(record.digest, None, "The manifest", subject, "manifest"):
            try:
                manifest = Manifest.from_bytes(self._blobs.path(record.digest).read_bytes())
            except (Rejected, OSError) as error:
                self.problems.append(Problem("manifest", subject, str(error)))
            else:
                for entry in manifest.files:
                    self._blob(entry.digest, entry.size, entry.path, subject, "blob")
        path = self._records.version_path(record.name, record.version)
        try:
            found = self._records.read_version(path)
        except Corrupted as error:
            self.problems.append(Problem("record", subject, error.message))
            return
        expected = (record.digest, record.created_at.isoformat(timespec="microseconds"), sequence)
        if (found.digest, found.created_at, found.sequence) != expected:
            self.problems.append(Problem("record", subject, f"the record {path} contradicts the index"))

    def aliases(self, name: str, moves: list[RegistryEvent]) -> None:
        try:
            lines = self._records.read_aliases(name)
        except Corrupted as error:
            self.problems.append(Problem("alias", name, error.message))
            return
        expected = [
            (move.sequence, move.alias, move.version if move.kind == "alias_set" else None, move.previous_version)
            for move in moves
        ]
        found = [(line.sequence, line.alias, line.version, line.previous_version) for line in lines]
        if found[: len(expected)] != expected:
            self.problems.append(Problem("alias", name, "the log of its aliases contradicts the index"))

    def _blob(self, digest: str, size: int | None, what: str, subject: str, kind: Any) -> bool:
        if digest not in self._checked:
            try:
                self._blobs.check(digest, size, what)
                self._checked[digest] = None
            except Corrupted as error:
                self._checked[digest] = error.message
        problem = self._checked[digest]
        if problem is not None:
            self.problems.append(Problem(kind, subject, problem))
        return problem is None


def verify(blobs: BlobStore, records: Records, index: Index, name: str | None) -> VerifyReport:
    """See `Registry.verify`. Blobs are read without a lock: they never change; pushes go on meanwhile."""
    with index.read() as db:
        db.execute("BEGIN")  # one state of the index throughout
        try:
            names = queries.names(db) if name is None else [name]
            found = [(each, queries.versions(db, each), queries.events_of(db, each)) for each in names]
        finally:
            db.execute("COMMIT")
    work = _Verification(blobs, records)
    for each, versions, events in found:
        sequences = {event.version: event.sequence for event in events if event.kind == "pushed"}
        for record in versions:
            work.version(record, sequences.get(record.version, 0))
        work.aliases(each, [event for event in events if event.alias is not None])
    known = {records.version_path(each, record.version) for each, versions, _ in found for record in versions}
    leftovers = sum(
        1 for path in records.versions() if path not in known and (name is None or records.name_of(path) == name)
    )
    return VerifyReport(work.checked_blobs, work.versions, tuple(work.problems), leftovers)


def rebuild(blobs: BlobStore, records: Records, db: sqlite3.Connection) -> None:
    """See `Registry.rebuild_index`. Needs the write lock."""
    for table in ("adapters", "versions", "aliases", "blobs", "events"):
        db.execute(f"DELETE FROM {table}")
    digests: dict[tuple[str, int], str] = {}
    for entry in _in_order(records):
        if isinstance(entry, VersionFile):
            path = blobs.check(entry.digest, None, f"The manifest of {entry.name}@{entry.version}")
            queries.insert_version(db, entry, _manifest(path, entry), path.stat().st_size)
            digests[entry.name, entry.version] = entry.digest
        else:
            number = entry.version if entry.version is not None else entry.previous_version
            digest = digests.get((entry.name, number)) if number is not None else None
            if digest is None:
                raise Corrupted(f"The alias {entry.name}@{entry.alias} points at version {number}, which is lost.")
            queries.insert_alias(db, entry, digest)


def _manifest(path: Path, entry: VersionFile) -> Manifest:
    try:
        return Manifest.from_bytes(path.read_bytes())
    except Rejected as error:
        raise Corrupted(f"The manifest of {entry.name}@{entry.version} is not valid: {error.message}") from error


def _in_order(records: Records) -> list[VersionFile | AliasLine]:
    """Everything on disk by sequence. Of two with one sequence the older, and its aliases, were never committed."""
    by_sequence: dict[int, VersionFile | AliasLine] = {}
    left_over: set[tuple[str, int]] = set()
    entries: list[VersionFile | AliasLine] = [records.read_version(path) for path in records.versions()]
    for path in records.alias_files():
        entries.extend(records.read_aliases(records.name_of(path)))
    for entry in sorted(entries, key=_time):
        older = by_sequence.get(entry.sequence)
        if isinstance(older, VersionFile):
            left_over.add((older.name, older.version))
        by_sequence[entry.sequence] = entry
    return [
        entry
        for _, entry in sorted(by_sequence.items())
        if isinstance(entry, VersionFile) or (entry.name, entry.version) not in left_over
    ]


def _time(entry: VersionFile | AliasLine) -> str:
    return entry.created_at if isinstance(entry, VersionFile) else entry.at
