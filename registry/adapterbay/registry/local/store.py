"""A local registry: immutable versions of adapters, found by name, alias or digest.

    registry = Registry.open("path/to/registry")
    receipt = registry.push("out/sentiment", "team/sentiment", aliases=["champion"])
    snapshot = registry.snapshot("team/sentiment@champion")

Layout: `registry.json` (what this folder is), `blobs/` (contents), `adapters/` (records), `index.sqlite` (built from
the two), `tmp/`. One object may be used by many threads, one folder by many processes; every read sees the newest
committed state.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from adapterbay.registry import durable
from adapterbay.registry.actor import actor, plain
from adapterbay.registry.admission import Limits
from adapterbay.registry.admission.candidate import Wishes, as_labels, examine
from adapterbay.registry.admission.folder import PeftFolder, from_files, read_folder
from adapterbay.registry.admission.regular_file import open_regular
from adapterbay.registry.base import BaseFiles, BaseReference, locate
from adapterbay.registry.digest import canonical_json, parse_json_object
from adapterbay.registry.errors import RegistryNotFound, Rejected, Unavailable
from adapterbay.registry.local.blobs import BlobStore, Staged
from adapterbay.registry.local.checks import backfill, rebuild, verify
from adapterbay.registry.local.collection import DEFAULT_GRACE_SECONDS, collect
from adapterbay.registry.local.commit import Also, Force, Writer
from adapterbay.registry.local.index import Index
from adapterbay.registry.local.lifecycle import Lifecycle
from adapterbay.registry.local.records import Change, Records
from adapterbay.registry.manifest import Manifest
from adapterbay.registry.paths import default_registry, expanded
from adapterbay.registry.portable import Claim, read_claim
from adapterbay.registry.reference import check_alias, check_name
from adapterbay.registry.signing import signer_of
from adapterbay.registry.views import CollectionReport, PushReceipt, VerifyReport

MARKER_FILE: Final = "registry.json"
INDEX_FILE: Final = "index.sqlite"
LAYOUT: Final = 1

FindBase = Callable[[str | BaseReference], BaseFiles]
Extra = Callable[[Manifest], Sequence[bytes | Path]]


class Registry(Lifecycle):
    """An open local registry. Make one with `Registry.open`."""

    def __init__(self, root: Path, limits: Limits | None = None, by: str | None = None) -> None:
        blobs, records, index = BlobStore(root), Records(root), Index(root / INDEX_FILE)
        super().__init__(blobs, index, Writer(root, blobs, records, index), plain(by) if by else actor())
        self.root = root
        self.limits = limits or Limits()
        self.records = records

    @classmethod
    def open(
        cls,
        location: str | Path | None = None,
        *,
        create: bool = True,
        limits: Limits | None = None,
        by: str | None = None,
    ) -> Registry:
        """Opens the registry at `location` (None: `default_registry()`), making it if it is not there.

        `by` is who the changes are recorded for (None: `adapterbay.registry.actor`). Raises RegistryNotFound if it is
        not there and `create` is False, Unavailable if the folder is something else.
        """
        root = default_registry().absolute() if location is None else expanded(location)
        registry = cls(root, limits, by)
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
            self.blobs.create()
            self.records.create()
            with self.blobs.staging() as staging:
                durable.write_atomic(marker, canonical_json({"layout": LAYOUT}) + b"\n", staging.temporary())
        try:
            layout = parse_json_object(marker.read_bytes(), str(marker)).get("layout")
        except Rejected as error:
            raise Unavailable(f"{self.root} is not a readable registry: {error.message}") from error
        if layout != LAYOUT:
            raise Unavailable(f"The registry at {self.root} has the layout {layout}: update adapterbay.")
        if not self.index.path.is_file() or not self.index.is_current():
            self.index.migrate(
                lambda db: rebuild(self.blobs, self.records, db), lambda db, done: backfill(self.blobs, db, done)
            )

    def _is_new(self) -> bool:
        # Another process may be making it at this moment, or was killed while it did.
        there = {path.name for path in self.root.iterdir()}
        return MARKER_FILE in there or there <= {"blobs", "adapters", "tmp"}

    def acting_as(self, by: str) -> Registry:
        """The same registry, for changes that are recorded for `by`."""
        other = copy.copy(self)
        other.by = plain(by)
        return other

    def close(self) -> None:
        """Gives the connections back. The object can still be used."""
        self.index.close()

    def push(
        self,
        folder: str | Path,
        name: str,
        *,
        aliases: Sequence[str] = (),
        base: str | BaseReference | None = None,
        task: str | None = None,
        labels: Sequence[str] | None = None,
        parents: Sequence[str] = (),
        force: Force | None = None,
        number: int | None = None,
    ) -> PushReceipt:
        """Stores a plain PEFT folder as the next version of `name` and moves `aliases` to it: all of it or nothing.

        What `base`, `task` and `labels` leave open is found in the folder; a folder that `pull` wrote is the same
        version again, with its digest and its signature. `parents` are the digests of what it was made from. `force`
        overrules the guards of `aliases`. `number` asks for a version number at or above the next one, as copying a
        registry does. The same content again is a new version that stores no new bytes.

        Raises Rejected (reasons in `adapterbay.registry.admission`), UnsupportedMethod, NoEffect, BaseMismatch,
        TaskMismatch, NotFound, InvalidArgument, PromotionRefused, Conflict (VERSION_TAKEN) or StorageFull.
        """
        source = read_folder(folder)
        claim = read_claim(source.portable)
        return self._push(
            name,
            source,
            claim,
            Wishes(base, task, as_labels(labels), claim.manifest if claim else None, tuple(parents)),
            aliases=aliases,
            force=force,
            number=number,
        )

    def push_files(
        self,
        files: Mapping[str, Path],
        name: str,
        *,
        number: int | None = None,
        find_base: FindBase = locate,
        extra: Extra | None = None,
        also: Callable[[Manifest, Sequence[Staged]], Also] | None = None,
    ) -> PushReceipt:
        """Like `push`, for files by relative path instead of a folder, and with more changes in the same transaction.

        `extra` gives further blobs to store, once the manifest is known; `also` gets the manifest and all staged blobs
        (the manifest first, then the files, then `extra`) and gives what is called under the write lock; see `Also`.
        """
        source = from_files(files)
        claim = read_claim(files)
        wishes = Wishes(claimed=claim.manifest if claim else None)
        return self._push(name, source, claim, wishes, number=number, find_base=find_base, extra=extra, also=also)

    def _push(
        self,
        name: str,
        source: PeftFolder,
        claim: Claim | None,
        wishes: Wishes,
        *,
        aliases: Sequence[str] = (),
        force: Force | None = None,
        number: int | None = None,
        find_base: FindBase = locate,
        extra: Extra | None = None,
        also: Callable[[Manifest, Sequence[Staged]], Also] | None = None,
    ) -> PushReceipt:
        check_name(name)
        wanted = tuple(dict.fromkeys(check_alias(alias) for alias in aliases))
        files = dict(claim.files) if claim else source.files
        with durable.storage_errors(self.root):
            self.blobs.sweep_staging()
            with self.blobs.staging() as staging:
                self._check_size(files)
                staged = {path: staging.add_file(real) for path, real in files.items()}
                candidate = examine(source, staged, wishes, self.limits, find_base=find_base)
                manifest = candidate.manifest
                blobs = [staging.add_bytes(manifest.to_bytes()), *staged.values()]
                blobs += [
                    staging.add_file(each) if isinstance(each, Path) else staging.add_bytes(each)
                    for each in (extra(manifest) if extra else ())
                ]
                more = [also(manifest, tuple(blobs))] if also else []
                if claim is not None and claim.signature is not None:
                    blobs.append(staging.add_bytes(claim.signature))
                    more.append(self._signing(name, blobs[-1]))
                done = self.writer.push(
                    staging,
                    blobs,
                    name,
                    manifest,
                    by=self.by,
                    aliases=wanted,
                    force=force,
                    number=number,
                    also=lambda db, version, at: (change for part in more for change in part(db, version, at)),
                )
        return PushReceipt(
            name,
            done.version,
            manifest.digest,
            wanted,
            manifest,
            done.same_as,
            done.new_bytes,
            list(candidate.findings),
            done.overruled,
        )

    def _signing(self, name: str, bundle: Staged) -> Also:
        key = signer_of(bundle.path.read_bytes())
        detail = {"signature": bundle.digest, "size": bundle.size, "key": key}
        return lambda _, version, at: [Change("signed", name, at, self.by, version, detail=detail)]

    def _check_size(self, files: Mapping[str, Path]) -> None:
        for path, real in files.items():
            limit = self.limits.weights_bytes if path.endswith(".safetensors") else self.limits.document_bytes
            with open_regular(real, path) as file:
                size = file.seek(0, io.SEEK_END)
            if size > limit:
                raise Rejected(f"{path} has {size} bytes, over the limit of {limit}.", reason="TOO_LARGE")

    def verify(self, name: str | None = None) -> VerifyReport:
        """Reads every blob and compares records with the index, of one adapter or all. Raises NotFound."""
        if name is not None:
            self.history(name)
        return verify(self.blobs, self.records, self.index, name)

    def gc(self, *, grace_seconds: float = DEFAULT_GRACE_SECONDS, dry_run: bool = False) -> CollectionReport:
        """Removes the blobs that no version needed any more when the grace period began.

        Files of deleted versions go; manifests stay, so that parents are known. Fresh orphans may belong to an upload
        that is under way.
        """
        with durable.storage_errors(self.root):
            return collect(self.blobs, self.index, grace_seconds, dry_run=dry_run)

    def rebuild_index(self) -> None:
        """Fills the index anew from the records and manifests on disk. Raises Corrupted if one is not readable."""
        with self.index.write() as db:
            rebuild(self.blobs, self.records, db)
