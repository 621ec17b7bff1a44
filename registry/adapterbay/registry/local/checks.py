"""Comparing what is in a registry with what should be, and building the index again from the files on disk."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path
from typing import Any, Final

from adapterbay.registry.errors import Corrupted, Rejected
from adapterbay.registry.local import changes, queries
from adapterbay.registry.local.blobs import BlobStore
from adapterbay.registry.local.index import Index
from adapterbay.registry.local.records import EVERY_ADAPTER_SPELLED, Change, Records, VersionFile
from adapterbay.registry.manifest import Manifest
from adapterbay.registry.views import Problem, RegistryEvent, VerifyReport, VersionRecord

_log = logging.getLogger(__name__)


TABLES: Final = (
    *("adapters", "versions", "aliases", "blobs", "events", "tags", "metrics", "guards", "comparisons", "commits"),
)


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

    def signature(self, name: str, version: int, digest: str) -> None:
        self._blob(digest, None, "The signature", f"{name}@{version}", "signature")

    def changes(self, name: str, events: list[RegistryEvent]) -> None:
        try:
            journal, old = self._records.changes(name)
        except Corrupted as error:
            self.problems.append(Problem("journal", name or EVERY_ADAPTER_SPELLED, error.message))
            return
        expected = [_fields(event) for event in events]
        found = [_fields(change) for change in [*journal, *old]]
        if any(fields not in found for fields in expected):
            contradiction = "the log of its changes contradicts the index"
            self.problems.append(Problem("journal", name or EVERY_ADAPTER_SPELLED, contradiction))

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


def _fields(change: RegistryEvent | Change) -> tuple[Any, ...]:
    return (change.sequence, change.kind, change.alias, change.previous_version, change.by, dict(change.detail))


def verify(blobs: BlobStore, records: Records, index: Index, name: str | None) -> VerifyReport:
    """See `Registry.verify`. Blobs are read without a lock: they never change; pushes go on meanwhile."""
    with index.read() as db:
        db.execute("BEGIN")  # one state of the index throughout
        try:
            names = queries.all_names(db) if name is None else [name]
            signatures = queries.signatures(db)
            recorded = queries.recorded(db)
            found = [(each, queries.versions(db, each), queries.events_of(db, each)) for each in names]
        finally:
            db.execute("COMMIT")
    work = _Verification(blobs, records)
    for each, versions, events in found:
        for version, digest in signatures.get(each, []):
            work.signature(each, version, digest)
        sequences = {event.version: event.sequence for event in events if event.kind == "pushed"}
        for record in versions:
            work.version(record, sequences.get(record.version, 0))
        work.changes(each, [event for event in events if event.kind != "pushed"])
    known = {records.version_path(*place) for place in recorded}
    leftovers = sum(
        1 for path in records.versions() if path not in known and (name is None or records.name_of(path) == name)
    )
    return VerifyReport(work.checked_blobs, work.versions, tuple(work.problems), leftovers)


def rebuild(blobs: BlobStore, records: Records, db: sqlite3.Connection) -> None:
    """See `Registry.rebuild_index`. Needs the write lock."""
    for table in TABLES:
        db.execute(f"DELETE FROM {table}")
    for entry in _in_order(records):
        if isinstance(entry, VersionFile):
            path = blobs.check(entry.digest, None, f"The manifest of {entry.name}@{entry.version}")
            changes.insert_version(db, entry, _manifest(path, entry), path.stat().st_size)
            continue
        digest = changes.digest_of(db, entry.name, entry.subject)
        if entry.subject and not digest:
            raise Corrupted(
                f"The journal of {entry.name} says that version {entry.subject} was {entry.kind}, and the record of "
                "that version is lost: bring it back from a copy of the registry, then rebuild."
            )
        changes.apply(db, entry, digest)


def backfill(blobs: BlobStore, db: sqlite3.Connection, done: int) -> None:
    """Adds what schema `done` did not have and only the manifests know. One that is not readable is left to verify."""
    if done < 2:
        for name, version, digest in db.execute("SELECT name, version, digest FROM versions").fetchall():
            try:
                manifest = Manifest.from_bytes(blobs.read(digest, None, "The manifest"))
            except (Corrupted, Rejected) as error:
                _log.warning("The metrics of %s@%s are not known: %s", name, version, error)
                continue
            changes.insert_metrics(db, name, version, manifest)


def _manifest(path: Path, entry: VersionFile) -> Manifest:
    try:
        return Manifest.from_bytes(path.read_bytes())
    except Rejected as error:
        raise Corrupted(f"The manifest of {entry.name}@{entry.version} is not valid: {error.message}") from error


def _in_order(records: Records) -> list[VersionFile | Change]:
    """Everything on disk by sequence. Of two with one sequence the older, and what is about it, was never committed."""
    by_sequence: dict[int, VersionFile | Change] = {}
    left_over: set[tuple[str, int]] = set()
    entries: list[VersionFile | Change] = [records.read_version(path) for path in records.versions()]
    for path in records.logs():
        entries.extend(records.read_changes(path))
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


def _time(entry: VersionFile | Change) -> str:
    return entry.created_at if isinstance(entry, VersionFile) else entry.at
