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
from adapterbay.registry.local.blobs import Staged
from adapterbay.registry.local.commits import Commit, CommitLog, Draft, VersionRow
from adapterbay.registry.local.store import Registry
from adapterbay.registry.reference import LATEST, check_alias, check_name
from adapterbay.registry.serve.problems import Refusal, entry_not_found, repository_not_found, revision_not_found
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

_VERSION = re.compile(r"v([1-9][0-9]{0,17})")
_SHA_PREFIX = re.compile(r"[0-9a-f]{7,40}")


class Overtaken(Exception):
    """The head moved between reading and writing."""


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
        while (row := self._behind(name)) is not None:
            self._catch_up(name, row)
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
            elif _SHA_PREFIX.fullmatch(wanted):
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

    def _behind(self, name: str) -> VersionRow | None:
        """The oldest version without a commit; or, if the head's was deleted, the newest one that is left."""
        versions = self.log.versions(name)
        done = max(self.log.tagged(name), default=0)
        current = self.log.head(name)
        for row in versions:
            if row.version > done:
                return row
        if current is None or not current.tree:
            return None
        standing = self.log.standing(name, current.number)
        if all(row.version != standing or not row.deleted for row in versions):
            return None
        left = [row for row in versions if not row.deleted]
        return left[-1] if left else next(row for row in versions if row.version == standing)

    def _catch_up(self, name: str, row: VersionRow) -> None:
        current = self.log.head(name)
        with self.log.staging() as staging:
            tree: dict[str, tuple[str, int]] = {}
            staged: list[Staged] = []
            if not row.deleted:
                tree, staged = self.files.of_version(staging, name, row)
            fresh = current is None or row.version > max(self.log.tagged(name), default=0)
            title = f"Version {row.version}" if fresh else f"Back to version {row.version}"
            draft = Draft(tree, f"{title} was deleted" if row.deleted else title, "", row.by or SERVER, row.version)

            def build(_: object, now: Commit | None) -> Iterator[Draft]:
                if (now and now.sha) != (current and current.sha):
                    raise Overtaken
                yield draft

            with contextlib.suppress(Overtaken):  # whoever was faster wrote the same
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
    if any("--" in part or part.endswith((".git", ".ipynb")) for part in parts):
        raise InvalidReference(f"{name}: the Hub's clients refuse '--' and names that end with .git.", field="name")


def _plain_revision(revision: str) -> str:
    for prefix in ("refs/heads/", "refs/tags/"):
        if revision.startswith(prefix):
            return revision.removeprefix(prefix)
    return revision
