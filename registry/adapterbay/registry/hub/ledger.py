"""The two documents that a repository keeps about its own history.

    adapterbay/versions.json    the ledger: which commit is which version, with its digest. The newest entry has no
                                commit, since a commit cannot hold its own SHA; the next push fills it in.
    adapterbay/aliases.jsonl    every move of an alias: one line before the tag is moved, so that movers queue up

Both change by commits whose parent is checked, so nobody overwrites what another wrote.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from adapterbay.registry.digest import canonical_json, parse_json_object
from adapterbay.registry.errors import Corrupted, Rejected
from adapterbay.registry.manifest import Digest
from adapterbay.registry.portable import FOLDER, LEDGER_PATH

SCHEMA_VERSION: Final = 1
ALIAS_LOG_PATH: Final = f"{FOLDER}/aliases.jsonl"
MAX_LEDGER_BYTES: Final = 8 * 2**20

_SHA = re.compile(r"[0-9a-f]{40}")


def is_commit(text: str) -> bool:
    """Whether `text` is the whole SHA of a commit."""
    return _SHA.fullmatch(text) is not None


def _commit(value: str) -> str:
    if not is_commit(value):
        raise ValueError("a commit is 40 hex digits")
    return value


def _time(value: str) -> str:
    if datetime.fromisoformat(value).tzinfo is None:
        raise ValueError("a time has its offset from UTC")
    return value


CommitSha = Annotated[str, AfterValidator(_commit)]


class LedgerEntry(BaseModel):
    """One version. `commit` is None for the newest."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: int = Field(ge=1, lt=10**18)
    digest: Digest
    commit: CommitSha | None


class Ledger(BaseModel):
    """The versions of a repository, the oldest first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = SCHEMA_VERSION
    versions: tuple[LedgerEntry, ...] = ()

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> Ledger:
        """Reads the ledger of the repository `name`. Raises Corrupted."""
        try:
            ledger = cls.model_validate(parse_json_object(data, f"{LEDGER_PATH} of {name}"))
        except (ValidationError, Rejected) as error:
            raise Corrupted(f"The ledger {LEDGER_PATH} of {name} is not valid: {_first(error)}.") from error
        numbers = [entry.version for entry in ledger.versions]
        if numbers != sorted(set(numbers)):
            raise Corrupted(f"The ledger {LEDGER_PATH} of {name} does not count upwards.")
        if any(entry.commit is None for entry in ledger.versions[:-1]):
            raise Corrupted(f"The ledger {LEDGER_PATH} of {name} lacks a commit that is not its newest.")
        return ledger

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return canonical_json(self.model_dump(mode="json"))


class LoggedMove(BaseModel):
    """A move of an alias as it was decided; `at` is RFC 3339. None: not set before, or removed.

    `newest` is the newest version at that time: commits have whole seconds, so times do not tell what came first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    alias: str
    version: int | None
    previous: int | None
    newest: int
    by: str
    at: Annotated[str, AfterValidator(_time)]
    rollback: bool = False


def read_alias_log(data: bytes, name: str) -> list[LoggedMove]:
    """The moves in a log, the oldest first. Raises Corrupted."""
    try:
        return [
            LoggedMove.model_validate(parse_json_object(line, f"{ALIAS_LOG_PATH} of {name}"))
            for line in data.splitlines()
        ]
    except (ValidationError, Rejected) as error:
        raise Corrupted(f"The log {ALIAS_LOG_PATH} of {name} is not valid: {_first(error)}.") from error


def alias_log_bytes(moves: list[LoggedMove]) -> bytes:
    """One line per move."""
    return b"".join(canonical_json(move.model_dump(mode="json")) + b"\n" for move in moves)


def _first(error: Any) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    return str(error).rstrip(".")
