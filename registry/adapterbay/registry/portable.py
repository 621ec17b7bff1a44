"""A version as a folder that anybody can use, and that is the same version again when it is pushed.

    adapter_config.json, adapter_model.safetensors, …    the files of the manifest, as plain PEFT reads them
    adapterbay/manifest.json                             the manifest; the sha256 of this file is the version's digest
    adapterbay/model.sig                                 the signature, if there is one

A repository on the Hub has two differences: README.md is the model card, with the version's own README.md beside it as
adapterbay/README.md if the bytes differ; and adapterbay/versions.json is the ledger of its versions.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from adapterbay.registry import durable
from adapterbay.registry.admission.documents import read_bytes
from adapterbay.registry.digest import copy_and_digest
from adapterbay.registry.errors import Corrupted, InvalidArgument, Rejected
from adapterbay.registry.manifest import README_FILE, FileEntry, Manifest
from adapterbay.registry.views import Snapshot

FOLDER: Final = "adapterbay"
MANIFEST_PATH: Final = "adapterbay/manifest.json"
SIGNATURE_PATH: Final = "adapterbay/model.sig"
OWN_README_PATH: Final = "adapterbay/README.md"
LEDGER_PATH: Final = "adapterbay/versions.json"
MAX_DOCUMENT_BYTES: Final = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Claim:
    """The manifest that a folder brings, and where its files lie in the folder. Nothing of it is checked yet."""

    manifest: Manifest
    files: Mapping[str, Path]
    signature: bytes | None


def read_claim(files: Mapping[str, Path]) -> Claim | None:
    """What the files of a folder, by relative path, claim to be; None if they hold no manifest of ours.

    Raises Rejected: BAD_MANIFEST, BAD_JSON, TOO_LARGE, or MANIFEST_MISMATCH if a file of the manifest is not there.
    """
    if MANIFEST_PATH not in files:
        return None
    manifest = Manifest.from_bytes(read_bytes(files[MANIFEST_PATH], MANIFEST_PATH, MAX_DOCUMENT_BYTES, follow=False))
    found = {}
    for entry in manifest.files:
        places = [entry.path] if entry.path != README_FILE else [OWN_README_PATH, README_FILE]
        there = [place for place in places if place in files and files[place].stat().st_size == entry.size]
        if not there:
            raise mismatch(f"it names {entry.path} with {entry.size} bytes, which is not there")
        found[entry.path] = files[there[0]]
    signature = files.get(SIGNATURE_PATH)
    return Claim(
        manifest,
        found,
        None if signature is None else read_bytes(signature, SIGNATURE_PATH, MAX_DOCUMENT_BYTES, follow=False),
    )


def mismatch(what: str) -> Rejected:
    """The error for a folder that is not what its manifest says."""
    return Rejected(
        f"The folder is not what its {MANIFEST_PATH} says: {what}. Remove the folder {FOLDER}/ to push it as something "
        "new.",
        reason="MANIFEST_MISMATCH",
    )


def write_folder(snapshot: Snapshot, destination: Path) -> Path:
    """Copies the files of `snapshot` to `destination`, which must not exist or be empty. Whole or not at all.

    Raises InvalidArgument, Corrupted or StorageFull.
    """
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise InvalidArgument(f"{destination} is not a folder: choose another destination.", field="destination")
    if destination.is_dir() and any(destination.iterdir()):
        raise InvalidArgument(
            f"{destination} is not empty: choose another destination, nothing was written.", field="destination"
        )
    target = destination.absolute()
    with durable.storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        try:
            for entry in snapshot.manifest.files:
                copy = temporary / entry.path
                copy.parent.mkdir(parents=True, exist_ok=True)
                _copy_checked(snapshot.files[entry.path], copy, entry)
            for path, data in ((MANIFEST_PATH, snapshot.manifest.to_bytes()), (SIGNATURE_PATH, snapshot.signature)):
                if data is not None:
                    copy = temporary / path
                    copy.parent.mkdir(exist_ok=True)
                    copy.write_bytes(data)
                    durable.sync_file(copy)
            temporary.chmod(0o755)
            durable.sync_folder(temporary)
            durable.rename(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return target


def _copy_checked(source: Path, target: Path, entry: FileEntry) -> None:
    """Copies one file durably, and reads it once. Raises Corrupted if it is not what the manifest says."""
    try:
        reading = source.open("rb")
    except OSError as error:
        raise _damaged(entry, f"cannot be read in the registry: {error.strerror}") from error
    with reading, target.open("wb") as writing:
        digest, size = copy_and_digest(reading, writing)
        writing.flush()
        os.fsync(writing.fileno())
    if size != entry.size:
        raise _damaged(entry, f"has {size} bytes in the registry instead of {entry.size}")
    if digest != entry.digest:
        raise _damaged(entry, f"was altered in the registry: it is {digest} now")


def _damaged(entry: FileEntry, what: str) -> Corrupted:
    return Corrupted(
        f"{entry.path} {what} ({entry.digest}). Push the same files again to repair it, or restore it from a copy.",
        metadata={"digest": entry.digest, "file": entry.path},
    )
