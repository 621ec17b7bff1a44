"""The linear history of an adapter as commits: what `registry serve` shows as a repository with one branch.

A commit is a tree (path → digest and size of a blob), a title and a parent. Its SHA is 40 hex digits of the sha256 of
its canonical JSON. A commit that has a `version` holds that version's files; one without is an edit of the card, or an
adapter that is not whole yet. It is written to the journal like any other change, in one transaction with what else
it brings.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from adapterbay.registry.digest import canonical_json
from adapterbay.registry.local import queries
from adapterbay.registry.local.blobs import BlobStore, Staged, Staging
from adapterbay.registry.local.commit import Writer
from adapterbay.registry.local.index import Index
from adapterbay.registry.local.records import Change, Records

Tree = Mapping[str, tuple[str, int]]
"""Path → digest and size in bytes of its blob."""

_COLUMNS: Final = "name, number, sha, parent, version, tree, title, message, author, at"


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit. `number` counts from 1; `parent` is a SHA; `at` is RFC 3339."""

    name: str
    number: int
    sha: str
    parent: str | None
    version: int | None
    tree: Tree
    title: str
    message: str
    author: str
    at: str


@dataclass(frozen=True, slots=True)
class Draft:
    """A commit to be. `version` None: it makes none."""

    tree: Tree
    title: str
    message: str
    author: str
    version: int | None = None


@dataclass(frozen=True, slots=True)
class VersionRow:
    """A version as its history needs it. `signature` is the digest of its bundle."""

    version: int
    digest: str
    by: str | None
    deleted: bool
    signature: str | None


def change_for(name: str, parent: str | None, draft: Draft, at: str) -> Change:
    """The journal's change for a commit."""
    tree = {path: list(entry) for path, entry in sorted(draft.tree.items())}
    content = {
        "name": name,
        "parent": parent,
        "tree": tree,
        "title": draft.title,
        "message": draft.message,
        "at": at,
        "author": draft.author,
        "version": draft.version,
    }
    sha = hashlib.sha256(canonical_json(content)).hexdigest()[:40]
    detail: dict[str, Any] = {"sha": sha, "title": draft.title, "tree": tree}
    if parent is not None:
        detail["parent"] = parent
    if draft.message:
        detail["message"] = draft.message
    return Change("committed", name, at, draft.author, draft.version, detail=detail)


def head(db: sqlite3.Connection, name: str) -> Commit | None:
    """The newest commit."""
    return _one(db, "name = ? ORDER BY number DESC LIMIT 1", (name,))


class CommitLog:
    """The commits of one registry; used by any number of threads and processes."""

    def __init__(self, root: Path) -> None:
        self._blobs = BlobStore(root)
        self._index = Index(root / "index.sqlite")
        self._writer = Writer(root, self._blobs, Records(root), self._index)

    def close(self) -> None:
        """Gives the connections back."""
        self._index.close()

    def exists(self, name: str) -> bool:
        """Whether there is such an adapter: a version that ever was, or a commit."""
        with self._index.read() as db:
            return _exists(db, name)

    def names(self, prefix: str, after: str, limit: int) -> list[str]:
        """Names that begin with `prefix` and come after `after`, sorted."""
        upper = f"{prefix}\U0010ffff"
        with self._index.read() as db:
            rows = db.execute(
                "SELECT name FROM adapters WHERE newest IS NOT NULL AND name >= ? AND name < ? AND name > ? UNION "
                "SELECT DISTINCT name FROM commits WHERE name >= ? AND name < ? AND name > ? ORDER BY name LIMIT ?",
                (prefix, upper, after, prefix, upper, after, limit),
            )
            return [row[0] for row in rows]

    def head(self, name: str) -> Commit | None:
        """The newest commit."""
        with self._index.read() as db:
            return head(db, name)

    def beginning(self, name: str, sha_prefix: str) -> list[Commit]:
        """The commits whose SHA begins so; at most 2."""
        with self._index.read() as db:
            return _many(db, "name = ? AND sha >= ? AND sha < ? LIMIT 2", (name, sha_prefix, f"{sha_prefix}g"))

    def of_version(self, name: str, version: int) -> Commit | None:
        """The commit that holds a version: the newest, if it was restored or signed later."""
        with self._index.read() as db:
            return _one(db, "name = ? AND version = ? ORDER BY number DESC LIMIT 1", (name, version))

    def tagged(self, name: str) -> dict[int, str]:
        """The versions that have a commit, and the SHA of the newest of each, as `of_version` has it."""
        with self._index.read() as db:
            rows = db.execute(
                "SELECT version, sha FROM commits WHERE name = ? AND version IS NOT NULL ORDER BY version, number",
                (name,),
            )
            return dict(rows.fetchall())

    def until(self, name: str, number: int, limit: int) -> list[Commit]:
        """The commits up to `number`, the newest first, at most `limit`."""
        with self._index.read() as db:
            return _many(db, "name = ? AND number <= ? ORDER BY number DESC LIMIT ?", (name, number, limit))

    def standing(self, name: str, number: int) -> int | None:
        """The version whose files the commit `number` has: that of the last commit with one. An empty tree has none."""
        with self._index.read() as db:
            row = db.execute(
                "SELECT version, tree FROM commits WHERE name = ? AND number <= ? "
                "AND (version IS NOT NULL OR tree = '{}') ORDER BY number DESC LIMIT 1",
                (name, number),
            ).fetchone()
        return row[0] if row and row[1] != "{}" else None

    def versions(self, name: str) -> list[VersionRow]:
        """All versions that ever were, the oldest first."""
        with self._index.read() as db:
            rows = db.execute(
                "SELECT v.version, v.digest, e.by, v.deleted_at IS NOT NULL, v.signature FROM versions v "
                "LEFT JOIN events e ON e.name = v.name AND e.version = v.version AND e.kind = 'pushed' "
                "WHERE v.name = ? ORDER BY v.version",
                (name,),
            )
            return [VersionRow(row[0], row[1], row[2], bool(row[3]), row[4]) for row in rows]

    def deletion(self, name: str, version: int) -> str | None:
        """When, by whom and why a version was deleted, in words; None if it was not."""
        with self._index.read() as db:
            found = queries.deletion(db, name, version)
        if found is None:
            return None
        reason = found.detail.get("reason")
        return f"on {found.at:%Y-%m-%d} by {found.by or 'somebody'}{f': {reason}' if reason else ''}"

    def mentions(self, name: str, digest: str) -> bool:
        """Whether any commit of the adapter has this blob."""
        with self._index.read() as db:
            row = db.execute(
                "SELECT 1 FROM commits WHERE name = ? AND instr(tree, ?) > 0 LIMIT 1", (name, f'"{digest}"')
            ).fetchone()
        return row is not None

    # Blobs

    def staging(self) -> AbstractContextManager[Staging]:
        """A staging folder, removed at the end; see `BlobStore.staging`."""
        return self._blobs.staging()

    def sweep(self) -> None:
        """Removes what writers left that were killed."""
        self._blobs.sweep_staging()

    def blob(self, digest: str) -> Path:
        """Where a blob lies, whether it is there or not."""
        return self._blobs.path(digest)

    def check_blob(self, digest: str, size: int | None, what: str) -> Path:
        """The path of a blob after reading it whole. Raises Corrupted."""
        return self._blobs.check(digest, size, what)

    def keep(self, staged: Sequence[Staged]) -> None:
        """Makes staged files blobs that no commit needs yet: the grace period of gc protects them until one does."""
        self._writer.change(lambda _, __: (), staged)

    # Writing

    def append(
        self,
        name: str,
        build: Callable[[sqlite3.Connection, Commit | None], Iterable[Draft]],
        files: Sequence[Staged] = (),
        also: Callable[[str], Iterable[Change]] = lambda _: (),
    ) -> Commit | None:
        """Commits what `build` makes of the index and the head, one after the other, all or none. Returns the new head.

        `files` are the blobs that are not there yet; `also` makes more changes of the time. Whatever `build` raises
        refuses it all, and nothing is kept.
        """

        def changes(db: sqlite3.Connection, at: str) -> Iterator[Change]:
            current = head(db, name)
            parent = current.sha if current else None
            for draft in build(db, current):
                change = change_for(name, parent, draft, at)
                parent = change.detail["sha"]
                yield change
            yield from also(at)

        self._writer.change(changes, files)
        return self.head(name)


def _exists(db: sqlite3.Connection, name: str) -> bool:
    found = db.execute(
        "SELECT EXISTS (SELECT 1 FROM versions WHERE name = ?) OR EXISTS (SELECT 1 FROM commits WHERE name = ?)",
        (name, name),
    ).fetchone()
    return bool(found[0])


def _one(db: sqlite3.Connection, condition: str, values: Sequence[Any]) -> Commit | None:
    found = _many(db, condition, values)
    return found[0] if found else None


def _many(db: sqlite3.Connection, condition: str, values: Sequence[Any]) -> list[Commit]:
    rows = db.execute(f"SELECT {_COLUMNS} FROM commits WHERE {condition}", values)
    return [_commit(row) for row in rows]


def _commit(row: Sequence[Any]) -> Commit:
    tree = {path: (digest, size) for path, (digest, size) in json.loads(row[5]).items()}
    return Commit(row[0], row[1], row[2], row[3], row[4], tree, row[6], row[7], row[8], row[9])
