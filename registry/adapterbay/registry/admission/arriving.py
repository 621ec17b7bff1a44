"""A checkpoint that another thread still reads. Most of admission needs its header alone: it goes on meanwhile."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from adapterbay.registry.errors import Corrupted

K = TypeVar("K", bound=Path | bytes)

AT_LEAST: Final = 1 << 16
"""Bytes of the beginning that are read at once: most headers."""


class Arriving:
    """A file of `size` bytes; `read` gives its first so many bytes, or all of them for None.

    One thread looks at its beginning; any number may want the whole, which who comes first reads. Both raise what
    `read` raises; `whole` also raises Corrupted if it does not begin with what was seen before.
    """

    def __init__(self, what: str, size: int, read: Callable[[int | None], bytes]) -> None:
        """`what` names the file in messages."""
        self.what = what
        self.size = size
        self._read = read
        self._lock = threading.Lock()
        self._seen = b""
        self._whole: bytes | None = None

    def beginning(self, count: int) -> bytes:
        """The first `count` bytes, or as many as there are, without waiting for the rest."""
        if self._whole is not None:
            return self._whole[:count]
        if len(self._seen) < min(count, self.size):
            self._seen = self._read(max(count, AT_LEAST))
        return self._seen[:count]

    def whole(self) -> bytes:
        """All of it."""
        with self._lock:
            if self._whole is None:
                self._whole = self._read(None)
        if not self._whole.startswith(self._seen):
            raise Corrupted(f"{self.what} was altered while it was read.")
        return self._whole

    def open(self) -> Beginning:
        """A stream for whoever reads the beginning only; reading far into the file would read it again and again."""
        return Beginning(self)


class Beginning(io.RawIOBase):
    """See `Arriving.open`."""

    def __init__(self, source: Arriving) -> None:
        self._source = source
        self._at = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """The place of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to a place."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._source.size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer from here on. Returns how many bytes there were."""
        data = self._source.beginning(self._at + len(buffer))[self._at :]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def whole_of(file: K | Arriving) -> K | bytes:
    """A file that can be read anywhere: of one that still arrives its bytes, once they are there."""
    return file.whole() if isinstance(file, Arriving) else file
