"""Tiny random bases and adapters, made by transformers and PEFT themselves, with a real tokenizer; what they answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>", "[CLS]", "[SEP]", "[PAD]"]
VOCABULARY = len(SPECIAL) + 256

CAUSAL = ("llama", "qwen2", "gpt2")
OTHER_CAUSAL = ("qwen3", "mistral", "gemma", "gemma2", "gemma3", "opt", "opt-projected", "gpt-neox")
ENCODERS = ("bert", "roberta", "distilbert", "electra", "albert")

TARGETS: dict[str, list[list[str]]] = {
    "llama": [
        ["q_proj", "v_proj"],
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        ["down_proj"],
        ["gate_proj", "up_proj"],
    ],
    "gpt2": [["c_attn"], ["c_attn", "c_proj", "c_fc"], ["mlp.c_proj"], ["c_fc"]],
    "bert": [["query", "value"], ["query", "key", "value", "dense"], ["intermediate.dense"], ["output.dense"]],
}
for _name in ("qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3"):
    TARGETS[_name] = TARGETS["llama"]
TARGETS["opt"] = TARGETS["opt-projected"] = [
    ["q_proj", "v_proj"],
    ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    ["fc2"],
    ["fc1", "out_proj"],
]
TARGETS["gpt-neox"] = [
    ["query_key_value"],
    ["query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h"],
    ["dense_4h_to_h"],
    ["dense_h_to_4h"],
]
TARGETS["electra"] = TARGETS["bert"]
TARGETS["albert"] = [["query", "value"], ["query", "key", "value", "dense", "pooler"], ["ffn"], ["ffn_output"]]
# RoBERTa's head has a layer called `dense`, too, which a target of that name would wrap.
TARGETS["roberta"] = [
    ["query", "value"],
    ["query", "key", "value", "attention.output.dense"],
    ["intermediate.dense"],
    ["output.dense"],
]
TARGETS["distilbert"] = [["q_lin", "v_lin"], ["q_lin", "k_lin", "v_lin", "out_lin"], ["ffn.lin1"], ["ffn.lin2"]]
TARGETS["t5"] = [["q", "v"], ["q", "k", "v", "o", "wi", "wo"], ["wi"], ["wo", "k"]]


def byte_tokenizer(*, encoder: bool = False) -> PreTrainedTokenizerFast:
    """One token for each byte; every text round-trips. `<|im_end|>` is end and padding at once, as in SmolLM2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if encoder:
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def make_model(architecture: str, *, seed: int = 0, hidden: int = 64, layers: int = 3) -> PreTrainedModel:
    """A random model in float32, weights large enough that logits differ clearly between tokens."""
    torch.manual_seed(seed)
    model_type, settings = SHAPES[architecture](hidden, layers)
    config = AutoConfig.for_model(model_type, vocab_size=VOCABULARY, **INITIAL.get(architecture, SPREAD), **settings)
    if architecture in ENCODERS:
        model = AutoModel.from_config(config)
    elif architecture == "t5":
        model = AutoModelForSeq2SeqLM.from_config(config)
        with torch.no_grad():  # tied to the head, it would have every token follow itself
            model.shared.weight.mul_(0.15)
    else:
        model = AutoModelForCausalLM.from_config(config)
    return model


END = SPECIAL.index("<|im_end|>")
SPREAD = {"initializer_range": 0.1}
INITIAL: dict[str, dict[str, Any]] = {"t5": {"initializer_factor": 1.5}}
MARKS = {"bos_token_id": 1, "eos_token_id": END, "pad_token_id": END}


def _llama_like(model_type: str, **more: Any) -> Callable[[int, int], tuple[str, dict[str, Any]]]:
    def shape(hidden: int, layers: int) -> tuple[str, dict[str, Any]]:
        return model_type, {
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            **MARKS,
            **more,
        }

    return shape


def _bert_like(model_type: str, **more: Any) -> Callable[[int, int], tuple[str, dict[str, Any]]]:
    def shape(hidden: int, layers: int) -> tuple[str, dict[str, Any]]:
        return model_type, {
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "pad_token_id": SPECIAL.index("[PAD]"),
            **more,
        }

    return shape


def _opt(projection: int | None) -> Callable[[int, int], tuple[str, dict[str, Any]]]:
    def shape(hidden: int, layers: int) -> tuple[str, dict[str, Any]]:
        return "opt", {
            "hidden_size": hidden,
            "ffn_dim": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "word_embed_proj_dim": projection or hidden,
            "do_layer_norm_before": projection is None,  # opt-350m projects, and normalizes behind
            "init_std": 0.1,
            **MARKS,
        }

    return shape


SHAPES: dict[str, Callable[[int, int], tuple[str, dict[str, Any]]]] = {
    "llama": _llama_like("llama"),
    "qwen2": _llama_like("qwen2"),
    "qwen3": _llama_like("qwen3", head_dim=24),
    "mistral": _llama_like("mistral", sliding_window=24),
    "gemma": _llama_like("gemma", head_dim=24),
    "gemma2": _llama_like(
        "gemma2", head_dim=24, sliding_window=24, attn_logit_softcapping=2.0, query_pre_attn_scalar=20
    ),
    "gemma3": _llama_like(
        "gemma3_text", head_dim=24, sliding_window=24, sliding_window_pattern=2, query_pre_attn_scalar=20
    ),
    "granite": _llama_like("granite", embedding_multiplier=12.0, logits_scaling=8.0),
    "ernie4_5": _llama_like("ernie4_5"),
    "ministral3": _llama_like(
        "ministral3",
        head_dim=16,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 8,
            "llama_4_scaling_beta": 0.5,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    ),
    "opt": _opt(None),
    "opt-projected": _opt(32),
    "gpt-neox": lambda hidden, layers: (
        "gpt_neox",
        {
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "rotary_pct": 0.25,
            **MARKS,
        },
    ),
    "gpt2": lambda hidden, layers: (
        "gpt2",
        {"n_embd": hidden, "n_layer": layers, "n_head": 4, "n_positions": 512, **MARKS},
    ),
    "bert": _bert_like("bert"),
    "roberta": _bert_like("roberta", type_vocab_size=1),
    "electra": _bert_like("electra", embedding_size=32),
    "albert": _bert_like("albert", embedding_size=32),
    "distilbert": lambda hidden, layers: (
        "distilbert",
        {
            "dim": hidden,
            "hidden_dim": 2 * hidden,
            "n_layers": layers,
            "n_heads": 4,
            "max_position_embeddings": 128,
            "pad_token_id": SPECIAL.index("[PAD]"),
        },
    ),
    "t5": lambda hidden, layers: (
        "t5",
        {
            "d_model": hidden,
            "d_kv": 16,
            "d_ff": 2 * hidden,
            "num_layers": layers,
            "num_heads": 4,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 40,
            "eos_token_id": END,
            "pad_token_id": END,
            "decoder_start_token_id": END,
        },
    ),
}
"""By architecture: the model type, and the settings of a model with so much hidden size and so many layers."""


def make_base(folder: Path, architecture: str, **settings: Any) -> Path:
    """Saves a random base with its tokenizer and returns its folder."""
    make_model(architecture, **settings).eval().save_pretrained(folder)
    byte_tokenizer(encoder=architecture in ENCODERS).save_pretrained(folder)
    return folder


def load_reference(base: Path, task: str = "CAUSAL_LM", **settings: Any) -> PreTrainedModel:
    """The base as plain transformers loads it, for PEFT to put adapters on."""
    settings.setdefault("dtype", torch.float32)
    if task == "CAUSAL_LM":
        return AutoModelForCausalLM.from_pretrained(base, **settings).eval()
    if task == "FEATURE_EXTRACTION":
        return AutoModel.from_pretrained(base, **settings).eval()
    if task == "SEQ_2_SEQ_LM":
        return AutoModelForSeq2SeqLM.from_pretrained(base, **settings).eval()
    if task == "TOKEN_CLS":
        return AutoModelForTokenClassification.from_pretrained(base, **settings).eval()
    model = AutoModelForSequenceClassification.from_pretrained(base, **settings)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = SPECIAL.index("<|im_end|>")
    return model.eval()


def make_adapter(
    base: Path,
    folder: Path,
    *,
    targets: Sequence[str] | str,
    rank: int = 8,
    alpha: int | None = None,
    seed: int = 0,
    task: str = "CAUSAL_LM",
    labels: Sequence[str] = (),
    scale: float = 1.0,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """A plain PEFT LoRA folder with a real effect, saved by PEFT itself; a classifier when `labels` are given."""
    torch.manual_seed(1000 + seed)
    extra: dict[str, Any] = {}
    if task in ("SEQ_CLS", "TOKEN_CLS"):
        extra = {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
    model = load_reference(base, task, **extra)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha if alpha is not None else 2 * rank,
        target_modules=list(targets) if not isinstance(targets, str) else targets,
        task_type=task,
        init_lora_weights=False,
        **(settings or {}),
    )
    peft = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.mul_(scale)
            elif "modules_to_save" in name:
                parameter.normal_(0, 0.3)
    peft.save_pretrained(folder)
    return folder


def peft_model(base: Path, adapter: Path, task: str = "CAUSAL_LM", **settings: Any) -> PeftModel:
    """The adapter alone on the base, the way a user of plain PEFT loads it."""
    return PeftModel.from_pretrained(load_reference(base, task, **settings), adapter).eval()


class Greedy(NamedTuple):
    """A reference's answer: `tokens`, and the `logits` [tokens, vocabulary] in float32 that chose them."""

    tokens: tuple[int, ...]
    logits: Tensor


def greedy(model: Any, ids: Sequence[int], most: int, **extra: Any) -> Greedy:
    """What a model answers to a text by transformers' own generate: exactly `most` tokens, end tokens ignored. `extra`
    goes to the model (`task_ids`). Of an encoder-decoder the start token is no part of the answer."""
    text = torch.tensor([list(ids)])
    with torch.no_grad():
        out = model.generate(
            input_ids=text,
            attention_mask=torch.ones_like(text),
            max_new_tokens=most,
            min_new_tokens=most,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
            **extra,
        )
    assert len(out.logits) == most
    return Greedy(tuple(out.sequences[0, -most:].tolist()), torch.cat(out.logits).float())
