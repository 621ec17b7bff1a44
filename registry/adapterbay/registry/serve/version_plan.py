"""A client's commit that shall be a version: which files are pushed, and what the registry adds to the tree."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from adapterbay.registry.admission.folder import READ_FILES, STORED_FILES
from adapterbay.registry.admission.origins import FindBase
from adapterbay.registry.digest import digest_bytes, parse_json_object
from adapterbay.registry.errors import Rejected
from adapterbay.registry.local.commits import Commit
from adapterbay.registry.manifest import README_FILE, TRAINING_FILE, Manifest
from adapterbay.registry.portable import (
    LEDGER_PATH,
    MANIFEST_PATH,
    MAX_DOCUMENT_BYTES,
    OWN_README_PATH,
    SIGNATURE_PATH,
    mismatch,
)
from adapterbay.registry.serve.bases import Bases
from adapterbay.registry.serve.repository_files import RepositoryFiles

Entry = tuple[str, int]

_CLAIM: Final = (MANIFEST_PATH, SIGNATURE_PATH, OWN_README_PATH, README_FILE)


@dataclass(frozen=True, slots=True)
class Proposal:
    """A commit before it is decided. `tree` is what the client makes of `current`, `differing` what it changes.

    `path_of` gives the bytes of a digest: a file that came with the commit, or a blob.
    """

    current: Commit
    tree: Mapping[str, Entry]
    differing: frozenset[str]
    path_of: Callable[[str], Path]

    def read(self, path: str) -> bytes:
        """A document of the tree. Raises Rejected with reason TOO_LARGE."""
        digest, size = self.tree[path]
        if size > MAX_DOCUMENT_BYTES:
            raise Rejected(f"{path} has {size} bytes, over {MAX_DOCUMENT_BYTES}.", reason="TOO_LARGE")
        return self.path_of(digest).read_bytes()

    def recorded_fingerprint(self, path: str) -> str | None:
        """The fingerprint of the base that a training record of the tree names. Raises Rejected."""
        if path not in self.tree:
            return None
        base = parse_json_object(self.read(path), path).get("base")
        found = base.get("fingerprint") if isinstance(base, dict) else None
        return found if isinstance(found, str) else None

    def brings(self, path: str) -> bool:
        """Whether the client writes this path, with other bytes than were there."""
        return path in self.differing and path in self.tree


class VersionPlan:
    """The commit as version `number`. Raises Rejected (MANIFEST_MISMATCH, BAD_MANIFEST) for a manifest that lies."""

    def __init__(self, proposal: Proposal, files: RepositoryFiles, number: int) -> None:
        self._proposal = proposal
        self._files = files
        self._number = number
        self._claimed = _claimed(proposal)
        self._tree = dict(proposal.tree)
        if self._claimed is None:
            for stale in (MANIFEST_PATH, SIGNATURE_PATH):
                self._tree.pop(stale, None)
        self._own = self._own_readme()

    def pushed(self) -> dict[str, Path]:
        """What goes through admission, by relative path."""
        if self._claimed is not None:
            wanted = {*(entry.path for entry in self._claimed.files), *_CLAIM}
        else:
            wanted = {*STORED_FILES, *READ_FILES} - {README_FILE}
        found = {path: self._proposal.path_of(self._tree[path][0]) for path in wanted if path in self._tree}
        if self._claimed is None and self._own is not None:
            found[README_FILE] = self._proposal.path_of(self._own[0])
        return found

    def base_finder(self, bases: Bases) -> FindBase:
        """How admission finds the base: by its fingerprint, if the files tell it, else by its name."""
        return bases.finder(
            self._claimed.base_fingerprint if self._claimed else self._proposal.recorded_fingerprint(TRAINING_FILE)
        )

    def documents(self, manifest: Manifest) -> dict[str, bytes]:
        """What the registry writes, by path: the card unless the client did, and the ledger unless it is right."""
        return self._documents(manifest.to_bytes())

    def final_tree(self, manifest: Manifest) -> dict[str, Entry]:
        """The tree of the commit."""
        result = dict(self._tree)
        result[MANIFEST_PATH] = (manifest.digest, len(manifest.to_bytes()))
        for path, data in self.documents(manifest).items():
            result[path] = (digest_bytes(data), len(data))
        result.pop(OWN_README_PATH, None)
        if self._own is not None and result.get(README_FILE) != self._own:
            result[OWN_README_PATH] = self._own
        return result

    @functools.lru_cache(maxsize=1)  # noqa: B019 - a plan lives as long as its commit
    def _documents(self, manifest_bytes: bytes) -> dict[str, bytes]:
        proposal = self._proposal
        name = proposal.current.name
        manifest = Manifest.from_bytes(manifest_bytes)
        found: dict[str, bytes] = {}
        if self._writes_card():
            own = None if self._own is None else self._proposal.path_of(self._own[0]).read_bytes()
            found[README_FILE] = self._files.card(manifest, name, self._number, own)
        if not (
            proposal.brings(LEDGER_PATH)
            and self._files.claimed(proposal.read(LEDGER_PATH), name, manifest.digest) == self._number
        ):
            found[LEDGER_PATH] = self._files.ledger(name, self._number, manifest.digest)
        return found

    def _writes_card(self) -> bool:
        if README_FILE in self._proposal.differing:
            return False
        return README_FILE not in self._tree or self._files.is_generated(self._proposal.current)

    def _own_readme(self) -> Entry | None:
        """README.md as the version has it: what a person wrote, never the registry's own card."""
        tree, proposal = self._tree, self._proposal
        if self._claimed is not None:
            named = (entry for entry in self._claimed.files if entry.path == README_FILE)
            return next(((entry.digest, entry.size) for entry in named), None)
        if proposal.brings(README_FILE) and not proposal.brings(OWN_README_PATH):
            return tree[README_FILE]
        if OWN_README_PATH in tree:
            return tree[OWN_README_PATH]
        if README_FILE not in tree or self._files.is_generated(proposal.current):
            return None
        return tree[README_FILE]


def _claimed(proposal: Proposal) -> Manifest | None:
    """The manifest in the tree, if it is that of the tree's files; None for one that was left from before."""
    if MANIFEST_PATH not in proposal.tree:
        if proposal.brings(SIGNATURE_PATH):
            raise mismatch(f"{SIGNATURE_PATH} signs a manifest that is not there")
        return None
    manifest = Manifest.from_bytes(proposal.read(MANIFEST_PATH))
    problem = _contradiction(manifest, proposal.tree)
    if problem is None:
        return manifest
    if proposal.brings(MANIFEST_PATH):
        raise mismatch(problem)
    return None


def _contradiction(manifest: Manifest, tree: Mapping[str, Entry]) -> str | None:
    """What the manifest says otherwise than the tree."""
    named = {entry.path for entry in manifest.files}
    for entry in manifest.files:
        places = [entry.path] if entry.path != README_FILE else [OWN_README_PATH, README_FILE]
        if all(tree.get(place) != (entry.digest, entry.size) for place in places):
            return f"it names {entry.path} as {entry.digest}, which is not in the commit"
    for path in STORED_FILES:
        place = path if path != README_FILE else OWN_README_PATH
        if place in tree and path not in named:
            return f"it does not name {place}"
    return None
