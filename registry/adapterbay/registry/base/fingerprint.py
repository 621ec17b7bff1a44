"""The fingerprint of a base: a digest of its config, its weights and its tokenizer with the chat template.

Two bases with one fingerprint compute the same thing. It does not depend on how the weights are cut into shards, on
where the folder lies, on the form of the JSON, nor on whether the chat template is a file of its own.

What is left out, since it changes no hidden state of the backbone:
- config.json: where it came from, library versions, the storage dtype (the dtype of every tensor is in the
  fingerprint), the class names, label names and other settings of a task's head, and what a forward pass returns or
  caches;
- tokenizer.json: the truncation and padding of its last use;
- tokenizer_config.json: where it came from;
- generation_config.json: defaults of sampling, which every request states for itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from adapterbay.registry.admission.safetensors_file import read_header
from adapterbay.registry.digest import canonical_json, digest_bytes, digest_json, digest_stream, parse_json_object
from adapterbay.registry.errors import Corrupted

FINGERPRINT_VERSION: Final = 1
"""Part of the fingerprint and of the cache key: raised when the definition above changes."""

VOLATILE_CONFIG_KEYS: Final = frozenset(
    {
        "_commit_hash",
        "_model_name_or_path",
        "_name_or_path",
        "architectures",
        "dtype",
        "finetuning_task",
        "gradient_checkpointing",
        "id2label",
        "label2id",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "use_cache",
        "use_return_dict",
    }
)
VOLATILE_TOKENIZER_KEYS: Final = frozenset(
    {
        "_commit_hash",
        "chat_template",
        "name_or_path",
        "special_tokens_map_file",
        "tokenizer_file",
        "transformers_version",
    }
)

TOKENIZER_JSON_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
TOKENIZER_OTHER_FILES: Final = (
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "spm.model",
    "tokenizer.model",
    "vocab.txt",
)
CHAT_TEMPLATE_FILE: Final = "chat_template.jinja"


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The digest of the whole, and those of two parts of it (None: the base has no such part)."""

    fingerprint: str
    tokenizer_digest: str | None
    chat_template_digest: str | None


def tokenizer_files(folder: Path) -> list[Path]:
    """Those files of `folder` that go into the tokenizer's digest or hold a chat template."""
    names = (*TOKENIZER_JSON_FILES, *TOKENIZER_OTHER_FILES, CHAT_TEMPLATE_FILE, "chat_template.json")
    return [path for name in names if (path := folder / name).is_file()]


def compute(folder: Path, config: Mapping[str, Any], weights: Sequence[Path]) -> Fingerprint:
    """Reads everything once, in bounded memory. Raises Corrupted for incomplete weights, Rejected for bad JSON."""
    template = chat_template(folder)
    tokenizer = tokenizer_digest(folder)
    template_digest = None if template is None else digest_bytes(canonical_json(template))
    document = {
        "fingerprint_version": FINGERPRINT_VERSION,
        "config": _without_volatile(config),
        "weights": _weights_digest(weights),
        "tokenizer": tokenizer,
        "chat_template": template_digest,
    }
    return Fingerprint(digest_json(document), tokenizer, template_digest)


def chat_template(folder: Path) -> Any:
    """The chat template: text, or a list of named ones; None if there is none. A file of its own goes first."""
    if (path := folder / CHAT_TEMPLATE_FILE).is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (path := folder / name).is_file():
            template = parse_json_object(path.read_bytes(), name).get("chat_template")
            if template is not None:
                return template
    return None


def tokenizer_digest(folder: Path) -> str | None:
    """The digest of the tokenizer in `folder` without its chat template; None if there is no tokenizer."""
    parts: dict[str, Any] = {}
    for name in TOKENIZER_JSON_FILES:
        if (path := folder / name).is_file():
            document = parse_json_object(path.read_bytes(), name)
            if name == "tokenizer.json":
                document = {key: value for key, value in document.items() if key not in ("truncation", "padding")}
            elif name == "tokenizer_config.json":
                document = {key: value for key, value in document.items() if key not in VOLATILE_TOKENIZER_KEYS}
            parts[name] = digest_json(document)
    for name in TOKENIZER_OTHER_FILES:
        if (path := folder / name).is_file():
            with path.open("rb") as file:
                parts[name] = digest_stream(file, None)
    return digest_json(parts) if parts else None


def _without_volatile(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_volatile(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in VOLATILE_CONFIG_KEYS
    }


def _weights_digest(weights: Iterable[Path]) -> str:
    tensors: list[list[Any]] = []
    for path in weights:
        header = read_header(path, path.name)
        with path.open("rb") as file:
            for tensor in sorted(header.tensors.values(), key=lambda tensor: tensor.begin):
                file.seek(tensor.begin)
                try:
                    digest = digest_stream(file, tensor.nbytes)
                except EOFError as error:
                    raise Corrupted(f"{path} ends inside the tensor {tensor.name}: fetch the base again.") from error
                tensors.append([tensor.name, tensor.dtype, list(tensor.shape), digest])
    hasher = hashlib.sha256()
    for line in sorted(canonical_json(tensor) for tensor in tensors):
        hasher.update(line + b"\n")
    return f"sha256:{hasher.hexdigest()}"
