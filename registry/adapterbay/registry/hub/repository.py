"""What a repository holds at one moment: which commit is which version, and where the aliases point.

Pushed by us, a repository has a ledger, and each version a tag `vN`. A version is in the ledger from the instant of its
commit; its tag comes right after. A killed push leaves a version without its tag: its commit is the oldest whose ledger
has it.

A repository without a ledger was pushed by others. Its tags `vN`, if it has such, are versions; every other commit of
main has the number of the highest such tag (0 without one) plus its position in the history of main, counted from 1.
So every commit of main has one number, and the newest version is main itself.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import dataclass

from adapterbay.registry.errors import Corrupted, InvalidReference, NotFound, Rejected
from adapterbay.registry.hub.client import Commit, HubClient
from adapterbay.registry.hub.fetch import adapter_files, holds_adapter, own_manifest
from adapterbay.registry.hub.ledger import (
    ALIAS_LOG_PATH,
    MAX_LEDGER_BYTES,
    Ledger,
    LedgerEntry,
    LoggedMove,
    read_alias_log,
)
from adapterbay.registry.hub.names import check_hub_alias, tagged_version, version_tag
from adapterbay.registry.nearest import nearest_numbers
from adapterbay.registry.portable import LEDGER_PATH, MANIFEST_PATH


@dataclass(frozen=True)
class RepositoryState:
    """A repository as it was read: main, tags, and the ledger at main. What is not needed is not asked for."""

    client: HubClient
    name: str
    head: str | None
    tags: Mapping[str, str]
    ledger: Ledger | None

    @classmethod
    def read(cls, client: HubClient, name: str) -> RepositoryState:
        """Reads a repository now; nothing of it comes from an earlier answer. Raises NotFound or Unavailable."""
        refs = client.refs(name)
        return cls(
            client, name, refs.head, refs.tags, None if refs.head is None else read_ledger(client, name, refs.head)
        )

    @functools.cached_property
    def version_tags(self) -> dict[int, str]:
        """The commits that the tags `vN` point at, by version."""
        found = {version: sha for tag, sha in self.tags.items() if (version := tagged_version(tag)) is not None}
        return dict(sorted(found.items()))

    @functools.cached_property
    def commits(self) -> list[Commit]:
        """The commits of main, the oldest first."""
        return [] if self.head is None else self.client.commits(self.name, self.head)[::-1]

    @functools.cached_property
    def positions(self) -> dict[str, int]:
        """The position of every commit in the history of main, counted from 1."""
        return {commit.sha: place for place, commit in enumerate(self.commits, 1)}

    # Versions

    @property
    def ledger_entries(self) -> tuple[LedgerEntry, ...]:
        """The ledger as it is written."""
        return self.ledger.versions if self.ledger else ()

    @functools.cached_property
    def entries(self) -> tuple[LedgerEntry, ...]:
        """The versions in the ledger."""
        return tuple(self._as_tagged(entry) for entry in self.ledger.versions) if self.ledger else ()

    def _as_tagged(self, entry: LedgerEntry) -> LedgerEntry:
        """An entry with the number that its commit is tagged with. A server may count otherwise than the pusher did."""
        if entry.version in self.version_tags:
            return entry
        for version, sha in self.version_tags.items():
            if sha == entry.commit or (
                entry.commit is None and version > entry.version and self._ends_with(sha, entry)
            ):
                return entry.model_copy(update={"version": version})
        return entry

    def _ends_with(self, commit: str, entry: LedgerEntry) -> bool:
        there = read_ledger(self.client, self.name, commit)
        return there is not None and bool(there.versions) and there.versions[-1] == entry

    def entry(self, version: int) -> LedgerEntry | None:
        """The entry of a version in the ledger."""
        return next((entry for entry in self.entries if entry.version == version), None)

    @functools.cached_property
    def deleted(self) -> frozenset[int]:
        """Versions of the ledger whose tag and manifest are both gone. (Without its tag alone, it lacks a tag.)"""
        untagged = [entry for entry in self.entries if entry.version not in self.version_tags]
        return frozenset(
            entry.version
            for entry in untagged
            if not self.client.has_file(self.name, self._commit_in_ledger(entry, None), MANIFEST_PATH)
        )

    def numbers(self) -> list[int]:
        """All versions, the oldest first. Of a repository without a ledger: tags `vN`, and main."""
        found = {*self.version_tags, *(entry.version for entry in self.entries)} - self.deleted
        if self.ledger is None and self.head is not None and holds_adapter(self.client.files(self.name, self.head)):
            found.add(self.number_of_commit(self.head))
        return sorted(found)

    def next_number(self) -> int:
        """The number of the next push: numbers are never reused."""
        used = [*self.version_tags, *(entry.version for entry in self.entries)]
        if self.ledger is None and self.head is not None and holds_adapter(self.client.files(self.name, self.head)):
            used.append(self.number_of_commit(self.head))
        return max(used, default=0) + 1

    def commit_of(self, version: int) -> str:
        """The commit of a version. Raises NotFound, or Corrupted if its tag was moved to another commit."""
        tagged = self.version_tags.get(version)
        entry = self.entry(version)
        if version in self.deleted:
            raise NotFound(f"The version {version} of {self.name} was deleted.")
        if entry is not None:
            commit = self._commit_in_ledger(entry, tagged)
            if tagged in (None, commit):
                return commit
            there = own_manifest(self.client, self.name, tagged)
            if there is None or there.digest != entry.digest:
                raise Corrupted(self.moved(version, commit), metadata={"version": str(version)})
            return tagged  # the same version in a later commit, such as one that brings its signature
        if tagged is not None:
            return tagged
        if self.ledger is None:
            place = version - max(self.version_tags, default=0)
            if 0 < place <= len(self.commits) and self.commits[place - 1].sha not in self.version_tags.values():
                return self.commits[place - 1].sha
        near = [f"{self.name}@{number}" for number in nearest_numbers(version, self.numbers())]
        raise NotFound(f"{self.name} has no version {version}.", near=near)

    def _commit_in_ledger(self, entry: LedgerEntry, tagged: str | None) -> str:
        """The commit of an entry; that of the newest is where its tag is, if the ledger there ends with it."""
        if entry.commit is not None:
            return entry.commit
        if tagged is not None and self._ends_with(tagged, self.ledger_entries[-1]):
            return tagged
        return self.commit_that_added(self.ledger_entries[-1].version)

    def moved(self, version: int, commit: str) -> str:
        """What is wrong with the tag of a version that does not point at `commit`."""
        tag = version_tag(version)
        return (
            f"the tag {tag} of {self.name} points at {self.tags.get(tag)}, but its ledger says that version {version} "
            f"is {commit}: it was moved. Move it back, or ask for the commit itself."
        )

    def commit_that_added(self, version: int) -> str:
        """The oldest commit of main whose ledger has a version. Raises NotFound."""
        found = None
        for commit in reversed(self.commits):
            ledger = read_ledger(self.client, self.name, commit.sha)
            if ledger is None or all(entry.version != version for entry in ledger.versions):
                break
            found = commit.sha
        if found is None:
            raise NotFound(f"{self.name} has no version {version}.")
        return found

    def number_of_commit(self, commit: str) -> int:
        """The version that a commit is. Raises NotFound for a commit that is none."""
        listed = [entry.version for entry in self.entries if entry.commit == commit]
        if listed:
            return listed[-1]
        for version, sha in reversed(self.version_tags.items()):
            with contextlib.suppress(Corrupted):  # a tag that was moved here
                if sha == commit and self.commit_of(version) == commit:
                    return version
        if self.ledger is None:
            place = self.positions.get(commit)
            if place is None:
                raise NotFound(f"{self.name} has no commit {commit} on main: only those have version numbers.")
            return max(self.version_tags, default=0) + place
        newest = self.entries[-1].version if self.entries else None
        if newest is not None and newest not in self.version_tags and self.commit_of(newest) == commit:
            return newest
        raise NotFound(f"The commit {commit} of {self.name} is no version.")

    # Aliases

    @functools.cached_property
    def alias_tags(self) -> dict[str, str]:
        """The commits that tags point at which can be aliases, by alias, sorted."""
        return {tag: sha for tag, sha in sorted(self.tags.items()) if _is_alias(tag)}

    @functools.cached_property
    def alias_log(self) -> list[LoggedMove]:
        """The moves of aliases in the log at main, the oldest first. Raises Corrupted."""
        if self.head is None:
            return []
        data = self.client.document(self.name, self.head, ALIAS_LOG_PATH, MAX_LEDGER_BYTES)
        return [] if data is None else read_alias_log(data, self.name)


def version_of_commit(state: RepositoryState, commit: str) -> int:
    """The version that a commit is, or that a later commit still is since it has the same adapter files.

    Raises NotFound, or Rejected (MANIFEST_MISMATCH) for a commit whose adapter files were changed without adapterbay.
    """
    try:
        return state.number_of_commit(commit)
    except NotFound:
        if state.ledger is None:
            raise
    manifest = own_manifest(state.client, state.name, commit)
    same = [
        entry.version
        for entry in state.entries
        if manifest is not None and entry.digest == manifest.digest and entry.version not in state.deleted
    ]
    if manifest is None or not same:
        known = ", ".join(f"{state.name}@{number}" for number in state.numbers()[-3:])
        raise NotFound(f"The commit {commit} is no version of {state.name}: ask for a version ({known}).")
    version = same[-1]
    files = state.client.files(state.name, commit)
    if adapter_files(files, manifest) != adapter_files(
        state.client.files(state.name, state.commit_of(version)), manifest
    ):
        raise Rejected(
            f"The adapter files of {state.name} at {commit} were changed without adapterbay after version {version}: "
            f"ask for {state.name}@{version}, or push what is there with `registry push`.",
            reason="MANIFEST_MISMATCH",
        )
    return version


def read_ledger(client: HubClient, name: str, commit: str) -> Ledger | None:
    """The ledger of a commit, if it has one. Raises Corrupted."""
    data = client.document(name, commit, LEDGER_PATH, MAX_LEDGER_BYTES)
    return None if data is None else Ledger.from_bytes(data, name)


def _is_alias(tag: str) -> bool:
    try:
        check_hub_alias(tag)
    except InvalidReference:
        return False
    return True
