"""Module paths of adapters against tensor names of checkpoints.

An adapter names modules as they are in the class it was trained on (`bert.encoder.layer.0…` in
BertForSequenceClassification, `encoder.layer.0…` in BertModel); a checkpoint names them as they were in the class it
was saved from. The two differ by the base-model prefix of the architecture, on one side or the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

BASE_MODEL_PREFIXES: Final = frozenset(
    {
        "albert",
        "backbone",
        "bert",
        "biogpt",
        "camembert",
        "convbert",
        "data2vec_text",
        "deberta",
        "decoder",
        "distilbert",
        "electra",
        "encoder",
        "ernie",
        "esm",
        "fnet",
        "gpt_neox",
        "ibert",
        "longformer",
        "luke",
        "mobilebert",
        "model",
        "mpnet",
        "nomic_bert",
        "nystromformer",
        "rembert",
        "roberta",
        "roberta_prelayernorm",
        "roformer",
        "rwkv",
        "splinter",
        "transformer",
        "yoso",
    }
)
"""`base_model_prefix` of the text architectures in transformers 5."""

CONV1D_MODEL_TYPES: Final = frozenset({"decision_transformer", "gpt2", "imagegpt", "openai-gpt"})
"""Architectures whose linear layers are transformers' Conv1D, with weights stored as [in, out]."""

EMBEDDINGS: Final = frozenset(
    {
        "embed_in",
        "embed_positions",
        "embed_tokens",
        "position_embeddings",
        "relative_attention_bias",
        "shared",
        "token_type_embeddings",
        "word_embeddings",
        "wpe",
        "wte",
    }
)
"""Tables of rows: what is looked up, not multiplied."""

OUTPUTS: Final = frozenset({"embed_out", "lm_head"})

EMBEDDING_AND_OUTPUT: Final = EMBEDDINGS | OUTPUTS
"""The language-model head, which is the input embedding itself in some bases."""


def backbone_path(module: str, base_shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The name that the checkpoint gives to `module`: `<answer>.weight` is in `base_shapes`. None: it has none.

    A leading prefix is taken away only if the checkpoint is that of a bare backbone (no tensor of it begins with the
    prefix), and one is added only if the checkpoint has it.
    """
    if f"{module}.weight" in base_shapes:
        return module
    first, dot, rest = module.partition(".")
    if dot and first in BASE_MODEL_PREFIXES and f"{rest}.weight" in base_shapes and not _begins(first, base_shapes):
        return rest
    for prefix in sorted(BASE_MODEL_PREFIXES):
        if f"{prefix}.{module}.weight" in base_shapes:
            return f"{prefix}.{module}"
    return None


def _begins(prefix: str, base_shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return any(name.startswith(f"{prefix}.") for name in base_shapes)


def hidden_size(base_config: Mapping[str, Any]) -> int | None:
    """The width of the last hidden state, by the names that architectures give to it."""
    text = base_config.get("text_config")
    for config in (base_config, text if isinstance(text, Mapping) else {}):
        for key in ("word_embed_proj_dim", "hidden_size", "n_embd", "d_model", "dim"):
            value = config.get(key)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None
