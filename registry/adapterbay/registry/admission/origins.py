"""Where the base, the task and the labels of an adapter come from: its caller, its files, or nobody.

The order is the same for all three: what the caller says, then training.json, then adapter_config.json, then what
else lies in the folder. Every answer says where it was found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias, cast, get_args

from adapterbay.registry.admission.documents import read_document
from adapterbay.registry.admission.report import Head
from adapterbay.registry.base import BaseFiles, BaseReference
from adapterbay.registry.errors import (
    BaseNotFound,
    InvalidArgument,
    InvalidReference,
    Rejected,
    TaskMismatch,
    UnsupportedMethod,
)
from adapterbay.registry.manifest import (
    CONFIG_FILE,
    HEAD_TASKS,
    MAX_BASE_REFERENCE,
    MAX_LABELS,
    README_FILE,
    TRAINING_FILE,
    TaskName,
    is_plain,
    plain_label,
)

FindBase: TypeAlias = Callable[[str | BaseReference], BaseFiles]

PEFT_TASKS: Final[Mapping[str, TaskName]] = {
    "CAUSAL_LM": "causal-lm",
    "SEQ_CLS": "sequence-classification",
    "TOKEN_CLS": "token-classification",
    "FEATURE_EXTRACTION": "feature-extraction",
    "SEQ_2_SEQ_LM": "seq2seq-lm",
}
CLASS_ENDINGS: Final[Mapping[str, TaskName]] = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForConditionalGeneration": "seq2seq-lm",
}
"""What the class in auto_mapping says, which PEFT writes where it has no task_type."""

_HUB_CACHE = re.compile(
    r"(?:.*[/\\])?models--(?P<repo>[A-Za-z0-9._-]+)[/\\]snapshots[/\\](?P<commit>[0-9a-f]{40})[/\\]*"
)
_HUB_PAGE = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>[^/?#]+/[^/?#]+)(?:/tree/(?P<revision>[^?#]+?))?/?"
)


@dataclass(frozen=True, slots=True)
class Origin:
    """A base, and where its name was found.

    `elsewhere` is where its files may lie if the name does not lead to them; `hint` is another name to propose.
    """

    reference: str | BaseReference
    where: str
    elsewhere: BaseReference | None = None
    hint: str | None = None


def base_named(config: Mapping[str, Any], training: Mapping[str, Any] | None, card: str | None = None) -> Origin:
    """The base that the files name; `card` is what the model card says.

    Raises InvalidArgument if they name none, Rejected (BAD_CONFIG) or BaseNotFound.
    """
    recorded = (training or {}).get("base")
    if isinstance(recorded, Mapping) and isinstance(recorded.get("reference"), str):
        return Origin(_checked(recorded["reference"], TRAINING_FILE), f"from {TRAINING_FILE}")
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name.strip():
        if card is not None:
            return Origin(BaseReference("hub", card), f"from {README_FILE}")
        raise InvalidArgument(
            f"The folder does not say which base it is for (no base_model_name_or_path in {CONFIG_FILE}): pass --base.",
            field="base",
        )
    return replace(_named_by_peft(_checked(name, CONFIG_FILE), config.get("revision"), card), hint=card)


def _checked(name: str, where: str) -> str:
    if len(name) > MAX_BASE_REFERENCE or not is_plain(name):
        raise Rejected(
            f"{where} names a base by {len(name)} characters that are no name or path: {name[:80]!r}. Pass --base.",
            reason="BAD_CONFIG",
        )
    return name


def _named_by_peft(name: str, revision: Any, card: str | None) -> Origin:
    try:
        if cached := _HUB_CACHE.fullmatch(name):
            # models--ORG--NAME; the commit is the folder's name. It outlives the machine, the path does not.
            return Origin(
                BaseReference("hub", cached["repo"].replace("--", "/", 1), cached["commit"]),
                f"from the cache path in {CONFIG_FILE}",
                elsewhere=BaseReference("folder", name),
            )
        if page := _HUB_PAGE.fullmatch(name):
            return Origin(BaseReference("hub", page["repo"], page["revision"]), f"from the address in {CONFIG_FILE}")
        reference = BaseReference.parse(name)
        if reference.scheme == "hub" and reference.revision is None and isinstance(revision, str) and revision:
            reference = BaseReference("hub", reference.target, revision)
    except InvalidReference as error:
        raise BaseNotFound(
            f"{CONFIG_FILE} names the base as {name[:200]!r}, which is no base: pass --base.{_proposed(card)}"
        ) from error
    return Origin(reference, f"from {CONFIG_FILE}")


def base_at(origin: Origin, find_base: FindBase) -> BaseFiles:
    """The files of a base that was named by an adapter. Raises BaseNotFound that asks for --base, and what else
    `find_base` raises.
    """
    try:
        return find_base(origin.reference)
    except (BaseNotFound, InvalidArgument) as error:
        if origin.elsewhere is not None and isinstance(origin.reference, BaseReference):
            try:
                return replace(find_base(origin.elsewhere), reference=origin.reference)
            except (BaseNotFound, InvalidArgument):
                pass
        raise BaseNotFound(
            f"The base {origin.reference} ({origin.where}) was not found: {error.message} {_advice(origin.reference)}"
            f"{_proposed(origin.hint)}"
        ) from error


def _proposed(card: str | None) -> str:
    return f" {README_FILE} names hub:{card}." if card else ""


def _advice(reference: str | BaseReference) -> str:
    try:
        parsed = BaseReference.parse(reference) if isinstance(reference, str) else reference
    except InvalidReference:
        return "Pass --base to say where it is."
    if parsed.scheme == "hub":
        return "Pass --base to say where it is, if that was a path."
    if parsed.scheme == "package":
        return "Pass --base to say where it is."
    path = Path(parsed.target)
    kind = (
        "a path of the machine where it was trained" if path.is_absolute() else "a path seen from where it was trained"
    )
    return f"It seems to be {kind}: pass --base with hub:ORG/REPO, or with where it lies here."


def find_task(
    config: Mapping[str, Any], training: Mapping[str, Any] | None, said: str | None, head: Head | None
) -> tuple[TaskName, str]:
    """The task, and where it was found.

    Raises InvalidArgument if nothing says it, Rejected (MISSING_TENSOR), TaskMismatch or UnsupportedMethod.
    """
    task, origin = _find_task(config, training, said, head)
    if task not in get_args(TaskName):
        raise InvalidArgument(f"The task {task[:60]!r} is not one of {', '.join(get_args(TaskName))}.", field="task")
    if task in HEAD_TASKS and head is None:
        raise Rejected(
            f"A {task} adapter needs its head (score or classifier) among its tensors: train with "
            f"task_type={'SEQ_CLS' if task == 'sequence-classification' else 'TOKEN_CLS'}, so that PEFT saves it.",
            reason="MISSING_TENSOR",
        )
    if task not in HEAD_TASKS and head is not None:
        raise TaskMismatch(f"The adapter has a head ({head.name}), but its task is {task}: pass --task.")
    return cast(TaskName, task), origin


def _find_task(
    config: Mapping[str, Any], training: Mapping[str, Any] | None, said: str | None, head: Head | None
) -> tuple[str, str]:
    if said is not None:
        return said, "as you said"
    if training and isinstance(training.get("task"), str):
        return training["task"], f"from {TRAINING_FILE}"
    peft_task = config.get("task_type")
    if isinstance(peft_task, str):
        if peft_task not in PEFT_TASKS:
            raise UnsupportedMethod(f"The task type {peft_task[:60]!r} is not served: {', '.join(PEFT_TASKS)} are.")
        return PEFT_TASKS[peft_task], f"from {CONFIG_FILE}"
    if head is not None:
        return "sequence-classification", "it has a head"
    mapping = config.get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    for ending, task in CLASS_ENDINGS.items():
        if isinstance(name, str) and name.endswith(ending):
            return task, f"from the class {name[:100]} in {CONFIG_FILE}"
    raise InvalidArgument(
        f"The folder does not say its task: pass --task with one of {', '.join(get_args(TaskName))}.", field="task"
    )


def find_labels(
    beside: Mapping[str, Path], training: Mapping[str, Any] | None, said: tuple[str, ...] | None, head: Head | None
) -> tuple[tuple[str, ...], str]:
    """The labels in the order of the head's rows, and where they were found; none without a head.

    Raises InvalidArgument, or Rejected: SHAPE_MISMATCH, BAD_CONFIG, TOO_LARGE.
    """
    if head is None:
        if said:
            raise InvalidArgument("Labels were given, but the adapter has no head.", field="labels")
        return (), ""
    if head.labels > MAX_LABELS:
        raise Rejected(f"The head has {head.labels} rows; {MAX_LABELS} are allowed.", reason="TOO_LARGE")
    labels, origin = _find_labels(beside, training, said, head.labels)
    if len(labels) != head.labels:
        raise Rejected(
            f"The head has {head.labels} rows, but there are {len(labels)} labels ({origin}): pass --label for each.",
            reason="SHAPE_MISMATCH",
        )
    try:
        for label in labels:
            plain_label(label)
    except ValueError as error:
        raise InvalidArgument(f"A label ({origin}) cannot be used: {error}. Pass --label.", field="labels") from error
    if len(set(labels)) != len(labels):
        raise InvalidArgument(f"Labels ({origin}) must differ: pass --label.", field="labels")
    return labels, origin


def _find_labels(
    beside: Mapping[str, Path], training: Mapping[str, Any] | None, said: tuple[str, ...] | None, rows: int
) -> tuple[tuple[str, ...], str]:
    if said is not None:
        return said, "as you said"
    found = training.get("labels") if training else None
    if found:
        if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
            raise Rejected(f"{TRAINING_FILE} has labels that are not a list of text.", reason="BAD_CONFIG")
        return tuple(found), f"from {TRAINING_FILE}"
    if "config.json" in beside:
        names = _id2label(read_document(beside["config.json"], "config.json", follow=False))
        if names is not None:
            return names, "from config.json"
    return tuple(str(row) for row in range(rows)), "counted; name them with --label"


def _id2label(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    names = config.get("id2label")
    if not isinstance(names, dict) or not names:
        return None
    rows = [names.get(str(row)) for row in range(len(names))]
    if not all(isinstance(name, str) for name in rows):
        raise Rejected("config.json has an id2label that does not count from 0.", reason="BAD_CONFIG")
    return tuple(str(name) for name in rows)
