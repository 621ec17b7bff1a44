"""What the files beside an adapter say of its training, where there is no training.json.

    eval_results.json, all_results.json    what transformers' Trainer wrote with `save_metrics`
    trainer_state.json                     its log: evaluations, steps, epochs, learning rate
    README.md                              the front matter's `datasets`, `license` and `language`

They are kept in the manifest as the training record, under the names that the trainer of adapterbay uses. A result
or state that cannot be read is said, not refused: nothing depends on it. README.md is a file of the version itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeGuard

from adapterbay.registry.admission.documents import STATE_FILE, read_bytes, read_document
from adapterbay.registry.admission.front_matter import MAX_FRONT_MATTER, front_matter
from adapterbay.registry.admission.regular_file import open_regular
from adapterbay.registry.errors import AdapterbayError
from adapterbay.registry.manifest import README_FILE, is_plain

RESULT_FILES: Final = ("eval_results.json", "all_results.json")
MAX_METRICS: Final = 100

_NO_RESULTS = re.compile(r"epoch|step|total_flos|(.*_)?(runtime|per_second|preparation_time|samples)|num_.*")
"""Timings and counts that the Trainer mixes with metrics."""
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,15})")


@dataclass(frozen=True, slots=True)
class Evidence:
    """`record` is the training record, None if nothing was found; `findings` are lines for people."""

    record: dict[str, Any] | None
    findings: tuple[str, ...]


def training_evidence(beside: Mapping[str, Path], readme: Path | None, folder_name: str = "") -> Evidence:
    """What can be found. `folder_name` tells which checkpoint it is (`checkpoint-500`)."""
    record: dict[str, Any] = {}
    sources: list[str] = []
    findings: list[str] = []
    documents: dict[str, dict[str, Any]] = {}
    for name in (*RESULT_FILES, STATE_FILE):
        if name in beside:
            try:
                documents[name] = read_document(beside[name], name, follow=False)
            except AdapterbayError as error:
                findings.append(f"{name} was not read: {error.message}")
    metrics, origin, problem = _metrics(documents, folder_name)
    if problem:
        findings.append(problem)
    if metrics:
        record["metrics"] = metrics
        sources.append(origin)
        shown = ", ".join(f"{key} {value:.4g}" for key, value in list(metrics.items())[:8])
        findings.append(f"metrics: {shown} (from {origin})")
    if STATE_FILE in documents and (course := _course(documents[STATE_FILE], folder_name)):
        record |= course
        sources.append(STATE_FILE)
        findings.append(f"{_course_line(course)} (from {STATE_FILE})")
    found = _card(_front_matter_of(readme))
    if found:
        record |= found
        sources.append(README_FILE)
        findings.append(f"{_card_line(found)} (from {README_FILE})")
    if not record:
        return Evidence(None, tuple(findings))
    return Evidence({"source": ", ".join(dict.fromkeys(sources)), **record}, tuple(findings))


def _metrics(documents: Mapping[str, Mapping[str, Any]], folder_name: str) -> tuple[dict[str, float], str, str | None]:
    """The metrics, where they are from, and why there are none where there could have been some."""
    for name in RESULT_FILES:
        found = _plain_metrics(documents.get(name, {}))
        if found:
            return found, name, None
    if STATE_FILE not in documents:
        return {}, "", None
    state = documents[STATE_FILE]
    step = state.get("global_step")
    if _best_elsewhere(state, folder_name):
        return {}, "", f"{STATE_FILE} does not say which of its evaluations is of these weights: no metrics were taken"
    log = state.get("log_history")
    entries = [entry for entry in log if isinstance(entry, dict)] if isinstance(log, list) else []
    evaluations = [entry for entry in entries if any(key.startswith("eval_") for key in entry)]
    own = [entry for entry in evaluations if entry.get("step") == step]
    if own:
        merged = {key: value for entry in own for key, value in entry.items() if key.startswith("eval_")}
        return _plain_metrics(merged), STATE_FILE, None
    if evaluations:
        return {}, "", f"{STATE_FILE} has no evaluation of these weights (step {step}): no metrics were taken"
    losses = [entry for entry in entries if entry.get("step") == step and "train_loss" in entry]
    return _plain_metrics({"train_loss": losses[-1]["train_loss"]} if losses else {}), STATE_FILE, None


def _best_elsewhere(state: Mapping[str, Any], folder_name: str) -> bool:
    """Whether the folder may hold the weights of the best checkpoint instead of the last ones.

    The Trainer loads it at the end (load_best_model_at_end) and does not say so.
    """
    step, best = state.get("global_step"), state.get("best_global_step")
    named = _CHECKPOINT.fullmatch(folder_name)
    return best not in (None, step) and not (named and _is_count(step) and int(named[1]) == step)


def _plain_metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """`eval_accuracy` is `accuracy`; `eval_loss` keeps its name, as the trainer's record has it."""
    found: dict[str, float] = {}
    for key, value in sorted(values.items()):
        short = key if key == "eval_loss" else key.removeprefix("eval_")
        if not short or len(short) > 64 or not is_plain(short) or _NO_RESULTS.fullmatch(short):
            continue
        if _is_number(value) and len(found) < MAX_METRICS:
            found[short] = value
    return found


def _course(state: Mapping[str, Any], folder_name: str) -> dict[str, Any]:
    """Steps and epochs that were trained, and the settings that the state has."""
    found: dict[str, Any] = {}
    if _is_count(state.get("global_step")) and state["global_step"] > 0:
        found["steps"] = state["global_step"]
    if _is_number(state.get("epoch")) and state["epoch"] > 0:
        found["epochs"] = state["epoch"]
    best = state.get("best_global_step")
    if found and _is_count(best) and _best_elsewhere(state, folder_name):
        found["best_step"] = best
    settings: dict[str, Any] = {}
    for key, name in (("num_train_epochs", "epochs"), ("max_steps", "max_steps"), ("train_batch_size", "batch_size")):
        if _is_count(state.get(key)) and state[key] > 0:
            settings[name] = state[key]
    log = state.get("log_history")
    rates = [
        entry["learning_rate"]
        for entry in (log if isinstance(log, list) else [])
        if isinstance(entry, dict) and _is_number(entry.get("learning_rate"))
    ]
    if rates:
        settings["learning_rate"] = max(rates)
    return found | ({"settings": settings} if settings and found else {})


def _course_line(course: Mapping[str, Any]) -> str:
    parts = [f"{course['steps']} steps"] if "steps" in course else []
    if "epochs" in course:
        parts.append(f"{course['epochs']:.4g} epochs")
    rate = course.get("settings", {}).get("learning_rate")
    if rate is not None:
        parts.append(f"learning rate up to {rate:.4g}")
    if "best_step" in course:
        parts.append(f"the best checkpoint at step {course['best_step']}")
    return "trained for " + ", ".join(parts)


def _card(card: Mapping[str, list[str]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    datasets = card.get("datasets", [])
    if datasets:
        found["data"] = {"datasets": datasets}
        if len(datasets) == 1:
            found["data"]["source"] = f"hf:{datasets[0]}"
    if card.get("license"):
        found["license"] = card["license"][0]
    if card.get("language"):
        found["language"] = card["language"]
    return found


def _card_line(found: Mapping[str, Any]) -> str:
    parts = []
    if "data" in found:
        parts.append(f"data {', '.join(found['data']['datasets'])}")
    if "license" in found:
        parts.append(f"licence {found['license']}")
    if "language" in found:
        parts.append(f"language {', '.join(found['language'])}")
    return "; ".join(parts)


def base_of_card(readme: Path | None) -> str | None:
    """The one base that a model card names as `ORG/REPO`; None if there is none or several."""
    named = _front_matter_of(readme).get("base_model", [])
    return named[0] if len(named) == 1 else None


def _front_matter_of(readme: Path | None) -> dict[str, list[str]]:
    if readme is None:
        return {}
    with open_regular(readme, README_FILE) as file:
        return front_matter(file.read(MAX_FRONT_MATTER))


def own_chat_template(beside: Mapping[str, Path]) -> Any:
    """The chat template that lies beside the adapter: text, or named ones; None if there is none.

    Raises Rejected if the file that would hold it cannot be read.
    """
    if "chat_template.jinja" in beside:
        try:
            return read_bytes(beside["chat_template.jinja"], "chat_template.jinja", follow=False).decode("utf-8")
        except UnicodeDecodeError:
            return None
    for name in ("chat_template.json", "tokenizer_config.json"):
        if name in beside:
            template = read_document(beside[name], name, follow=False).get("chat_template")
            if template is not None:
                return template
    return None


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**1000
