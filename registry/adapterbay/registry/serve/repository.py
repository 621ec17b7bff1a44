"""The one door to the local store: adapters as repositories with commits, tags and files.

Versions that came by another way than HTTP get their commit when they are first looked at. A commit that brings or
changes an adapter passes admission and is its next version in the same transaction; anything else is an edit.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from adapterbay.registry.digest import is_digest
from adapterbay.registry.errors import Conflict, InvalidReference, NotFound
from adapterbay.registry.hub.ledger import ALIAS_LOG_PATH
from adapterbay.registry.local.blobs import Staged
from adapterbay.registry.local.commits import Commit, CommitLog, Draft, VersionRow
from adapterbay.registry.local.store import Registry
from adapterbay.registry.portable import MANIFEST_PATH, SIGNATURE_PATH
from adapterbay.registry.reference import LATEST, check_alias, check_name
from adapterbay.registry.serve.problems import Refusal, entry_not_found, repository_not_found, revision_not_found
from adapterbay.registry.serve.recent import Recent
from adapterbay.registry.serve.repository_files import RepositoryFiles

MAIN: Final = "main"
SERVER: Final = "registry"
INITIAL: Final = "initial commit"
PROTOCOL_WORDS: Final = frozenset(
    {
        *("revision", "tree", "paths-info", "refs", "commits", "commit", "preupload", "auth-check", "tag", "branch"),
        *("resolve", "raw", "blob", "settings", "super-squash", "discussions", "lfs-files", "likers", "like"),
        *("xet-read-token", "xet-write-token", "user-access-request", "duplicate", "compare", "safetensors-metadata"),
    }
)
"""The second part of a name that would be taken for something else in an address."""
KINDS: Final = frozenset({"api", "models", "datasets", "spaces", "kernels", "buckets"})
"""The first part of a name that would be."""

SHA_PREFIX: Final = re.compile(r"[0-9a-f]{7,40}")
"""A commit, whole or shortened as the clients allow."""

_VERSION = re.compile(r"v([1-9][0-9]{0,17})")


class Overtaken(Exception):
    """The head moved between reading and writing."""


@dataclass(frozen=True, slots=True)
class _Missing:
    """A commit that the history of an adapter lacks."""

    row: VersionRow
    title: str
    signature_only: bool = False


@dataclass(frozen=True, slots=True)
class Tag:
    """A name for a commit that the clients see as a tag."""

    name: str
    sha: str


class Repositories:
    """Adapters as repositories. Every method may block on the disk; used by any number of threads."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.log = CommitLog(registry.root)
        self.files = RepositoryFiles(self.log)
        self._caught_up: Recent[str, int] = Recent(100_000)  # name → the event at which no commit was missing

    def close(self) -> None:
        """Gives the connections back."""
        self.log.close()
        self.registry.close()

    # What is there

    def exists(self, name: str) -> bool:
        """Whether there is such an adapter, whole or not."""
        return self.log.exists(name)

    def head(self, name: str) -> Commit:
        """The newest commit, after giving one to every version that has none. Raises Refusal 404."""
        check_readable_name(name)
        newest_event = self.registry.last_event()
        if self._caught_up.get(name) != newest_event:
            while (missing := self._missing(name)) is not None:
                self._add(name, missing)
            self._caught_up.put(name, newest_event)
        current = self.log.head(name)
        if current is None:
            raise repository_not_found(f"There is no adapter {name} in this registry.")
        return current

    def find(self, name: str, revision: str) -> Commit:
        """The commit that a revision means: main, vN, an alias, a SHA (7 digits or more), or the digest of a version.

        Raises Refusal 404 with code RepoNotFound or RevisionNotFound.
        """
        newest = self.head(name)
        wanted = _plain_revision(revision)
        if wanted in (MAIN, "HEAD"):
            return newest
        match = _VERSION.fullmatch(wanted)
        found: Commit | None = None
        if match:
            found = self.log.of_version(name, int(match[1]))
        elif is_digest(wanted):
            numbers = [row.version for row in self.log.versions(name) if row.digest == wanted]
            found = self.log.of_version(name, numbers[-1]) if numbers else None
        else:
            version = self._aliases(name).get(wanted)
            if version is not None:
                found = self.log.of_version(name, version)
            elif SHA_PREFIX.fullmatch(wanted):
                found = self._by_sha(name, wanted)
        if found is None:
            raise revision_not_found(f"{name} has no revision {revision[:200]!r}: main, vN, an alias or a commit.")
        return found

    def tags(self, name: str) -> list[Tag]:
        """The versions as vN, the newest last, then the aliases."""
        self.head(name)
        commits = self.log.tagged(name)
        deleted = {row.version for row in self.log.versions(name) if row.deleted}
        found = [Tag(f"v{number}", sha) for number, sha in commits.items() if number not in deleted]
        taken = {tag.name for tag in found} | {MAIN}
        for alias, version in self._aliases(name).items():
            if alias not in taken and version in commits:
                found.append(Tag(alias, commits[version]))
        return found

    def history(self, commit: Commit, limit: int) -> list[Commit]:
        """The commit and those before it, the newest first."""
        return self.log.until(commit.name, commit.number, limit)

    def file(self, commit: Commit, path: str) -> tuple[str, int]:
        """Digest and size of a file. Raises Refusal 404 (EntryNotFound), also for what only a deleted version had."""
        entry = commit.tree.get(path)
        deleted = self.deletion(commit)
        if deleted is not None:
            raise entry_not_found(f"{path[:200]} is gone: {deleted}", commit.sha)
        if entry is None:
            raise entry_not_found(f"{commit.name} has no file {path[:200]!r} at {commit.sha[:12]}.", commit.sha)
        return entry

    def deletion(self, commit: Commit) -> str | None:
        """That the version whose files the commit has was deleted, in words; None if it was not."""
        version = commit.version or self.log.standing(commit.name, commit.number)
        words = None if version is None else self.log.deletion(commit.name, version)
        return None if words is None else f"version {version} of {commit.name} was deleted {words}."

    # Changes that are no commits of a client

    def create(self, name: str, by: str) -> Commit:
        """Makes an adapter without files. Raises Conflict if there is one, or InvalidReference."""
        check_name(name)
        check_servable(name)

        def build(_: object, current: Commit | None) -> Iterator[Draft]:
            if current is not None or self.log.exists(name):
                raise Conflict(f"{name} is there already.", reason="EXISTS")
            yield Draft({}, INITIAL, "", by)

        made = self.log.append(name, build)
        assert made is not None
        return made

    def add_tag(self, name: str, tag: str, commit: Commit, by: str, moved_from: str | None = None) -> None:
        """Sets an alias; vN is there from the beginning. Raises Refusal 409 or 400, or what set_alias raises.

        An alias that is there is moved, at one instant, if it points at the commit `moved_from`.
        """
        version = commit.version
        match = _VERSION.fullmatch(tag)
        if match:
            if version == int(match[1]):
                raise Refusal(409, f"The tag {tag} is there: every version has its tag from the beginning.")
            made = "none yet" if version is None else f"v{version}"
            raise Refusal(
                400,
                f"The tag {tag} cannot be put on this commit, whose version is {made}: they are tagged by themselves.",
            )
        if tag in (MAIN, LATEST):
            raise Refusal(
                400,
                f"The tag {tag} cannot be set: it always means the newest {'commit' if tag == MAIN else 'version'}.",
            )
        check_alias(tag)
        if version is None:
            raise Refusal(
                400, f"{commit.sha[:12]} makes no version, so no alias can point at it: tag a version's commit."
            )
        current = self._aliases(name).get(tag)
        standing = None if current is None else self.log.of_version(name, current)
        if current is not None and (standing is None or standing.sha != moved_from):
            raise Refusal(409, f"The tag {tag} is there, at v{current}: delete it first to move it.")
        self.registry.acting_as(by).set_alias(name, tag, version, expected=current)

    def remove_tag(self, name: str, tag: str, by: str) -> None:
        """Removes an alias. Raises Refusal 400 for vN, or 404."""
        self.head(name)
        if _VERSION.fullmatch(tag):
            raise Refusal(400, f"The tag {tag} is a version and stays; versions are deleted by `registry delete`.")
        if tag not in self._aliases(name):
            raise revision_not_found(f"{name} has no tag {tag[:200]!r}.")
        self.registry.acting_as(by).remove_alias(name, tag)

    # Commits for versions that came by another way

    def _missing(self, name: str) -> _Missing | None:
        """What the history lacks: the oldest version without a commit; then, if the head's version was deleted, the
        newest that is left, or nothing; then the signature of the head's version.
        """
        versions = {row.version: row for row in self.log.versions(name)}
        done = max(self.log.tagged(name), default=0)
        for number, row in versions.items():
            if number > done:
                return _Missing(row, f"Version {number}{' was deleted' if row.deleted else ''}")
        current = self.log.head(name)
        standing = None if current is None else self.log.standing(name, current.number)
        if current is None or standing is None:
            return None
        row = versions[standing]
        if row.deleted:
            left = [each for each in versions.values() if not each.deleted]
            return (
                _Missing(left[-1], f"Back to version {left[-1].version}") if left else _Missing(row, "No version left")
            )
        manifest = current.tree.get(MANIFEST_PATH, ("", 0))[0]
        if row.signature is not None and manifest == row.digest:
            signed = current.tree.get(SIGNATURE_PATH, ("", 0))[0]
            if signed != row.signature:
                return _Missing(row, f"Signature of version {standing}", signature_only=True)
        return None

    def _add(self, name: str, missing: _Missing) -> None:
        """Commits it, unless another process was faster."""
        current, row = self.log.head(name), missing.row
        with self.log.staging() as staging:
            tree: dict[str, tuple[str, int]] = {}
            staged: list[Staged] = []
            if missing.signature_only and current is not None:
                tree = {**current.tree, SIGNATURE_PATH: self.files.signature(row)}
            elif not row.deleted:
                tree, staged = self.files.of_version(staging, name, row)
            if current is not None and ALIAS_LOG_PATH in current.tree:  # what clients know of moves goes on
                tree[ALIAS_LOG_PATH] = current.tree[ALIAS_LOG_PATH]
            draft = Draft(tree, missing.title, "", row.by or SERVER, row.version)

            def build(_: object, now: Commit | None) -> Iterator[Draft]:
                if (now and now.sha) != (current and current.sha):
                    raise Overtaken
                yield draft

            with contextlib.suppress(Overtaken):
                self.log.append(name, build, staged)

    def _aliases(self, name: str) -> dict[str, int]:
        try:
            return self.registry.aliases(name)
        except NotFound:  # no version yet
            return {}

    def _by_sha(self, name: str, prefix: str) -> Commit | None:
        found = self.log.beginning(name, prefix)
        if len(found) > 1:
            raise revision_not_found(f"{prefix} is the beginning of several commits of {name}: give more of it.")
        return found[0] if found else None


def check_readable_name(name: str) -> None:
    """Raises Refusal 404 with the grammar's own words: no such name can be in a registry."""
    try:
        check_name(name)
    except InvalidReference as error:
        raise repository_not_found(error.message) from error


def check_servable(name: str) -> None:
    """Raises InvalidReference for a name that the Hub's addresses cannot hold."""
    parts = name.split("/")
    if len(parts) > 2:
        raise InvalidReference(f"{name} has {len(parts)} parts; an adapter on a server has one or two.", field="name")
    if parts[-1] in PROTOCOL_WORDS and len(parts) == 2:
        raise InvalidReference(f"{name}: {parts[-1]!r} is a word of the Hub's addresses; choose another.", field="name")
    if parts[0] in KINDS:
        raise InvalidReference(f"{name}: {parts[0]!r} is a word of the Hub's addresses; choose another.", field="name")
    if any("--" in part or part.endswith((".git", ".ipynb")) for part in parts):
        raise InvalidReference(f"{name}: the Hub's clients refuse '--' and names that end with .git.", field="name")


def is_servable(name: str) -> bool:
    """Whether the clients can ask for the name at all: a store may hold others, which are not listed."""
    try:
        check_servable(name)
    except InvalidReference:
        return False
    return True


def _plain_revision(revision: str) -> str:
    for prefix in ("refs/heads/", "refs/tags/"):
        if revision.startswith(prefix):
            return revision.removeprefix(prefix)
    return revision
