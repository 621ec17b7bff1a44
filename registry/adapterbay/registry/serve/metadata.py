"""What a repository is, in the Hub's JSON: model info, the card's front matter, files of a tree."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

import yaml

from adapterbay.registry.local.commits import Commit, Tree

MAX_FRONT_MATTER: Final = 64 * 1024

# The clients look for the block in the same way (huggingface_hub.repocard.REGEX_YAML_BLOCK).
_FRONT_MATTER = re.compile(r"^(\s*---[\r\n]+)([\S\s]*?)([\r\n]+---(\r\n|\n|$))")


class FrontMatterError(ValueError):
    """A front matter that is not usable; the message says why."""


class _Loader(yaml.SafeLoader):
    """Without aliases: a few lines of them can stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise FrontMatterError("it has YAML aliases (*name), which are not read here")
        return super().compose_node(parent, index)


def front_matter(readme: bytes) -> dict[str, Any]:
    """The metadata of a card as JSON has it; empty if it has none. Raises FrontMatterError."""
    try:
        match = _FRONT_MATTER.match(readme[: 2 * MAX_FRONT_MATTER].decode("utf-8", "ignore"))
        if match is None:
            return {}
        if len(match[2]) > MAX_FRONT_MATTER:
            raise FrontMatterError(f"it has over {MAX_FRONT_MATTER} characters")
        found = yaml.load(match[2], Loader=_Loader)  # noqa: S506 - a SafeLoader
        if found is None:
            return {}
        if not isinstance(found, dict):
            raise FrontMatterError("it is no mapping of keys to values")
        document = json.loads(json.dumps(found, default=str, allow_nan=False))
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, FrontMatterError):
            raise
        raise FrontMatterError(" ".join(str(error).split())[:300] or "it is nested too deeply") from error
    return dict(document)


def model_info(
    commit: Commit, created_at: str, card: Mapping[str, Any], *, private: bool, blobs: bool
) -> dict[str, Any]:
    """The answer to `model_info`. `card` is the front matter of its README.md."""
    name = commit.name
    info: dict[str, Any] = {
        "_id": hashlib.sha256(name.encode()).hexdigest()[:24],
        "id": name,
        "modelId": name,
        "sha": commit.sha,
        "createdAt": time(created_at),
        "lastModified": time(commit.at),
        "private": private,
        "gated": False,
        "disabled": False,
        "tags": tags(card),
        "siblings": [_sibling(path, entry, blobs) for path, entry in sorted(commit.tree.items())],
        "usedStorage": sum(size for _, size in commit.tree.values()),
    }
    if "/" in name:
        info["author"] = name.split("/")[0]
    if card:
        info["cardData"] = dict(card)
    for key in ("library_name", "pipeline_tag"):
        if isinstance(card.get(key), str):
            info[key] = card[key]
    return info


def tags(card: Mapping[str, Any]) -> list[str]:
    """The tags that the Hub makes of a card: its own, its library, its task, its base."""
    found = [str(tag) for tag in _list(card.get("tags"))]
    found += [str(card[key]) for key in ("library_name", "pipeline_tag") if isinstance(card.get(key), str)]
    for base in _list(card.get("base_model")):
        found += [f"base_model:{base}", f"base_model:adapter:{base}"]
    found += [f"dataset:{each}" for each in _list(card.get("datasets"))]
    found += [f"license:{each}" for each in _list(card.get("license"))]
    return list(dict.fromkeys(found))


def _list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _sibling(path: str, entry: tuple[str, int], blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": path}
    large = lfs(entry)
    return {
        "rfilename": path,
        "size": entry[1],
        "blobId": pointer_id(entry),
        "lfs": {"sha256": large["oid"], "size": large["size"], "pointerSize": large["pointerSize"]},
    }


# Every file is shown as an LFS file: its sha256 is its ETag, and the clients' own check of downloads.


def file_entry(path: str, entry: tuple[str, int]) -> dict[str, Any]:
    """A file in a listing."""
    return {"type": "file", "path": path, "oid": pointer_id(entry), "size": entry[1], "lfs": lfs(entry)}


def folder_entry(path: str, tree: Tree) -> dict[str, Any]:
    """A folder in a listing. Its id depends on what is in it."""
    inside = sorted((name, entry) for name, entry in tree.items() if name.startswith(f"{path}/"))
    oid = hashlib.sha1(json.dumps(inside).encode(), usedforsecurity=False).hexdigest()
    return {"type": "directory", "path": path, "oid": oid, "size": 0}


def lfs(entry: tuple[str, int]) -> dict[str, Any]:
    """The LFS part of a listing."""
    return {"oid": entry[0].removeprefix("sha256:"), "size": entry[1], "pointerSize": len(_pointer(entry))}


def pointer_id(entry: tuple[str, int]) -> str:
    """The git id of the LFS pointer (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md)."""
    pointer = _pointer(entry)
    return hashlib.sha1(b"blob %d\0" % len(pointer) + pointer, usedforsecurity=False).hexdigest()


def _pointer(entry: tuple[str, int]) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid {entry[0]}\nsize {entry[1]}\n".encode()


def time(at: str) -> str:
    """A time as the clients parse it: UTC with milliseconds."""
    moment = datetime.fromisoformat(at).astimezone(UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"


def folders(paths: Iterable[str]) -> list[str]:
    """Every folder that the paths are in, sorted."""
    found: set[str] = set()
    for path in paths:
        parts = path.split("/")[:-1]
        found.update("/".join(parts[: count + 1]) for count in range(len(parts)))
    return sorted(found)
