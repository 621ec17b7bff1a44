"""Bearer tokens: who may read and who may write. The file holds the sha256 of each token, never the token.

    {"schema_version": 1, "tokens": [{"name": "ci", "scope": "write", "only": "team/", "sha256": …, "created_at": …}]}

The file is replaced whole, with mode 0600, and read again whenever it changed: a revoked token is refused at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import os
import secrets
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, cast, get_args

from adapterbay.registry import durable
from adapterbay.registry.digest import canonical_json, parse_json_object
from adapterbay.registry.errors import InvalidArgument, InvalidReference, NotFound, Rejected, Unavailable
from adapterbay.registry.nearest import nearest_words
from adapterbay.registry.reference import check_name

Scope = Literal["read", "write"]

SCHEMA_VERSION: Final = 1
PREFIX: Final = "abt_"
MODE: Final = 0o600


@dataclass(frozen=True, slots=True)
class Token:
    """A token as it is stored. `only`: good for this name and what is below it; None: all. `created_at` is RFC 3339."""

    name: str
    scope: Scope
    only: str | None
    sha256: str
    created_at: str


class TokenFile:
    """The tokens of one server; used by any number of threads and processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._seen: tuple[int, int, int] | None = None
        self._tokens: tuple[Token, ...] = ()

    def tokens(self) -> tuple[Token, ...]:
        """All tokens, by name. Raises Unavailable if the file is not readable as tokens."""
        with self._lock:
            try:
                status = self.path.stat()
            except FileNotFoundError:
                self._seen, self._tokens = None, ()
                return ()
            seen = (status.st_ino, status.st_mtime_ns, status.st_size)
            if seen != self._seen:
                self._tokens = _parse(self.path)
                self._seen = seen
            return self._tokens

    def find(self, presented: str) -> Token | None:
        """The token with this text. Every stored one is compared, each in constant time."""
        digest = hashlib.sha256(presented.encode("utf-8", "surrogateescape")).hexdigest()
        found = None
        for token in self.tokens():
            if hmac.compare_digest(token.sha256, digest):
                found = token
        return found

    def named(self, name: str) -> Token | None:
        """The token of this name."""
        return next((token for token in self.tokens() if token.name == name), None)

    def create(self, name: str, scope: str, only: str | None = None) -> tuple[Token, str]:
        """Adds a token. Returns it and its text, which is kept nowhere. Raises InvalidArgument."""
        _check_token_name(name)
        if scope not in get_args(Scope):
            raise InvalidArgument(
                f"The scope {scope[:40]!r} is not one of {', '.join(get_args(Scope))}.", field="scope"
            )
        if only is not None:
            check_name(only.removesuffix("/"))
        text = PREFIX + secrets.token_urlsafe(32)
        digest = hashlib.sha256(text.encode()).hexdigest()
        token = Token(name, cast(Scope, scope), only, digest, datetime.now(UTC).isoformat(timespec="seconds"))
        with self._changing() as tokens:
            if any(each.name == name for each in tokens):
                raise InvalidArgument(
                    f"There is a token named {name}: revoke it first, or choose another name.", field="name"
                )
            tokens.append(token)
        return token, text

    def revoke(self, name: str) -> Token:
        """Removes a token; it is refused from now on. Raises NotFound."""
        with self._changing() as tokens:
            for token in tokens:
                if token.name == name:
                    tokens.remove(token)
                    return token
            raise NotFound(
                f"There is no token named {name}.", near=nearest_words(name, [token.name for token in tokens])
            )

    @contextlib.contextmanager
    def _changing(self) -> Iterator[list[Token]]:
        with durable.storage_errors(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path.with_name(f"{self.path.name}.lock"), os.O_RDWR | os.O_CREAT, MODE)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                tokens = list(self.tokens())
                yield tokens
                self._write(sorted(tokens, key=lambda token: token.name))
            finally:
                os.close(handle)

    def _write(self, tokens: list[Token]) -> None:
        document = {"schema_version": SCHEMA_VERSION, "tokens": [asdict(token) for token in tokens]}
        temporary = self.path.with_name(f".{self.path.name}-{secrets.token_hex(4)}")
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, MODE)
            with os.fdopen(handle, "wb") as file:
                file.write(canonical_json(document) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            durable.rename(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)


def _parse(path: Path) -> tuple[Token, ...]:
    try:
        document = parse_json_object(path.read_bytes(), str(path))
        if document.get("schema_version") != SCHEMA_VERSION:
            raise TypeError(f"schema_version {document.get('schema_version')!r}")
        return tuple(_token(entry) for entry in document["tokens"])
    except (OSError, Rejected, TypeError, KeyError) as error:
        raise Unavailable(f"The tokens in {path} are not readable: {error}. Restore the file.") from error


def _token(entry: dict[str, Any]) -> Token:
    token = Token(**entry)
    texts = (token.name, token.sha256, token.created_at)
    if token.scope not in get_args(Scope) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"the token {token.name!r} is not valid")
    return token


def _check_token_name(name: str) -> None:
    try:
        check_name(name)
    except InvalidReference as error:
        raise InvalidArgument(f"{name[:80]!r} does not name a token: {error.message}", field="name") from error
    if "/" in name:
        raise InvalidArgument(f"{name!r} does not name a token: '/' cannot be in it.", field="name")
