"""Files that survive a crash: temporary file, fsync, rename, fsync of the folder. And what a full disk is called."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from adapterbay.registry.errors import StorageFull, Unavailable

READ_ONLY = 0o444


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Makes the bytes of `path` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folders(folder: Path, below: Path) -> None:
    """Makes `folder` and its parents, durably, as far as they lie below the existing folder `below`."""
    missing = []
    place = folder
    while place != below and not place.is_dir():
        missing.append(place)
        place = place.parent
    for place in reversed(missing):
        with contextlib.suppress(FileExistsError):
            place.mkdir()
        sync_folder(place.parent)


def remove_empty_folders(folder: Path, below: Path) -> None:
    """Removes `folder` and its parents below `below`, as long as they are empty."""
    place = folder
    while place != below:
        try:
            place.rmdir()
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return
            raise
        place = place.parent


def write_atomic(path: Path, data: bytes, temporary: Path) -> None:
    """Writes `path` whole or not at all, by way of `temporary` on the same file system."""
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    rename(temporary, path)


def rename(source: Path, destination: Path) -> None:
    """Renames a synced file over `destination`, durably."""
    source.replace(destination)
    sync_folder(destination.parent)


def append(path: Path, data: bytes) -> None:
    """Appends to a file, durably. A crash can leave a part of `data` at its end."""
    new = not path.exists()
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if new:
        sync_folder(path.parent)


@contextlib.contextmanager
def storage_errors(place: Path) -> Iterator[None]:
    """A full disk or quota becomes StorageFull, a place that cannot be written Unavailable."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(
                f"No space left for the registry at {place}; nothing was kept of this write. Free some and try again."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise Unavailable(
                f"The registry at {place} cannot be written: {error.strerror}. Check its owner and its mount."
            ) from error
        raise
