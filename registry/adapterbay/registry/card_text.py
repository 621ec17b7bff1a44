"""The text of a model card: what the adapter is, how to load it, and what it was trained from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from adapterbay.registry.admission.methods import METHODS
from adapterbay.registry.manifest import HEAD_TASKS, Manifest, TaskName
from adapterbay.registry.markdown import code, escaped, plain_text, table, without_private_path

MARK: Final = "<!-- Made by adapterbay from the version's manifest. Remove this line to keep changes of your own. -->"
"""By this line a card is known as ours, so that the next version's card replaces it."""

MAX_LABELS: Final = 50
MAX_ROWS: Final = 80
MAX_LABELS_IN_CODE: Final = 20

_TASKS: Final[Mapping[TaskName, str]] = {
    "causal-lm": "that generates text",
    "sequence-classification": "that labels text",
    "token-classification": "that labels words",
    "feature-extraction": "that turns text into vectors",
    "seq2seq-lm": "that turns text into other text",
}
_CLASSES: Final[Mapping[TaskName, str]] = {
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "feature-extraction": "AutoModel",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
}
NOT_SETTINGS: Final = frozenset({"output", "overwrite", "threads"})
"""Settings that say where a run was, not what it computed."""


def body(manifest: Manifest, *, name: str, version: int | None, base_id: str | None) -> str:
    """Everything below the front matter."""
    training = manifest.training or {}
    sections = [
        _head(manifest, name, version),
        _peft_section(manifest, name, version, base_id),
        _adapterbay_section(name, version),
        _fusion_section(training),
        _training_section(training),
        _settings_section(training),
    ]
    return "\n" + "\n\n".join("\n".join(section) for section in sections if section) + "\n"


def display_base(manifest: Manifest) -> str:
    """The base as the manifest names it, without the folders of the machine it was on."""
    return without_private_path(manifest.base_reference)


def figure(value: Any) -> str:
    """A number with four significant digits; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return plain_text(value)
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def flattened(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as dotted names and text, sorted; what is unset or empty is left out."""
    for key, item in sorted(value.items()):
        path = f"{prefix}{key}"
        if isinstance(item, Mapping):
            yield from flattened(item, f"{path}.")
        elif isinstance(item, list):
            if item:
                yield path, ", ".join(without_private_path(str(part)) for part in item)
        elif item is not None:
            yield path, without_private_path(str(item)) if not isinstance(item, float) else figure(item)


def _head(manifest: Manifest, name: str, version: int | None) -> list[str]:
    method = method_name(manifest)
    facts = [
        ("Task", escaped(manifest.task)),
        ("Labels", _labels(manifest.labels)),
        ("Method", _method_line(manifest, method)),
        ("Base", code(display_base(manifest))),
        ("Base fingerprint", code(manifest.base_fingerprint)),
        ("Digest", code(manifest.digest)),
        ("Parents", "<br>".join(code(parent) for parent in manifest.parents)),
    ]
    of = f", version {version}" if version is not None else ""
    return [
        MARK,
        "",
        f"# {escaped(name)}",
        "",
        f"A {escaped(method)} adapter {_TASKS[manifest.task]}{of}. It is one of many that one copy of its base serves.",
        "",
        *table(("", ""), ((f"**{key}**", value) for key, value in facts if value)),
    ]


def method_name(manifest: Manifest) -> str:
    """What people call the method."""
    if manifest.peft_type == "LORA" and manifest.peft_config.get("use_rslora") is True:
        return "rsLoRA"
    known = METHODS.get(manifest.peft_type)
    return known.title if known else manifest.peft_type


def _method_line(manifest: Manifest, method: str) -> str:
    rank = f", rank {manifest.rank}" if manifest.rank else ""
    alpha = manifest.peft_config.get("lora_alpha", 8) if manifest.peft_type == "LORA" else None
    return escaped(method) + rank + (f", alpha {escaped(figure(alpha))}" if alpha is not None else "")


def _labels(labels: Sequence[str]) -> str:
    shown = ", ".join(code(label, 80) for label in labels[:MAX_LABELS])
    return shown + (f" and {len(labels) - MAX_LABELS} more" if len(labels) > MAX_LABELS else "")


def _peft_section(manifest: Manifest, name: str, version: int | None, base_id: str | None) -> list[str]:
    if manifest.peft_type == "BOTTLENECK":
        return ["PEFT has no bottleneck adapters: this one is a type of adapterbay's own, in a folder of PEFT's shape."]
    model_class = _CLASSES[manifest.task]
    imports = ["from peft import PeftModel", f"from transformers import {model_class}, AutoTokenizer"]
    scheme, _, target = manifest.base_reference.partition(":")
    source, setup = "base", ['base = "path/to/the/base"']
    if base_id is not None:
        revision = target.partition("@")[2] if scheme == "hub" else ""
        source = _literal(base_id) + (f", revision={_literal(revision)}" if revision else "")
        setup = []
    elif scheme == "package":
        imports.append("from adapterbay.registry import locate")
        setup = [f"base = locate({_literal(manifest.base_reference)}).folder"]
    extra = ""
    if manifest.task in HEAD_TASKS:
        extra = f", num_labels={len(manifest.labels)}"
        if len(manifest.labels) <= MAX_LABELS_IN_CODE:
            pairs = ", ".join(f"{index}: {_literal(label)}" for index, label in enumerate(manifest.labels))
            extra = f", id2label={{{pairs}}}"
    tag = f', revision="v{version}"' if version is not None else ""
    return [
        "## Load with PEFT",
        "",
        "```python",
        *imports,
        "",
        *setup,
        f"model = {model_class}.from_pretrained({source}{extra})",
        f"model = PeftModel.from_pretrained(model, {_literal(name)}{tag})",
        f"tokenizer = AutoTokenizer.from_pretrained({source})",
        "```",
    ]


def _literal(text: str) -> str:
    """A Python string on one line, in ASCII."""
    return json.dumps(text)


def _adapterbay_section(name: str, version: int | None) -> list[str]:
    folder = name.rpartition("/")[2]
    if name.count("/") == 1:
        reference = f"hub:{name}" + (f"@v{version}" if version is not None else "")
    else:
        reference = name + (f"@{version}" if version is not None else "")
    return [
        "## Load with adapterbay",
        "",
        "```bash",
        f"registry pull {reference} ./{folder}",
        f"registry push ./{folder} {folder.lower()}",
        "```",
        "",
        "Both keep the digest: sha256 of `adapterbay/manifest.json` is the identity of this version everywhere.",
    ]


def _fusion_section(training: Mapping[str, Any]) -> list[str]:
    fusion = training.get("fusion")
    if not isinstance(fusion, Mapping):
        return []
    parents, weights = fusion.get("parents"), fusion.get("weights")
    rows: list[tuple[str, str]] = []
    if isinstance(parents, list) and isinstance(weights, list) and len(parents) == len(weights):
        rows = [(code(parent), escaped(figure(weight))) for parent, weight in zip(parents, weights, strict=True)]
    others = {key: value for key, value in fusion.items() if key not in ("parents", "weights")}
    facts = [(escaped(key), escaped(value)) for key, value in flattened(others)]
    return [
        "## Fused from",
        "",
        *(table(("parent", "weight"), rows[:MAX_ROWS]) if rows else []),
        "",
        *table(("setting", "value"), facts[:MAX_ROWS]),
    ]


def _training_section(training: Mapping[str, Any]) -> list[str]:
    data = training.get("data")
    data = data if isinstance(data, Mapping) else {}
    facts = [
        ("Data", code(without_private_path(data["source"])) if isinstance(data.get("source"), str) else ""),
        ("Data digest", code(data["digest"]) if isinstance(data.get("digest"), str) else ""),
        ("Training rows", _count(data.get("train_rows"))),
        ("Held-out rows", _count(data.get("eval_rows"))),
        ("Seed", _count(training.get("seed"))),
        ("Trained parameters", _count(training.get("trainable_parameters"))),
    ]
    versions = training.get("versions")
    if isinstance(versions, Mapping):
        facts.append(
            ("Libraries", escaped(", ".join(f"{key} {value}" for key, value in sorted(versions.items())), 400))
        )
    rows = [(f"**{key}**", value) for key, value in facts if value]
    metrics = training.get("metrics")
    figures = sorted(metrics.items()) if isinstance(metrics, Mapping) else []
    lines = ["## Training", "", *table(("", ""), rows)] if rows else []
    if figures:
        lines += ["", "## Metrics", ""] if rows else ["## Metrics", ""]
        lines += table(
            ("metric", "value"), [(escaped(key), escaped(figure(value))) for key, value in figures[:MAX_ROWS]]
        )
    return lines


def _count(value: Any) -> str:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else ""


def _settings_section(training: Mapping[str, Any]) -> list[str]:
    settings = training.get("settings")
    if not isinstance(settings, Mapping):
        return []
    kept = {key: value for key, value in settings.items() if key not in NOT_SETTINGS}
    rows = [(escaped(key), escaped(value)) for key, value in flattened(kept)]
    if not rows:
        return []
    return [
        "<details><summary>All settings</summary>",
        "",
        *table(("setting", "value"), rows[:MAX_ROWS]),
        "",
        "</details>",
    ]
