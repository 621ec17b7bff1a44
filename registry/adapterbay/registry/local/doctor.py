"""What is wrong with a store, and what can be mended: the index against the disk, without reading file contents.

`verify` reads every byte; the doctor is quick, looks at everything else, and works when the index is damaged or gone.
"""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from adapterbay.registry.errors import AdapterbayError, Corrupted
from adapterbay.registry.local import changes, queries
from adapterbay.registry.local.records import EVERY_ADAPTER_SPELLED
from adapterbay.registry.local.store import INDEX_FILE, Registry
from adapterbay.registry.views import Diagnosis, Finding

_SIDE_FILES: Final = ("", "-wal", "-shm")


def diagnose(root: Path, *, rebuild: bool = False) -> Diagnosis:
    """Examines the registry at `root`; with `rebuild`, makes its index anew first.

    A damaged index is moved aside (`index.sqlite.damaged-<time>`) before it is made anew. Raises RegistryNotFound.
    """
    findings: list[Finding] = []
    rebuilt = False
    try:
        registry = Registry.open(root, create=False)
        damage = _integrity(registry)
    except Corrupted as error:
        registry, damage = None, error.message
    if damage is not None:
        if not rebuild:
            findings.append(Finding("error", "index", damage, "run doctor --rebuild while no other process uses it"))
            return Diagnosis(str(root), tuple(findings), rebuilt=False)
        if registry is not None:
            registry.close()
        aside = _move_aside(root)
        findings.append(Finding("mended", "index", f"it was damaged; the old one is {aside}", ""))
        registry = Registry.open(root, create=False)  # builds it from the records
        rebuilt = True
    assert registry is not None
    if rebuild and not rebuilt:
        registry.rebuild_index()
        rebuilt = True
    try:
        findings += _compare(registry)
    finally:
        registry.close()
    return Diagnosis(str(root), tuple(findings), rebuilt)


def _integrity(registry: Registry) -> str | None:
    with registry.index.read() as db:
        said = [row[0] for row in db.execute("PRAGMA integrity_check(5)")]
    return None if said == ["ok"] else f"it is damaged: {'; '.join(said)}"


def _move_aside(root: Path) -> Path:
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    for side in _SIDE_FILES:
        path = root / f"{INDEX_FILE}{side}"
        if path.exists():
            path.rename(root / f"{INDEX_FILE}.damaged-{stamp}{side}")
    return root / f"{INDEX_FILE}.damaged-{stamp}"


def _compare(registry: Registry) -> list[Finding]:
    with registry.index.read() as db:
        db.execute("BEGIN")  # one state of the index throughout
        try:
            return [*_records(registry, db), *_journals(registry, db), *_blobs(registry, db)]
        finally:
            db.execute("COMMIT")


def _records(registry: Registry, db: sqlite3.Connection) -> list[Finding]:
    findings = []
    known = {registry.records.version_path(*place): place for place in queries.recorded(db)}
    there = set(registry.records.versions())
    for path, (name, version) in sorted(known.items()):
        subject = f"{name}@{version}"
        if path not in there:
            findings.append(Finding("error", subject, f"its record {path} is missing", "restore it from a copy"))
            continue
        try:
            record = registry.records.read_version(path)
        except Corrupted as error:
            findings.append(Finding("error", subject, error.message, "restore it from a copy"))
            continue
        if record.digest != changes.digest_of(db, name, version):
            findings.append(
                Finding("error", subject, f"its record {path} names another digest", "run doctor --rebuild")
            )
    findings.extend(
        Finding("note", path.name, f"{path} is left over from a push that was killed", "the next push replaces it")
        for path in sorted(there - known.keys())
    )
    return findings


def _journals(registry: Registry, db: sqlite3.Connection) -> list[Finding]:
    findings = []
    for name in queries.all_names(db):
        subject = name or EVERY_ADAPTER_SPELLED
        try:
            journal, _ = registry.records.changes(name)
        except Corrupted as error:
            findings.append(Finding("error", subject, error.message, "restore it from a copy"))
            continue
        committed = queries.journal_lines(db, name)
        if len(journal) < committed:
            findings.append(
                Finding(
                    "error", subject, f"its journal has {len(journal)} of {committed} lines", "restore it from a copy"
                )
            )
        elif len(journal) > committed:
            findings.append(
                Finding(
                    "note", subject, "its journal ends in lines that were never committed", "the next change cuts them"
                )
            )
    return findings


def _blobs(registry: Registry, db: sqlite3.Connection) -> list[Finding]:
    findings = []
    there = {digest: path.stat().st_size for digest, path in registry.blobs.all()}
    needed: dict[str, tuple[str, int | None]] = {}
    for name in queries.names(db):
        for record in queries.versions(db, name):
            subject = f"{name}@{record.version}"
            needed.setdefault(record.digest, (subject, None))
            try:
                for entry in registry.manifest(record.digest).files:
                    needed.setdefault(entry.digest, (subject, entry.size))
            except AdapterbayError as error:
                findings.append(Finding("error", subject, error.message, "push the same files again"))
    for digest, (subject, size) in needed.items():
        if digest not in there:
            findings.append(Finding("error", subject, f"the blob {digest} is missing", "push the same files again"))
        elif size is not None and there[digest] != size:
            findings.append(
                Finding(
                    "error",
                    subject,
                    f"the blob {digest} has {there[digest]} bytes instead of {size}",
                    "push the same files again",
                )
            )
    orphans = [size for digest, size in there.items() if not queries.is_blob(db, digest)]
    if orphans:
        findings.append(Finding("note", "blobs", f"{len(orphans)} ({sum(orphans)} bytes) belong to nothing", "run gc"))
    return findings
