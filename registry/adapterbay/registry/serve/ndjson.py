"""The body of a commit, parsed while it streams: one JSON object a line, files as base64 inside.

    {"key": "header", "value": {"summary": …, "description": …, "parentCommit": …}}       first, and once
    {"key": "file", "value": {"content": base64, "path": …, "encoding": "base64"}}
    {"key": "lfsFile", "value": {"path": …, "algo": "sha256", "oid": 64 hex, "size": …}}
    {"key": "deletedFile" or "deletedFolder", "value": {"path": …}}

The value of `content` never lies in memory whole: it is decoded piece by piece into a sink. What is left of a line is
small, and parsed as strict JSON. Knows nothing about adapters.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from adapterbay.registry.digest import parse_json_object
from adapterbay.registry.errors import Rejected
from adapterbay.registry.serve.settings import Sizes

_OID = re.compile(r"[0-9a-f]{64}")
_STRUCTURE = re.compile(rb'["{}\[\]\n]')
_STRING_END = re.compile(rb'["\\\n]')


class Sink(Protocol):
    """Where the bytes of one file go. `abandon` may come after `close`, too."""

    def write(self, data: bytes) -> None:
        """Takes the next bytes."""

    def close(self) -> Any:
        """All bytes were written. Returns what stands for the file from here on."""

    def abandon(self) -> None:
        """No more bytes come."""


@dataclass(frozen=True, slots=True)
class Header:
    """What the commit says of itself. `parent` is the commit it was made on, if the client insists on it."""

    title: str
    message: str
    parent: str | None


@dataclass(frozen=True, slots=True)
class AddFile:
    """A file that came inside; `content` is what the sink gave back."""

    path: str
    content: Any


@dataclass(frozen=True, slots=True)
class AddLarge:
    """A file that was uploaded before, by its digest. `size` None: the client did not say."""

    path: str
    digest: str
    size: int | None


@dataclass(frozen=True, slots=True)
class Delete:
    """A file to remove, or a folder with everything in it."""

    path: str
    folder: bool


Operation = AddFile | AddLarge | Delete


@dataclass(slots=True)
class CommitParser:
    """Feed it the body, then `finish`. Raises Rejected: BAD_JSON, BAD_COMMIT or TOO_LARGE, naming the line."""

    open_sink: Callable[[], Sink]
    sizes: Sizes
    header: Header | None = None
    operations: list[Operation] = field(default_factory=list)
    _line: bytearray = field(default_factory=bytearray)  # the line without the content
    _number: int = 1
    _depth: int = 0
    _text_from: int | None = None  # where the string that is open now begins in `_line`
    _escaped: bool = False  # the next character of the string is escaped
    _key: bytes | None = None  # the last whole string at depth 2, if nothing but a colon came after it
    _sink: Sink | None = None
    _content: Any = None
    _base64: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> None:
        """The next piece of the body."""
        position = 0
        while position < len(data):
            if self._sink is not None:
                position = self._feed_content(data, position)
            elif self._text_from is not None:
                position = self._feed_string(data, position)
            else:
                position = self._feed_structure(data, position)

    def finish(self) -> tuple[Header, list[Operation]]:
        """The whole commit. The last line may lack its end."""
        if self._sink is not None or self._text_from is not None or self._depth:
            raise self._refuse("the body ends inside it")
        if self._line.strip():
            self._end_line()
        if self.header is None:
            raise Rejected("The commit has no header line.", reason="BAD_COMMIT")
        return self.header, self.operations

    def abandon(self) -> None:
        """No more of the body comes; closes what is open."""
        if self._sink is not None:
            self._sink.abandon()

    def _feed_structure(self, data: bytes, position: int) -> int:
        found = _STRUCTURE.search(data, position)
        end = found.start() if found else len(data)
        between = data[position:end]
        self._take(between)
        if between.strip() not in (b"", b":"):
            self._key = None
        if found is None:
            return len(data)
        mark = found.group()
        if mark == b"\n":
            self._end_line()
            return found.end()
        self._take(mark)
        if mark == b'"':
            self._text_from = len(self._line)
            if self._depth == 2 and self._key == b"content" and bytes(self._line).rstrip(b'" \t\r').endswith(b":"):
                self._sink = self.open_sink()
                self._text_from = None
        else:
            self._depth += 1 if mark in b"{[" else -1
            self._key = None
        return found.end()

    def _feed_string(self, data: bytes, position: int) -> int:
        assert self._text_from is not None
        if self._escaped:
            self._take(data[position : position + 1])  # whatever it is
            self._escaped = False
            return position + 1
        found = _STRING_END.search(data, position)
        if found is None:
            self._take(data[position:])
            return len(data)
        self._take(data[position : found.end()])
        if found.group() == b'"':
            self._key = bytes(self._line[self._text_from : -1]) if self._depth == 2 else None
            self._text_from = None
        elif found.group() == b"\n":
            raise self._refuse("the line ends inside a string", "BAD_JSON")
        else:
            self._escaped = True
        return found.end()

    def _feed_content(self, data: bytes, position: int) -> int:
        assert self._sink is not None
        end = data.find(b'"', position)
        piece = data[position:] if end < 0 else data[position:end]
        self._base64 += piece.replace(b"\\/", b"/") if b"\\" in piece else piece
        if end < 0:
            whole = len(self._base64) // 4 * 4
            # The last group stays until it is known whether it is the end, where padding may stand.
            self._decode(max(0, whole - 4), last=False)
            return len(data)
        self._decode(len(self._base64), last=True)
        if self._content is not None:
            raise self._refuse("it has two contents")
        self._content = self._sink.close()
        self._sink = None
        self._key = None
        self._take(b'"')
        return end + 1

    def _decode(self, count: int, *, last: bool) -> None:
        assert self._sink is not None
        encoded = bytes(self._base64[:count])
        del self._base64[:count]
        try:
            if not last and b"=" in encoded:
                raise binascii.Error("padding before the end")
            self._sink.write(binascii.a2b_base64(encoded, strict_mode=True))
        except binascii.Error as error:
            raise self._refuse(f"the content is not base64: {error}") from error

    def _take(self, piece: bytes) -> None:
        self._line += piece
        if len(self._line) > self.sizes.line_bytes:
            raise self._refuse(f"without its content it has over {self.sizes.line_bytes} bytes", "TOO_LARGE")

    def _end_line(self) -> None:
        line, content = bytes(self._line), self._content
        self._line.clear()
        self._content, self._depth, self._key = None, 0, None
        if line.strip():
            self._read(parse_json_object(line, f"Line {self._number} of the commit"), content)
        self._number += 1

    def _read(self, document: dict[str, Any], content: Any) -> None:
        key, value = document.get("key"), document.get("value")
        if not isinstance(value, dict) or set(document) != {"key", "value"}:
            raise self._refuse("it is no object with a key and a value")
        if content is not None and key != "file":
            raise self._refuse(f"a {key!r} has no content")
        if (self.header is None) != (key == "header"):
            raise self._refuse("the header comes first, and once")
        if key == "header":
            self.header = Header(
                self._text(value, "summary"),
                self._text(value, "description", required=False),
                self._text(value, "parentCommit", required=False) or None,
            )
            return
        if len(self.operations) == self.sizes.files:
            raise self._refuse(f"a commit may have {self.sizes.files} operations", "TOO_LARGE")
        self.operations.append(self._operation(key, value, content))

    def _operation(self, key: Any, value: dict[str, Any], content: Any) -> Operation:
        path = self._text(value, "path")
        if key == "file":
            if content is None or value.get("encoding") != "base64":
                raise self._refuse(f"the file {path[:200]!r} has no base64 content")
            return AddFile(path, content)
        if key == "lfsFile":
            oid, size = self._text(value, "oid"), value.get("size")
            if value.get("algo") != "sha256" or _OID.fullmatch(oid) is None:
                raise self._refuse(f"the large file {path[:200]!r} is not named by its sha256")
            if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 0):
                raise self._refuse(f"the size of the large file {path[:200]!r} is not a number of bytes")
            return AddLarge(path, f"sha256:{oid}", size)
        if key in ("deletedFile", "deletedFolder"):
            return Delete(path, key == "deletedFolder")
        raise self._refuse(f"{str(key)[:60]!r} is no operation of a commit")

    def _text(self, value: dict[str, Any], name: str, *, required: bool = True) -> str:
        text = value.get(name)
        if text is None and not required:
            return ""
        if not isinstance(text, str):
            raise self._refuse(f"its {name} is missing or not text")
        return text

    def _refuse(self, what: str, reason: str = "BAD_COMMIT") -> Rejected:
        return Rejected(f"Line {self._number} of the commit was refused: {what}.", reason=reason)
