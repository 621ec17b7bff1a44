"""What the registry answers with: frozen values, no connection behind them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal, cast

from adapterbay.registry.digest import digest_bytes
from adapterbay.registry.errors import Corrupted, InvalidArgument, NotFound
from adapterbay.registry.manifest import Manifest

EventKind = Literal[
    "pushed",
    "alias_set",
    "alias_removed",
    "tagged",
    "deprecated",
    "deleted",
    "guard_set",
    "guard_removed",
    "compared",
    "signed",
    "committed",
]


_BOUND = re.compile(r"(?P<metric>[^<>=]+)(?P<relation>>=|<=|>|<)\s*(?P<value>[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)")


class AnyVersion:
    """The class of `ANY`."""

    def __repr__(self) -> str:
        return "ANY"


ANY: Final = AnyVersion()
"""`expected=ANY`: move the alias wherever it is now."""


@dataclass(frozen=True, slots=True)
class PushReceipt:
    """A pushed version. `same_as` is an earlier version with the same digest; `new_bytes` were not stored before.

    `overruled` are the demands of the aliases' guards that were not met when the push was forced.
    """

    name: str
    version: int
    digest: str
    aliases: tuple[str, ...]
    manifest: Manifest
    same_as: int | None
    new_bytes: int
    findings: list[str]
    overruled: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a reference means at this moment."""

    reference: str
    name: str
    version: int
    digest: str


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """A version. `aliases` point at it now; `size_bytes` are its files; `deprecated` says why, if it is.

    `tags`, `deprecated` and `signed` may change; the rest is of its manifest.
    """

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
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    deprecated: str | None
    signed: bool


@dataclass(frozen=True, slots=True)
class AdapterSummary(VersionRecord):
    """An adapter by its newest version; `versions` counts all, `alias_versions` says where every alias points."""

    versions: int
    alias_versions: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class MetricBound:
    """What a metric must be, such as accuracy >= 0.8."""

    metric: str
    relation: Literal[">=", "<=", ">", "<"]
    value: float

    @classmethod
    def parse(cls, text: str) -> MetricBound:
        """Reads `accuracy>=0.8`. Raises InvalidArgument."""
        match = _BOUND.fullmatch(text)
        if match is None:
            raise InvalidArgument(f"{text[:80]!r} is not a bound on a metric: write accuracy>=0.8.", field="metric")
        return cls(match["metric"].strip(), cast(Any, match["relation"]), float(match["value"]))


@dataclass(frozen=True, slots=True)
class Listing:
    """Which adapters to list: those whose newest version is as asked. None and empty: any.

    `base` is a reference, with or without its scheme and revision, or a fingerprint; `tags` maps keys to values (None:
    any value). At most `limit` after the name `after`.
    """

    prefix: str = ""
    base: str | None = None
    task: str | None = None
    method: str | None = None
    tags: Mapping[str, str | None] = field(default_factory=dict)
    metrics: tuple[MetricBound, ...] = ()
    after: str = ""
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class AliasMove:
    """An alias before and after. None: it was not there before, or is not there any more.

    `overruled` are the demands of its guard that were not met when the move was forced.
    """

    alias: str
    previous: int | None
    version: int | None
    overruled: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RegistryEvent:
    """Something that was committed. `sequence` grows by one from event to event.

    `by` is who did it, None where it was not recorded. `version` is 0 and `digest` empty where a change is of the
    adapter as a whole. `detail` depends on `kind`; see `adapterbay.registry.local.records`.
    """

    sequence: int
    kind: EventKind
    name: str
    version: int
    digest: str
    alias: str | None
    previous_version: int | None
    at: datetime
    by: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that verify found. `subject` is a version, an adapter or a blob."""

    kind: Literal["blob", "manifest", "record", "alias", "journal", "signature", "index", "tag"]
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
    """The files of a version, by relative path, each checked when the snapshot was opened.

    `signature` is the bundle that signs it, if there is one; nobody has checked it.
    """

    manifest: Manifest
    files: Mapping[str, Path]
    signature: bytes | None = None

    def read(self, path: str) -> bytes:
        """The bytes of a file, checked again. Raises NotFound for a path it does not have, or Corrupted."""
        for entry in self.manifest.files:
            if entry.path == path:
                data = self.files[path].read_bytes()
                if digest_bytes(data) != entry.digest:
                    raise Corrupted(f"{path} was altered in the registry since it was opened ({entry.digest}).")
                return data
        raise NotFound(f"The version has no file {path}.", near=sorted(self.files))


@dataclass(frozen=True, slots=True)
class CollectionReport:
    """What garbage collection removed, or with `dry_run` would remove. `fresh` orphans are younger than the grace."""

    removed_blobs: int
    freed_bytes: int
    fresh: int
    kept_blobs: int
    swept_staging: int
    dry_run: bool


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that the doctor saw. `advice` is what to do, empty if it is done."""

    severity: Literal["error", "note", "mended"]
    subject: str
    detail: str
    advice: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.detail}" + (f" ({self.advice})" if self.advice else "")


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What the doctor saw of the registry at `place`."""

    place: str
    findings: tuple[Finding, ...]
    rebuilt: bool

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong now."""
        return not any(finding.severity == "error" for finding in self.findings)


@dataclass(frozen=True, slots=True)
class ArchiveReport:
    """An archive that was written or read: its size, and how many versions went in, or were here already."""

    size_bytes: int
    versions: int
    skipped: int
    notes: tuple[str, ...]
