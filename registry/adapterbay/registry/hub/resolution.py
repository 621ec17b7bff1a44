"""What a reference means: online by what the repository holds now, offline by what the cache remembers of it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Final

from adapterbay.registry.base.filecache import remembered
from adapterbay.registry.errors import AdapterbayError, Corrupted, NotFound, Unavailable
from adapterbay.registry.hub.aliases import alias_commit
from adapterbay.registry.hub.client import HubClient
from adapterbay.registry.hub.fetch import manifest_of, own_manifest
from adapterbay.registry.hub.names import MAIN, version_tag
from adapterbay.registry.hub.repository import RepositoryState, read_ledger, version_of_commit
from adapterbay.registry.manifest import CONFIG_FILE
from adapterbay.registry.nearest import nearest_words
from adapterbay.registry.portable import LEDGER_PATH, MANIFEST_PATH
from adapterbay.registry.reference import HubReference

_NUMBERS_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Found:
    """A version: its repository, number, commit and digest."""

    name: str
    version: int
    commit: str
    digest: str


def find(client: HubClient, reference: HubReference) -> Found:
    """What a reference means. Raises NotFound with near names, Corrupted, Rejected or Unavailable."""
    if client.offline:
        return _find_offline(client, reference)
    return find_in(RepositoryState.read(client, reference.name), reference)


def find_in(state: RepositoryState, reference: HubReference) -> Found:
    """What a reference means in a state of its repository."""
    if reference.version is not None:
        return of_version(state, reference.version)
    if reference.digest is not None:
        return _of_digest(state, reference.digest)
    if reference.commit is not None:
        return of_commit(state, reference.commit)
    if reference.revision is None:
        return _newest(state)
    commit = state.head if reference.revision == MAIN else alias_commit(state, reference.revision)
    if commit is None:
        near = [f"{state.name}@{alias}" for alias in nearest_words(reference.revision, state.tags)]
        raise NotFound(f"{state.name} has no version, alias or tag {reference.revision}.", near=near)
    return of_commit(state, commit)


def of_version(state: RepositoryState, version: int) -> Found:
    """A version by its number."""
    commit = state.commit_of(version)
    entry = state.entry(version)
    digest = entry.digest if entry else manifest_of(state.client, state.name, commit).digest
    return Found(state.name, version, commit, digest)


def of_commit(state: RepositoryState, commit: str) -> Found:
    """A version by its commit, or by a later commit with the same adapter files; see `version_of_commit`."""
    return of_version(state, version_of_commit(state, commit))


def _newest(state: RepositoryState) -> Found:
    numbers = state.numbers()
    if not numbers or state.head is None:
        raise NotFound(f"{state.name} has no version: nothing was pushed to it.")
    if state.ledger is None:
        return of_commit(state, state.head)
    newest = of_version(state, numbers[-1])
    if newest.commit != state.head:
        of_commit(state, state.head)  # refuses a main that was changed without adapterbay
    return newest


def _of_digest(state: RepositoryState, digest: str) -> Found:
    for version in reversed(state.numbers()):
        entry = state.entry(version)
        if entry is not None and entry.digest != digest:
            continue
        found = of_version(state, version)
        if found.digest == digest:
            return found
    raise NotFound(f"{state.name} has no version with the digest {digest}.")


# Offline


def note(client: HubClient, found: Found) -> None:
    """Has the cache remember what names a version has, after its files were fetched, for a time without a network.

    Raises Unavailable and NotFound; the files are there all the same.
    """
    read_ledger(client, found.name, found.commit)
    own = own_manifest(client, found.name, found.commit) is not None
    refs = client.refs(found.name)
    for tag, commit in refs.tags.items():
        if commit == found.commit:
            client.remember(found.name, tag, MANIFEST_PATH if own else CONFIG_FILE)
    if refs.head is not None:
        ledger = read_ledger(client, found.name, refs.head)
        if ledger is not None or refs.head == found.commit:
            client.remember(found.name, MAIN, LEDGER_PATH if ledger is not None else CONFIG_FILE)
    if not own:
        _remembered_number(client, found.name, found.commit, found.version)


def _find_offline(client: HubClient, reference: HubReference) -> Found:
    name, wanted = reference.name, reference.revision or MAIN
    if reference.version is not None:
        wanted = version_tag(reference.version)
    head = client.cached_commit(name, MAIN, LEDGER_PATH) if wanted == MAIN else None
    ledger = None if head is None else read_ledger(client, name, head)
    if ledger is not None and ledger.versions:
        wanted = ledger.versions[-1].commit or version_tag(ledger.versions[-1].version)
    if reference.digest is not None:
        commit = _cached_with(client, name, reference.digest)
    else:
        commit = client.cached_commit(name, wanted, MANIFEST_PATH) or client.cached_commit(name, wanted, CONFIG_FILE)
    if commit is None:
        raise Unavailable(
            f"{reference} is not in the cache and HF_HUB_OFFLINE is set: pull it once without it, under this name."
        )
    manifest = manifest_of(client, name, commit)
    ledger = read_ledger(client, name, commit)
    if ledger is None:
        return Found(name, _remembered_number(client, name, commit, None), commit, manifest.digest)
    same = [entry.version for entry in ledger.versions if entry.digest == manifest.digest]
    if not same:
        raise Corrupted(f"The ledger of {name} at {commit} does not know the version that is there.")
    return Found(name, same[-1], commit, manifest.digest)


def _cached_with(client: HubClient, name: str, digest: str) -> str | None:
    """A commit in the cache that is the version with this digest."""
    for commit in client.cached_commits(name):
        with contextlib.suppress(AdapterbayError):  # of a commit that was not fetched whole
            if manifest_of(client, name, commit).digest == digest:
                return commit
    return None


def _remembered_number(client: HubClient, name: str, commit: str, number: int | None) -> int:
    def compute() -> dict[str, int]:
        if number is None:
            raise Unavailable(
                f"The version number of {name} at {commit} is not known here and HF_HUB_OFFLINE is set: pull it once "
                "without it."
            )
        return {"version": number}

    place = client.snapshot_path(name, commit, CONFIG_FILE)
    found = remembered("hub-numbers", _NUMBERS_VERSION, [place], compute, lambda value: "version" in value)
    return int(found["version"])
