"""A registry on the Hub: what every registry can do, over repositories. See `adapterbay.registry.hub`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from adapterbay.registry.actor import actor, plain
from adapterbay.registry.admission.candidate import Wishes, as_labels
from adapterbay.registry.base import BaseReference
from adapterbay.registry.errors import AdapterbayError, Corrupted, InvalidReference, NotFound, Rejected, Unavailable
from adapterbay.registry.hub import aliases as moves
from adapterbay.registry.hub.answers import events, record, records, summary
from adapterbay.registry.hub.checks import Verification
from adapterbay.registry.hub.client import HubClient, Repository
from adapterbay.registry.hub.fetch import fetch_snapshot, holds_adapter
from adapterbay.registry.hub.names import Namespace, check_hub_alias
from adapterbay.registry.hub.push import prepared, push
from adapterbay.registry.hub.repository import RepositoryState
from adapterbay.registry.hub.resolution import Found, find, note
from adapterbay.registry.portable import LEDGER_PATH, write_folder
from adapterbay.registry.reference import HubReference, check_alias
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

LISTED_AT_ONCE: Final = 8

_log = logging.getLogger(__name__)


class HubRegistry:
    """The repositories of an organization or user (`hub:ORG`), or one of them (`hub:ORG/REPO`), as a registry.

    `endpoint` None is HF_ENDPOINT, else huggingface.co; `token` None is what `hf auth login` or HF_TOKEN set; `cache`
    None is huggingface_hub's own. `private` is for the repositories that a push makes. `by` is who moves of aliases are
    recorded for. Raises InvalidReference for a place that is none. No request is made before the first question.
    """

    def __init__(
        self,
        place: str,
        *,
        endpoint: str | None = None,
        token: str | None = None,
        cache: str | Path | None = None,
        private: bool | None = None,
        by: str | None = None,
    ) -> None:
        self.namespace = Namespace.parse(place)
        self.client = HubClient(endpoint, token, None if cache is None else Path(cache))
        self.by = plain(by) if by else actor()
        self._private = private

    def __repr__(self) -> str:
        return f"HubRegistry({str(self.namespace)!r}, endpoint={self.client.endpoint!r})"

    def close(self) -> None:
        """Nothing to give back: huggingface_hub keeps one connection pool for the whole process."""

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
        parents: Sequence[str] = (),
        number: int | None = None,
    ) -> PushReceipt:
        """Stores a PEFT folder as the next version: admission here, then one commit, then its tag, then the aliases.

        Raises what a local push raises before anything is sent; then Conflict, Unavailable, or StaleAlias if the
        version was pushed and an alias was moved by somebody else meanwhile.
        """
        self._online(name)
        repository = self.namespace.name(name)
        wanted = tuple(dict.fromkeys(check_hub_alias(alias) for alias in aliases))
        with prepared(folder, Wishes(base, task, as_labels(labels), None, tuple(parents))) as admitted:
            done = push(
                self.client,
                repository,
                admitted,
                aliases=wanted,
                number=number,
                private=self._private,
                by=self.by,
            )
        findings = [*admitted.candidate.findings, f"commit {done.commit}"]
        if done.untagged is not None:
            findings.append(
                f"the tag of version {done.version} could not be set ({done.untagged}); the next push or verify sets it"
            )
        manifest = admitted.manifest
        return PushReceipt(
            repository, done.version, manifest.digest, wanted, manifest, done.same_as, done.new_bytes, findings
        )

    def set_alias(self, name: str, alias: str, version: int, *, expected: int | AnyVersion | None = ANY) -> AliasMove:
        """Moves an alias by compare-and-swap, as far as the Hub allows: see `adapterbay.registry.hub.aliases`.

        Raises StaleAlias with both versions, NotFound, InvalidReference, Conflict or Unavailable.
        """
        repository, _ = self._writable(name, check_hub_alias(alias))
        return moves.set_alias(self.client, repository, alias, version, expected, self.by)

    def remove_alias(self, name: str, alias: str, *, expected: int | AnyVersion | None = ANY) -> AliasMove:
        """Removes an alias, if it points at `expected` now. Raises StaleAlias, NotFound, Conflict or Unavailable."""
        repository, _ = self._writable(name, check_hub_alias(alias))
        return moves.remove_alias(self.client, repository, alias, expected, self.by)

    def rollback(self, name: str, alias: str) -> AliasMove:
        """Points an alias at where it was before its last move, as far as the repository's log knows.

        Raises NotFound if it never was elsewhere, StaleAlias, Conflict or Unavailable.
        """
        repository, _ = self._writable(name, check_hub_alias(alias))
        return moves.rollback(self.client, repository, alias, self.by)

    def _writable(self, name: str, alias: str) -> tuple[str, str]:
        self._online(name)
        return self.namespace.name(name), check_alias(alias)

    # Reading

    def find(self, reference: str | HubReference) -> Found:
        """What a reference means now, with its commit. Raises as `resolve` does."""
        parsed = self.namespace.reference(reference) if isinstance(reference, str) else reference
        return find(self.client, parsed)

    def resolve(self, reference: str) -> Resolved:
        """What a reference means now. Offline: what it meant when it was pulled last.

        Raises NotFound with near names, Corrupted if a tag was moved, Rejected (MANIFEST_MISMATCH) if main was changed
        without adapterbay, Unavailable, InvalidReference.
        """
        parsed = self.namespace.reference(reference)
        found = self.find(parsed)
        return Resolved(str(parsed), found.name, found.version, found.digest)

    def snapshot(self, reference: str) -> Snapshot:
        """The files of what a reference means now, in huggingface_hub's cache, every byte checked."""
        parsed = self.namespace.reference(reference)
        found = self.find(parsed)
        snapshot = fetch_snapshot(self.client, found.name, found.commit)
        if snapshot.manifest.digest != found.digest:
            raise Corrupted(
                f"{parsed} at {found.commit} is {snapshot.manifest.digest} instead of {found.digest}: its ledger or "
                "its tag was changed. Ask who may write there.",
                metadata={"digest": found.digest},
            )
        if not self.client.offline:
            try:
                note(self.client, found)
            except AdapterbayError as error:
                _log.warning("%s cannot be found by its names while offline: %s", parsed, error.message)
        return snapshot

    def pull(self, reference: str, destination: str | Path) -> Path:
        """Writes a version as a folder that plain PEFT loads, whole or not at all. Returns its path.

        Raises what `snapshot` raises, InvalidArgument if there is something at `destination`, or StorageFull.
        """
        return write_folder(self.snapshot(reference), Path(destination).expanduser())

    def version(self, name: str, version: int) -> VersionRecord:
        """One version. Raises NotFound."""
        state = self._state(name)
        return record(state, version, moves.current_versions(state))

    def versions(self, name: str) -> list[VersionRecord]:
        """All versions, the oldest first. Raises NotFound.

        Of a repository pushed with plain PEFT: main and the commits that are tagged as versions.
        """
        return records(self._state(name))

    def adapters(self, prefix: str = "") -> list[AdapterSummary]:
        """The repositories that hold an adapter, by name; `prefix` is that of `ORG/REPO` or of `REPO`.

        Of one pushed with plain PEFT only what its adapter_config.json says is known: its digest and the fingerprint of
        its base are empty here.
        """
        with ThreadPoolExecutor(LISTED_AT_ONCE) as pool:
            found = pool.map(self._summary, self._repositories(prefix))
            return [each for each in found if each is not None]

    def _summary(self, repository: Repository) -> AdapterSummary | None:
        try:
            return summary(self.client, repository)
        except (Corrupted, NotFound, Rejected) as error:  # NotFound: gated, or gone meanwhile
            _log.warning("%s is left out of the list: %s", repository.name, error.message)
            return None

    def _repositories(self, prefix: str) -> list[Repository]:
        """Those that hold an adapter, by name."""
        self._online("the list of repositories")
        found = []
        for each in self.client.repositories(self.namespace.org):
            org, _, repo = each.name.partition("/")
            ours = org == self.namespace.org and self.namespace.repo in (None, repo)
            named = each.name.startswith(prefix) or repo.startswith(prefix)
            if ours and named and (LEDGER_PATH in each.files or holds_adapter(each.files)):
                found.append(each)
        return sorted(found, key=lambda each: each.name)

    def aliases(self, name: str) -> dict[str, int]:
        """The aliases of an adapter and the versions they point at. Raises NotFound."""
        return moves.current_versions(self._state(name))

    def history(self, name: str) -> list[RegistryEvent]:
        """Pushes with their commits' authors and times, and the moves of aliases in its log, the oldest first.

        Who moved an alias is what the mover said of itself. Raises NotFound.
        """
        return events(self._state(name))

    def verify(self, name: str | None = None) -> VerifyReport:
        """Fetches every file of every version and checks its digest; compares tags, ledger and log.

        A version whose pusher was killed before its tag gets the tag. Raises NotFound or Unavailable.
        """
        work = Verification()
        for state in self._states(name):
            work.repository(state)
        return VerifyReport(work.blobs, work.versions, tuple(work.problems), 0)

    def _states(self, name: str | None) -> Iterator[RepositoryState]:
        if name is not None:
            yield self._state(name)
            return
        for found in self._repositories(""):
            yield RepositoryState.read(self.client, found.name)

    def _state(self, name: str) -> RepositoryState:
        self._online(name)
        if "@" in name:
            raise InvalidReference(f"{name[:200]!r} is a reference: give the name alone.", field="name")
        return RepositoryState.read(self.client, self.namespace.name(name))

    def _online(self, what: str) -> None:
        if self.client.offline:
            raise Unavailable(f"HF_HUB_OFFLINE is set, and {what} must be asked for on the Hub: unset it.")
