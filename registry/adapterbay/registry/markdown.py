"""Text of strangers inside Markdown: labels, settings and names must neither break a table nor become HTML."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, Final

MAX_TEXT: Final = 200
"""Characters of one value; what is longer is cut, with an ellipsis."""

# What begins HTML, an entity, code, mathematics or a cell; an underscore between letters or digits is one.
_SPECIAL = re.compile(r"[&<>`$\\{}|*\[\]~#!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_BACKSLASHED: Final = frozenset("*_[]~#!")
_PLAIN_CODE = re.compile(r"[\w .,:;@/+=()-]+")
_HIDDEN: Final = frozenset({"Cc", "Zl", "Zp", "Cs"})
_DIRECTIONS: Final = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_PRIVATE_PATH = re.compile(
    r"(?P<scheme>folder:|gguf:|file:/{0,2})?(?P<path>(?:/|~|\.{1,2}/|[A-Za-z]:[\\/]).*)", re.DOTALL
)


def plain_text(value: Any, limit: int = MAX_TEXT) -> str:
    """`value` on one line: no control characters, no marks that turn the reading direction, at most `limit` long."""
    text = "".join(" " if unicodedata.category(sign) in _HIDDEN else sign for sign in str(value)[: 4 * limit])
    text = " ".join("".join("\ufffd" if sign in _DIRECTIONS else sign for sign in text).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def escaped(value: Any, limit: int = MAX_TEXT) -> str:
    """`value` as Markdown that shows it literally, in a table as well (CommonMark 0.31, sections 2.4 and 2.5)."""
    return _SPECIAL.sub(_escape, plain_text(value, limit))


def _escape(match: re.Match[str]) -> str:
    return f"\\{match[0]}" if match[0] in _BACKSLASHED else f"&#{ord(match[0])};"


def code(value: Any, limit: int = MAX_TEXT) -> str:
    """`value` in the typeface of code: by a tag where it needs escaping, which backticks do not allow."""
    text = plain_text(value, limit)
    return f"`{text}`" if _PLAIN_CODE.fullmatch(text) else f"<code>{escaped(text, limit)}</code>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; the cells are Markdown already."""
    return [
        f"| {' | '.join(header)} |",
        "|" + "---|" * len(header),
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def without_private_path(text: str) -> str:
    """A path of somebody's machine cut to its last part: `folder:/home/me/base` becomes `folder:…/base`."""
    match = _PRIVATE_PATH.fullmatch(text)
    if match is None:
        return text
    parts = [part for part in re.split(r"[\\/]+", match["path"]) if part]
    return f"{match['scheme'] or ''}…/{parts[-1] if parts else ''}"
