"""A folder of built libraries, each named by what it was built from and by its own bytes.

A file whose bytes are not those of its name (cut off, changed, not readable) is never loaded: it would kill the process
or compute something else. It is built anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

Build = Callable[[Path], Path]
"""Builds in a folder, and says which file there is the result."""

log = logging.getLogger(__name__)


def kept(folder: Path, key: str, build: Build) -> tuple[Path, bool]:
    """The library of `key`, and whether it was built now. Of several processes one builds, the others wait for it.

    Raises OSError if `folder` cannot be used, and what `build` raises.
    """
    found = find(folder, key)
    if found is not None:
        return found, False
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{key}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = find(folder, key)
        if found is not None:
            return found, False
        for damaged in folder.glob(f"{key}.*.so"):
            log.warning("%s is damaged: it is built anew", damaged)
            _remove(damaged)
        for left in folder.glob(f"build-{key}-*"):  # of a process that was killed: the lock is ours
            _remove(left)
        with tempfile.TemporaryDirectory(dir=folder, prefix=f"build-{key}-") as work:
            return _commit(build(Path(work)), folder, key), True


def find(folder: Path, key: str) -> Path | None:
    """The library of `key` if it is there, whole; reads all of it."""
    return next((path for path in sorted(folder.glob(f"{key}.*.so")) if path.name == f"{key}.{_digest(path)}.so"), None)


def _digest(path: Path) -> str | None:
    """None for what cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _commit(made: Path, folder: Path, key: str) -> Path:
    """Others see the file whole or not at all, after a power cut, too."""
    with open(made, "rb+") as file:
        name = f"{key}.{hashlib.file_digest(file, 'sha256').hexdigest()}.so"
        os.fsync(file.fileno())
    made.replace(folder / name)
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
    return folder / name


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
