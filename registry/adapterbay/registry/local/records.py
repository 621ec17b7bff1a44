"""What is on disk besides blobs: enough to build the index again.

    adapters/<name>/@<version>.json     one record per version, never changed
    adapters/<name>/@journal.jsonl      every other change, one line each, only appended to
    adapters/@journal.jsonl             changes that are of all adapters: guards of an alias everywhere
    adapters/<name>/@aliases.jsonl      what adapterbay 0.1 wrote instead: moves of aliases; read, never written

'@' cannot be in a name, so a record never collides with an adapter below it. A record or line that the index does not
know was left by a writer that was killed before its commit: it is no part of the registry, and the next writer of that
name removes it. What `detail` holds, by kind of change:

    alias_set       {"forced": why, "overruled": [demands]} if it was forced, {"rollback": true} if it was rolled back
    tagged          {"set": {key: value}, "removed": [key]}
    deprecated      {"reason": text, or null to take it back}
    deleted         {"reason": text}
    guard_set       {"minimum": {metric: least}, "maximum": {metric: most}, "requires": [evidence]}
    compared        a `Comparison` (adapterbay.registry.gate)
    signed          {"signature": digest of the bundle, "size": bytes, "key": fingerprint of the public key}
    committed       {"sha", "parent", "title", "message", "tree": {path: [digest, size]}}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, get_args

from adapterbay.registry import durable
from adapterbay.registry.digest import canonical_json, parse_json_object
from adapterbay.registry.errors import Corrupted, Rejected
from adapterbay.registry.views import EventKind

RECORD_VERSION: Final = 2
JOURNAL_FILE: Final = "@journal.jsonl"
ALIASES_FILE: Final = "@aliases.jsonl"
EVERY_ADAPTER: Final = ""
EVERY_ADAPTER_SPELLED: Final = "every adapter"
"""The name under which changes are filed that are of all adapters."""


@dataclass(frozen=True, slots=True)
class VersionFile:
    """A version record. `sequence` is that of its push event; `created_at` is RFC 3339 in UTC; `by` is who pushed."""

    name: str
    version: int
    digest: str
    created_at: str
    sequence: int
    by: str | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """A change that is not a push. `version` is what it is about, or where an alias points now; `at` is RFC 3339.

    `previous_version` is where an alias pointed before. `journal` is False for what adapterbay 0.1 wrote.
    """

    kind: EventKind
    name: str
    at: str
    by: str | None
    version: int | None = None
    alias: str | None = None
    previous_version: int | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)
    sequence: int = 0
    journal: bool = True

    @property
    def subject(self) -> int:
        """The version that the change is filed under; 0 if it is of the adapter as a whole."""
        return self.version or self.previous_version or 0


def now() -> str:
    """The time as it stands in records."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


class Records:
    """The record files of one registry. Everything that writes needs the index's write lock."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "adapters"

    def create(self) -> None:
        """Makes the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def version_path(self, name: str, version: int) -> Path:
        """Where the record of a version lies."""
        return self.folder / name / f"@{version}.json"

    def write_version(self, record: VersionFile, temporary: Path) -> None:
        """Writes a record, over one that a killed push left."""
        path = self.version_path(record.name, record.version)
        durable.make_folders(path.parent, self.folder)
        durable.write_atomic(path, canonical_json({"record_version": RECORD_VERSION, **asdict(record)}), temporary)
        path.chmod(durable.READ_ONLY)

    def remove_version(self, name: str, version: int) -> None:
        """Removes the record of a version that was not committed."""
        path = self.version_path(name, version)
        path.unlink(missing_ok=True)
        durable.remove_empty_folders(path.parent, self.folder)

    def read_version(self, path: Path) -> VersionFile:
        """Reads a record. Raises Corrupted."""
        try:
            document = parse_json_object(path.read_bytes(), str(path))
            if document.pop("record_version", None) not in (1, RECORD_VERSION):
                raise TypeError("another record_version")
            record = VersionFile(**document)
        except (OSError, Rejected, TypeError) as error:
            raise Corrupted(f"The record {path} is not readable: {error}") from error
        if self.version_path(record.name, record.version) != path:
            raise Corrupted(f"The record {path} says that it is {record.name}@{record.version}.")
        return record

    def versions(self) -> Iterator[Path]:
        """The paths of all version records, in no order."""
        return (path for path in self.folder.rglob("@*.json") if path.is_file())

    def logs(self) -> Iterator[Path]:
        """The paths of all logs of changes, of both forms, in no order."""
        for name in (JOURNAL_FILE, ALIASES_FILE):
            yield from self.folder.rglob(name)

    def append(self, change: Change, committed: int) -> None:
        """Appends to the journal of a name, after its first `committed` lines; later ones were never committed."""
        path = self.folder / change.name / JOURNAL_FILE
        durable.make_folders(path.parent, self.folder)
        self.keep(change.name, committed)
        durable.append(path, canonical_json(_document(change)) + b"\n")

    def keep(self, name: str, committed: int) -> None:
        """Cuts the journal of `name` after its first `committed` lines."""
        path = self.folder / name / JOURNAL_FILE
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return
        lines = data.split(b"\n")
        end = sum(len(line) + 1 for line in lines[:committed])
        if end == 0:
            path.unlink()
            durable.remove_empty_folders(path.parent, self.folder)
        elif end < len(data):
            with path.open("r+b") as file:
                file.truncate(end)
            durable.sync_file(path)

    def read_changes(self, path: Path) -> list[Change]:
        """All whole lines of a log. A last line without an end was never committed. Raises Corrupted."""
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return []
        parse = _parse_change if path.name == JOURNAL_FILE else _parse_alias
        return [parse(line, self.name_of(path), path) for line in data.split(b"\n")[:-1]]

    def changes(self, name: str) -> tuple[list[Change], list[Change]]:
        """The journal of a name, and what adapterbay 0.1 wrote of it. Raises Corrupted."""
        folder = self.folder / name
        return self.read_changes(folder / JOURNAL_FILE), self.read_changes(folder / ALIASES_FILE)

    def name_of(self, path: Path) -> str:
        """The adapter that a file under `adapters/` belongs to; `EVERY_ADAPTER` for one that is of all."""
        name = path.parent.relative_to(self.folder).as_posix()
        return EVERY_ADAPTER if name == "." else name


def _document(change: Change) -> dict[str, Any]:
    document = asdict(change)
    del document["name"]  # the folder says it
    del document["journal"]
    return {key: value for key, value in document.items() if value not in (None, {})}


def _parse_change(line: bytes, name: str, path: Path) -> Change:
    try:
        document = parse_json_object(line, str(path))
        if document.get("kind") not in get_args(EventKind):
            raise TypeError(f"the kind {document.get('kind')!r} is not known: update adapterbay")
        return Change(name=name, by=document.pop("by", None), **document)
    except (Rejected, TypeError) as error:
        raise Corrupted(f"The journal {path} has a line that is not readable: {error}") from error


def _parse_alias(line: bytes, name: str, path: Path) -> Change:
    try:
        document = parse_json_object(line, str(path))
        kind: EventKind = "alias_removed" if document["version"] is None else "alias_set"
        return Change(kind=kind, name=name, by=None, journal=False, **document)
    except (Rejected, TypeError, KeyError) as error:
        raise Corrupted(f"The alias log {path} has a line that is not readable: {error}") from error
