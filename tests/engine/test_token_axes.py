"""Norms that see heads, [1, tokens, heads, size] in Qwen3 and [1, heads, tokens, size] in Gemma 3: an adapter's own
parameters there reach its own tokens and nobody else's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_tools import Answer, Harness, held, reference_logits
from peft import LNTuningConfig, LoraConfig, get_peft_model
from peft_zoo import randomize
from tiny import load_reference, make_base, peft_model
from torch import nn

from adapterbay.registry import Registry
from adapterbay.registry.errors import UnsupportedMethod
from adapterbay.server.mix.axes import ShapeWatch, TokenAxis

CONFIGS: dict[str, Any] = {
    "heads": LNTuningConfig(task_type="CAUSAL_LM", target_modules=["q_norm", "k_norm"]),
    "saved": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["norm"]),
    "attention": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["up_proj"], modules_to_save=["self_attn"]),
    "lora": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"]),
}
PROMPTS = [
    [9, 10, 11, 12],
    [50 + at for at in range(21)],
    [7, 60, 8, 44, 5],
    [30, 31, 32],
    [90 + at for at in range(9)],
]
ATOL = 2e-5


class Bench:
    """A base, its adapters, and PEFT's models of them."""

    def __init__(self, root: Path, architecture: str) -> None:
        self.base = make_base(root / "base", architecture, layers=2)
        self.registry = Registry.open(root / "registry")
        self.models: dict[str | None, Any] = {None: load_reference(self.base)}
        for index, (name, config) in enumerate(CONFIGS.items()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = get_peft_model(load_reference(self.base), config)
                randomize(made, index)
                made.save_pretrained(root / name)
                self.models[name] = peft_model(self.base, root / name)
            self.registry.push(root / name, name, base=f"folder:{self.base}")

    def distance(self, harness: Harness, model: Any, answer: Answer, prompt: list[int]) -> float:
        """Of the served logits to those of a model."""
        tokens = answer.generated().token_ids
        assert answer.request is not None
        got = torch.stack(harness.logits[answer.request.id])
        return float((got - reference_logits(model, prompt, tokens)).abs().max())


@pytest.fixture(scope="module", params=["qwen3", "gemma3"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("compiled", ["auto", "off"])
def test_every_row_of_a_mixed_batch_is_peft_alone(bench: Bench, compiled: str) -> None:
    names = [*CONFIGS, None]
    with Harness(bench.base, bench.registry, compile=compiled) as harness:
        harness.load(*CONFIGS)
        for shift in (0, 2):
            with held(harness.engine):
                prompts = [PROMPTS[(at + shift) % len(PROMPTS)] for at in range(len(names))]
                asked = [harness.generate(name, prompt, 4) for name, prompt in zip(names, prompts, strict=True)]
            for name, prompt, answer in zip(names, prompts, asked, strict=True):
                assert bench.distance(harness, bench.models[name], answer, prompt) < ATOL, name
                if name is not None:
                    assert bench.distance(harness, bench.models[None], answer, prompt) > 100 * ATOL, name
        assert max(harness.step_sizes) == len(names)


def test_a_weight_moves_a_heads_norm_so_far(bench: Bench) -> None:
    """What a norm gives is linear in its weight, so the fusion has the weight in between."""
    between = load_reference(bench.base)
    tuned = dict(bench.models["heads"].named_modules())
    with torch.no_grad():
        for path, module in between.named_modules():
            if path.endswith(("q_norm", "k_norm")):
                own = tuned[f"base_model.model.{path}"].ln_tuning_layers["default"].weight
                module.weight.lerp_(own, 0.3)  # type: ignore[operator, union-attr]
    with Harness(bench.base, bench.registry) as harness:
        harness.load("heads", "lora")
        with held(harness.engine):
            fused, beside = harness.generate({"heads": 0.3}, PROMPTS[1], 4), harness.generate("lora", PROMPTS[4], 4)
        assert bench.distance(harness, between, fused, PROMPTS[1]) < ATOL
        assert bench.distance(harness, bench.models["lora"], beside, PROMPTS[4]) < ATOL


def test_a_module_whose_tokens_cannot_be_told_apart_is_refused_by_name(bench: Bench) -> None:
    with Harness(bench.base, bench.registry) as harness:
        sites = harness.engine._model.sites
        assert sites.token_axes.keys() == sites.norms.keys()
        assert not sites.apart
        del sites.token_axes["layers.1.self_attn.k_norm"]
        sites.apart.add("layers.0.mlp.down_proj")
        for name, module in (("heads", "layers.1.self_attn.k_norm"), ("lora", "layers.0.mlp.down_proj")):
            with pytest.raises(UnsupportedMethod, match="which token it belongs to") as caught:
                harness.generate(name, PROMPTS[0], 2).wait()
            assert caught.value.metadata["module"] == module
        alone = harness.generate(None, PROMPTS[0], 2)
        assert bench.distance(harness, bench.models[None], alone, PROMPTS[0]) < ATOL


class _Layouts(nn.Module):
    """Norms that get the same text in different layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.heads, self.turned, self.merged, self.features = (nn.LayerNorm(n) for n in (6, 3, 3, 3, 1))
        self.never = nn.LayerNorm(3)

    def forward(self, x: torch.Tensor) -> None:
        heads = x.view(1, -1, 2, 3)
        self.plain(x)
        self.heads(input=heads)
        self.turned(heads.transpose(1, 2))
        self.merged(heads.flatten(0, 2))
        self.features(x.transpose(1, 2)[..., :1])


def test_an_axis_is_the_tokens_if_it_grows_with_the_text() -> None:
    model = _Layouts()
    watch = ShapeWatch(dict(model.named_children()))
    for tokens in (6, 3, 2):  # as many as features, as features of a head, as heads
        with watch.of(tokens):
            model(torch.zeros(1, tokens, 6))
    assert {name: watch.axis(name) for name, _ in model.named_children()} == {
        "plain": TokenAxis(3, 1),
        "heads": TokenAxis(4, 1, 2),
        "turned": TokenAxis(4, 2, 2),
        "merged": None,
        "features": None,
        "never": None,
    }
    assert not any(module._forward_pre_hooks for module in model.children())


def test_an_input_of_another_layout_is_never_sliced() -> None:
    for shape in ((1, 4, 5, 3), (1, 5, 3), (5, 3)):
        with pytest.raises(RuntimeError, match="a mix of 5 tokens"):
            TokenAxis(4, 1, 2).check(torch.Size(shape), 5)
    TokenAxis(4, 1, 2).check(torch.Size((1, 5, 4, 3)), 5)
