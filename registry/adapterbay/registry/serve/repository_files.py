"""What a repository has besides the files of its version: the manifest, the card, the ledger, the signature."""

from __future__ import annotations

from collections.abc import Mapping

from adapterbay.registry.card import render_card
from adapterbay.registry.errors import AdapterbayError
from adapterbay.registry.hub.ledger import Ledger, LedgerEntry
from adapterbay.registry.local.blobs import Staged, Staging
from adapterbay.registry.local.commits import Commit, CommitLog, Tree, VersionRow
from adapterbay.registry.manifest import README_FILE, Manifest
from adapterbay.registry.portable import LEDGER_PATH, MANIFEST_PATH, OWN_README_PATH, SIGNATURE_PATH


class RepositoryFiles:
    """Makes them, and recognises its own. Reads blobs; writes nothing but staged files."""

    def __init__(self, log: CommitLog) -> None:
        self._log = log

    def of_version(
        self, staging: Staging, name: str, row: VersionRow
    ) -> tuple[dict[str, tuple[str, int]], list[Staged]]:
        """The tree of a version that was not pushed over HTTP, and its blobs that are new. Raises Corrupted."""
        path = self._log.check_blob(row.digest, None, f"The manifest of {name}@{row.version}")
        manifest = Manifest.from_bytes(path.read_bytes())
        tree = {entry.path: (entry.digest, entry.size) for entry in manifest.files}
        tree[MANIFEST_PATH] = (row.digest, len(manifest.to_bytes()))
        if row.signature is not None:
            tree[SIGNATURE_PATH] = self.signature(row)
        card = self.card(manifest, name, row.version, self.own_readme(tree))
        new = {README_FILE: card, LEDGER_PATH: self.ledger(name, row.version, row.digest)}
        return self.with_documents(tree, {path: staging.add_bytes(data) for path, data in new.items()})

    def signature(self, row: VersionRow) -> tuple[str, int]:
        """The signature of a version that has one. Raises Corrupted."""
        digest = row.signature or ""
        return digest, self._log.check_blob(digest, None, f"The signature of version {row.version}").stat().st_size

    def with_documents(
        self, tree: Tree, documents: Mapping[str, Staged]
    ) -> tuple[dict[str, tuple[str, int]], list[Staged]]:
        """The tree with generated documents; the README.md that a generated one replaces moves to `adapterbay/`."""
        result = dict(tree)
        for path, staged in documents.items():
            entry = (staged.digest, staged.size)
            if path == README_FILE and README_FILE in result and result[README_FILE] != entry:
                result.setdefault(OWN_README_PATH, result[README_FILE])
            result[path] = entry
        if result.get(OWN_README_PATH) == result.get(README_FILE):
            result.pop(OWN_README_PATH, None)
        return result, list(documents.values())

    def own_readme(self, tree: Tree) -> bytes | None:
        """The bytes of README.md as the version has it."""
        entry = tree.get(OWN_README_PATH) or tree.get(README_FILE)
        return None if entry is None else self._log.check_blob(*entry, README_FILE).read_bytes()

    def card(self, manifest: Manifest, name: str, version: int, own: bytes | None) -> bytes:
        """The card that the registry publishes for a version."""
        return render_card(manifest, name=name, own_readme=own, version=version)

    def ledger(self, name: str, version: int, digest: str) -> bytes:
        """The ledger with `version` as its newest."""
        digests = {row.version: row.digest for row in self._log.versions(name)}
        commits = self._log.tagged(name)
        older = [
            LedgerEntry(version=number, digest=digests[number], commit=sha)
            for number, sha in sorted(commits.items())
            if number < version
        ]
        return Ledger(versions=(*older, LedgerEntry(version=version, digest=digest, commit=None))).to_bytes()

    def claimed(self, ledger: bytes, name: str, digest: str) -> int | None:
        """The version that a ledger says the commit it comes with is, if it is one with `digest`."""
        try:
            newest = Ledger.from_bytes(ledger, name).versions[-1:]
        except AdapterbayError:
            return None
        return newest[0].version if newest and newest[0].digest == digest and newest[0].commit is None else None

    def is_generated(self, commit: Commit) -> bool:
        """Whether README.md of a commit is the card that the registry made for its version."""
        entry, version = commit.tree.get(README_FILE), self._log.standing(commit.name, commit.number)
        if entry is None or version is None or MANIFEST_PATH not in commit.tree:
            return False
        manifest = Manifest.from_bytes(self._log.check_blob(*commit.tree[MANIFEST_PATH], MANIFEST_PATH).read_bytes())
        named = {file.path: (file.digest, file.size) for file in manifest.files}
        if README_FILE in named and OWN_README_PATH not in commit.tree and named[README_FILE] != entry:
            return False  # somebody edited what the version brought
        own = commit.tree.get(OWN_README_PATH) or named.get(README_FILE)
        data = None if own is None else self._log.check_blob(*own, README_FILE).read_bytes()
        return self._log.blob(entry[0]).read_bytes() == self.card(manifest, commit.name, version, data)
