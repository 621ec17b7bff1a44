"""The streamed parser of commits against a naive one, in pieces of any size, and against noise."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from hostile_tools import fuzz
from hypothesis import given
from hypothesis import strategies as st

from adapterbay.registry.errors import Rejected
from adapterbay.registry.serve.ndjson import AddFile, AddLarge, CommitParser, Delete, Header, Operation
from adapterbay.registry.serve.settings import Sizes

SIZES = Sizes(regular_bytes=10_000, commit_bytes=50_000, line_bytes=4_000, files=50)


@dataclass
class Memory:
    """A sink that remembers how many bytes came at once."""

    data: bytearray = field(default_factory=bytearray)
    largest: int = 0

    def write(self, data: bytes) -> None:
        self.data += data
        self.largest = max(self.largest, len(data))
        if len(self.data) > SIZES.regular_bytes:
            raise Rejected("too large", reason="TOO_LARGE")

    def close(self) -> bytes:
        return bytes(self.data)

    def abandon(self) -> None:
        pass


def parse(pieces: list[bytes]) -> tuple[Header, list[Operation]]:
    parser = CommitParser(Memory, SIZES)
    for piece in pieces:
        parser.feed(piece)
    return parser.finish()


def cut(body: bytes, sizes: list[int]) -> list[bytes]:
    pieces, position = [], 0
    for size in sizes:
        pieces.append(body[position : position + size])
        position += size
    return [*pieces, body[position:]]


def naive(body: bytes) -> tuple[Header, list[Operation]]:
    """The whole body in memory, line by line."""
    first, *rest = [json.loads(line) for line in body.split(b"\n") if line.strip()]
    value = first["value"]
    header = Header(value["summary"], value.get("description") or "", value.get("parentCommit"))
    operations: list[Operation] = []
    for document in rest:
        value = document["value"]
        if document["key"] == "file":
            operations.append(AddFile(value["path"], base64.b64decode(value["content"])))
        elif document["key"] == "lfsFile":
            operations.append(AddLarge(value["path"], f"sha256:{value['oid']}", value.get("size")))
        else:
            operations.append(Delete(value["path"], document["key"] == "deletedFolder"))
    return header, operations


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(
    ['"', "\\", '\\"', '{"content": "', "content", '":"', "\n", "é😀", "}\n{"]
)
FILE = st.builds(
    lambda path, data: {
        "key": "file",
        "value": {"content": base64.b64encode(data).decode(), "path": path, "encoding": "base64"},
    },
    TEXT,
    st.binary(max_size=300),
)
LARGE = st.builds(
    lambda path, oid, size: {
        "key": "lfsFile",
        "value": {"path": path, "algo": "sha256", "oid": oid, **({} if size is None else {"size": size})},
    },
    TEXT,
    st.text("0123456789abcdef", min_size=64, max_size=64),
    st.none() | st.integers(0, 2**40),
)
DELETE = st.builds(
    lambda key, path: {"key": key, "value": {"path": path}}, st.sampled_from(["deletedFile", "deletedFolder"]), TEXT
)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Commits as JSON can write them: keys in any order, any spacing, escaped or not, empty lines between."""
    header: dict[str, Any] = {"summary": draw(TEXT), "description": draw(TEXT)}
    if draw(st.booleans()):
        header["parentCommit"] = "a" * 40
    documents = [{"key": "header", "value": header}, *draw(st.lists(FILE | LARGE | DELETE, max_size=6))]
    lines = []
    for document in documents:
        shuffled = {
            key: dict(draw(st.permutations(list(value.items())))) if isinstance(value, dict) else value
            for key, value in draw(st.permutations(list(document.items())))
        }
        separators = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\t", " : ")]))
        line = json.dumps(shuffled, ensure_ascii=draw(st.booleans()), separators=separators)
        if draw(st.booleans()):
            line = line.replace("/", "\\/")
        lines.append(line.encode() + draw(st.sampled_from([b"", b"\r", b" ", b"\n"])))
    return b"\n".join(lines) + draw(st.sampled_from([b"", b"\n", b"\n\n"]))


@given(bodies(), st.lists(st.integers(0, 50), max_size=200))
@fuzz(400)
def test_the_same_as_a_naive_parser(body: bytes, sizes: list[int]) -> None:
    assert parse(cut(body, sizes)) == naive(body)


@given(bodies(), st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=3)), min_size=1, max_size=5))
@fuzz(400)
def test_damage_is_refused_or_harmless(body: bytes, damage: list[tuple[int, bytes]]) -> None:
    """What still parses is what strict JSON makes of it; anything else is Rejected, and nothing else is raised."""
    data = bytearray(body)
    for place, noise in damage:
        position = place % (len(data) + 1)
        data[position : position + len(noise)] = noise
    try:
        found = parse([bytes(data)])
    except Rejected:
        return
    assert found == naive(bytes(data))


@given(st.binary(max_size=500), st.lists(st.integers(0, 20), max_size=30))
@fuzz(300)
def test_noise_is_refused(noise: bytes, sizes: list[int]) -> None:
    with pytest.raises(Rejected):
        parse(cut(noise, sizes))


def test_a_content_is_never_in_memory_whole() -> None:
    data = bytes(range(256)) * 30
    line = {"key": "file", "value": {"content": base64.b64encode(data).decode(), "path": "a", "encoding": "base64"}}
    body = b'{"key": "header", "value": {"summary": "x"}}\n' + json.dumps(line).encode()
    sinks: list[Memory] = []

    def sink() -> Memory:
        sinks.append(Memory())
        return sinks[-1]

    parser = CommitParser(sink, SIZES)
    for start in range(0, len(body), 100):
        parser.feed(body[start : start + 100])
        assert len(parser._line) + len(parser._base64) < 300
    _, (operation,) = parser.finish()
    assert operation == AddFile("a", data)
    assert sinks[0].largest <= 100


@pytest.mark.parametrize("body", [b"\\" * 10_000, b'"' + b"\\" * 3000, b"{" * 3000, b'{"key": "' + b"x" * 5000])
def test_long_nonsense_is_refused_soon(body: bytes) -> None:
    with pytest.raises(Rejected):
        parse([body])


def test_limits() -> None:
    header = b'{"key": "header", "value": {"summary": "x"}}\n'
    with pytest.raises(Rejected, match="Line 2 of the commit was refused: without its content it has over 4000 bytes"):
        parse([header + b'{"key": "deletedFile", "value": {"path": "' + b"x" * 4000 + b'"}}'])
    with pytest.raises(Rejected, match="a commit may have 50 operations"):
        parse([header + b'{"key": "deletedFile", "value": {"path": "x"}}\n' * 51])
