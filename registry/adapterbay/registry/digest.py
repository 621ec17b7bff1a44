"""Digests and canonical JSON: one spelling of every value, so that equal content has an equal digest anywhere."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from adapterbay.registry.errors import Rejected

CHUNK_BYTES = 4 * 1024 * 1024
DIGEST_PATTERN = re.compile(r"sha256:[0-9a-f]{64}")


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
    while left is None or left > 0:
        chunk = file.read(CHUNK_BYTES if left is None else min(CHUNK_BYTES, left))
        if not chunk:
            if left is None:
                break
            raise EOFError(f"{left} bytes are missing")
        hasher.update(chunk)
        if left is not None:
            left -= len(chunk)
    return f"sha256:{hasher.hexdigest()}"


def is_digest(text: str) -> bool:
    """Whether `text` is written as a digest."""
    return DIGEST_PATTERN.fullmatch(text) is not None


def parse_json(data: bytes, what: str) -> Any:
    """Strict JSON: UTF-8, no duplicate keys, finite numbers only.

    `what` names the document in the message. Raises Rejected with reason BAD_JSON.
    """

    def refuse(detail: str) -> NoReturn:
        raise Rejected(f"{what} is not usable JSON: {detail}.", reason="BAD_JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            refuse(f"the key {twice!r} is there twice")
        return found

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            refuse(f"{text[:40]} is not a finite number")
        return value

    try:
        text = data.decode("utf-8-sig")
        value = json.loads(
            text,
            object_pairs_hook=unique,
            parse_float=finite,
            parse_constant=lambda word: refuse(f"{word} is not a JSON number"),
        )
        canonical_json(value)  # lone surrogates parse, but cannot be written
    except (ValueError, RecursionError) as error:
        refuse(str(error) if isinstance(error, ValueError) else "it is nested too deeply")
    return value


def parse_json_object(data: bytes, what: str) -> dict[str, Any]:
    """Like `parse_json`, and the document must be an object."""
    value = parse_json(data, what)
    if not isinstance(value, dict):
        raise Rejected(f"{what} must hold a JSON object, not {type(value).__name__}.", reason="BAD_JSON")
    return value
