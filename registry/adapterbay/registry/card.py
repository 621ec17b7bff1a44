"""The model card of a version: README.md as the Hugging Face Hub reads it, made of the manifest alone.

The same manifest gives the same bytes anywhere. Front matter: https://huggingface.co/docs/hub/model-cards. What a
person wrote stays: their text as it is, their front matter completed. The cards that PEFT and our own trainer write
without being asked are replaced.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from typing import Any, Final

import yaml

from adapterbay.registry.base.sources import PACKAGED_BASES
from adapterbay.registry.card_text import MARK, body
from adapterbay.registry.errors import InvalidArgument
from adapterbay.registry.manifest import Manifest
from adapterbay.registry.markdown import plain_text, without_private_path

PIPELINES: Final = {
    "causal-lm": "text-generation",
    "sequence-classification": "text-classification",
    "token-classification": "token-classification",
    "feature-extraction": "feature-extraction",
    "seq2seq-lm": "text2text-generation",
}
"""The Hub's name for each task (https://huggingface.co/docs/hub/models-tasks)."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95}){0,7}")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_BARE_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_DATASET_FILE = re.compile(r".*\.(csv|tsv|jsonl|json|parquet)", re.IGNORECASE)
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|code|multilingual")
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}")
_METRIC = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._@/-]{0,63}")
_METRIC_TYPES: Final = {"macro_f1": "f1", "eval_loss": "loss"}
_NOT_RESULTS = re.compile(r"(train|base|majority)_.*|.*_tokens")
"""Figures of the training, of the base and of the data: no results of the adapter, so not in the model index."""

# The Hub reads the block with the same expression (huggingface_hub.repocard.REGEX_YAML_BLOCK).
_FRONT_MATTER = re.compile(r"\s*---(?:\r\n|\r|\n)(?P<yaml>[\S\s]*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)")
_MAX_FRONT_MATTER: Final = 64 * 1024

_TRAINER_CARD: Final = ("# Adapter for ", "made by adapterbay from", "Everything else is in `training.json`.")
_BOILERPLATE = re.compile(
    r"|#.*|(- )?\*\*[^*]+\*\*|(- )?(\*\*[^*]+:?\*\*:?\s*)?\[More Information Needed\]|- PEFT \S+|\{\{.*\}\}"
    r"|Use the code below to get started with the model\."
    r"|Users \(both direct and downstream\) should be made aware of the risks, biases and limitations of the model\."
    r" More information needed for further recommendations\."
    r"|Carbon emissions can be estimated using the \[Machine Learning Impact calculator\]\(\S+\)"
    r" presented in \[Lacoste et al\. \(2019\)\]\(\S+\)\."
    r"|The following `bitsandbytes` quantization config was used during training:"
    r"|- (quant_method|_?load_in_\dbit|llm_int8_\w+|bnb_4bit_\w+): .*"
)
"""A line of the template that PEFT fills (huggingface_hub/templates/modelcard_template.md) and nobody edited."""

_log = logging.getLogger(__name__)


def render_card(manifest: Manifest, *, name: str, own_readme: bytes | None = None, version: int | None = None) -> bytes:
    """The card, UTF-8. `name` is the repository (`ORG/REPO`) or the adapter; `version` is the tag `vN` in its examples.

    `own_readme` is the version's own README.md. Raises InvalidArgument for a `name` that is none.
    """
    if _NAME.fullmatch(name) is None:
        raise InvalidArgument(f"{name[:80]!r} is not the name of an adapter or repository.", field="name")
    ours = front_matter(manifest, name=name)
    theirs, text = _read_own(own_readme)
    return _document(
        _completed(theirs, ours), text or body(manifest, name=name, version=version, base_id=base_id(manifest))
    )


def front_matter(manifest: Manifest, *, name: str) -> dict[str, Any]:
    """The metadata of the card, in the order in which it is written."""
    from huggingface_hub import ModelCardData

    training, base = manifest.training or {}, base_id(manifest)
    results = _results(manifest)
    data = ModelCardData(
        base_model=base,
        datasets=[dataset] if (dataset := hub_dataset(_source(training))) else None,
        eval_results=results or None,
        language=_languages(training),
        library_name="peft",
        license=_license(training),
        model_name=name.rpartition("/")[2] if results else None,
        pipeline_tag=PIPELINES[manifest.task],
        tags=_tags(manifest, base),
    )
    if base is not None:
        data["base_model_relation"] = "adapter"
    found: dict[str, Any] = data.to_dict()  # type: ignore[no-untyped-call]
    first = (
        "license",
        "language",
        "library_name",
        "base_model",
        "base_model_relation",
        "pipeline_tag",
        "tags",
        "datasets",
    )
    return {key: found[key] for key in (*first, *sorted(found.keys() - set(first))) if key in found}


def base_id(manifest: Manifest) -> str | None:
    """The base's repository on the Hub, if it is known to have one; never a path."""
    scheme, separator, target = manifest.base_reference.partition(":")
    if separator and scheme == "hub":
        repository = target.partition("@")[0]
        return repository if _HUB_ID.fullmatch(repository) or _BARE_HUB_ID.fullmatch(repository) else None
    if separator and scheme == "package" and target in PACKAGED_BASES:
        return PACKAGED_BASES[target]
    named = manifest.peft_config.get("base_model_name_or_path")
    if not isinstance(named, str) or _HUB_ID.fullmatch(named) is None or named.endswith(".gguf"):
        return None
    # `out/base`, trained from a relative path, looks like a repository.
    return None if f"/{target}".endswith(f"/{named}") else named


def hub_dataset(source: str) -> str | None:
    """The data set on the Hub that a source of the trainer names: `hf:NAME[:SPLIT]` or `ORG/NAME`."""
    if source.startswith("hf:"):
        named = source.removeprefix("hf:").partition(":")[0]
        return named if _HUB_ID.fullmatch(named) or _BARE_HUB_ID.fullmatch(named) else None
    return source if _HUB_ID.fullmatch(source) and not _DATASET_FILE.fullmatch(source) else None


def _source(training: Mapping[str, Any]) -> str:
    data = training.get("data")
    source = data.get("source") if isinstance(data, Mapping) else None
    return source if isinstance(source, str) else ""


def _tags(manifest: Manifest, base: str | None) -> list[str]:
    tags = ["adapterbay", manifest.peft_type.lower(), manifest.task]
    if manifest.peft_config.get("use_rslora") is True:
        tags.append("rslora")
    if isinstance((manifest.training or {}).get("fusion"), Mapping):
        tags.append("fusion")
    if base:
        tags.append(f"base_model:adapter:{base}")
    return tags


def _results(manifest: Manifest) -> list[Any]:
    from huggingface_hub import EvalResult

    training = manifest.training or {}
    source = _source(training)
    dataset, metrics = hub_dataset(source), training.get("metrics")
    if not isinstance(metrics, Mapping):
        return []
    shown = dataset or plain_text(without_private_path(source)) or "held-out rows"
    return [
        EvalResult(
            task_type=PIPELINES[manifest.task],
            dataset_type=dataset or "private",
            dataset_name=shown,
            dataset_split=source.split(":")[2] if dataset and source.count(":") == 2 else None,
            metric_type=_METRIC_TYPES.get(metric, metric),
            metric_name=metric,
            metric_value=value,
        )
        for metric, value in sorted(metrics.items())
        if isinstance(metric, str)
        and _METRIC.fullmatch(metric)
        and not _NOT_RESULTS.fullmatch(metric)
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    ]


def _languages(training: Mapping[str, Any]) -> list[str] | None:
    data = training.get("data")
    for place in (training, data if isinstance(data, Mapping) else {}):
        value = place.get("language")
        given = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        found = [item for item in given if isinstance(item, str) and _LANGUAGE.fullmatch(item)]
        if found:
            return found
    return None


def _license(training: Mapping[str, Any]) -> str | None:
    value = training.get("license")
    return value.lower() if isinstance(value, str) and _LICENSE.fullmatch(value) else None


def _read_own(own_readme: bytes | None) -> tuple[dict[str, Any], str]:
    """The front matter to keep and the text to keep; the text is empty where nobody wrote one."""
    if own_readme is None:
        return {}, ""
    content = own_readme.decode("utf-8-sig", errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    match = _FRONT_MATTER.match(content)
    text = content[match.end() :] if match else content
    theirs = _parse_front_matter(match["yaml"]) if match else {}
    return _publishable(theirs), "" if _is_generated(text) else text


def _is_generated(text: str) -> bool:
    if not text.strip() or MARK in text or all(phrase in text for phrase in _TRAINER_CARD):
        return True
    lines = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL).splitlines()
    return "[More Information Needed]" in text and all(_BOILERPLATE.fullmatch(line.strip()) for line in lines)


def _parse_front_matter(block: str) -> dict[str, Any]:
    """A front matter that cannot be read is left out with a warning: the Hub would refuse the whole commit for it."""
    if len(block) > _MAX_FRONT_MATTER:
        _log.warning("The front matter of README.md has %d characters: it was left out of the card.", len(block))
        return {}
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(block, Loader=yaml.SafeLoader)):
            raise yaml.YAMLError("it uses aliases, which can expand without end")
        value = yaml.safe_load(block)
        if value is not None and not isinstance(value, dict):
            raise yaml.YAMLError(f"it is a {type(value).__name__}, not a mapping")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        _log.warning("The front matter of README.md is not usable and was left out of the card: %s", plain_text(error))
        return {}
    return {key: item for key, item in (value or {}).items() if isinstance(key, str)}


def _publishable(theirs: dict[str, Any]) -> dict[str, Any]:
    """Without what is empty, and without local paths that PEFT wrote for the base: the Hub refuses a card with one."""
    kept = {key: value for key, value in theirs.items() if value is not None and value != [] and value != ""}
    base = kept.get("base_model")
    named = base if isinstance(base, list) else [base]
    if not all(isinstance(item, str) and (_HUB_ID.fullmatch(item) or _BARE_HUB_ID.fullmatch(item)) for item in named):
        kept.pop("base_model", None)
        kept.pop("base_model_relation", None)
    tags = kept.get("tags")
    if isinstance(tags, list):
        kept["tags"] = [
            tag for tag in tags if not re.fullmatch(r"base_model:(adapter:)?([/~.]|[A-Za-z]:\\).*", str(tag))
        ]
    return kept


def _completed(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    merged = {**theirs, **{key: value for key, value in ours.items() if key not in theirs}}
    if isinstance(theirs.get("tags"), list):
        merged["tags"] = [*theirs["tags"], *(tag for tag in ours["tags"] if tag not in theirs["tags"])]
    if theirs.get("base_model") not in (None, ours.get("base_model")):
        merged["tags"] = [tag for tag in merged["tags"] if tag != f"base_model:adapter:{ours.get('base_model')}"]
    return merged


def _document(metadata: Mapping[str, Any], text: str) -> bytes:
    block = yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True, width=10_000)
    return f"---\n{block}---\n{text if text.startswith(chr(10)) else chr(10) + text}".encode()
