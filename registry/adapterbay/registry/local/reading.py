"""Reading a local registry: what a reference means, and what is there."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from adapterbay.registry.admission.arriving import Arriving, whole_of
from adapterbay.registry.digest import is_digest
from adapterbay.registry.errors import InvalidReference, NotFound
from adapterbay.registry.gate import Comparison, Guard
from adapterbay.registry.local import queries
from adapterbay.registry.local.blobs import BlobStore
from adapterbay.registry.local.commit import unknown_name, unknown_version
from adapterbay.registry.local.index import Index
from adapterbay.registry.local.records import EVERY_ADAPTER
from adapterbay.registry.manifest import WEIGHTS_FILE, FileEntry, Manifest
from adapterbay.registry.nearest import nearest_words
from adapterbay.registry.portable import write_folder
from adapterbay.registry.reference import HubReference, Reference, check_name, parse_reference
from adapterbay.registry.views import (
    AdapterSummary,
    Listing,
    RegistryEvent,
    Resolved,
    Snapshot,
    VersionRecord,
)


@dataclass(frozen=True, slots=True)
class Contents:
    """The files of a version by path; the tensors still arrive. Nobody may act on them before `verify` has returned;
    what only looks at them may run meanwhile, for it takes the time of reading them."""

    manifest: Manifest
    files: Mapping[str, bytes | Arriving]
    blobs: BlobStore

    def verify(self) -> None:
        """Reads what has not been read and compares every file with its digest, the largest first. Raises Corrupted
        naming file and digest."""
        for entry in sorted(self.manifest.files, key=lambda entry: -entry.size):
            file = self.files[entry.path]
            self.blobs.verify(whole_of(file), entry.digest, entry.path)


class Reader:
    """What can be asked of a local registry. Every answer is of the newest committed state."""

    def __init__(self, blobs: BlobStore, index: Index) -> None:
        self.blobs = blobs
        self.index = index

    def resolve(self, reference: str | Reference) -> Resolved:
        """What a reference means now. Raises NotFound with near names, or InvalidReference."""
        parsed = parse_reference(reference) if isinstance(reference, str) else reference
        if isinstance(parsed, HubReference):
            raise InvalidReference(
                f"{parsed} is on the Hub: push it to the registry first, by `registry push {parsed} NAME`.",
                field="adapter",
            )
        with self.index.read() as db:
            found = _find(db, parsed)
            if found is None:
                raise _unknown(db, parsed)
        return Resolved(str(parsed), parsed.name, *found)

    def resolve_at_once(self, reference: str) -> Resolved | None:
        """What a reference means now if that can be told without waiting for anybody: for callers that must not block,
        such as an event loop. None leaves it to `resolve`: nothing is found, or the index cannot be read now."""
        try:
            parsed = parse_reference(reference)
        except InvalidReference:
            return None
        if isinstance(parsed, HubReference):
            return None
        try:
            with self.index.read_at_once() as db:
                found = None if db is None else _find(db, parsed)
        except sqlite3.Error:
            return None
        return None if found is None else Resolved(str(parsed), parsed.name, *found)

    def manifest(self, digest: str) -> Manifest:
        """The manifest with this digest, read and checked. Raises NotFound (also for a deleted one) or Corrupted."""
        self._check_known(digest)
        return Manifest.from_bytes(self.blobs.read(digest, None, "The manifest"))

    def _check_known(self, digest: str) -> None:
        if not is_digest(digest):
            raise InvalidReference(f"{digest[:80]!r} is not a digest: sha256: and 64 hex digits.", field="digest")
        with self.index.read() as db:
            if not queries.knows_digest(db, digest):
                deleted = queries.places_of(db, digest)
                if deleted:
                    raise unknown_version(db, *deleted[-1][:2])
                raise NotFound(f"No version in the registry has the digest {digest}.")

    def contents(self, manifest: Manifest) -> Contents:
        """The files of a version in memory, each read once; `Contents.verify` then says whether they are intact.

        Raises NotFound if the version was deleted since, or Corrupted for what cannot be read; for tensors, which are
        read when they are first asked for, `Arriving` does.
        """
        self._check_known(manifest.digest)

        def contents(entry: FileEntry) -> bytes | Arriving:
            read = partial(self.blobs.read_unchecked, entry.digest, entry.size, entry.path)
            return Arriving(entry.path, entry.size, read) if entry.path == WEIGHTS_FILE else read()

        return Contents(manifest, {entry.path: contents(entry) for entry in manifest.files}, self.blobs)

    def open_snapshot(self, digest: str) -> Snapshot:
        """The files of a version, each read and checked now. Raises NotFound, or Corrupted naming file and digest."""
        manifest = self.manifest(digest)
        files = {entry.path: self.blobs.check(entry.digest, entry.size, entry.path) for entry in manifest.files}
        return Snapshot(manifest, files, self.signature(digest))

    def snapshot(self, reference: str | Reference) -> Snapshot:
        """The files of what a reference means now. Raises as `resolve` and `open_snapshot` do."""
        return self.open_snapshot(self.resolve(reference).digest)

    def signature(self, digest: str) -> bytes | None:
        """The bundle that signs the version with this digest, if there is one. Raises Corrupted."""
        with self.index.read() as db:
            found = queries.signature(db, digest)
        return None if found is None else self.blobs.read(found, None, "The signature")

    def pull(self, reference: str | Reference, destination: str | Path) -> Path:
        """Writes a version as a folder that plain PEFT loads at `destination`, whole or not at all. Returns its path.

        Its manifest lies in it as adapterbay/manifest.json: see `adapterbay.registry.portable`.

        Raises NotFound, Corrupted, InvalidArgument if there is something at `destination`, or StorageFull.
        """
        digest = self.resolve(reference).digest
        manifest = self.manifest(digest)
        files = {entry.path: self.blobs.path(entry.digest) for entry in manifest.files}
        # Each file is checked while it is copied: reading all of them before that would double the time.
        return write_folder(Snapshot(manifest, files, self.signature(digest)), Path(destination).expanduser())

    def version(self, name: str, version: int) -> VersionRecord:
        """One version. Raises NotFound."""
        with self.index.read() as db:
            found = queries.version(db, name, version)
            if found is None:
                raise unknown_version(db, Reference(name, version).name, version)
        return found

    def versions(self, name: str) -> list[VersionRecord]:
        """All versions of an adapter, the oldest first. Raises NotFound."""
        with self.index.read() as db:
            found = queries.versions(db, name)
            if not found:
                raise unknown_name(db, check_name(name))
        return found

    def adapters(self, prefix: str = "", *, listing: Listing | None = None) -> list[AdapterSummary]:
        """The adapters that have a version, by name: those whose name begins with `prefix`, or as `listing` says."""
        with self.index.read() as db:
            return queries.summaries(db, Listing(prefix=prefix) if listing is None else listing)

    def count(self) -> int:
        """How many adapters have a version."""
        with self.index.read() as db:
            return queries.count(db)

    def aliases(self, name: str) -> dict[str, int]:
        """The aliases of an adapter and the versions they point at. Raises NotFound for an unknown adapter."""
        with self.index.read() as db:
            if queries.newest_version(db, name) is None:
                raise unknown_name(db, check_name(name))
            return queries.aliases(db, name)

    def guards(self, name: str | None) -> Mapping[str, Guard]:
        """The guarded aliases of an adapter and what their guards demand. None: the guards of every adapter."""
        place = EVERY_ADAPTER if name is None else check_name(name)
        with self.index.read() as db:
            return queries.guards(db, place)

    def comparisons(self, name: str, version: int) -> list[Comparison]:
        """The recorded comparisons of a version, the newest last."""
        with self.index.read() as db:
            return queries.comparisons(db, name, version)

    def places(self, digest: str) -> list[tuple[str, int]]:
        """Names and versions under which the content with this digest is here."""
        with self.index.read() as db:
            return [(name, version) for name, version, deleted in queries.places_of(db, digest) if not deleted]

    def children(self, digest: str) -> list[tuple[str, int, str]]:
        """Name, version and digest of what was made from the version with this digest."""
        with self.index.read() as db:
            return queries.children_of(db, digest)

    def history(self, name: str | None) -> list[RegistryEvent]:
        """All that happened to an adapter, the oldest first: pushes, moves of aliases, deletions, by whom and when.

        None: what was done for every adapter. Raises NotFound.
        """
        with self.index.read() as db:
            if name is None:
                return queries.events_of(db, EVERY_ADAPTER)
            found = queries.events_of(db, check_name(name))
            if not found:
                raise unknown_name(db, name)
        return found

    def events(self, after: int = 0, limit: int = 1000) -> list[RegistryEvent]:
        """What was committed after the event `after`, the oldest first, at most `limit` events."""
        with self.index.read() as db:
            return queries.events(db, after, limit)

    def last_event(self) -> int:
        """The sequence of the newest event; 0 in an empty registry. Cheap enough to poll."""
        with self.index.read() as db:
            return queries.last_sequence(db)


def _find(db: sqlite3.Connection, reference: Reference) -> tuple[int, str] | None:
    selector = reference.selector
    if selector is None:
        return queries.newest_version(db, reference.name)
    if isinstance(selector, int):
        digest = queries.version_by_number(db, reference.name, selector)
        return None if digest is None else (selector, digest)
    if reference.digest:
        version = queries.version_by_digest(db, reference.name, reference.digest)
        return None if version is None else (version, reference.digest)
    return queries.version_by_alias(db, reference.name, selector)


def _unknown(db: sqlite3.Connection, reference: Reference) -> NotFound:
    newest = queries.newest_version(db, reference.name)
    if newest is None:
        return unknown_name(db, reference.name)
    if isinstance(reference.selector, int):
        return unknown_version(db, reference.name, reference.selector)
    if reference.digest:
        for name, version, deleted in queries.places_of(db, reference.digest):
            if deleted and name == reference.name:
                return unknown_version(db, name, version)
        return NotFound(f"{reference.name} has no version with the digest {reference.digest}.")
    known = queries.aliases(db, reference.name)
    near = [f"{reference.name}@{alias}" for alias in nearest_words(str(reference.alias), known)]
    return NotFound(f"{reference.name} has no alias {reference.alias}.", near=near)
