"""Garbage collection of blobs: mark from manifests, sweep what is old enough.

Marked are the manifests of all versions that ever were (small, and the parents of others), the files and signatures of
versions that are not deleted, and the files of commits, except what only deleted versions brought. Old enough is what
was written, and lost its last version, before the grace period began.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from datetime import datetime
from typing import Final

from adapterbay.registry.errors import Corrupted, Rejected
from adapterbay.registry.local.blobs import BlobStore
from adapterbay.registry.local.index import Index
from adapterbay.registry.manifest import Manifest
from adapterbay.registry.views import CollectionReport

DEFAULT_GRACE_SECONDS: Final = 24 * 3600.0


def collect(blobs: BlobStore, index: Index, grace_seconds: float, *, dry_run: bool) -> CollectionReport:
    """See `Registry.gc`. Holds the write lock, so that no write can refer to a blob while it goes.

    Raises Corrupted, and removes nothing, if a manifest is not readable: what it needs is not known.
    """
    swept_staging = 0 if dry_run else blobs.sweep_staging()
    removed = fresh = freed = 0
    with index.write() as db:
        deadline = time.time() - grace_seconds
        marked, leaving = _needed(db, blobs, deadline)
        for digest, path in list(blobs.all()):
            if digest in marked:
                continue
            status = path.stat()
            # A rename does not change the time of a file: the time of the inode's last change is what tells its age.
            if digest in leaving or max(status.st_mtime, status.st_ctime) > deadline:
                fresh += 1
                continue
            removed += 1
            freed += status.st_size
            if not dry_run:
                db.execute("DELETE FROM blobs WHERE digest = ?", (digest,))
                blobs.remove(digest)
        kept = len(marked)
    return CollectionReport(removed, freed, fresh, kept, swept_staging, dry_run)


def _needed(db: sqlite3.Connection, blobs: BlobStore, deadline: float) -> tuple[set[str], set[str]]:
    """What is needed now, and what was when the grace period began: of versions that were deleted since."""
    needed: set[str] = set()
    leaving: set[str] = set()
    deleted: dict[tuple[str, int], bool] = {}  # version → whether since the deadline
    live: set[str] = set()
    left: set[str] = set()
    for name, version, digest, deleted_at, signature in db.execute(
        "SELECT name, version, digest, deleted_at, signature FROM versions"
    ):
        needed.add(digest)
        if deleted_at is not None:
            deleted[name, version] = datetime.fromisoformat(deleted_at).timestamp() > deadline
            if not deleted[name, version]:
                continue
        (live if deleted_at is None else left).add(digest)
        if signature is not None:
            (needed if deleted_at is None else leaving).add(signature)
    for digest in live:
        needed.update(_files(blobs, digest))
    for digest in left - live:
        with contextlib.suppress(Corrupted):  # a version that is leaving needs nothing for good
            leaving.update(_files(blobs, digest))
    standing: dict[str, int] = {}  # name → the version whose files the commit has
    for name, version, tree in db.execute("SELECT name, version, tree FROM commits ORDER BY name, number"):
        if tree == "{}":
            standing.pop(name, None)
        elif version is not None:
            standing[name] = version
        since = deleted.get((name, standing.get(name, 0)))
        if since is not False:
            (needed if since is None else leaving).update(digest for digest, _ in json.loads(tree).values())
    return needed, leaving


def _files(blobs: BlobStore, digest: str) -> list[str]:
    """The files that a manifest names. Raises Corrupted."""
    path = blobs.check(digest, None, "The manifest")
    try:
        return [entry.digest for entry in Manifest.from_bytes(path.read_bytes()).files]
    except Rejected as error:
        raise Corrupted(f"The manifest {digest} is not valid: {error.message}") from error
