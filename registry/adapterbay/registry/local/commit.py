"""Writing to the registry: files first, the index last. SQLite's COMMIT is the one instant at which a write happens.

Before it, what is on disk is a leftover that nobody sees; after it, everything is durable. All of it is done under
the index's write lock, which the system releases if the process dies.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adapterbay.registry import durable
from adapterbay.registry.errors import (
    AdapterbayError,
    Conflict,
    InvalidArgument,
    NotFound,
    PromotionRefused,
)
from adapterbay.registry.gate import Evidence, unmet
from adapterbay.registry.local import changes, queries
from adapterbay.registry.local.blobs import BlobStore, Staged, Staging
from adapterbay.registry.local.index import Index
from adapterbay.registry.local.records import EVERY_ADAPTER, Change, Records, VersionFile, now
from adapterbay.registry.manifest import Manifest
from adapterbay.registry.nearest import nearest_numbers, nearest_words
from adapterbay.registry.swap import check_expected
from adapterbay.registry.views import AliasMove, AnyVersion


@dataclass(slots=True)
class _Written:
    """What a write put on disk before its commit, to be taken back if the commit does not come."""

    placed: list[str] = field(default_factory=list)
    new: set[str] = field(default_factory=set)
    record: tuple[str, int] | None = None
    journals: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Committed:
    """A committed push. `new_bytes` were not stored before; `overruled`: the demands of guards that were forced."""

    version: int
    same_as: int | None
    new_bytes: int
    overruled: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Force:
    """A guard shall be overruled, because of `why`."""

    why: str

    def __post_init__(self) -> None:
        if not self.why.strip():
            raise InvalidArgument("Say why the guard is overruled: --why TEXT.", field="why")


Also = Callable[[sqlite3.Connection, int, str], Iterable[Change]]
"""More changes of the same transaction: called with the index, the version and its time; may raise to refuse it all."""


class Writer:
    """All writes of a registry: a push, and changes of what is there. `by` is who does it."""

    def __init__(self, root: Path, blobs: BlobStore, records: Records, index: Index) -> None:
        self._root = root
        self._blobs = blobs
        self._records = records
        self._index = index

    def push(
        self,
        staging: Staging,
        files: Sequence[Staged],
        name: str,
        manifest: Manifest,
        *,
        by: str,
        aliases: Iterable[str] = (),
        number: int | None = None,
        force: Force | None = None,
        also: Also | None = None,
    ) -> Committed:
        """Makes staged files the next version of `name` and moves `aliases` to it. `files` begins with the manifest.

        `number`, if given, is the version to make: Conflict if it or a later one was there before. Blobs among `files`
        that the manifest does not name must be named by a change of `also`.
        """
        with self._transaction() as (db, written):
            self._place(files, written)
            version = queries.next_version(db, name)
            if number is not None:
                version = _numbered(name, number, version)
            same_as = queries.version_by_digest(db, name, manifest.digest)
            at = now()
            record = VersionFile(name, version, manifest.digest, at, queries.last_sequence(db) + 1, by)
            written.record = (name, version)
            self._records.write_version(record, staging.temporary())
            changes.insert_version(db, record, manifest, files[0].size)
            overruled: list[str] = []
            for alias in aliases:
                previous = queries.aliases(db, name).get(alias)
                detail = self._gate(db, name, alias, version, force)
                overruled += detail.get("overruled", ())
                self._write(db, Change("alias_set", name, at, by, version, alias, previous, detail), written)
            for change in also(db, version, at) if also else ():
                self._write(db, change, written)
            new_bytes = sum(staged.size for staged in files if staged.digest in written.new)
        return Committed(version, same_as, new_bytes, tuple(dict.fromkeys(overruled)))

    def change(
        self, build: Callable[[sqlite3.Connection, str], Iterable[Change]], files: Sequence[Staged] = ()
    ) -> list[Change]:
        """Commits the changes that `build` makes of the index and the time, with the blobs they name; all or none."""
        with self._transaction() as (db, written):
            self._place(files, written)
            return [self._write(db, change, written) for change in build(db, now())]

    def set_alias(
        self,
        name: str,
        alias: str,
        version: int,
        *,
        by: str,
        expected: int | AnyVersion | None,
        force: Force | None = None,
        rollback: bool = False,
    ) -> AliasMove:
        """Compare-and-swap; see `Registry.set_alias`."""
        previous: int | None = None
        overruled: tuple[str, ...] = ()

        def build(db: sqlite3.Connection, at: str) -> Iterator[Change]:
            nonlocal previous, overruled
            if queries.version_by_number(db, name, version) is None:
                raise unknown_version(db, name, version)
            previous = queries.aliases(db, name).get(alias)
            check_expected(name, alias, expected, previous)
            if previous != version:
                detail = self._gate(db, name, alias, version, force)
                overruled = tuple(detail.get("overruled", ()))
                if rollback:
                    detail["rollback"] = True
                yield Change("alias_set", name, at, by, version, alias, previous, detail)

        self.change(build)
        return AliasMove(alias, previous, version, overruled)

    def remove_alias(self, name: str, alias: str, *, by: str, expected: int | AnyVersion | None) -> AliasMove:
        """Compare-and-swap; see `Registry.remove_alias`."""
        previous: int | None = None

        def build(db: sqlite3.Connection, at: str) -> Iterator[Change]:
            nonlocal previous
            pointing = queries.aliases(db, name)
            previous = pointing.get(alias)
            if previous is None:
                if queries.newest_version(db, name) is None:
                    raise unknown_name(db, name)
                raise NotFound(f"{name} has no alias {alias}.", near=nearest_words(alias, pointing))
            check_expected(name, alias, expected, previous)
            yield Change("alias_removed", name, at, by, None, alias, previous)

        self.change(build)
        return AliasMove(alias, previous, None)

    def _gate(self, db: sqlite3.Connection, name: str, alias: str, version: int, force: Force | None) -> dict[str, Any]:
        """What to record of the guard, if it was overruled. Raises PromotionRefused."""
        guards = [queries.guards(db, place).get(alias) for place in (EVERY_ADAPTER, name)]
        if not any(guards):
            return {}
        record = queries.version(db, name, version)
        assert record is not None
        before = queries.last_place(db, name, alias)
        evidence = Evidence(
            record.metrics,
            queries.comparisons(db, name, version),
            record.signed,
            before[1] if before and before[1] != record.digest else None,
        )
        demands = [demand for guard in guards if guard for demand in unmet(guard, evidence)]
        missing = tuple(dict.fromkeys(demands))
        if missing and force is None:
            raise PromotionRefused(
                f"{name}@{alias} is guarded and may not point at version {version}: {'; '.join(missing)}. "
                "(--force with --why overrules it, and is recorded.)",
                unmet=missing,
            )
        return {"forced": force.why, "overruled": list(missing)} if missing and force else {}

    def _place(self, files: Sequence[Staged], written: _Written) -> None:
        # Noted before anything moves, so that a half-done placement is taken back too. A blob that was there
        # already is not this write's to remove, even if no version refers to it.
        written.placed = [staged.digest for staged in files if not staged.stored]
        written.new = {staged.digest for staged in self._blobs.place(files)}

    def _write(self, db: sqlite3.Connection, change: Change, written: _Written) -> Change:
        numbered = replace(change, sequence=queries.last_sequence(db) + 1)
        subject = changes.digest_of(db, change.name, change.subject)
        written.journals.add(change.name)
        self._records.append(numbered, queries.journal_lines(db, change.name))
        changes.apply(db, numbered, subject)
        return numbered

    @contextmanager
    def _transaction(self) -> Iterator[tuple[sqlite3.Connection, _Written]]:
        written = _Written()
        try:
            with durable.storage_errors(self._root), self._index.write() as db:
                yield db, written
        except BaseException as error:
            self._take_back(written, error)
            raise

    def _take_back(self, written: _Written, cause: BaseException) -> None:
        """Removes what was written, as far as the index, read anew under the lock, does not know it."""
        if not written.placed and written.record is None and not written.journals:
            return
        try:
            with self._index.write() as db:
                for digest in queries.unreferenced(db, written.placed):
                    self._blobs.remove(digest)
                if written.record and not queries.is_recorded(db, *written.record):
                    self._records.remove_version(*written.record)
                for name in written.journals:
                    self._records.keep(name, queries.journal_lines(db, name))
        except (OSError, AdapterbayError) as error:
            # The leftovers are no part of the registry; the error that led here is the one to report.
            cause.add_note(f"What was written before could not be removed: {error}")


def _numbered(name: str, number: int, following: int) -> int:
    if number < following:
        raise Conflict(
            f"{name}@{number} cannot be made: the next version of {name} here is {following}, and numbers are never "
            "used again.",
            reason="VERSION_TAKEN",
        )
    return number


def unknown_name(db: sqlite3.Connection, name: str) -> NotFound:
    """The error for an adapter that is not there."""
    return NotFound(f"There is no adapter {name} in the registry.", near=nearest_words(name, queries.names(db)))


def unknown_version(db: sqlite3.Connection, name: str, version: int) -> NotFound:
    """The error for a version that is not there, or not any more."""
    newest = queries.newest_version(db, name)
    deleted = queries.deletion(db, name, version)
    if deleted is not None:
        reason = deleted.detail.get("reason")
        return NotFound(
            f"{name}@{version} was deleted on {deleted.at:%Y-%m-%d} by {deleted.by}{f': {reason}' if reason else ''}."
            + (f" The newest version is {newest[0]}." if newest else ""),
            reason="DELETED",
        )
    if newest is None:
        return unknown_name(db, name)
    there = [record.version for record in queries.versions(db, name)]
    near = [f"{name}@{number}" for number in nearest_numbers(version, there)]
    return NotFound(f"{name} has no version {version}; its newest is {newest[0]}.", near=near)
