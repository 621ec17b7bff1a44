"""Activated LoRA: the base before its invocation tokens, the adapter from them on, and the base's cache for both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_tools import Answer, Harness, Selection, held, reference_logits
from tiny import make_base, peft_model
from zoo import Zoo

from adapterbay.registry import Registry
from adapterbay.registry.errors import InvalidArgument
from adapterbay.server.blocks import BlockLedger
from adapterbay.server.intake import last_start

CALL = [40, 41, 42]
OTHER = [43, 44]
TEXT = [50 + (3 * index) % 200 for index in range(60)]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    root = tmp_path_factory.mktemp("alora")
    zoo = Zoo(make_base(root / "base", "llama", layers=2), Registry.open(root / "registry"))
    targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
    for index, (name, call) in enumerate((("judge", CALL), ("critic", CALL), ("other", OTHER))):
        zoo.add(name, root / name, targets=targets, rank=8, seed=index, settings={"alora_invocation_tokens": call})
    zoo.add("plain", root / "plain", targets=["q_proj", "v_proj"], rank=4, seed=7)
    return zoo


@pytest.fixture(scope="module")
def models(zoo: Zoo) -> dict[str, torch.nn.Module]:
    return {name: peft_model(zoo.base, folder) for name, folder in zoo.folders.items()}


def check(harness: Harness, models: dict[str, torch.nn.Module], arm: str | None, prompt: list[int], a: Answer) -> None:
    tokens = a.generated().token_ids
    assert a.request is not None
    got = torch.stack(harness.logits[a.request.id])
    if arm is None:
        with models["plain"].disable_adapter():  # type: ignore[operator]
            want = reference_logits(models["plain"], prompt, tokens)
    else:
        want = reference_logits(models[arm], prompt, tokens)
    assert (got - want).abs().max() < 2e-4


PROMPTS = {
    "first": [*CALL, *TEXT[:20]],
    "last": [*TEXT[:50], *CALL],
    "at a block's edge": [*TEXT[:32], *CALL, *TEXT[:9]],
    "across blocks": [*TEXT[:30], *CALL, *TEXT[:20]],
    "twice": [*TEXT[:18], *CALL, *TEXT[:25], *CALL, 9, 9],
    "overlapping": [*TEXT[:18], 40, *CALL, *TEXT[:25], 40, 41, 9],
}


@pytest.mark.parametrize("step_tokens", [512, 16])
def test_rows_equal_peft_alone_in_a_mixed_batch(zoo: Zoo, models: dict[str, torch.nn.Module], step_tokens: int) -> None:
    with Harness(zoo.base, zoo.registry, step_tokens=step_tokens) as harness:
        for _ in range(2):
            with held(harness.engine):
                asked = [
                    (arm, prompt, harness.generate(arm, prompt, 5))
                    for prompt in PROMPTS.values()
                    for arm in ("judge", "critic", "plain", None)
                ]
            for arm, prompt, answer in asked:
                check(harness, models, arm, prompt, answer)


def test_the_blocks_before_the_activation_are_the_bases(zoo: Zoo, models: dict[str, torch.nn.Module]) -> None:
    prompt = [*TEXT[:50], *CALL, *TEXT[:20]]  # 73 tokens; active from 50 on, so that 3 blocks are the base's

    def ask(harness: Harness, arm: Selection) -> int:
        before = harness.engine.stats().reused_tokens
        answer = harness.generate(arm, prompt, 3)
        answer.wait()
        if not isinstance(arm, dict):
            check(harness, models, arm, prompt, answer)  # type: ignore[arg-type]
        return harness.engine.stats().reused_tokens - before

    with Harness(zoo.base, zoo.registry) as harness:
        assert [ask(harness, arm) for arm in (None, "judge", "critic", "judge", "plain")] == [0, 48, 48, 64, 0]
        assert ask(harness, None) == 64
    with Harness(zoo.base, zoo.registry) as harness:
        assert [ask(harness, arm) for arm in ("judge", "plain", None, "critic")] == [0, 0, 48, 48]
        assert [ask(harness, {"judge": weight}) for weight in (0.5, 0.25, 0.5)] == [48, 48, 64]


def test_the_base_and_its_judges_compute_a_conversation_once(zoo: Zoo) -> None:
    conversation = [50 + (7 * at) % 200 for at in range(200)]
    with Harness(zoo.base, zoo.registry, step_tokens=64) as harness:
        prompts: list[tuple[str | None, list[int]]] = [(None, [*conversation, 9])]
        prompts += [(arm, [*conversation, *CALL]) for arm in ("judge", "critic")]
        prompts += [("other", [*conversation, *OTHER])]
        with held(harness.engine):
            answers = [harness.generate(arm, prompt, 3) for arm, prompt in prompts]
        for answer in answers:
            answer.wait()
        assert harness.engine.stats().reused_tokens == 3 * 192


def test_a_prompt_without_the_invocation_is_refused_and_never_the_base(zoo: Zoo) -> None:
    with Harness(zoo.base, zoo.registry) as harness:
        for prompt in (TEXT, [*TEXT, 40, 41], [*TEXT, 41, 42], [*TEXT, *OTHER]):
            with pytest.raises(InvalidArgument, match=r"activated by the tokens \[40, 41, 42\]") as caught:
                harness.generate("judge", prompt, 3).wait()
            assert caught.value.field == "input"
        harness.idle()


def test_activated_rows_give_way_and_go_on(zoo: Zoo, models: dict[str, torch.nn.Module]) -> None:
    prompts = [[*TEXT[index : 20 + index], *CALL, 9] for index in range(4)]
    arms = (None, "judge", "critic", "judge")
    with Harness(zoo.base, zoo.registry) as harness:
        harness.engine._blocks.ledger = harness.engine._loop.scheduler._blocks = BlockLedger(11)
        with held(harness.engine):
            answers = [harness.generate(arm, prompt, 40) for arm, prompt in zip(arms, prompts, strict=True)]
        for arm, prompt, answer in zip(arms, prompts, answers, strict=True):
            check(harness, models, arm, prompt, answer)
        assert harness.engine.stats().preemptions > 0


def test_the_last_start_is_found(tmp_path: Path) -> None:
    assert last_start([1, 2, 1, 2, 1], [1, 2]) == 2
    assert last_start([1, 1, 1], [1, 1]) == 1
    assert last_start([1, 2], [1, 2]) == 0
    assert last_start([1, 2], [1, 2, 3]) is None
    assert last_start([], [1]) is None
