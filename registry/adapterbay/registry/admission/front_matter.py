"""The few lines of a model card's front matter that say what an adapter was trained on.

Not YAML: only `key: value`, `key: [a, b]` and `key:` with `- item` lines below it, for four keys. What is written in
another way is passed over, so that no anchor, tag or nesting of a stranger is ever resolved.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

MAX_FRONT_MATTER: Final = 64 * 1024
MAX_ITEMS: Final = 50

_BLOCK = re.compile(r"\s{0,100}---[ \t]{0,10}\r?\n(?P<lines>.*?)\r?\n---[ \t]{0,10}(\r?\n|$)", re.DOTALL)
_KEY = re.compile(r"(?P<key>[A-Za-z_]{1,40}):(?P<value>.*)")
_ITEM = re.compile(r" {0,8}- (?P<value>.*)")

_VALUES: Final = {
    "base_model": re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}"),
    "datasets": re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?"),
    "license": re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}"),
    "language": re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8}){0,3}|code|multilingual"),
}
_BOILERPLATE: Final = frozenset(
    {
        "arrow",
        "csv",
        "generator",
        "imagefolder",
        "json",
        "none",
        "null",
        "other",
        "pandas",
        "parquet",
        "text",
        "unknown",
    }
)
"""What the Trainer writes for data without a name, and for a licence that nobody chose."""


def front_matter(card: bytes) -> dict[str, list[str]]:
    """`base_model`, `datasets`, `license` and `language` as far as they are there and say something."""
    block = _BLOCK.match(card[:MAX_FRONT_MATTER].decode("utf-8", errors="replace").removeprefix("\ufeff"))
    found: dict[str, list[str]] = {}
    for key, value in _pairs(block["lines"].splitlines() if block else []):
        pattern = _VALUES.get(key)
        if pattern is None or pattern.fullmatch(value) is None or value.lower() in _BOILERPLATE:
            continue
        items = found.setdefault(key, [])
        if value not in items and len(items) < MAX_ITEMS:
            items.append(value)
    return found


def _pairs(lines: list[str]) -> Iterator[tuple[str, str]]:
    key = ""
    for line in lines:
        if match := _KEY.fullmatch(line):
            key, value = match["key"], match["value"].strip()
            listed = value[1:-1].split(",") if value.startswith("[") and value.endswith("]") else [value]
            yield from ((key, _unquoted(item)) for item in listed)
        elif match := _ITEM.fullmatch(line):
            yield key, _unquoted(match["value"])
        elif line.strip() and not line.startswith("#"):
            key = ""


def _unquoted(text: str) -> str:
    text = text.partition(" #")[0].strip()
    quoted = len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]
    return text[1:-1] if quoted else text
