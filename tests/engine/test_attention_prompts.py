"""LLaMA-Adapter on GPT-2, where PEFT adds what the prompts give behind the attention module: rows of a mixed batch
equal plain PEFT alone, and rows without it are the base's, before and beside. Tolerance 1e-4 of logits, float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft_zoo
import pytest
import torch
from engine_tools import Answer, Harness, held, reference_logits
from peft import AdaptionPromptConfig, PeftModel, get_peft_model
from tiny import greedy, load_reference, make_base

from adapterbay.registry import Registry
from adapterbay.server.adapters.forms import AttentionPrompt, ServingForm
from adapterbay.server.mix.sites import Sites

ATOL = 1e-4
TEXTS = [[20 + (index + 3 * at) % 200 for at in range(length)] for index, length in enumerate((7, 40, 1, 18, 25))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`one` and `two` change the upper two layers, `top` the last, `bare` neither: a LoRA."""
    root = tmp_path_factory.mktemp("gpt2-prompts")
    base = make_base(root / "base", "gpt2", layers=3)
    made = {"base": base}
    for seed, (name, layers, length) in enumerate((("one", 2, 4), ("two", 2, 7), ("top", 1, 3))):
        settings = {"adapter_layers": layers, "adapter_len": length}
        made[name] = peft_zoo.make(base, root / name, "adaption_prompt", seed=seed, settings=settings)
    made["bare"] = peft_zoo.make(base, root / "bare", "lora", seed=9)
    return made


@pytest.fixture(scope="module")
def harness(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    registry = Registry.open(tmp_path_factory.mktemp("registry"))
    for name, folder in folders.items():
        if name != "base":
            registry.push(folder, name, base=f"folder:{folders['base']}")
    with Harness(folders["base"], registry, step_tokens=32) as harness:
        yield harness


def off(harness: Harness, model: Any, text: list[int], answer: Answer) -> float:
    """How far the logits are from the reference's."""
    assert answer.request is not None
    tokens = answer.generated().token_ids
    got = torch.stack(harness.logits[answer.request.id])
    return float((got - reference_logits(model, text, tokens)).abs().max())


def test_rows_equal_peft_alone(harness: Harness, folders: dict[str, Path]) -> None:
    base = load_reference(folders["base"])
    before = harness.generate(None, TEXTS[0], 5)
    assert off(harness, base, TEXTS[0], before) < ATOL
    names = ("one", "two", "top", "bare", None)
    for adapter in ("one", "two", "top", "bare"):
        harness.embed(adapter, TEXTS[0]).wait()  # on the device, so that all rows enter in one step
    with held(harness.engine):
        answers = {name: harness.generate(name, text, 8) for name, text in zip(names, TEXTS, strict=True)}
    for (name, answer), text in zip(answers.items(), TEXTS, strict=True):
        model = base if name is None else PeftModel.from_pretrained(load_reference(folders["base"]), folders[name])
        assert off(harness, model.eval(), text, answer) < ATOL, name
        assert answer.generated().token_ids == greedy(model, text, 8).tokens
        if name is not None:
            assert off(harness, base, text, answer) > 20 * ATOL, f"{name} has no effect"
    assert max(harness.step_sizes) == len(names)


def test_a_weighted_sum_adds_what_the_prompts_give(harness: Harness, folders: dict[str, Path]) -> None:
    """Gates take the weights. Beside a LoRA the queries are the LoRA's, as PEFT's module computes them anew."""
    answer = harness.generate({"top": 0.5, "bare": 1.0}, TEXTS[3], 4)
    model: Any = PeftModel.from_pretrained(load_reference(folders["base"]), folders["bare"]).merge_and_unload()
    merged = PeftModel.from_pretrained(model, folders["top"]).eval()
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            if name.endswith("adaption_gate"):
                parameter.mul_(0.5)
    assert off(harness, merged, TEXTS[3], answer) > 20 * ATOL, "keys come from the base, not from the merged layer"
    attention = merged.base_model.model.transformer.h[-1].attn
    with torch.no_grad():
        plain = load_reference(folders["base"]).transformer.h[-1].attn.c_attn
        attention.model.c_attn = _Keys(attention.model.c_attn, plain, attention.adapter_len)
    assert off(harness, merged, TEXTS[3], answer) < ATOL


class _Keys(torch.nn.Module):
    """The prompt, [1, length, hidden], through one layer; everything else through another."""

    def __init__(self, others: torch.nn.Module, prompts: torch.nn.Module, length: int) -> None:
        super().__init__()
        self.others, self.prompts, self.length = others, prompts, length

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.prompts if x.shape[1] == self.length else self.others
        y: torch.Tensor = chosen(x)
        return y


def test_nothing_is_left_behind(folders: dict[str, Path]) -> None:
    """The hook behind an attention module stays while an adapter needs it, and no longer."""
    backbone = load_reference(folders["base"]).transformer
    sites = Sites.wrap(backbone, torch.float32, torch.device("cpu"), packs=False)
    module = backbone.h[1].attn
    prompt = AttentionPrompt(1.0, torch.ones(2, 4, 16), torch.ones(2, 4, 16), behind="h.1.attn")
    forms = {key: ServingForm(key, None, attention={1: prompt}) for key in "ab"}  # type: ignore[arg-type]
    for key, form in forms.items():
        sites.place(key, form)
    assert len(module._forward_hooks) == 1
    sites.remove("a", forms["a"])
    assert len(module._forward_hooks) == 1
    sites.remove("b", forms["b"])
    assert not module._forward_hooks
    assert sites.prompts is None


def test_peft_makes_it_for_no_other_architecture(tmp_path: Path) -> None:
    """What the reason says: GPT-NeoX and others never come so far."""
    settings = AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="Unsupported model type"):
        get_peft_model(load_reference(make_base(tmp_path / "base", "gpt-neox", layers=2)), settings)
