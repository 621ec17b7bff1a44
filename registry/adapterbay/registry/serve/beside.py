"""What a commit brings beside the adapter at the root: PEFT's clients load adapters from folders below it, too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Final

from adapterbay.registry.admission import Limits
from adapterbay.registry.admission.candidate import Wishes, examine
from adapterbay.registry.admission.documents import read_document
from adapterbay.registry.admission.folder import READ_FILES, STORED_FILES, from_files
from adapterbay.registry.admission.safetensors_file import read_header
from adapterbay.registry.errors import AdapterbayError, shown
from adapterbay.registry.local.blobs import Staged
from adapterbay.registry.manifest import CONFIG_FILE, TRAINING_FILE
from adapterbay.registry.serve import trees
from adapterbay.registry.serve.bases import Bases
from adapterbay.registry.serve.version_plan import Entry, Proposal

SAFETENSORS: Final = ".safetensors"


Folder = tuple[str, frozenset[tuple[str, Entry]]]
"""The path of a folder, and its files by name."""


def check_beside(proposal: Proposal, bases: Bases, limits: Limits, admitted: set[Folder]) -> None:
    """Admits what the commit changes and what is not the adapter at the root, which a version admits.

    An adapter in a folder passes the same admission as soon as it is whole; every other safetensors file must have a
    sound header, every other adapter_config.json must be JSON. `admitted` remembers folders between the attempts of
    one commit. Raises what admission raises, with the path.
    """
    inside: dict[str, dict[str, Entry]] = {}
    for path, entry in proposal.tree.items():
        at = PurePosixPath(path)
        inside.setdefault(str(at.parent), {})[at.name] = entry
    changed: dict[str, set[str]] = {}
    for at in map(PurePosixPath, proposal.differing):
        changed.setdefault(str(at.parent), set()).add(at.name)
    for folder, names in sorted(changed.items()):
        there = inside.get(folder, {})
        key = (folder, frozenset(there.items()))
        if key in admitted:
            continue
        whole = trees.is_whole(there)
        for name in sorted(names & there.keys() - (frozenset(trees.REQUIRED) if whole else frozenset())):
            _check_part(str(PurePosixPath(folder, name)), proposal, limits)
        if whole and folder != "." and names & trees.ADAPTER_FILES:
            _admit(folder, there, proposal, bases, limits)
        admitted.add(key)


def _check_part(path: str, proposal: Proposal, limits: Limits) -> None:
    """As far as one file can be checked alone."""
    file = proposal.path_of(proposal.tree[path][0])
    if path.lower().endswith(SAFETENSORS):
        read_header(file, path, max_header_bytes=limits.header_bytes, max_tensors=limits.tensors)
    elif PurePosixPath(path).name == CONFIG_FILE:
        read_document(file, path, limits.document_bytes)


def _admit(folder: str, inside: Mapping[str, Entry], proposal: Proposal, bases: Bases, limits: Limits) -> None:
    """One adapter against the base that it names, as a push of its folder. The message begins with the folder."""
    wanted = {*STORED_FILES, *READ_FILES} & inside.keys()
    files = {name: proposal.path_of(inside[name][0]) for name in wanted}
    staged = {name: Staged(path, *inside[name], stored=True) for name, path in files.items() if name in STORED_FILES}
    try:
        find_base = bases.finder(proposal.recorded_fingerprint(str(PurePosixPath(folder, TRAINING_FILE))))
        examine(from_files(files), staged, Wishes(), limits, find_base=find_base)
    except AdapterbayError as error:
        error.message = shown(f"{folder[:200]}/: {error.message}")
        error.args = (error.message,)
        raise
