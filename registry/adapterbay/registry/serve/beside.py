"""What a commit brings beside the adapter at the root: PEFT's clients load adapters from folders below it, too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Final

from adapterbay.registry.admission import Limits, admit, understand
from adapterbay.registry.admission.documents import read_document
from adapterbay.registry.admission.origins import base_at, base_named
from adapterbay.registry.admission.safetensors_file import read_header
from adapterbay.registry.errors import AdapterbayError, BaseMismatch, shown
from adapterbay.registry.manifest import CONFIG_FILE, TRAINING_FILE, WEIGHTS_FILE
from adapterbay.registry.serve import trees
from adapterbay.registry.serve.bases import Bases
from adapterbay.registry.serve.version_plan import Proposal

SAFETENSORS: Final = ".safetensors"
_PARTS: Final = (CONFIG_FILE, WEIGHTS_FILE, TRAINING_FILE)


def check_beside(proposal: Proposal, bases: Bases, limits: Limits) -> None:
    """Admits what the commit changes and what is not the adapter at the root, which a version admits.

    An adapter in a folder passes the same admission as soon as it is whole; every other safetensors file must have a
    sound header, every other adapter_config.json must be JSON. Raises what admission raises, with the path.
    """
    tree = proposal.tree
    brought = sorted(path for path in proposal.differing if path in tree)
    whole = {folder for folder in map(_folder, brought) if _is_whole(tree, folder)}
    for path in brought:
        name = PurePosixPath(path).name
        if _folder(path) in whole and name in _PARTS:
            continue
        file = proposal.path_of(tree[path][0])
        if path.lower().endswith(SAFETENSORS):
            read_header(file, path, max_header_bytes=limits.header_bytes, max_tensors=limits.tensors)
        elif name == CONFIG_FILE:
            read_document(file, path, limits.document_bytes)
    for folder in sorted(whole - {""}):
        if any(_in(folder, part) in brought for part in _PARTS):
            _admit(folder, dict(_parts(proposal, folder)), bases, limits)


def _admit(folder: str, files: Mapping[str, Path], bases: Bases, limits: Limits) -> None:
    """One adapter against the base that it names. Raises as admission does; the message begins with the folder."""
    try:
        config, _, _ = understand(files, limits)
        training = (
            read_document(files[TRAINING_FILE], TRAINING_FILE, limits.document_bytes)
            if TRAINING_FILE in files
            else None
        )
        base = base_at(base_named(config, training), bases.find)
        recorded = (training or {}).get("base")
        fingerprint = recorded.get("fingerprint") if isinstance(recorded, dict) else None
        if fingerprint not in (None, base.fingerprint):
            raise BaseMismatch(
                f"It was trained on a base with the fingerprint {str(fingerprint)[:80]!r}, but {base.reference} has "
                f"{base.fingerprint}.",
                expected=base.fingerprint,
                actual=str(fingerprint)[:80],
            )
        admit(files, base.tensor_shapes(), base_config=base.config, limits=limits)
    except AdapterbayError as error:
        error.message = shown(f"{folder[:200]}/: {error.message}")
        error.args = (error.message,)
        raise


def _parts(proposal: Proposal, folder: str) -> Iterator[tuple[str, Path]]:
    for part in _PARTS:
        entry = proposal.tree.get(_in(folder, part))
        if entry is not None:
            yield part, proposal.path_of(entry[0])


def _folder(path: str) -> str:
    parent = str(PurePosixPath(path).parent)
    return "" if parent == "." else parent


def _in(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _is_whole(tree: Mapping[str, object], folder: str) -> bool:
    return all(_in(folder, each) in tree for each in trees.REQUIRED)
