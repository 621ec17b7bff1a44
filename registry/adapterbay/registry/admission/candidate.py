"""What a folder would be as a version: its base, task and labels, found in the folder unless the caller says them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast, get_args

from adapterbay.registry.admission import AdmissionReport, Head, Limits, admit
from adapterbay.registry.admission.folder import PeftFolder
from adapterbay.registry.base import BaseFiles, BaseReference, locate
from adapterbay.registry.base.fingerprint import chat_template
from adapterbay.registry.digest import is_digest, parse_json_object
from adapterbay.registry.errors import (
    BaseMismatch,
    BaseNotFound,
    InvalidArgument,
    Rejected,
    TaskMismatch,
    UnsupportedMethod,
)
from adapterbay.registry.local.blobs import Staged
from adapterbay.registry.manifest import CONFIG_FILE, TRAINING_FILE, FileEntry, Manifest, TaskName

PEFT_TASKS: Final[Mapping[str, TaskName]] = {
    "CAUSAL_LM": "causal-lm",
    "SEQ_CLS": "sequence-classification",
    "FEATURE_EXTRACTION": "feature-extraction",
}
MAX_LABELS: Final = 100_000


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the caller says about the folder; None: find it."""

    base: str | BaseReference | None = None
    task: str | None = None
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """An admitted folder. `findings` are lines for people."""

    manifest: Manifest
    findings: tuple[str, ...]


def examine(
    folder: PeftFolder, staged: Mapping[str, Staged], wishes: Wishes, limits: Limits | None = None
) -> Candidate:
    """Runs admission on the staged copies and describes them as a manifest.

    Raises Rejected, UnsupportedMethod, NoEffect, BaseMismatch, TaskMismatch, BaseNotFound or InvalidArgument.
    """
    limits = limits or Limits()
    config = _document(staged, CONFIG_FILE, limits)
    training = _document(staged, TRAINING_FILE, limits) if TRAINING_FILE in staged else None
    base, origin = _base(config, training, wishes)
    report = admit(
        {name: file.path for name, file in staged.items()},
        base.tensor_shapes(),
        base_config=base.config,
        limits=limits,
    )
    task, task_origin = _task(config, training, wishes, report.head)
    labels, labels_origin = _labels(folder, training, wishes, report.head)
    findings = [
        *report.findings,
        f"base {base.reference} ({origin}), fingerprint {base.fingerprint}",
        f"task {task} ({task_origin})",
    ]
    if labels:
        shown = ", ".join(labels[:10]) + (", …" if len(labels) > 10 else "")
        findings.append(f"{len(labels)} labels: {shown} ({labels_origin})")
    findings += _tokenizer_findings(folder, base, training)
    if folder.left_out:
        findings.append(f"left out: {', '.join(folder.left_out)}")
    return Candidate(_manifest(staged, report, base, task, labels, training), tuple(findings))


def _document(staged: Mapping[str, Staged], name: str, limits: Limits) -> dict[str, Any]:
    file = staged[name]
    if file.size > limits.document_bytes:
        raise Rejected(f"{name} has {file.size} bytes, over {limits.document_bytes}.", reason="TOO_LARGE")
    return parse_json_object(file.path.read_bytes(), name)


def _base(config: Mapping[str, Any], training: Mapping[str, Any] | None, wishes: Wishes) -> tuple[BaseFiles, str]:
    recorded = training.get("base") if training else None
    if recorded is not None and not isinstance(recorded, dict):
        raise Rejected(f"{TRAINING_FILE} has a base that is not an object.", reason="BAD_CONFIG")
    recorded = recorded or {}
    reference: str | BaseReference
    if wishes.base is not None:
        reference, origin = wishes.base, "as you said"
    elif isinstance(recorded.get("reference"), str):
        reference, origin = recorded["reference"], f"from {TRAINING_FILE}"
    elif isinstance(config.get("base_model_name_or_path"), str) and config["base_model_name_or_path"]:
        reference, origin = _named_by_peft(config), f"from {CONFIG_FILE}"
    else:
        raise InvalidArgument("The folder does not say which base it is for: pass --base.", field="base")
    try:
        base = locate(reference)
    except (BaseNotFound, InvalidArgument) as error:
        if wishes.base is not None:
            raise
        raise BaseNotFound(
            f"The base {reference} ({origin}) was not found: {error.message} Pass --base to say where it is."
        ) from error
    fingerprint = recorded.get("fingerprint")
    if fingerprint is not None and fingerprint != base.fingerprint:
        raise BaseMismatch(
            f"The adapter was trained on a base with the fingerprint {fingerprint}, but {base.reference} has "
            f"{base.fingerprint}. Pass --base to say where the right one is.",
            expected=base.fingerprint,
            actual=str(fingerprint),
        )
    return base, origin


def _named_by_peft(config: Mapping[str, Any]) -> BaseReference:
    reference = BaseReference.parse(config["base_model_name_or_path"])
    revision = config.get("revision")
    if reference.scheme == "hub" and reference.revision is None and isinstance(revision, str) and revision:
        return BaseReference("hub", reference.target, revision)
    return reference


def _task(
    config: Mapping[str, Any], training: Mapping[str, Any] | None, wishes: Wishes, head: Head | None
) -> tuple[TaskName, str]:
    task, origin = _find_task(config, training, wishes, head)
    if task not in get_args(TaskName):
        raise InvalidArgument(f"The task {task[:60]!r} is not one of {', '.join(get_args(TaskName))}.", field="task")
    if task == "sequence-classification" and head is None:
        raise Rejected(
            "A sequence-classification adapter needs its head (score or classifier) among its tensors: train with "
            "task_type=SEQ_CLS, so that PEFT saves it.",
            reason="MISSING_TENSOR",
        )
    if task != "sequence-classification" and head is not None:
        raise TaskMismatch(f"The adapter has a head ({head.name}), but its task is {task}: pass --task.")
    return cast(TaskName, task), origin


def _find_task(
    config: Mapping[str, Any], training: Mapping[str, Any] | None, wishes: Wishes, head: Head | None
) -> tuple[str, str]:
    if wishes.task is not None:
        return wishes.task, "as you said"
    if training and isinstance(training.get("task"), str):
        return training["task"], f"from {TRAINING_FILE}"
    peft_task = config.get("task_type")
    if isinstance(peft_task, str):
        if peft_task not in PEFT_TASKS:
            raise UnsupportedMethod(f"The task type {peft_task[:60]} is not served: {', '.join(PEFT_TASKS)} are.")
        return PEFT_TASKS[peft_task], f"from {CONFIG_FILE}"
    if head is not None:
        return "sequence-classification", "it has a head"
    raise InvalidArgument(
        f"The folder does not say its task: pass --task with one of {', '.join(get_args(TaskName))}.", field="task"
    )


def _labels(
    folder: PeftFolder, training: Mapping[str, Any] | None, wishes: Wishes, head: Head | None
) -> tuple[tuple[str, ...], str]:
    if head is None:
        if wishes.labels:
            raise InvalidArgument("Labels were given, but the adapter has no head.", field="labels")
        return (), ""
    labels, origin = _find_labels(folder, training, wishes, head)
    if len(labels) != head.labels:
        raise Rejected(
            f"The head has {head.labels} rows, but there are {len(labels)} labels ({origin}): pass --label for each.",
            reason="SHAPE_MISMATCH",
        )
    if len(set(labels)) != len(labels) or not all(label.strip() for label in labels):
        raise InvalidArgument(f"Labels ({origin}) must differ and must not be empty: pass --label.", field="labels")
    return labels, origin


def _find_labels(
    folder: PeftFolder, training: Mapping[str, Any] | None, wishes: Wishes, head: Head
) -> tuple[tuple[str, ...], str]:
    if head.labels > MAX_LABELS:
        raise Rejected(f"The head has {head.labels} rows; {MAX_LABELS} are allowed.", reason="TOO_LARGE")
    if wishes.labels is not None:
        return wishes.labels, "as you said"
    found = training.get("labels") if training else None
    if found:
        if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
            raise Rejected(f"{TRAINING_FILE} has labels that are not a list of text.", reason="BAD_CONFIG")
        return tuple(found), f"from {TRAINING_FILE}"
    if folder.config_json is not None:
        names = _id2label(folder.config_json)
        if names is not None:
            return names, "from config.json"
    return tuple(str(row) for row in range(head.labels)), "counted"


def _id2label(path: Path) -> tuple[str, ...] | None:
    names = parse_json_object(path.read_bytes(), "config.json").get("id2label")
    if not isinstance(names, dict) or not names:
        return None
    rows = [names.get(str(row)) for row in range(len(names))]
    if not all(isinstance(name, str) for name in rows):
        raise Rejected("config.json has an id2label that does not count from 0.", reason="BAD_CONFIG")
    return tuple(str(name) for name in rows)


def _tokenizer_findings(folder: PeftFolder, base: BaseFiles, training: Mapping[str, Any] | None) -> list[str]:
    findings = []
    own = chat_template(folder.path)
    if own is not None and own != chat_template(base.folder):
        findings.append("the folder's chat template differs from the base's; the base's is served")
    trained_with = training.get("chat_template_digest") if training else None
    if trained_with is not None and trained_with != base.chat_template_digest:
        findings.append("it was trained with another chat template than the base's")
    return findings


def _manifest(
    staged: Mapping[str, Staged],
    report: AdmissionReport,
    base: BaseFiles,
    task: TaskName,
    labels: tuple[str, ...],
    training: dict[str, Any] | None,
) -> Manifest:
    trained_with = training.get("chat_template_digest") if training else None
    versions = (training or {}).get("versions")
    libraries = {str(key): str(value) for key, value in versions.items()} if isinstance(versions, dict) else {}
    if isinstance(report.config.get("peft_version"), str):
        libraries.setdefault("peft", report.config["peft_version"])
    return Manifest(
        files=tuple(FileEntry(path=name, digest=file.digest, size=file.size) for name, file in sorted(staged.items())),
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
        library_versions=libraries,
        training=training,
    )


def as_labels(labels: Sequence[str] | None) -> tuple[str, ...] | None:
    """None and an empty sequence both mean: find them."""
    return tuple(labels) if labels else None
