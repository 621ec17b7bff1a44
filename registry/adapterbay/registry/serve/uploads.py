"""Bytes on their way in: written to a staging folder as they come, counted and hashed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from adapterbay.registry.errors import Rejected
from adapterbay.registry.local.blobs import Staging


@dataclass(frozen=True, slots=True)
class Uploaded:
    """A file that came whole. `path` is in the staging folder; `prefix` are its first bytes."""

    path: Path
    digest: str
    size: int
    prefix: bytes


@dataclass(slots=True)
class Allowance:
    """How many bytes may still come, over several files."""

    left: int
    limit: int

    def take(self, count: int, what: str) -> None:
        """Uses some of it up. Raises Rejected with reason TOO_LARGE."""
        self.left -= count
        if self.left < 0:
            raise Rejected(f"{what} has over {self.limit} bytes.", reason="TOO_LARGE")


class FileSink:
    """One file, written as it comes. Not durable until it is staged."""

    def __init__(self, staging: Staging, own: Allowance, shared: Allowance | None = None) -> None:
        self._path = staging.temporary()
        self._file = self._path.open("xb")
        self._hasher = hashlib.sha256()
        self._own = own
        self._shared = shared
        self._size = 0
        self._prefix = b""

    def write(self, data: bytes) -> None:
        """The next bytes. Raises Rejected with reason TOO_LARGE."""
        self._own.take(len(data), "The file")
        if self._shared is not None:
            self._shared.take(len(data), "The commit, all files together,")
        if len(self._prefix) < 16:
            self._prefix = (self._prefix + data[:16])[:16]
        self._size += len(data)
        self._hasher.update(data)
        self._file.write(data)

    def close(self) -> Uploaded:
        """All bytes came."""
        self._file.close()
        return Uploaded(self._path, f"sha256:{self._hasher.hexdigest()}", self._size, self._prefix)

    def abandon(self) -> None:
        """No more bytes come; the staging folder removes what came."""
        self._file.close()
