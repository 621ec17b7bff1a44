"""A client's commit: what it makes of the head, whether that is a version, and its admission. All of it or nothing."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from adapterbay.registry.admission import check_prefix
from adapterbay.registry.errors import Rejected
from adapterbay.registry.local.blobs import Staged, Staging
from adapterbay.registry.local.commits import Commit, Draft, change_for, head
from adapterbay.registry.local.records import Change
from adapterbay.registry.manifest import Manifest
from adapterbay.registry.portable import LEDGER_PATH, MANIFEST_PATH, SIGNATURE_PATH
from adapterbay.registry.serve import trees
from adapterbay.registry.serve.bases import Bases
from adapterbay.registry.serve.beside import Folder, check_beside
from adapterbay.registry.serve.ndjson import AddFile, AddLarge, Delete, Header, Operation
from adapterbay.registry.serve.problems import Refusal
from adapterbay.registry.serve.repository import SHA_PREFIX, Overtaken, Repositories
from adapterbay.registry.serve.uploads import Uploaded
from adapterbay.registry.serve.version_plan import Entry, Proposal, VersionPlan
from adapterbay.registry.signing import signer_of

ATTEMPTS: Final = 20
LOCKS: Final = 64
LARGEST_GAP: Final = 100_000
"""So many version numbers a client may leave out at once."""


class Unchanged(Exception):
    """The commit makes no difference."""


@dataclass(slots=True)
class Incoming:
    """One commit on its way in. `may_use` says whether the caller may refer to a large file by its digest alone."""

    name: str
    by: str
    header: Header
    operations: Sequence[Operation]
    staging: Staging
    may_use: Callable[[str], bool]
    staged: dict[str, Staged] = field(default_factory=dict)
    admitted: set[Folder] = field(default_factory=set)  # what need not be admitted again on another head

    @property
    def uploaded(self) -> list[Uploaded]:
        """The files that came with it."""
        return [each.content for each in self.operations if isinstance(each, AddFile)]

    def place(self, content: Uploaded) -> Path:
        """Where the bytes of an uploaded file are now."""
        staged = self.staged.get(content.digest)
        return content.path if staged is None else staged.path

    def adopt(self) -> list[Staged]:
        """All uploaded files, durable."""
        for content in self.uploaded:
            if content.digest not in self.staged:
                self.staged[content.digest] = self.staging.adopt(content.path, content.digest)
        return list(self.staged.values())

    def draft(self, tree: dict[str, Entry], version: int | None) -> Draft:
        """The commit to be."""
        return Draft(tree, self.header.title, self.header.message, self.by, version)


class Committer:
    """Takes the commits of clients, one at a time per adapter. Used by any number of threads."""

    def __init__(self, repositories: Repositories, bases: Bases) -> None:
        self._repositories = repositories
        self._log = repositories.log
        self._files = repositories.files
        self._bases = bases
        self._locks = [threading.Lock() for _ in range(LOCKS)]

    def commit(self, incoming: Incoming) -> Commit:
        """Commits it on the head. Returns the new head, or the old one if nothing changed.

        Raises Refusal 412 if the head is not the parent that the client insists on, and whatever admission raises.
        """
        for operation in incoming.operations:
            if isinstance(operation, AddFile):
                check_prefix(operation.path, operation.content.prefix[:9])
        with self._locks[hash(incoming.name) % LOCKS]:
            for _ in range(ATTEMPTS):
                current = self._repositories.head(incoming.name)
                self._check_parent(current, incoming)
                try:
                    return self._on(current, incoming)
                except Unchanged:
                    return current
                except Overtaken:
                    continue
        raise Refusal(409, f"Others commit to {incoming.name} all the time: try again.", reason="BUSY")

    def _check_parent(self, current: Commit, incoming: Incoming) -> None:
        parent = incoming.header.parent
        if parent is not None and not (SHA_PREFIX.fullmatch(parent) and current.sha.startswith(parent)):
            raise Refusal(
                412,
                f"A commit has happened since: the head of {incoming.name} is {current.sha}, not {parent[:64]}. "
                "Read it again and decide anew.",
                reason="HEAD_MOVED",
            )

    def _on(self, current: Commit, incoming: Incoming) -> Commit:
        deletions = [(each.path, each.folder) for each in incoming.operations if isinstance(each, Delete)]
        tree = trees.applied(current.tree, self._additions(incoming), deletions)
        differing = frozenset(trees.changed(current.tree, tree))
        if not differing:
            raise Unchanged
        by_digest = {content.digest: content for content in incoming.uploaded}

        def path_of(digest: str) -> Path:
            return incoming.place(by_digest[digest]) if digest in by_digest else self._log.blob(digest)

        proposal = Proposal(current, tree, differing, path_of)
        check_beside(proposal, self._bases, self._repositories.registry.limits, incoming.admitted)
        following = max((row.version for row in self._log.versions(incoming.name)), default=0) + 1
        claimed = self._claimed(proposal) or 0
        # A copy of a registry leaves out the numbers that were deleted there.
        if claimed > following + LARGEST_GAP:
            raise Rejected(
                f"The ledger says version {claimed}, and the next one is {following}: too many numbers are left out.",
                reason="BAD_COMMIT",
            )
        number = max(claimed, following)
        if trees.is_whole(tree) and (differing & trees.ADAPTER_FILES or claimed == number):
            return self._version(VersionPlan(proposal, self._files, number), proposal, number, incoming)
        return self._edit(self._with_own_ledger(proposal), incoming)

    def _with_own_ledger(self, proposal: Proposal) -> Proposal:
        """An edit leaves the ledger as it is: it is the registry's own, and written with every version."""
        if LEDGER_PATH not in proposal.differing:
            return proposal
        tree = {path: entry for path, entry in proposal.tree.items() if path != LEDGER_PATH}
        if LEDGER_PATH in proposal.current.tree:
            tree[LEDGER_PATH] = proposal.current.tree[LEDGER_PATH]
        differing = proposal.differing - {LEDGER_PATH}
        if not differing:
            raise Unchanged
        return replace(proposal, tree=tree, differing=differing)

    def _claimed(self, proposal: Proposal) -> int | None:
        """The version that the client's ledger says the commit is, even if the adapter is as it was."""
        if not proposal.brings(LEDGER_PATH) or MANIFEST_PATH not in proposal.tree:
            return None
        ledger, manifest = proposal.read(LEDGER_PATH), proposal.tree[MANIFEST_PATH]
        return self._files.claimed(ledger, proposal.current.name, manifest[0])

    def _version(self, plan: VersionPlan, proposal: Proposal, number: int, incoming: Incoming) -> Commit:
        """A commit that is the next version, by the same admission as any push."""
        sha = ""

        def extra(manifest: Manifest) -> list[bytes | Path]:
            return [*plan.documents(manifest).values(), *map(incoming.place, incoming.uploaded)]

        def also(manifest: Manifest, _: Sequence[Staged]) -> Callable[[sqlite3.Connection, int, str], list[Change]]:
            tree = plan.final_tree(manifest)
            if tree == proposal.current.tree:
                raise Unchanged

            def build(db: sqlite3.Connection, version: int, at: str) -> list[Change]:
                nonlocal sha
                self._check_still(head(db, incoming.name), proposal.current, tree, incoming)
                if version != number:
                    raise Overtaken
                change = change_for(incoming.name, proposal.current.sha, incoming.draft(tree, version), at)
                sha = str(change.detail["sha"])
                return [change]

            return build

        self._repositories.registry.acting_as(incoming.by).push_files(
            plan.pushed(), incoming.name, number=number, find_base=plan.base_finder(self._bases), extra=extra, also=also
        )
        return self._log.beginning(incoming.name, sha)[0]

    def _edit(self, proposal: Proposal, incoming: Incoming) -> Commit:
        """A commit that makes no version; it may sign the one that is there."""
        tree, name = dict(proposal.tree), incoming.name
        signed = self._signed(proposal)
        key = None if signed is None else signer_of(proposal.read(SIGNATURE_PATH))

        def build(_: sqlite3.Connection, now: Commit | None) -> Iterator[Draft]:
            self._check_still(now, proposal.current, tree, incoming)
            yield incoming.draft(tree, signed)

        def signing(at: str) -> Iterable[Change]:
            if signed is not None:
                digest, size = tree[SIGNATURE_PATH]
                detail = {"signature": digest, "size": size, "key": key}
                yield Change("signed", name, at, incoming.by, signed, detail=detail)

        named = {digest for digest, _ in tree.values()}
        staged = [each for each in incoming.adopt() if each.digest in named]
        made = self._log.append(name, build, staged, signing)
        assert made is not None
        return made

    def _signed(self, proposal: Proposal) -> int | None:
        """The version that the commit signs: the one whose manifest is there, if the client brings its signature."""
        current = proposal.current
        version = self._log.standing(current.name, current.number)
        if version is None or not proposal.brings(SIGNATURE_PATH):
            return None
        digests = {row.version: row.digest for row in self._log.versions(current.name) if not row.deleted}
        manifest = proposal.tree.get(MANIFEST_PATH)
        return version if manifest is not None and digests.get(version) == manifest[0] else None

    def _additions(self, incoming: Incoming) -> Iterator[tuple[str, Entry]]:
        for each in incoming.operations:
            if isinstance(each, AddFile):
                yield each.path, (each.content.digest, each.content.size)
            elif isinstance(each, AddLarge):
                yield each.path, (each.digest, self._large(each, incoming))

    def _large(self, each: AddLarge, incoming: Incoming) -> int:
        """The size of a large file that was uploaded before."""
        path = self._log.blob(each.digest)
        try:
            size = path.stat().st_size if incoming.may_use(each.digest) else None
        except FileNotFoundError:
            size = None
        if size is None or each.size not in (None, size):
            raise Rejected(
                f"{each.path[:200]} was not uploaded: nothing with its sha256 and size came before the commit.",
                reason="MISSING_FILE",
            )
        with path.open("rb") as file:
            check_prefix(each.path, file.read(9))
        return size

    def _check_still(self, now: Commit | None, current: Commit, tree: dict[str, Entry], incoming: Incoming) -> None:
        """Under the write lock: that nobody committed since, and that no large file was collected meanwhile."""
        if now is None or now.sha != current.sha:
            raise Overtaken
        for each in incoming.operations:
            if isinstance(each, AddLarge) and each.path in tree:
                self._large(each, incoming)
