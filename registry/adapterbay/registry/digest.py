"""Digests and canonical JSON: one spelling of every value, so that equal content has an equal digest anywhere."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from adapterbay.registry.errors import Rejected

CHUNK_BYTES = 1024 * 1024
"""Small enough to stay in a core's cache between reading, hashing and writing."""
DIGEST_PATTERN = re.compile(r"sha256:[0-9a-f]{64}")
MAX_JSON_DEPTH = 100
"""Deeper documents could be read and then not be written."""
MAX_JSON_DIGITS = 400
"""The time that Python takes for a whole number grows with the square of its digits."""


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys, no whitespace, no NaN and no Infinity (ValueError for those)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def digest_bytes(data: bytes) -> str:
    """`sha256:` and 64 hex digits."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def digest_json(value: Any) -> str:
    """The digest of the canonical JSON of `value`."""
    return digest_bytes(canonical_json(value))


def digest_file(path: Path) -> str:
    """The digest of a file's bytes, read in chunks."""
    with path.open("rb") as file:
        return digest_stream(file, None)


def digest_stream(file: BinaryIO, length: int | None) -> str:
    """The digest of the next `length` bytes (None: to the end). EOFError if the file ends before."""
    hasher = hashlib.sha256()
    left = length
    buffer = memoryview(bytearray(CHUNK_BYTES if length is None else min(CHUNK_BYTES, length)))
    while left is None or left > 0:
        count = _read_into(file, buffer if left is None else buffer[: min(CHUNK_BYTES, left)])
        if not count:
            if left is None:
                break
            raise EOFError(f"{left} bytes are missing")
        hasher.update(buffer[:count])
        if left is not None:
            left -= count
    return f"sha256:{hasher.hexdigest()}"


def copy_and_digest(source: BinaryIO, target: BinaryIO) -> tuple[str, int]:
    """Copies to the end of `source` and reads it once. Returns the digest of what was copied, and how many bytes."""
    hasher = hashlib.sha256()
    size = 0
    buffer = memoryview(bytearray(CHUNK_BYTES))
    while count := _read_into(source, buffer):
        hasher.update(buffer[:count])
        target.write(buffer[:count])
        size += count
    return f"sha256:{hasher.hexdigest()}", size


def _read_into(file: BinaryIO, buffer: memoryview) -> int:
    return int(file.readinto(buffer))  # type: ignore[attr-defined]  # every binary file has it, BinaryIO does not say so


def is_digest(text: str) -> bool:
    """Whether `text` is written as a digest."""
    return DIGEST_PATTERN.fullmatch(text) is not None


def parse_json(data: bytes, what: str, *, max_values: int | None = None) -> Any:
    """Strict JSON: UTF-8 without a byte order mark, no duplicate keys, finite numbers only, at most 100 deep.

    `what` names the document in messages. `max_values` bounds the memory that a stranger's document can take: as
    many commas, and as many brackets, may be in it. Raises Rejected with reason BAD_JSON or TOO_LARGE.
    """

    def refuse(detail: str) -> NoReturn:
        raise Rejected(f"{what} is not usable JSON: {detail}.", reason="BAD_JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            refuse(f"the key {twice[:100]!r} is there twice")
        return found

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            refuse(f"{text[:40]} is not a finite number")
        return value

    def whole(text: str) -> int:
        if len(text) > MAX_JSON_DIGITS:
            refuse(f"a number has {len(text)} digits")
        if text == "-0":
            refuse("-0 is not a whole number")  # for Python it is 0, for others -0.0
        return int(text)

    if data.startswith(b"\xef\xbb\xbf"):
        refuse("it begins with a byte order mark, which PEFT does not read; save it as UTF-8 without one")
    brackets = data.count(b"[") + data.count(b"{")
    if max_values is not None and max(brackets, data.count(b",")) > max_values:
        raise Rejected(f"{what} holds more than {max_values} values.", reason="TOO_LARGE")
    try:
        # Escapes can spell lone surrogates, which parse, but cannot be written.
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=unique,
            parse_float=finite,
            parse_int=whole,
            parse_constant=lambda word: refuse(f"{word} is not a JSON number"),
        )
        if brackets > MAX_JSON_DEPTH and _is_deep(value):
            refuse(f"it is nested more than {MAX_JSON_DEPTH} deep")
        if b"\\u" in data:
            canonical_json(value)
    except (ValueError, RecursionError) as error:
        refuse(str(error) if isinstance(error, ValueError) else "it is nested too deeply")
    return value


def _is_deep(value: Any) -> bool:
    level: list[Any] = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_JSON_DEPTH):
        level = [
            item
            for inner in level
            for item in (inner.values() if isinstance(inner, dict) else inner)
            if item.__class__ is dict or item.__class__ is list
        ]
        if not level:
            return False
    return True


def parse_json_object(data: bytes, what: str, *, max_values: int | None = None) -> dict[str, Any]:
    """Like `parse_json`, and the document must be an object."""
    value = parse_json(data, what, max_values=max_values)
    if not isinstance(value, dict):
        raise Rejected(f"{what} must hold a JSON object, not {type(value).__name__}.", reason="BAD_JSON")
    return value
