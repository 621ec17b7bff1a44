"""The files of a commit, into huggingface_hub's cache and checked there; and the manifest that they have.

A commit that we pushed holds its manifest. For one that others pushed with plain PEFT the manifest is made here, by the
same admission as at a push, with the base pinned to its commit of now. It is remembered on this machine, so that the
digest stays the same while the base's main branch moves on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from adapterbay.registry.admission import Limits
from adapterbay.registry.admission.candidate import Wishes, examine
from adapterbay.registry.admission.folder import READ_FILES, STORED_FILES, from_files
from adapterbay.registry.base.filecache import remembered
from adapterbay.registry.base.reference import BaseReference
from adapterbay.registry.digest import digest_bytes, digest_file
from adapterbay.registry.errors import BaseNotFound, Corrupted, Rejected
from adapterbay.registry.hub.client import HubClient, RemoteFile
from adapterbay.registry.hub.ledger import is_commit
from adapterbay.registry.local.blobs import Staged
from adapterbay.registry.manifest import CONFIG_FILE, README_FILE, WEIGHTS_FILE, FileEntry, Manifest
from adapterbay.registry.portable import (
    MANIFEST_PATH,
    MAX_DOCUMENT_BYTES,
    OWN_README_PATH,
    SIGNATURE_PATH,
)
from adapterbay.registry.views import Snapshot

_FETCHED_DOCUMENTS: Final = tuple(name for name in sorted(READ_FILES) if name.endswith(".json"))
_MANIFESTS_VERSION: Final = 1


def own_manifest(client: HubClient, name: str, commit: str) -> Manifest | None:
    """The manifest that a commit holds, if it holds one. Raises Rejected if it is not valid."""
    data = client.document(name, commit, MANIFEST_PATH, MAX_DOCUMENT_BYTES)
    if data is None:
        return None
    manifest = Manifest.from_bytes(data)
    if manifest.digest != digest_bytes(data):
        raise Rejected(f"{MANIFEST_PATH} of {name} at {commit} is not canonical JSON.", reason="BAD_MANIFEST")
    return manifest


def manifest_of(client: HubClient, name: str, commit: str) -> Manifest:
    """The manifest of a commit: its own, or for a plain PEFT repository the one that admission makes of it.

    Raises Rejected and the other errors of admission, BaseNotFound, NotFound or Unavailable.
    """
    return own_manifest(client, name, commit) or _admitted(client, name, commit)


def holds_adapter(files: Collection[str]) -> bool:
    """Whether a list of files is that of an adapter."""
    return CONFIG_FILE in files and WEIGHTS_FILE in files


def adapter_files(files: Mapping[str, RemoteFile], manifest: Manifest) -> dict[str, RemoteFile | None]:
    """What tells two commits apart: the manifest and its files, except the card."""
    wanted = [MANIFEST_PATH, *(entry.path for entry in manifest.files if entry.path != README_FILE)]
    return {path: files.get(path) for path in wanted}


def fetch_snapshot(client: HubClient, name: str, commit: str) -> Snapshot:
    """The files of a commit, every byte checked against its manifest.

    Raises Corrupted that names the file, or what `manifest_of` raises.
    """
    manifest = manifest_of(client, name, commit)
    limits = Limits()
    for entry in manifest.files:
        limit = limits.weights_bytes if entry.path == WEIGHTS_FILE else limits.document_bytes
        if entry.size > limit:
            raise Rejected(f"{entry.path} of {name} has {entry.size} bytes, over {limit}.", reason="TOO_LARGE")
    files = {entry.path: fetch_entry(client, name, commit, entry) for entry in manifest.files}
    return Snapshot(manifest, files, client.document(name, commit, SIGNATURE_PATH, MAX_DOCUMENT_BYTES))


def fetch_entry(client: HubClient, name: str, commit: str, entry: FileEntry) -> Path:
    """A file of a manifest, checked. A damaged copy in the cache is fetched again once. Raises Corrupted."""
    place = entry.path
    if place == README_FILE and client.document(name, commit, OWN_README_PATH, MAX_DOCUMENT_BYTES) is not None:
        place = OWN_README_PATH
    size = None if client.is_cached(name, commit, place) else client.size(name, commit, place)
    if size in (None, entry.size):  # what has another size is not fetched at all
        path = client.fetch(name, commit, place)
        if _is(path, entry):
            return path
        if not client.offline and client.size(name, commit, place) == entry.size:
            path = client.fetch(name, commit, place, again=True)
            if _is(path, entry):
                return path
    raise Corrupted(
        f"{place} of {name} at {commit} is not what the manifest there says ({entry.digest}): it was changed without "
        "adapterbay, or damaged. Ask for another version, or push the adapter again.",
        metadata={"digest": entry.digest, "file": place},
    )


def _is(path: Path, entry: FileEntry) -> bool:
    return path.stat().st_size == entry.size and digest_file(path) == entry.digest


def _admitted(client: HubClient, name: str, commit: str) -> Manifest:
    there = _plain_files(client, name, commit)
    files = {path: place.resolve() for path, place in client.fetch_all(name, commit, there).items()}

    def compute() -> dict[str, Any]:
        folder = from_files(files)
        staged = {
            path: Staged(file, digest_file(file), file.stat().st_size, True) for path, file in folder.files.items()
        }
        try:
            found = examine(folder, staged, Wishes())
        except BaseNotFound as error:
            raise BaseNotFound(
                f"{name} was pushed without adapterbay, and the base that it names was not found: {error.message} Or "
                f"download it with `hf download {name}` and push the folder with --base."
            ) from error
        check_pinned(found.manifest, name)
        return found.manifest.model_dump(mode="json")

    keys = [client.snapshot_path(name, commit, path) for path in sorted(files)]
    return Manifest.model_validate(remembered("hub-manifests", _MANIFESTS_VERSION, keys, compute, _is_manifest))


def _plain_files(client: HubClient, name: str, commit: str) -> list[str]:
    """What is fetched of a plain PEFT repository: never pickles, never code."""
    if client.offline:
        wanted = (*STORED_FILES, *_FETCHED_DOCUMENTS)
        return [path for path in wanted if client.is_cached(name, commit, path)] or [CONFIG_FILE]
    there = client.files(name, commit)
    for required in (CONFIG_FILE, WEIGHTS_FILE):
        if required not in there:
            pickled = " Pickled weights (*.bin) are never read." if "adapter_model.bin" in there else ""
            raise Rejected(
                f"{name} at {commit} is no adapter: it has no {required}.{pickled}",
                reason="MISSING_FILE",
                metadata={"file": required},
            )
    limits = Limits()
    for path in (*STORED_FILES, *_FETCHED_DOCUMENTS):
        most = limits.weights_bytes if path == WEIGHTS_FILE else limits.document_bytes
        if path in there and there[path].size > most:
            raise Rejected(f"{path} of {name} has {there[path].size} bytes, over {most}.", reason="TOO_LARGE")
    return [path for path in (*STORED_FILES, *_FETCHED_DOCUMENTS) if path in there]


def check_pinned(manifest: Manifest, name: str) -> None:
    """Refuses a manifest whose base is on the Hub and not pinned to a commit. Raises Rejected (BAD_MANIFEST)."""
    base = BaseReference.parse(manifest.base_reference)
    if base.scheme == "hub" and (base.revision is None or not is_commit(base.revision)):
        raise Rejected(f"The base {base} of {name} is not pinned to a commit.", reason="BAD_MANIFEST")


def _is_manifest(value: dict[str, Any]) -> bool:
    try:
        Manifest.model_validate(value)
    except ValueError:
        return False
    return True
