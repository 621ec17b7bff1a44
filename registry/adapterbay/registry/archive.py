"""Versions in one file, for machines without a network: a plain tar of content-addressed blobs.

    adapterbay-archive.json    names, versions, digests, aliases, tags; always the first member
    blobs/<64 hex digits>      manifests, files and signatures, each once

Weights do not compress, so the tar is not compressed; its bytes depend on its content alone. Reading trusts nothing:
every blob is checked against its name, every version goes through admission again.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapterbay.registry import durable
from adapterbay.registry.admission import Limits
from adapterbay.registry.base import BaseReference
from adapterbay.registry.digest import CHUNK_BYTES, canonical_json, digest_bytes, digest_file, parse_json_object
from adapterbay.registry.errors import Conflict, Corrupted, InvalidArgument, NotFound, PromotionRefused, Rejected
from adapterbay.registry.local.store import Registry
from adapterbay.registry.manifest import Digest, Manifest
from adapterbay.registry.portable import MANIFEST_PATH, SIGNATURE_PATH
from adapterbay.registry.reference import Reference
from adapterbay.registry.views import ArchiveReport, RegistryEvent, VersionRecord

HEADER: Final = "adapterbay-archive.json"
MAX_HEADER_BYTES: Final = 64 * 2**20
_BLOB = re.compile(r"blobs/(?P<hex>[0-9a-f]{64})")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ArchivedVersion(_Frozen):
    """A version. `signature` is the digest of the bundle that signs it."""

    version: int = Field(ge=1)
    digest: Digest
    signature: Digest | None = None
    tags: dict[str, str] = Field(default_factory=dict)
    deprecated: str | None = None


class ArchivedAdapter(_Frozen):
    """An adapter with those of its versions that were asked for, in their order, and the aliases that point at them."""

    name: str
    versions: tuple[ArchivedVersion, ...]
    aliases: dict[str, int] = Field(default_factory=dict)


class ArchiveHeader(_Frozen):
    """What an archive holds."""

    schema_version: Literal[1] = 1
    adapters: Annotated[tuple[ArchivedAdapter, ...], Field(min_length=1)]


def export_archive(registry: Registry, references: Sequence[str], destination: Path) -> ArchiveReport:
    """Writes what the references mean into one file: NAME means all its versions. Whole or not at all.

    Raises NotFound, Corrupted, InvalidArgument if there is something at `destination`, or StorageFull.
    """
    if not references:
        raise InvalidArgument("Say what to export: NAME for all its versions, or NAME@3.", field="references")
    if destination.exists():
        raise InvalidArgument(f"{destination} is there already: choose another file.", field="destination")
    wanted = _wanted(registry, references)
    adapters = []
    blobs: dict[str, bytes | Path] = {}
    for name, records in sorted(wanted.items()):
        versions = []
        for record in records:
            snapshot = registry.open_snapshot(record.digest)
            blobs[record.digest] = snapshot.manifest.to_bytes()
            blobs.update({entry.digest: snapshot.files[entry.path] for entry in snapshot.manifest.files})
            signature = None
            if snapshot.signature is not None:
                signature = digest_bytes(snapshot.signature)
                blobs[signature] = snapshot.signature
            versions.append(
                ArchivedVersion(
                    version=record.version,
                    digest=record.digest,
                    signature=signature,
                    tags=dict(record.tags),
                    deprecated=record.deprecated,
                )
            )
        numbers = {record.version for record in records}
        aliases = {alias: number for alias, number in registry.aliases(name).items() if number in numbers}
        adapters.append(ArchivedAdapter(name=name, versions=tuple(versions), aliases=aliases))
    header = ArchiveHeader(adapters=tuple(adapters))
    _write(destination, header, blobs)
    count = sum(len(adapter.versions) for adapter in adapters)
    return ArchiveReport(destination.stat().st_size, count, 0, ())


def _wanted(registry: Registry, references: Iterable[str]) -> dict[str, list[VersionRecord]]:
    found: dict[str, dict[int, VersionRecord]] = {}
    for text in references:
        reference = Reference.parse(text)
        if reference.selector is None and "@" not in text:
            records = registry.versions(reference.name)
        else:
            resolved = registry.resolve(reference)
            records = [registry.version(resolved.name, resolved.version)]
        found.setdefault(reference.name, {}).update({record.version: record for record in records})
    return {name: [records[number] for number in sorted(records)] for name, records in found.items()}


def _write(destination: Path, header: ArchiveHeader, blobs: Mapping[str, bytes | Path]) -> None:
    target = destination.absolute()
    with durable.storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                    _add(tar, HEADER, canonical_json(header.model_dump(mode="json")))
                    for digest, source in sorted(blobs.items()):
                        _add(tar, f"blobs/{digest.removeprefix('sha256:')}", source)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            durable.rename(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _add(tar: tarfile.TarFile, name: str, source: bytes | Path) -> None:
    member = tarfile.TarInfo(name)  # no time, owner or mode of this machine
    member.mode = 0o644
    if isinstance(source, bytes):
        member.size = len(source)
        tar.addfile(member, io.BytesIO(source))
        return
    with source.open("rb") as file:
        member.size = os.fstat(file.fileno()).st_size
        tar.addfile(member, file)


def import_archive(registry: Registry, archive: Path, *, base: str | BaseReference | None = None) -> ArchiveReport:
    """Brings the versions of an archive in, under their names, numbers and digests.

    Versions that are there are skipped, and what was said of them here stays: an import that was cut off is finished by
    the next. An alias is set if it is not set here and its guard lets it; notes say which were not. `base` says where
    the base lies here, if the archive names it otherwise. Nothing is written if a number holds other content.
    Raises Conflict (VERSION_TAKEN), Rejected (BAD_ARCHIVE and all of admission), NotFound, or StorageFull.
    """
    if not archive.is_file():
        raise NotFound(f"There is no file {archive}.")
    with durable.storage_errors(registry.root), tempfile.TemporaryDirectory(dir=registry.root / "tmp") as place:
        work = Path(place)
        header = _unpack(archive, work, registry.limits)
        missing = _missing(registry, header)
        skipped = sum(len(adapter.versions) for adapter in header.adapters) - len(missing)
        for name, version in missing:
            folder = work / "folder"
            _lay_out(version, work, folder)
            registry.push(folder, name, base=base, number=version.version)
            shutil.rmtree(folder)
        notes = [note for adapter in header.adapters for note in _labels(registry, adapter)]
    return ArchiveReport(archive.stat().st_size, len(missing), skipped, tuple(notes))


def _missing(registry: Registry, header: ArchiveHeader) -> list[tuple[str, ArchivedVersion]]:
    """What is to be pushed, in order. Raises Conflict before anything is written."""
    missing = []
    for adapter in header.adapters:
        there = {event.version: event.digest for event in _pushes(registry, adapter.name)}
        newest = max(there, default=0)
        for version in adapter.versions:
            known = there.get(version.version)
            if known is None and version.version > newest:
                missing.append((adapter.name, version))
            elif known != version.digest:
                other = f"is {known[:19]}… here" if known else f"was never made here, and {newest} was"
                raise Conflict(
                    f"{adapter.name}@{version.version} of the archive is {version.digest[:19]}…, but {other}. Nothing "
                    "was imported.",
                    reason="VERSION_TAKEN",
                )
    return missing


def _pushes(registry: Registry, name: str) -> list[RegistryEvent]:
    try:
        return [event for event in registry.history(name) if event.kind == "pushed"]
    except NotFound:
        return []


def _lay_out(version: ArchivedVersion, work: Path, folder: Path) -> None:
    """The version as a portable folder; files are links to the blobs, so nothing is copied twice."""
    blobs = {version.digest: MANIFEST_PATH}
    if version.signature is not None:
        blobs[version.signature] = SIGNATURE_PATH
    source = _blob(work, version.digest)
    manifest = Manifest.from_bytes(source.read_bytes())
    wanted = [*blobs.items(), *((entry.digest, entry.path) for entry in manifest.files)]
    for digest, path in wanted:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(_blob(work, digest), target)


def _blob(work: Path, digest: str) -> Path:
    path = work / digest.removeprefix("sha256:")
    if not path.is_file():
        raise _bad(f"the blob {digest} is missing")
    return path


def _labels(registry: Registry, adapter: ArchivedAdapter) -> Iterable[str]:
    events = registry.history(adapter.name)
    said = {(event.kind, event.version) for event in events}
    for version in adapter.versions:
        if ("deleted", version.version) in said:
            continue
        if version.tags and ("tagged", version.version) not in said:
            registry.tag(adapter.name, version.version, version.tags)
        if version.deprecated is not None and ("deprecated", version.version) not in said:
            registry.deprecate(adapter.name, version.version, version.deprecated)
    there = registry.aliases(adapter.name)
    for alias, number in adapter.aliases.items():
        if alias in there:
            if there[alias] != number:
                yield f"{adapter.name}@{alias} stays at {there[alias]} (in the archive: {number})"
            continue
        try:
            registry.set_alias(adapter.name, alias, number, expected=None)
        except (NotFound, PromotionRefused) as error:  # deleted here, or guarded here
            yield f"{adapter.name}@{alias} was not set: {error.message}"


def _unpack(archive: Path, work: Path, limits: Limits) -> ArchiveHeader:
    """Writes the blobs of the archive into `work`, each checked. Raises Rejected with reason BAD_ARCHIVE."""
    try:
        with tarfile.open(archive, "r:") as tar:
            header = _header(tar, tar.next())
            named = _named(header)
            while (member := tar.next()) is not None:
                match = _BLOB.fullmatch(member.name)
                if match is None or not member.isreg() or member.issparse():
                    raise _bad(f"it holds {member.name[:100]!r}")
                if member.size > limits.weights_bytes:
                    raise Rejected(f"{member.name} has {member.size} bytes, over the limit.", reason="TOO_LARGE")
                _extract(tar, member, work / match["hex"])
                named.discard(f"sha256:{match['hex']}")
    except (tarfile.TarError, EOFError, UnicodeDecodeError, ValueError) as error:
        raise _bad(str(error)) from error
    if named:
        raise _bad(f"the blob {min(named)} is missing")
    return header


def _header(tar: tarfile.TarFile, member: tarfile.TarInfo | None) -> ArchiveHeader:
    if member is None or member.name != HEADER or not member.isreg() or member.issparse():
        raise _bad(f"it does not begin with {HEADER}")
    if member.size > MAX_HEADER_BYTES:
        raise _bad(f"{HEADER} has {member.size} bytes")
    file = tar.extractfile(member)
    document = parse_json_object(b"" if file is None else file.read(), HEADER)
    try:
        header = ArchiveHeader.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        raise _bad(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    for adapter in header.adapters:
        numbers = [version.version for version in adapter.versions]
        if numbers != sorted(set(numbers)):
            raise _bad(f"the versions of {adapter.name[:100]} are not in order")
    return header


def _named(header: ArchiveHeader) -> set[str]:
    versions = [version for adapter in header.adapters for version in adapter.versions]
    return {version.digest for version in versions} | {
        version.signature for version in versions if version.signature is not None
    }


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    if target.exists():
        raise _bad(f"it holds {member.name} twice")
    source = tar.extractfile(member)
    if source is None:
        raise _bad(f"{member.name} has no content")
    with source, target.open("xb") as file:
        shutil.copyfileobj(source, file, CHUNK_BYTES)
    if digest_file(target) != f"sha256:{target.name}":
        raise Corrupted(f"The archive {member.name} does not have its digest: copy the archive again.")


def _bad(what: str) -> Rejected:
    return Rejected(f"This is not an archive of adapterbay, or it is damaged: {what}.", reason="BAD_ARCHIVE")
