"""A local registry: immutable versions of adapters, found by name, alias or digest.

    registry = Registry.open("path/to/registry")
    receipt = registry.push("out/sentiment", "team/sentiment", aliases=["champion"])
    snapshot = registry.open_snapshot(registry.resolve("team/sentiment@champion").digest)

Layout: `registry.json` (what this folder is), `blobs/` (contents), `adapters/` (records), `index.sqlite` (built from
the two), `tmp/`. One object may be used by many threads, one folder by many processes; every read sees the newest
committed state.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from adapterbay.registry import durable
from adapterbay.registry.admission import Limits
from adapterbay.registry.admission.candidate import Wishes, as_labels, examine
from adapterbay.registry.admission.folder import read_folder
from adapterbay.registry.base import BaseReference
from adapterbay.registry.digest import canonical_json, is_digest, parse_json_object
from adapterbay.registry.errors import InvalidReference, NotFound, RegistryNotFound, Rejected, Unavailable
from adapterbay.registry.local import queries
from adapterbay.registry.local.blobs import BlobStore
from adapterbay.registry.local.checks import rebuild, verify
from adapterbay.registry.local.commit import Writer, unknown_name, unknown_version
from adapterbay.registry.local.export import write_folder
from adapterbay.registry.local.index import Index
from adapterbay.registry.local.records import Records
from adapterbay.registry.manifest import Manifest
from adapterbay.registry.nearest import nearest_words
from adapterbay.registry.paths import default_registry
from adapterbay.registry.reference import HubReference, Reference, check_alias, check_name, parse_reference
from adapterbay.registry.views import (
    ANY,
    AdapterSummary,
    AliasMove,
    AnyVersion,
    PushReceipt,
    RegistryEvent,
    Resolved,
    Snapshot,
    VerifyReport,
    VersionRecord,
)

MARKER_FILE: Final = "registry.json"
INDEX_FILE: Final = "index.sqlite"
LAYOUT: Final = 1


class Registry:
    """An open local registry. Make one with `Registry.open`."""

    def __init__(self, root: Path, limits: Limits | None = None) -> None:
        self.root = root
        self._limits = limits or Limits()
        self._blobs = BlobStore(root)
        self._records = Records(root)
        self._index = Index(root / INDEX_FILE)
        self._writer = Writer(root, self._blobs, self._records, self._index)

    @classmethod
    def open(cls, location: str | Path | None = None, *, create: bool = True, limits: Limits | None = None) -> Registry:
        """Opens the registry at `location` (None: `default_registry()`), making it if it is not there.

        Raises RegistryNotFound if it is not there and `create` is False, Unavailable if the folder is something else.
        """
        root = (default_registry() if location is None else Path(location).expanduser()).absolute()
        registry = cls(root, limits)
        with durable.storage_errors(root):
            registry._prepare(create)
        return registry

    def _prepare(self, create: bool) -> None:
        marker = self.root / MARKER_FILE
        if not marker.is_file():
            if not create:
                raise RegistryNotFound(
                    f"There is no registry at {self.root}: push something there first, or check --registry."
                )
            if self.root.exists() and (not self.root.is_dir() or not self._is_new()):
                raise Unavailable(f"{self.root} is not a registry and not empty: choose another place.")
            self._blobs.create()
            self._records.create()
            with self._blobs.staging() as staging:
                durable.write_atomic(marker, canonical_json({"layout": LAYOUT}) + b"\n", staging.temporary())
        try:
            layout = parse_json_object(marker.read_bytes(), str(marker)).get("layout")
        except Rejected as error:
            raise Unavailable(f"{self.root} is not a readable registry: {error.message}") from error
        if layout != LAYOUT:
            raise Unavailable(f"The registry at {self.root} has the layout {layout}: update adapterbay.")
        if not self._index.path.is_file() or not self._index.is_current():
            self._index.migrate(lambda db: rebuild(self._blobs, self._records, db))

    def _is_new(self) -> bool:
        # Another process may be making it at this moment, or was killed while it did.
        there = {path.name for path in self.root.iterdir()}
        return MARKER_FILE in there or there <= {"blobs", "adapters", "tmp"}

    def close(self) -> None:
        """Gives the connections back. The object can still be used."""
        self._index.close()

    # Writing

    def push(
        self,
        folder: str | Path,
        name: str,
        *,
        aliases: Sequence[str] = (),
        base: str | BaseReference | None = None,
        task: str | None = None,
        labels: Sequence[str] | None = None,
    ) -> PushReceipt:
        """Stores a plain PEFT folder as the next version of `name` and moves `aliases` to it: all of it or nothing.

        What `base`, `task` and `labels` leave open is found in the folder. The same content again is a new version that
        stores no new bytes. Raises Rejected (reasons in `adapterbay.registry.admission`), UnsupportedMethod, NoEffect,
        BaseMismatch, TaskMismatch, NotFound, InvalidArgument or StorageFull.
        """
        check_name(name)
        wanted = tuple(dict.fromkeys(check_alias(alias) for alias in aliases))
        source = read_folder(folder)
        with durable.storage_errors(self.root):
            self._blobs.sweep_staging()
            with self._blobs.staging() as staging:
                self._check_size(source.files)
                staged = {path: staging.add_file(real) for path, real in source.files.items()}
                candidate = examine(source, staged, Wishes(base, task, as_labels(labels)), self._limits)
                manifest = candidate.manifest
                files = [staging.add_bytes(manifest.to_bytes()), *staged.values()]
                done = self._writer.push(staging, files, name, manifest, wanted)
        return PushReceipt(
            name,
            done.version,
            manifest.digest,
            wanted,
            manifest,
            done.same_as,
            done.new_bytes,
            list(candidate.findings),
        )

    def _check_size(self, files: dict[str, Path]) -> None:
        for path, real in files.items():
            limit = self._limits.weights_bytes if path.endswith(".safetensors") else self._limits.document_bytes
            size = real.stat().st_size
            if size > limit:
                raise Rejected(f"{path} has {size} bytes, over the limit of {limit}.", reason="TOO_LARGE")

    def set_alias(self, name: str, alias: str, version: int, *, expected: int | AnyVersion | None = ANY) -> AliasMove:
        """Points an alias at a version, if it points at `expected` now (None: if it is not set; ANY: in any case).

        Raises StaleAlias with both versions, NotFound for an unknown adapter or version, InvalidReference.
        """
        check_alias(check_name(name) and alias)
        return self._writer.set_alias(name, alias, version, expected)

    def remove_alias(self, name: str, alias: str, *, expected: int | AnyVersion | None = ANY) -> AliasMove:
        """Removes an alias, if it points at `expected` now. Raises StaleAlias or NotFound."""
        check_alias(check_name(name) and alias)
        return self._writer.remove_alias(name, alias, expected)

    # Reading

    def resolve(self, reference: str | Reference) -> Resolved:
        """What a reference means now. Raises NotFound with near names, or InvalidReference."""
        parsed = parse_reference(reference) if isinstance(reference, str) else reference
        if isinstance(parsed, HubReference):
            raise InvalidReference(
                f"{parsed} is on the Hub: download it with `hf download` and push it to the registry first.",
                field="adapter",
            )
        with self._index.read() as db:
            found = _find(db, parsed)
            if found is None:
                raise _unknown(db, parsed)
        return Resolved(str(parsed), parsed.name, *found)

    def manifest(self, digest: str) -> Manifest:
        """The manifest with this digest, read and checked. Raises NotFound or Corrupted."""
        if not is_digest(digest):
            raise InvalidReference(f"{digest[:80]!r} is not a digest: sha256: and 64 hex digits.", field="digest")
        with self._index.read() as db:
            if not queries.knows_digest(db, digest):
                raise NotFound(f"No version in the registry has the digest {digest}.")
        return Manifest.from_bytes(self._blobs.check(digest, None, "The manifest").read_bytes())

    def open_snapshot(self, digest: str) -> Snapshot:
        """The files of a version, each read and checked now. Raises NotFound, or Corrupted naming file and digest."""
        manifest = self.manifest(digest)
        return Snapshot(
            manifest, {entry.path: self._blobs.check(entry.digest, entry.size, entry.path) for entry in manifest.files}
        )

    def pull(self, reference: str | Reference, destination: str | Path) -> Path:
        """Writes a version as a plain PEFT folder at `destination`, whole or not at all. Returns its path.

        Raises NotFound, Corrupted, InvalidArgument if there is something at `destination`, or StorageFull.
        """
        return write_folder(self.open_snapshot(self.resolve(reference).digest), Path(destination).expanduser())

    def version(self, name: str, version: int) -> VersionRecord:
        """One version. Raises NotFound."""
        with self._index.read() as db:
            found = queries.version(db, name, version)
            if found is None:
                raise _unknown(db, Reference(name, version))
        return found

    def versions(self, name: str) -> list[VersionRecord]:
        """All versions of an adapter, the oldest first. Raises NotFound."""
        with self._index.read() as db:
            found = queries.versions(db, name)
            if not found:
                raise unknown_name(db, check_name(name))
        return found

    def adapters(self, prefix: str = "") -> list[AdapterSummary]:
        """All adapters whose name begins with `prefix`, by name."""
        with self._index.read() as db:
            return queries.summaries(db, prefix)

    def aliases(self, name: str) -> dict[str, int]:
        """The aliases of an adapter and the versions they point at. Raises NotFound for an unknown adapter."""
        with self._index.read() as db:
            if queries.newest_version(db, name) is None:
                raise unknown_name(db, check_name(name))
            return queries.aliases(db, name)

    def events(self, after: int = 0, limit: int = 1000) -> list[RegistryEvent]:
        """What was committed after the event `after`, the oldest first, at most `limit` events."""
        with self._index.read() as db:
            return queries.events(db, after, limit)

    def last_event(self) -> int:
        """The sequence of the newest event; 0 in an empty registry. Cheap enough to poll."""
        with self._index.read() as db:
            return queries.last_sequence(db)

    # Keeping

    def verify(self, name: str | None = None) -> VerifyReport:
        """Reads every blob and compares records with the index, of one adapter or all. Raises NotFound."""
        if name is not None:
            self.versions(name)
        return verify(self._blobs, self._records, self._index, name)

    def rebuild_index(self) -> None:
        """Fills the index anew from the records and manifests on disk. Raises Corrupted if one is not readable."""
        with self._index.write() as db:
            rebuild(self._blobs, self._records, db)


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
        return unknown_version(db, reference.name, reference.selector, newest[0])
    if reference.digest:
        return NotFound(f"{reference.name} has no version with the digest {reference.digest}.")
    known = queries.aliases(db, reference.name)
    near = [f"{reference.name}@{alias}" for alias in nearest_words(str(reference.alias), known)]
    return NotFound(f"{reference.name} has no alias {reference.alias}.", near=near)
