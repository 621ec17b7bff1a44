"""What a folder would be as a version: its base, task and labels, found in the folder unless the caller says them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from adapterbay.registry.admission import AdmissionReport, Limits, admit, understand
from adapterbay.registry.admission.documents import read_document
from adapterbay.registry.admission.evidence import base_of_card, own_chat_template, training_evidence
from adapterbay.registry.admission.folder import STORED_FILES, PeftFolder
from adapterbay.registry.admission.neighbours import inner_adapters, is_checkpoint
from adapterbay.registry.admission.origins import FindBase, Origin, base_at, base_named, find_labels, find_task
from adapterbay.registry.base import BaseFiles, BaseReference, locate
from adapterbay.registry.base.fingerprint import chat_template
from adapterbay.registry.digest import is_digest
from adapterbay.registry.errors import BaseMismatch, Rejected, shown
from adapterbay.registry.local.blobs import Staged
from adapterbay.registry.manifest import (
    HEAD_TASKS,
    README_FILE,
    TRAINING_FILE,
    FileEntry,
    Manifest,
    TaskName,
    is_plain,
    unusable,
)
from adapterbay.registry.portable import MANIFEST_PATH, mismatch

MAX_NAMED: Final = 20
"""How many of the files that were left out are named."""
MAX_FINDING: Final = 1000


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the caller says about the folder; None: find it.

    `claimed` is the manifest that the folder brings; `parents` are the digests of what it was made from.
    """

    base: str | BaseReference | None = None
    task: str | None = None
    labels: tuple[str, ...] | None = None
    claimed: Manifest | None = None
    parents: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """An admitted folder. `findings` are lines for people."""

    manifest: Manifest
    findings: tuple[str, ...]


def examine(
    folder: PeftFolder,
    staged: Mapping[str, Staged],
    wishes: Wishes,
    limits: Limits | None = None,
    *,
    find_base: FindBase = locate,
) -> Candidate:
    """Runs admission on the staged copies and describes them as a manifest.

    `find_base` brings the base that the files name; a server gives one that opens no path a client names, and raises
    BaseNotFound for those. Raises Rejected, UnsupportedMethod, NoEffect, BaseMismatch, TaskMismatch, BaseNotFound or
    InvalidArgument.
    """
    limits = limits or Limits()
    files: dict[str, Path | bytes] = {name: file.path for name, file in staged.items()}
    config = understand(files, limits)  # before a base is fetched for it
    training = None
    if TRAINING_FILE in staged:
        training = read_document(staged[TRAINING_FILE].path, TRAINING_FILE, limits.document_bytes)
    readme = staged[README_FILE].path if README_FILE in staged else None
    base, origin = _base(config, training, readme, wishes, find_base)
    report = admit(files, base.tensor_shapes(), base_config=base.config, limits=limits)
    if wishes.claimed is not None:
        return _as_claimed(wishes.claimed, staged, report, base, wishes, training)
    task, task_origin = find_task(config, training, wishes.task, report.head)
    labels, labels_origin = find_labels(folder.beside, training, wishes.labels, report.head)
    findings = [
        *report.findings,
        f"base {base.reference} ({origin}), fingerprint {base.fingerprint}",
        f"task {task} ({task_origin})",
    ]
    if labels:
        first = ", ".join(labels[:10]) + (", …" if len(labels) > 10 else "")
        findings.append(f"{len(labels)} labels: {first} ({labels_origin})")
    findings += _tokenizer_findings(folder, base, training)
    if training is None:
        evidence = training_evidence(folder.beside, readme, folder.path.name if folder.path else "")
        training = evidence.record
        findings += evidence.findings
    findings += _left_out(folder)
    manifest = _manifest(staged, report, base, task, labels, training, wishes.parents)
    return Candidate(manifest, tuple(shown(finding, MAX_FINDING) for finding in findings))


def _as_claimed(
    claimed: Manifest,
    staged: Mapping[str, Staged],
    report: AdmissionReport,
    base: BaseFiles,
    wishes: Wishes,
    training: dict[str, Any] | None,
) -> Candidate:
    """The manifest that the folder brings, if everything that it says holds."""
    for entry in claimed.files:
        if entry.path not in STORED_FILES:
            raise mismatch(f"it names {entry.path}, and only {', '.join(STORED_FILES)} are files of a version")
        if staged[entry.path].digest != entry.digest:
            raise mismatch(f"{entry.path} is {staged[entry.path].digest}, not {entry.digest}")
    found: dict[str, Any] = {"peft_type": report.peft_type, "peft_config": report.config, "rank": report.rank}
    if training is not None:
        found["training"] = training
    for key, value in found.items():
        if getattr(claimed, key) != value:
            raise mismatch(f"its {key} contradicts the files")
    said = {"task": wishes.task, "labels": wishes.labels, "parents": wishes.parents or None}
    for key, wanted in said.items():
        if wanted is not None and wanted != getattr(claimed, key):
            raise mismatch(f"you gave another {key}")
    if (claimed.task in HEAD_TASKS) != (report.head is not None):
        raise mismatch(f"its task is {claimed.task}, {'but it has' if report.head else 'and it lacks'} a head")
    if report.head is not None and len(claimed.labels) != report.head.labels:
        raise mismatch(f"it has {len(claimed.labels)} labels for the {report.head.labels} rows of its head")
    digests = (base.tokenizer_digest, claimed.tokenizer_digest)
    if None not in digests and digests[0] != digests[1]:
        raise mismatch("its tokenizer is not the base's")
    facts = [f"base {claimed.base_reference}, fingerprint {claimed.base_fingerprint}", f"task {claimed.task}"]
    return Candidate(claimed, (*report.findings, *facts, "its own manifest, which was kept"))


def _base(
    config: Mapping[str, Any],
    training: Mapping[str, Any] | None,
    readme: Path | None,
    wishes: Wishes,
    find_base: FindBase,
) -> tuple[BaseFiles, str]:
    recorded = training.get("base") if training else None
    if recorded is not None and not isinstance(recorded, dict):
        raise Rejected(f"{TRAINING_FILE} has a base that is not an object.", reason="BAD_CONFIG")
    if wishes.base is not None:
        base, where = find_base(wishes.base), "as you said"
    else:
        claimed = wishes.claimed
        origin = (
            Origin(claimed.base_reference, f"from {MANIFEST_PATH}")
            if claimed
            else base_named(config, training, base_of_card(readme))
        )
        base, where = base_at(origin, find_base), origin.where
    fingerprint = wishes.claimed.base_fingerprint if wishes.claimed else (recorded or {}).get("fingerprint")
    if fingerprint is not None and fingerprint != base.fingerprint:
        raise BaseMismatch(
            f"The adapter was trained on a base with the fingerprint {str(fingerprint)[:80]!r}, but {base.reference} "
            f"has {base.fingerprint}. Pass --base to say where the right one is.",
            expected=base.fingerprint,
            actual=str(fingerprint)[:80],
        )
    return base, where


def _tokenizer_findings(folder: PeftFolder, base: BaseFiles, training: Mapping[str, Any] | None) -> list[str]:
    findings = []
    try:
        own = own_chat_template(folder.beside)
    except Rejected as error:
        findings.append(f"the folder's chat template was not read: {error.message}")
    else:
        if own is not None and own != chat_template(base.folder):
            findings.append("the folder's chat template differs from the base's; the base's is served")
    trained_with = training.get("chat_template_digest") if training else None
    if trained_with is not None and trained_with != base.chat_template_digest:
        findings.append("it was trained with another chat template than the base's")
    return findings


def _left_out(folder: PeftFolder) -> list[str]:
    findings = []
    others = [name for name in inner_adapters(folder.path) if not is_checkpoint(name)] if folder.path else []
    if others:
        findings.append(f"more adapters in {_some(others)}: push them one by one")
    rest = [name for name in folder.left_out if name.rstrip("/") not in others]
    if rest:
        findings.append(f"left out: {_some(rest)}")
    return findings


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(name if is_plain(name) else ascii(name) for name in names[:MAX_NAMED]) + more


def _manifest(
    staged: Mapping[str, Staged],
    report: AdmissionReport,
    base: BaseFiles,
    task: TaskName,
    labels: tuple[str, ...],
    training: dict[str, Any] | None,
    parents: tuple[str, ...],
) -> Manifest:
    trained_with = training.get("chat_template_digest") if training else None
    try:
        return Manifest(
            files=tuple(
                FileEntry(path=name, digest=file.digest, size=file.size) for name, file in sorted(staged.items())
            ),
            peft_type=report.peft_type,
            peft_config=report.config,
            base_reference=str(base.reference),
            base_fingerprint=base.fingerprint,
            task=task,
            labels=labels,
            rank=report.rank,
            chat_template_digest=trained_with
            if isinstance(trained_with, str) and is_digest(trained_with)
            else base.chat_template_digest,
            tokenizer_digest=base.tokenizer_digest,
            library_versions=_libraries(report.config, training),
            training=training,
            parents=parents,
        )
    except ValidationError as error:
        raise unusable(error) from error


def _libraries(config: Mapping[str, Any], training: Mapping[str, Any] | None) -> dict[str, str]:
    versions = (training or {}).get("versions")
    named = dict(versions) if isinstance(versions, Mapping) else {}
    named.setdefault("peft", config.get("peft_version"))
    return {
        name: version
        for name, version in named.items()
        if isinstance(version, str) and len(name) + len(version) < 200 and is_plain(name + version)
    }


def as_labels(labels: Sequence[str] | None) -> tuple[str, ...] | None:
    """None and an empty sequence both mean: find them."""
    return tuple(labels) if labels else None
