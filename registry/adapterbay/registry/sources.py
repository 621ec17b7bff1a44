"""Adapters that lie elsewhere: repositories on the Hub or ModelScope that plain PEFT wrote, as folders to push.

    fetch_adapter_folder("hub:org/repo@v2")
    fetch_adapter_folder("modelscope:org/repo")

Only what a push reads is fetched: no pickles, no code, no checkpoints inside. The folder belongs to one commit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from adapterbay.registry.admission.folder import READ_FILES, STORED_FILES
from adapterbay.registry.base import modelscope
from adapterbay.registry.base.reference import BaseReference
from adapterbay.registry.errors import InvalidReference, NotFound
from adapterbay.registry.manifest import CONFIG_FILE, WEIGHTS_FILE
from adapterbay.registry.portable import MANIFEST_PATH, OWN_README_PATH, SIGNATURE_PATH
from adapterbay.registry.reference import HubReference

ADAPTER_FILES: Final = (*STORED_FILES, *sorted(READ_FILES), MANIFEST_PATH, SIGNATURE_PATH, OWN_README_PATH)
"""What is fetched of a repository."""

_HUB: Final = "hub:"
_MODELSCOPE: Final = "modelscope:"


def fetch_adapter_folder(text: str) -> Path:
    """The folder of an adapter named `hub:ORG/REPO[@REVISION]` or `modelscope:ORG/REPO[@REVISION]`, fetched if needed.

    Without a connection the cache is used. The folder may lack what an adapter needs; pushing it says so.
    Raises InvalidReference, NotFound, Unavailable, StorageFull, or MissingExtra for ModelScope without its client.
    """
    if text.startswith(_HUB):
        return _from_hub(HubReference.parse(text))
    if text.startswith(_MODELSCOPE):
        return _from_modelscope(text)
    raise InvalidReference(f"{text[:200]!r} names no repository: hub:ORG/REPO or modelscope:ORG/REPO.", field="folder")


def _from_hub(reference: HubReference) -> Path:
    from huggingface_hub import snapshot_download

    from adapterbay.registry.hub.failures import hub_errors

    if reference.digest is not None:
        raise InvalidReference(
            f"{reference} names a digest: `registry mirror` follows those. Name a commit, a tag or a branch to push.",
            field="folder",
        )
    revision = reference.revision if reference.version is None else f"v{reference.version}"
    with hub_errors(str(reference)):
        return Path(snapshot_download(reference.name, revision=revision, allow_patterns=list(ADAPTER_FILES)))


def _from_modelscope(text: str) -> Path:
    try:
        reference = BaseReference.parse(text)
    except InvalidReference as error:
        raise InvalidReference(
            f"{text[:200]!r} is no repository on ModelScope: modelscope:ORG/REPO@REVISION.", field="folder"
        ) from error
    return modelscope.fetch(
        modelscope.Request(
            repo=reference.target,
            revision=reference.revision,
            what=f"adapter {reference}",
            wanted=ADAPTER_FILES.__contains__,
            whole=_is_whole,
            missing=NotFound,
            reuse=False,
        )
    )


def _is_whole(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file()
