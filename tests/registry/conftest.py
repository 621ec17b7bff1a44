"""Tiny random bases of three architectures, real PEFT adapters on them, and what tests of the registry share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from registry_tools import Draft, Tiny

from adapterbay.registry import Registry

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def session_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, session_home: Path) -> None:
    """No test sees or touches the caches and the registry of the person who runs it."""
    monkeypatch.setenv("ADAPTERBAY_HOME", str(session_home))
    monkeypatch.delenv("ADAPTERBAY_REGISTRY", raising=False)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """LlamaForCausalLM; LoRA of rank 4 on q_proj, v_proj and down_proj."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    (folder / "base" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}, "truncation": null}')
    (folder / "base" / "tokenizer_config.json").write_text('{"eos_token": "a", "chat_template": "{{ messages }}"}')
    model = LlamaForCausalLM.from_pretrained(folder / "base")
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights=False,
    )
    get_peft_model(model, lora).save_pretrained(folder / "adapter")
    return Tiny(folder / "base", folder / "adapter")


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """GPT2ForSequenceClassification with 3 labels over a GPT2LMHeadModel checkpoint; Conv1D, ranks 2 and 6."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder / "base")
    model = GPT2ForSequenceClassification.from_pretrained(folder / "base", num_labels=3)
    lora = LoraConfig(
        r=2,
        rank_pattern={"attn.c_proj": 6},
        task_type="SEQ_CLS",
        target_modules=["c_attn", "c_proj"],
        init_lora_weights=False,
        fan_in_fan_out=True,
    )
    get_peft_model(model, lora).save_pretrained(folder / "adapter")
    return Tiny(folder / "base", folder / "adapter")


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """BertForSequenceClassification with 2 labels over a bare BertModel checkpoint."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(2)
    config = BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    BertModel(config).save_pretrained(folder / "base")
    model = BertForSequenceClassification.from_pretrained(folder / "base", num_labels=2)
    lora = LoraConfig(
        r=4, use_rslora=True, task_type="SEQ_CLS", target_modules=["query", "dense"], init_lora_weights=False
    )
    get_peft_model(model, lora).save_pretrained(folder / "adapter")
    return Tiny(folder / "base", folder / "adapter")


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    store = Registry.open(tmp_path / "registry")
    yield store
    store.close()


@pytest.fixture
def draft(tmp_path: Path) -> Callable[[Tiny], Draft]:
    """Copies an adapter folder."""
    count = 0

    def copy(tiny: Tiny) -> Draft:
        nonlocal count
        count += 1
        target = tmp_path / f"draft-{count}"
        shutil.copytree(tiny.adapter, target)
        return Draft(target)

    return copy


@pytest.fixture
def trained(llama: Tiny, draft: Callable[[Tiny], Draft]) -> Callable[..., Path]:
    """Adapters that differ, each with the metrics of its training."""
    count = 0

    def make(**metrics: object) -> Path:
        nonlocal count
        count += 1
        made = draft(llama)
        made.edit_tensors(lambda tensors: next(iter(tensors.values())).flat.__setitem__(0, float(count)))
        made.write_training(metrics=metrics)
        return made.path

    return make
