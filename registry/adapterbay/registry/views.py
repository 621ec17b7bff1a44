"""What the registry answers with: frozen values, no connection behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final, Literal

from adapterbay.registry.digest import digest_bytes
from adapterbay.registry.errors import Corrupted, NotFound
from adapterbay.registry.manifest import Manifest

EventKind = Literal["pushed", "alias_set", "alias_removed"]


class AnyVersion:
    """The class of `ANY`."""

    def __repr__(self) -> str:
        return "ANY"


ANY: Final = AnyVersion()
"""`expected=ANY`: move the alias wherever it is now."""


@dataclass(frozen=True, slots=True)
class PushReceipt:
    """A pushed version. `same_as` is an earlier version with the same digest; `new_bytes` were not stored before."""

    name: str
    version: int
    digest: str
    aliases: tuple[str, ...]
    manifest: Manifest
    same_as: int | None
    new_bytes: int
    findings: list[str]


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a reference means at this moment."""

    reference: str
    name: str
    version: int
    digest: str


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """A version. `aliases` point at it now; `size_bytes` are its files; the rest is of its manifest."""

    name: str
    version: int
    digest: str
    created_at: datetime
    size_bytes: int
    aliases: tuple[str, ...]
    task: str
    peft_type: str
    rank: int
    base_reference: str
    base_fingerprint: str
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AdapterSummary(VersionRecord):
    """An adapter by its newest version; `versions` counts all, `alias_versions` says where every alias points."""

    versions: int
    alias_versions: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class AliasMove:
    """An alias before and after. None: it was not there before, or is not there any more."""

    alias: str
    previous: int | None
    version: int | None


@dataclass(frozen=True, slots=True)
class RegistryEvent:
    """Something that was committed. `sequence` grows by one from event to event."""

    sequence: int
    kind: EventKind
    name: str
    version: int
    digest: str
    alias: str | None
    previous_version: int | None
    at: datetime


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that verify found. `subject` is a version, an adapter or a blob."""

    kind: Literal["blob", "manifest", "record", "alias"]
    subject: str
    detail: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.detail}"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """`leftovers` counts records of pushes that were killed before their commit: no part of the registry."""

    checked_blobs: int
    checked_versions: int
    problems: tuple[Problem, ...]
    leftovers: int

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The files of a version, by relative path, each checked when the snapshot was opened."""

    manifest: Manifest
    files: Mapping[str, Path]

    def read(self, path: str) -> bytes:
        """The bytes of a file, checked again. Raises NotFound for a path it does not have, or Corrupted."""
        for entry in self.manifest.files:
            if entry.path == path:
                data = self.files[path].read_bytes()
                if digest_bytes(data) != entry.digest:
                    raise Corrupted(f"{path} was altered in the registry since it was opened ({entry.digest}).")
                return data
        raise NotFound(f"The version has no file {path}.", near=sorted(self.files))
