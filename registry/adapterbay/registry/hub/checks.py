"""Verifying a repository: its tags, ledger, manifests and files must say the same. A tag that is missing is set."""

from __future__ import annotations

from adapterbay.registry.errors import AdapterbayError, Corrupted, NotFound, Rejected
from adapterbay.registry.hub.aliases import current_version
from adapterbay.registry.hub.fetch import fetch_entry, manifest_of
from adapterbay.registry.hub.names import version_tag
from adapterbay.registry.hub.push import tag_version
from adapterbay.registry.hub.repository import RepositoryState, version_of_commit
from adapterbay.registry.hub.resolution import of_version
from adapterbay.registry.manifest import README_FILE, Manifest
from adapterbay.registry.portable import OWN_README_PATH
from adapterbay.registry.views import Problem


class Verification:
    """What was found wrong in the repositories that were checked so far."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.versions = 0
        self._intact: set[str] = set()

    @property
    def blobs(self) -> int:
        """How many different files are intact."""
        return len(self._intact)

    def repository(self, state: RepositoryState) -> None:
        """Checks one repository. A version without its tag gets it. Raises Unavailable if the Hub cannot be read."""
        for version in state.numbers():
            self.versions += 1
            self._version(state, version)
        if state.ledger is not None and state.head is not None:
            try:
                version_of_commit(state, state.head)
            except (NotFound, Rejected) as error:
                self.problems.append(Problem("record", f"{state.name}@main", error.message))
            except Corrupted:
                pass  # a tag that was moved: said with its version
        try:
            for alias in state.alias_tags:
                self._alias(state, alias)
            _ = state.alias_log
        except Corrupted as error:
            self.problems.append(Problem("journal", state.name, error.message))

    def _version(self, state: RepositoryState, version: int) -> None:
        subject = f"{state.name}@{version}"
        try:
            found = of_version(state, version)
        except (Corrupted, NotFound) as error:
            self.problems.append(Problem("tag", subject, error.message))
            return
        try:
            manifest = manifest_of(state.client, state.name, found.commit)
        except AdapterbayError as error:
            _raise_unavailable(error)
            self.problems.append(Problem("manifest", subject, error.message))
            return
        if manifest.digest != found.digest:
            detail = f"its manifest is {manifest.digest} now instead of {found.digest}"
            self.problems.append(Problem("manifest", subject, detail))
        self._files(state, subject, found.commit, manifest)
        if state.entry(version) is not None and version not in state.version_tags:
            try:
                tag_version(state.client, state.name, version, found.commit)
            except AdapterbayError as error:
                detail = f"it has no tag {version_tag(version)}, and it could not be set: {error.message}"
                self.problems.append(Problem("tag", subject, detail))

    def _files(self, state: RepositoryState, subject: str, commit: str, manifest: Manifest) -> None:
        there = state.client.files(state.name, commit)
        for entry in manifest.files:
            place = OWN_README_PATH if entry.path == README_FILE and OWN_README_PATH in there else entry.path
            try:
                path = fetch_entry(state.client, state.name, commit, entry)
            except (Corrupted, NotFound) as error:
                self.problems.append(Problem("blob", subject, error.message))
                continue
            # What the cache has was checked; what the Hub has now is told by its own names for it.
            if place not in there or not there[place].is_same(path, entry.digest, entry.size):
                self.problems.append(Problem("blob", subject, f"{place} is another file on the Hub now"))
                continue
            self._intact.add(entry.digest)

    def _alias(self, state: RepositoryState, alias: str) -> None:
        subject = f"{state.name}@{alias}"
        current = current_version(state, alias)
        if current is None:
            detail = f"the tag points at {state.tags[alias]}, which is no version: it is no alias, or was moved by hand"
            self.problems.append(Problem("alias", subject, detail))


def _raise_unavailable(error: AdapterbayError) -> None:
    if error.reason in ("UNAVAILABLE", "FORBIDDEN", "UNAUTHENTICATED"):
        raise error
