"""What an activated LoRA has trained beside its low-rank deltas (biases, tokens, saved modules) is on from the first
token, as in PEFT, which switches the deltas alone. Such an adapter's blocks before the invocation are its own."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_tools import Answer, Harness, held, reference_logits
from peft import LoraConfig, get_peft_model
from peft_zoo import randomize
from tiny import load_reference, make_base, peft_model

from adapterbay.registry import Registry
from adapterbay.registry.errors import UnsupportedMethod
from adapterbay.registry.fusing import FusionSettings

CALL = [40, 41, 42]
TEXT = [50 + (3 * index) % 200 for index in range(60)]
PROMPT = [*TEXT[:50], *CALL, *TEXT[:20]]  # 73 tokens; active from 50 on: 3 blocks before, 4 in all
SETTINGS: dict[str, dict[str, Any]] = {
    "judge": {},
    "judge_bias": {"lora_bias": True},
    "biases": {"bias": "all"},
    "both_biases": {"bias": "lora_only", "lora_bias": True},
    "tokens": {"trainable_token_indices": [56, 59]},
    "norm": {"modules_to_save": ["input_layernorm"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "layer": {"modules_to_save": ["up_proj"]},
}
ATOL = 5e-5


class Bench:
    """A base, its adapters, and PEFT's models of them."""

    def __init__(self, root: Path) -> None:
        self.base = make_base(root / "base", "qwen2", layers=2)  # has biases
        self.registry = Registry.open(root / "registry")
        self.models: dict[str | None, Any] = {None: load_reference(self.base)}
        for index, (name, more) in enumerate(SETTINGS.items()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                targets = ["q_proj", "v_proj", "down_proj"]
                activated = LoraConfig(
                    task_type="CAUSAL_LM", r=4, target_modules=targets, alora_invocation_tokens=CALL, **more
                )
                made = get_peft_model(load_reference(self.base), activated)
                randomize(made, index)
                made.save_pretrained(root / name)
                self.models[name] = peft_model(self.base, root / name)
            self.registry.push(root / name, name, base=f"folder:{self.base}")

    def check(self, harness: Harness, model: Any, prompt: list[int], answer: Answer) -> None:
        """That a row's logits are those of a model."""
        tokens = answer.generated().token_ids
        assert answer.request is not None
        got = torch.stack(harness.logits[answer.request.id])
        torch.testing.assert_close(got, reference_logits(model, prompt, tokens), rtol=0, atol=ATOL)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("lasting"))


@pytest.mark.parametrize("step_tokens", [512, 16])
def test_rows_equal_peft_alone_in_a_mixed_batch(bench: Bench, step_tokens: int) -> None:
    prompts = (PROMPT, [*TEXT[:9], *CALL], [*CALL, *TEXT[:12]])
    with Harness(bench.base, bench.registry, step_tokens=step_tokens) as harness:
        harness.load(*SETTINGS)
        with held(harness.engine):
            asked = [(arm, prompt, harness.generate(arm, prompt, 4)) for prompt in prompts for arm in bench.models]
        for arm, prompt, answer in asked:
            bench.check(harness, bench.models[arm], prompt, answer)


def test_blocks_before_the_invocation_are_the_adapters_own_if_something_lasts(bench: Bench) -> None:
    def ask(harness: Harness, arm: str | None) -> int:
        before = harness.engine.stats().reused_tokens
        answer = harness.generate(arm, PROMPT, 3)
        bench.check(harness, bench.models[arm], PROMPT, answer)
        return harness.engine.stats().reused_tokens - before

    with Harness(bench.base, bench.registry) as harness:
        arms = (None, "judge", "judge_bias", "biases", "tokens", "biases", "norm", "tokens", "judge")
        assert [ask(harness, arm) for arm in arms] == [0, 48, 48, 0, 0, 64, 0, 64, 64]
    with Harness(bench.base, bench.registry) as harness:
        assert ask(harness, "biases") == 0
        other = [*PROMPT[:49], 9, *CALL, 7]  # the same adapter, activated elsewhere
        before = harness.engine.stats().reused_tokens
        bench.check(harness, bench.models["biases"], other, harness.generate("biases", other, 3))
        assert harness.engine.stats().reused_tokens - before == 48
        assert ask(harness, None) == 0


def test_a_weight_is_for_both_parts(bench: Bench) -> None:
    half = copy.deepcopy(bench.models["biases"])
    plain = dict(bench.models[None].named_parameters())
    with torch.no_grad():
        for name, parameter in half.base_model.model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.5)
            elif name.endswith(".bias"):
                parameter.lerp_(plain[name.replace(".base_layer", "")], 0.5)
    with Harness(bench.base, bench.registry) as harness:
        bench.check(harness, half, PROMPT, harness.generate({"biases": 0.5}, PROMPT, 4))
        both = harness.fused({"biases": 1.0, "judge": 1.0}, FusionSettings("svd"))
        with pytest.raises(UnsupportedMethod, match="more than low-rank deltas"):
            harness.generate(both, PROMPT, 2).wait()


def test_nothing_is_left_behind(bench: Bench) -> None:
    with Harness(bench.base, bench.registry) as harness:
        sites = harness.engine._model.sites
        for name in SETTINGS:
            harness.generate(name, [*TEXT[:5], *CALL], 2).wait()
            harness.engine.adapters.unload(harness.arm(name).parts[0].digest).result(20)
        bench.check(harness, bench.models[None], PROMPT, harness.generate(None, PROMPT, 2))
        assert not any(layer.site is not None and layer.site.used for layer in sites.linears.values())
        assert not any(table._own for table in sites.tables.values())
        assert not sites._mixed_norms
