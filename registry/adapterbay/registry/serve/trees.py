"""What the operations of a commit make of a tree, and which paths a tree may have. Pure: no store, no HTTP."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Final

from adapterbay.registry.admission import check_path
from adapterbay.registry.errors import Rejected
from adapterbay.registry.local.commits import Tree
from adapterbay.registry.manifest import CONFIG_FILE, TRAINING_FILE, WEIGHTS_FILE, inside_path
from adapterbay.registry.portable import MANIFEST_PATH, OWN_README_PATH
from adapterbay.registry.serve.problems import Refusal

REQUIRED: Final = (CONFIG_FILE, WEIGHTS_FILE)
ADAPTER_FILES: Final = frozenset({CONFIG_FILE, WEIGHTS_FILE, TRAINING_FILE, MANIFEST_PATH, OWN_README_PATH})
"""A commit that changes one of them makes a version, if the adapter is whole afterwards."""


def applied(
    tree: Tree, added: Iterable[tuple[str, tuple[str, int]]], deleted: Iterable[tuple[str, bool]]
) -> dict[str, tuple[str, int]]:
    """The tree after deleting (path, whether it is a folder) and then adding (path, entry).

    Raises Refusal 404 for a deleted path that is not there, or Rejected (PATH_OUTSIDE, PICKLE, CODE_IN_FOLDER,
    BAD_COMMIT).
    """
    result = dict(tree)
    for path, folder in deleted:
        plain = path.rstrip("/")
        _check_inside(plain)
        gone = [each for each in result if each.startswith(f"{plain}/")] if folder else [plain]
        if not gone or any(each not in result for each in gone):
            what = "folder" if folder else "file"
            raise Refusal(404, f"A {what} with this name doesn't exist: {plain[:200]!r}.", code="EntryNotFound")
        for each in gone:
            del result[each]
    seen: set[str] = set()
    for path, entry in added:
        check_path(path)
        if path in seen:
            raise Rejected(f"The commit adds {path} twice.", reason="BAD_COMMIT")
        seen.add(path)
        result[path] = entry
    _check_no_file_is_a_folder(result)
    return result


def _check_inside(path: str) -> None:
    try:
        inside_path(path)
    except ValueError as error:
        raise Rejected(f"The path {path[:200]!r} was refused: {error}.", reason="PATH_OUTSIDE") from error


def _check_no_file_is_a_folder(tree: Mapping[str, object]) -> None:
    for path in tree:
        for parent in PurePosixPath(path).parents:
            if str(parent) in tree:
                raise Rejected(f"{parent} is a file, so {path} cannot be in it.", reason="BAD_COMMIT")


def changed(old: Tree, new: Tree) -> set[str]:
    """The paths that were added, removed, or have other bytes."""
    return {path for path in {*old, *new} if old.get(path) != new.get(path)}


def is_whole(tree: Tree) -> bool:
    """Whether the tree has what an adapter needs."""
    return all(path in tree for path in REQUIRED)
