"""Tiny random bases and adapters, made by transformers and PEFT themselves, with a real tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>", "[CLS]", "[SEP]", "[PAD]"]
VOCABULARY = len(SPECIAL) + 256

CAUSAL = ("llama", "qwen2", "gpt2")

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
TARGETS["qwen2"] = TARGETS["llama"]


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
    shared: dict[str, Any] = {"vocab_size": VOCABULARY, "initializer_range": 0.1}
    end = SPECIAL.index("<|im_end|>")
    if architecture in ("llama", "qwen2"):
        settings = {
            **shared,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": 1,
            "eos_token_id": end,
            "pad_token_id": end,
        }
        if architecture == "llama":
            return LlamaForCausalLM(LlamaConfig(**settings))
        return Qwen2ForCausalLM(Qwen2Config(**settings))
    if architecture == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                **shared,
                n_embd=hidden,
                n_layer=layers,
                n_head=4,
                n_positions=512,
                bos_token_id=1,
                eos_token_id=end,
                pad_token_id=end,
            )
        )
    if architecture == "bert":
        return BertModel(
            BertConfig(
                **shared,
                hidden_size=hidden,
                intermediate_size=2 * hidden,
                num_hidden_layers=layers,
                num_attention_heads=4,
                max_position_embeddings=128,
                pad_token_id=SPECIAL.index("[PAD]"),
            )
        )
    raise ValueError(architecture)


def make_base(folder: Path, architecture: str, **settings: Any) -> Path:
    """Saves a random base with its tokenizer and returns its folder."""
    make_model(architecture, **settings).eval().save_pretrained(folder)
    byte_tokenizer(encoder=architecture == "bert").save_pretrained(folder)
    return folder


def load_reference(base: Path, task: str = "CAUSAL_LM", **settings: Any) -> PreTrainedModel:
    """The base as plain transformers loads it, for PEFT to put adapters on."""
    settings.setdefault("dtype", torch.float32)
    if task == "CAUSAL_LM":
        return AutoModelForCausalLM.from_pretrained(base, **settings).eval()
    if task == "FEATURE_EXTRACTION":
        return AutoModel.from_pretrained(base, **settings).eval()
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
    if task == "SEQ_CLS":
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
