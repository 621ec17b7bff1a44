"""Remembers what was computed from files, as long as their paths, sizes, times and inodes stay the same.

A cache is never needed: a damaged, foreign or unwritable entry means that the value is computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adapterbay.registry.digest import canonical_json
from adapterbay.registry.paths import cache_folder

_log = logging.getLogger(__name__)


def remembered(
    kind: str,
    version: int,
    files: Sequence[Path],
    compute: Callable[[], dict[str, Any]],
    valid: Callable[[dict[str, Any]], bool],
) -> dict[str, Any]:
    """The value for `files`, from the cache if they are unchanged since, else from `compute`.

    `version` is raised when the computation changes. `valid` says whether a cached value has the expected form.
    """
    key = [kind, version, [_identity(file) for file in files]]
    name = hashlib.sha256(canonical_json([kind, [str(file) for file in files]])).hexdigest()
    entry = cache_folder() / kind / f"{name}.json"
    found = _read(entry)
    if found is not None and found.get("key") == key:
        value = found.get("value")
        if isinstance(value, dict) and valid(value):
            return value
    value = compute()
    # Files that changed meanwhile: the value may belong to neither state, so it is not kept.
    if [_identity(file) for file in files] == key[2]:
        _write(entry, {"key": key, "value": value})
    return value


def _identity(file: Path) -> list[str | int]:
    stat = file.stat()
    return [str(file), stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _read(entry: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(entry.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        _log.warning("The cache entry %s is not readable and is made again: %s", entry, error)
        return None
    return value if isinstance(value, dict) else None


def _write(entry: Path, value: dict[str, Any]) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=entry.parent, prefix=f"{entry.stem}-", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(canonical_json(value))
            Path(temporary).replace(entry)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                Path(temporary).unlink()
            raise
    except OSError as error:
        _log.warning("The cache entry %s could not be written; it will be computed again: %s", entry, error)
