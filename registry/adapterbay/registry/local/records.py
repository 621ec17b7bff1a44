"""What is on disk besides blobs: enough to build the index again.

    adapters/<name>/@<version>.json     one record per version, never changed
    adapters/<name>/@aliases.jsonl      every move of an alias, one line each, only appended to

'@' cannot be in a name, so a record never collides with an adapter below it. A record or line that the index does not
know was left by a push that was killed before its commit: it is no part of the registry, and the next writer of that
name removes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from adapterbay.registry import durable
from adapterbay.registry.digest import canonical_json, parse_json_object
from adapterbay.registry.errors import Corrupted, Rejected

RECORD_VERSION: Final = 1
ALIASES_FILE: Final = "@aliases.jsonl"


@dataclass(frozen=True, slots=True)
class VersionFile:
    """A version record. `sequence` is that of its push event; `created_at` is RFC 3339 in UTC."""

    name: str
    version: int
    digest: str
    created_at: str
    sequence: int


@dataclass(frozen=True, slots=True)
class AliasLine:
    """One move of an alias: to `version`, or away from `previous_version` if `version` is None."""

    name: str
    alias: str
    version: int | None
    previous_version: int | None
    at: str
    sequence: int


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
            if document.pop("record_version", None) != RECORD_VERSION:
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

    def alias_files(self) -> Iterator[Path]:
        """The paths of all alias logs, in no order."""
        return self.folder.rglob(ALIASES_FILE)

    def append_alias(self, line: AliasLine, committed: int) -> None:
        """Appends a move to the log of its name, after its first `committed` lines; later ones were never committed."""
        path = self.folder / line.name / ALIASES_FILE
        durable.make_folders(path.parent, self.folder)
        self.keep_aliases(line.name, committed)
        durable.append(path, canonical_json(_alias_document(line)) + b"\n")

    def keep_aliases(self, name: str, committed: int) -> None:
        """Cuts the log of `name` after its first `committed` lines."""
        path = self.folder / name / ALIASES_FILE
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

    def read_aliases(self, name: str) -> list[AliasLine]:
        """All whole lines of the log of `name`. A last line without an end was never committed. Raises Corrupted."""
        path = self.folder / name / ALIASES_FILE
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return []
        return [_parse_alias(line, name, path) for line in data.split(b"\n")[:-1]]

    def name_of(self, path: Path) -> str:
        """The adapter that a file under `adapters/` belongs to."""
        return path.parent.relative_to(self.folder).as_posix()


def _alias_document(line: AliasLine) -> dict[str, Any]:
    document = asdict(line)
    del document["name"]  # the folder says it
    return document


def _parse_alias(line: bytes, name: str, path: Path) -> AliasLine:
    try:
        return AliasLine(name=name, **parse_json_object(line, str(path)))
    except (Rejected, TypeError) as error:
        raise Corrupted(f"The alias log {path} has a line that is not readable: {error}") from error
