"""Adapters of many methods on SmolLM2-135M-Instruct and all-MiniLM-L6-v2, in one mixed batch each: every row equals
plain PEFT alone, on real weights and real text, in float32.

Tolerance: 1e-4 in logits, which are up to 31 on SmolLM2, and 1e-5 on MiniLM. Measured: 5e-5, and 2e-7. Every adapter's
effect is at least a thousand times the tolerance.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_tools import Harness, held, reference_logits
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from tiny import load_reference
from torch import Tensor
from zoo import MINILM, SMOLLM2, Zoo

from adapterbay.base.text import encode_conversation, encode_text
from adapterbay.registry import Registry, locate

pytestmark = [pytest.mark.real, pytest.mark.slow]

Made = tuple[str, Mapping[str, Any], float]
"""PEFT's type, settings, and how large the noise on its trained tensors is."""

ATTENTION = ["q_proj", "v_proj"]
ON_SMOLLM2: Mapping[str, Made] = {
    "lora": ("LORA", {"r": 8, "lora_alpha": 16, "target_modules": [*ATTENTION, "down_proj"]}, 0.01),
    "dora": ("LORA", {"r": 4, "use_dora": True, "target_modules": ATTENTION}, 0.01),
    "ia3": ("IA3", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}, 0.05),
    "vera": ("VERA", {"r": 16, "target_modules": ["q_proj", "o_proj"]}, 0.05),
    "loha": ("LOHA", {"r": 4, "target_modules": ATTENTION}, 0.05),
    "oft": ("OFT", {"oft_block_size": 8, "target_modules": ATTENTION}, 0.02),
    "prompt": ("PROMPT_TUNING", {"num_virtual_tokens": 6}, 0.05),
    "prefix": ("PREFIX_TUNING", {"num_virtual_tokens": 6}, 0.02),
}
ON_MINILM: Mapping[str, Made] = {
    "lora": ("LORA", {"r": 8, "target_modules": ["query", "value", "dense"]}, 0.02),
    "ia3": (
        "IA3",
        {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]},
        0.1,
    ),
    "norms": ("LN_TUNING", {"target_modules": ["LayerNorm"]}, 0.1),
}
LABELS = {"lora": 2, "ia3": 3, "norms": 5}
QUESTIONS = (
    "Name three rivers in Europe.",
    "Why is the sky blue?",
    "Explain rain to a child, in two sentences, and then say what snow is and why it is white and soft.",
)


def make(zoo: Zoo, root: Path, base: Any, name: str, made: Made, task: str, reference: str) -> None:
    """An adapter with random values that show, saved by PEFT and pushed."""
    kind, settings, noise = made
    torch.manual_seed(len(zoo.folders))
    model = get_peft_model(copy.deepcopy(base), PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type=task, **settings))
    with torch.no_grad():
        for at, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            random = torch.randn_like(parameter)
            if "modules_to_save" in at:
                parameter.normal_(0, 0.1)
            elif re.search("ia3_l|ln_tuning|magnitude", at):
                parameter.mul_(1 + noise * random)
            else:
                parameter.add_(noise * random)
        if kind == "PREFIX_TUNING":  # random ones would take all attention, and rounding would grow with them
            rows = model.prompt_encoder["default"].embedding.weight
            rows.copy_(keys_and_values(base, len(rows)) + noise * torch.randn_like(rows))
    model.save_pretrained(root / name)
    zoo.folders[name] = root / name
    zoo.registry.push(root / name, name, base=reference)


def keys_and_values(base: Any, count: int) -> Tensor:
    """A prefix as PEFT keeps it, [count, layers · 2 · heads · size]: what the base itself has for some text."""
    cache = base(input_ids=torch.arange(500, 500 + count)[None], use_cache=True).past_key_values
    parts = [part[0].transpose(0, 1) for layer in cache.layers for part in (layer.keys, layer.values)]
    return torch.stack(parts, 1).flatten(1)


def apart(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max())


def test_smollm2_rows_of_every_method(tmp_path: Path) -> None:
    zoo = Zoo(locate(SMOLLM2).folder, Registry.open(tmp_path / "registry"))
    base: Any = load_reference(zoo.base)
    for name, made in ON_SMOLLM2.items():
        make(zoo, tmp_path, base, name, made, "CAUSAL_LM", SMOLLM2)
    arms = [*ON_SMOLLM2, None]
    with Harness(SMOLLM2, zoo.registry, max_rows=16, step_tokens=1024, device_bytes=1 << 31) as harness:
        prompts = [
            encode_conversation(
                harness.engine.tokenizer,
                [{"role": "user", "content": QUESTIONS[at % len(QUESTIONS)]}],
                add_generation_prompt=True,
            )
            for at in range(len(arms))
        ]
        for arm in ON_SMOLLM2:
            harness.generate(arm, prompts[0][:2], 1).wait()  # what is not on the device yet comes in over some steps
        with held(harness.engine):
            answers = [harness.generate(arm, prompt, 4) for arm, prompt in zip(arms, prompts, strict=True)]
        for answer in answers:
            answer.wait(120)
        assert max(harness.step_sizes) == len(arms), "the rows were not batched"
    for arm, prompt, answer in zip(arms, prompts, answers, strict=True):
        tokens = answer.generated().token_ids
        assert answer.request is not None
        got = torch.stack(harness.logits[answer.request.id])
        plain = reference_logits(base, prompt, tokens)
        if arm is None:
            expected = plain
        else:
            model: Any = PeftModel.from_pretrained(copy.deepcopy(base), zoo.folders[arm]).eval()
            ids = torch.tensor([[*prompt, *tokens]])
            with torch.no_grad():
                expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(tokens) - 1 : -1]
            assert apart(expected, plain) > 1000 * 1e-4, f"{arm} has no effect"
        assert apart(got, expected) < 1e-4, arm


def test_minilm_heads_of_several_methods(tmp_path: Path) -> None:
    zoo = Zoo(locate(MINILM).folder, Registry.open(tmp_path / "registry"))
    bases: dict[str, Any] = {name: load_reference(zoo.base, "SEQ_CLS", num_labels=LABELS[name]) for name in ON_MINILM}
    for name, made in ON_MINILM.items():
        make(zoo, tmp_path, bases[name], name, made, "SEQ_CLS", MINILM)
    with Harness(MINILM, zoo.registry, max_rows=32) as harness:
        texts = [encode_text(harness.engine.tokenizer, text) for text in QUESTIONS]
        harness.load(*ON_MINILM)
        with held(harness.engine):
            labelled = [(name, ids, harness.classify(name, ids)) for name in ON_MINILM for ids in texts]
            embedded = [(ids, harness.embed(None, ids)) for ids in texts]
        for _, _, answer in labelled:
            answer.wait()
        assert max(harness.step_sizes) == len(labelled) + len(embedded), "the rows were not batched"
        for ids, answer in embedded:
            with torch.no_grad():
                states: Tensor = bases["lora"].bert(input_ids=torch.tensor([ids])).last_hidden_state[0]
            assert apart(torch.tensor(answer.wait().values), states.mean(0)) < 1e-5, "an adapter changed the base"
    for name in ON_MINILM:
        model: Any = PeftModel.from_pretrained(copy.deepcopy(bases[name]), zoo.folders[name]).eval()
        for asked, ids, answer in labelled:
            if asked == name:
                with torch.no_grad():
                    expected = model(input_ids=torch.tensor([ids])).logits[0]
                    with model.disable_adapter():
                        plain = model(input_ids=torch.tensor([ids])).logits[0]
                assert apart(expected, plain) > 1000 * 1e-5, f"{name} has no effect"
                assert apart(torch.tensor(answer.classified().logits), expected) < 1e-5, name
