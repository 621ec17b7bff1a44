"""Content-addressed blobs: `blobs/sha256/ab/<hex>`, written once, read-only, found by their digest.

A push first stages its files in a folder of its own under `tmp/`. Placing them, under the index's write lock, only
renames.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

from adapterbay.registry import durable
from adapterbay.registry.admission.regular_file import open_regular
from adapterbay.registry.digest import copy_and_digest, digest_bytes, digest_file, digest_stream, is_digest
from adapterbay.registry.errors import Corrupted

ABANDONED_SECONDS: Final = 24 * 3600
"""A staging folder of another machine, or of a process that cannot be asked, is dead after this time."""
MEND: Final = "Push the same files again to repair it, or restore it from a copy."


@dataclass(slots=True)
class Staged:
    """A file on its way in. `stored`: its blob was there and intact when it was staged."""

    path: Path
    digest: str
    size: int
    stored: bool


@dataclass(slots=True)
class Staging:
    """The files of one push, in a folder that goes away with it."""

    blobs: BlobStore
    folder: Path
    files: list[Staged] = field(default_factory=list)

    def add_file(self, source: Path) -> Staged:
        """Copies a regular file in; durable unless its blob is there already. Raises as `open_regular` does."""
        target = self._target()
        with open_regular(source, source.name, follow=False) as reading, target.open("wb") as writing:
            digest, _ = copy_and_digest(reading, writing)
        return self._add(target, digest)

    def add_bytes(self, data: bytes) -> Staged:
        """Stages bytes."""
        target = self._target()
        target.write_bytes(data)
        return self._add(target, digest_bytes(data))

    def adopt(self, path: Path, digest: str) -> Staged:
        """Takes a file that was written at `temporary()` without copying it. Raises Corrupted if it is not `digest`."""
        return self._add(path.rename(self._target()), digest)

    def temporary(self) -> Path:
        """A path for a file of the caller's own."""
        return self.folder / f"other-{secrets.token_hex(4)}"

    def _target(self) -> Path:
        return self.folder / f"blob-{len(self.files)}"

    def _add(self, path: Path, digest: str) -> Staged:
        size = path.stat().st_size
        stored = self.blobs.is_intact(digest, size)
        if not stored:
            durable.sync_file(path)
            if digest_file(path) != digest:
                raise Corrupted(f"{path} does not read back as it was written: check the disk.")
        path.chmod(durable.READ_ONLY)
        staged = Staged(path, digest, size, stored)
        self.files.append(staged)
        return staged


class BlobStore:
    """The blobs of one registry."""

    def __init__(self, root: Path) -> None:
        self._blobs = root / "blobs" / "sha256"
        self._staging = root / "tmp"

    def create(self) -> None:
        """Makes the folders."""
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._staging.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """Where the blob lies, whether it is there or not."""
        hexadecimal = digest.removeprefix("sha256:")
        return self._blobs / hexadecimal[:2] / hexadecimal

    def is_intact(self, digest: str, size: int) -> bool:
        """Whether the blob is there with its size and its digest. Reads it."""
        path = self.path(digest)
        try:
            return path.stat().st_size == size and digest_file(path) == digest
        except FileNotFoundError:
            return False

    def check(self, digest: str, size: int | None, what: str) -> Path:
        """The path of the blob after reading it whole. Raises Corrupted that names `what` and the digest."""
        with self._opened(digest, size, what) as file:
            actual = digest_stream(file, None)
        self._compare(actual, digest, what)
        return self.path(digest)

    def read(self, digest: str, size: int | None, what: str) -> bytes:
        """The blob's bytes, read once and then checked. Raises as `check` does."""
        data = self.read_unchecked(digest, size, what)
        self.verify(data, digest, what)
        return data

    def read_unchecked(self, digest: str, size: int | None, what: str, count: int | None = None) -> bytes:
        """What lies where the blob should, or its first `count` bytes. Raises Corrupted if it cannot be read or has
        another size."""
        with self._opened(digest, size, what) as file:
            return file.read(-1 if count is None else count)

    def verify(self, data: bytes, digest: str, what: str) -> None:
        """Raises Corrupted unless the bytes have this digest."""
        self._compare(digest_bytes(data), digest, what)

    @contextmanager
    def _opened(self, digest: str, size: int | None, what: str) -> Iterator[BinaryIO]:
        """Turns what goes wrong while the blob is read into Corrupted."""
        try:
            with self.path(digest).open("rb") as file:
                actual_size = os.fstat(file.fileno()).st_size
                if size is not None and actual_size != size:
                    raise Corrupted(
                        f"{what} has {actual_size} bytes in the registry instead of {size} ({digest}). {MEND}",
                        metadata={"digest": digest, "file": what},
                    )
                yield file
        except OSError as error:
            raise Corrupted(
                f"{what} cannot be read in the registry: {error.strerror} ({digest}). {MEND}",
                metadata={"digest": digest, "file": what},
            ) from error

    @staticmethod
    def _compare(actual: str, digest: str, what: str) -> None:
        if actual != digest:
            raise Corrupted(
                f"{what} was altered in the registry: it is {actual} now instead of {digest}. {MEND}",
                metadata={"digest": digest, "file": what},
            )

    @contextmanager
    def staging(self) -> Iterator[Staging]:
        """A staging folder, removed at the end whatever happens."""
        self._staging.mkdir(exist_ok=True)
        folder = self._staging / f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(6)}"
        folder.mkdir()
        try:
            yield Staging(self, folder)
        finally:
            shutil.rmtree(folder)

    def place(self, files: Iterable[Staged]) -> list[Staged]:
        """Moves staged files to their places; needs the write lock. Returns those that were not there before."""
        placed: list[Staged] = []
        for staged in files:
            target = self.path(staged.digest)
            if target.exists() and staged.stored:
                continue
            existed = target.exists()
            if staged.stored:  # it was there when it was staged and went away since
                durable.sync_file(staged.path)
            durable.make_folders(target.parent, self._blobs)
            durable.rename(staged.path, target)
            if not existed:
                placed.append(staged)
        return placed

    def remove(self, digest: str) -> None:
        """Removes a blob that nothing refers to; needs the write lock."""
        path = self.path(digest)
        path.unlink(missing_ok=True)
        durable.remove_empty_folders(path.parent, self._blobs)

    def all(self) -> Iterator[tuple[str, Path]]:
        """Digest and path of every blob on disk, in no order."""
        for path in self._blobs.glob("*/*"):
            digest = f"sha256:{path.name}"
            if is_digest(digest) and path.is_file():
                yield digest, path

    def sweep_staging(self) -> int:
        """Removes the staging folders of dead pushes. Returns how many."""
        removed = 0
        for folder in list(self._staging.iterdir()):
            if _is_abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)
                removed += 1
        return removed


def _is_abandoned(folder: Path) -> bool:
    host, _, rest = folder.name.rpartition("-")[0].rpartition("-")
    if host == socket.gethostname() and rest.isdigit():
        try:
            os.kill(int(rest), 0)
        except ProcessLookupError:
            return True
        except (PermissionError, OverflowError):
            pass
    try:
        return time.time() - folder.stat().st_mtime > ABANDONED_SECONDS
    except FileNotFoundError:
        return False
