"""How architectures name their parts, for the recipes of `peft_zoo`. By `model_type` of config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

CLASSIFIERS: Final = ("llama", "gpt2", "qwen2", "bert", "roberta", "distilbert", "t5")


@dataclass(frozen=True)
class Layout:
    """How an architecture names its parts. `linear` are three layers of a block, the last of its feed-forward part."""

    linear: tuple[str, ...]
    ia3: tuple[str, ...]  # key, value and feed-forward down
    down: str
    norms: tuple[str, ...]
    embedding: str
    output: str | None = None  # the language-model head
    bias: bool = False  # whether its linear layers have biases
    task: str = "CAUSAL_LM"
    head: tuple[str, ...] = ()  # modules of a classification head that PEFT does not save by itself
    lacks: tuple[str, ...] = ()  # recipes that PEFT or transformers cannot run on it


_LLAMA = Layout(
    ("q_proj", "v_proj", "down_proj"),
    ("k_proj", "v_proj", "down_proj"),
    "down_proj",
    ("input_layernorm", "norm"),
    "embed_tokens",
    "lm_head",
)
LINEAR_ONLY: Final = (
    *("adamss", "beft", "boft", "boft_butterfly", "c3a", "coft", "delora", "glora", "glora_vectors", "hra", "hra_gs"),
    *("kasa", "lily", "loha", "lokr", "lokr_low_rank", "miss", "miss_bat", "miss_mini", "oft", "oft_exact"),
    *("oft_shared", "olora", "osf", "peanut", "peanut_deep", "poly", "psoft", "road", "road_2", "road_4", "shadow"),
    *("shira", "supertuning", "supertuning_low_rank"),
)
"""What PEFT does not put on transformers' Conv1D."""
_NO_VIRTUAL: Final = ("prefix_tuning", "prefix_projection", "cartridge", "adaption_prompt", "p_tuning_lstm")
_BERT = Layout(
    ("query", "value", "output.dense"),
    ("key", "value", "output.dense"),
    "output.dense",
    ("LayerNorm",),
    "word_embeddings",
    bias=True,
    task="FEATURE_EXTRACTION",
    lacks=(*_NO_VIRTUAL, "cpt", "alora", "multitask_prompt_tuning"),
)
LAYOUTS: Final[Mapping[str, Layout]] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "smollm3"), _LLAMA),
    "gpt2": Layout(
        ("c_attn", "mlp.c_proj"),
        ("c_attn", "mlp.c_proj"),
        "mlp.c_proj",
        ("ln_1", "ln_f"),
        "wte",
        "lm_head",
        bias=True,
        lacks=LINEAR_ONLY,
    ),
    "opt": Layout(
        ("q_proj", "v_proj", "fc2"),
        ("k_proj", "v_proj", "fc2"),
        "fc2",
        ("self_attn_layer_norm", "final_layer_norm"),
        "embed_tokens",
        "lm_head",
        bias=True,
        lacks=("adaption_prompt",),
    ),
    "gpt_neox": Layout(
        ("query_key_value", "dense_4h_to_h"),
        ("query_key_value", "dense_4h_to_h"),
        "dense_4h_to_h",
        ("input_layernorm", "final_layer_norm"),
        "embed_in",
        "embed_out",
        bias=True,
        lacks=("adaption_prompt",),
    ),
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": Layout(
        ("q_lin", "v_lin", "ffn.lin2"),
        ("k_lin", "v_lin", "ffn.lin2"),
        "ffn.lin2",
        ("sa_layer_norm", "output_layer_norm"),
        "word_embeddings",
        bias=True,
        task="FEATURE_EXTRACTION",
        head=("pre_classifier", "classifier"),
        lacks=(*_NO_VIRTUAL, "cpt", "alora", "prompt_tuning", "p_tuning", "multitask_prompt_tuning"),
    ),
    "t5": Layout(
        ("q", "v", "wo"),
        ("k", "v", "wo"),
        "wo",
        ("layer_norm", "final_layer_norm"),
        "shared",
        "lm_head",
        task="SEQ_2_SEQ_LM",
        head=("classification_head",),
        lacks=("adaption_prompt", "alora", "cartridge", "cpt"),
    ),
}
