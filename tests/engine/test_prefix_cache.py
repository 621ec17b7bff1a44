"""Equal beginnings are computed once and never cross from one computation to another."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from engine_tools import Answer, Harness, Selection, held, reference_logits
from tiny import make_base, peft_model
from zoo import Zoo

from adapterbay.registry import Registry
from adapterbay.registry.errors import Cancelled, EngineFault
from adapterbay.server.batch import Share
from adapterbay.server.blocks import BLOCK_TOKENS, BlockLedger
from adapterbay.server.prefix import BlockNames, seed
from adapterbay.server.requests import Pooling
from adapterbay.server.runner import StepResult
from adapterbay.server.weights import LayerWeights

SYSTEM = [20 + (7 * index) % 200 for index in range(1000)]
WHOLE = len(SYSTEM) // BLOCK_TOKENS * BLOCK_TOKENS


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    root = tmp_path_factory.mktemp("prefix")
    base = make_base(root / "base", "llama", layers=2)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    zoo = Zoo(base, Registry.open(root / "registry"))
    zoo.add("x", root / "x", targets=["q_proj", "v_proj", "down_proj"], rank=4, seed=1, scale=0.5)
    zoo.add("y", root / "y", targets=["q_proj", "v_proj"], rank=8, seed=2, scale=0.5)
    zoo.add("c", root / "c", targets=["k_proj"], rank=4, seed=3, task="SEQ_CLS", labels=["no", "yes"])
    return zoo


def count_prompts(harness: Harness) -> list[Share]:
    """Every share of a prompt that goes through the base from now on."""
    shares: list[Share] = []
    run = harness.engine._loop._runner.run

    def counting(step: Sequence[Share]) -> StepResult:
        shares.extend(share for share in step if share.start + share.count <= share.row.prompt_tokens)
        return run(step)

    harness.engine._loop._runner.run = counting  # type: ignore[method-assign]
    return shares


def shrink(harness: Harness, blocks: int) -> None:
    """Leaves the engine a cache of so few blocks."""
    ledger = BlockLedger(blocks)
    harness.engine._blocks.ledger = harness.engine._loop.scheduler._blocks = ledger


def logits_of(harness: Harness, answer: Answer) -> torch.Tensor:
    assert answer.request is not None
    return torch.stack(harness.logits[answer.request.id])


@pytest.mark.parametrize("at_once", [False, True])
def test_a_long_system_prompt_under_one_adapter_is_computed_once(zoo: Zoo, at_once: bool) -> None:
    prompts = [[*SYSTEM, 30 + index, 40, 50 + index] for index in range(16)]
    with Harness(zoo.base, zoo.registry) as harness:
        shares = count_prompts(harness)
        if at_once:
            with held(harness.engine):
                answers = [harness.generate("x", prompt, 3) for prompt in prompts]
        else:
            answers = []
            for prompt in prompts:
                answers.append(harness.generate("x", prompt, 3))
                answers[-1].wait()
        results = [answer.generated() for answer in answers]
        whole = len(prompts[0])
        assert sum(share.count for share in shares) == whole + 15 * (whole - WHOLE)
        harness.idle()
        stats = harness.engine.stats()
        assert (stats.reusable_tokens, stats.reused_tokens) == (16 * whole, 15 * WHOLE)
        reference = peft_model(zoo.base, zoo.folders["x"])
        for index in (0, 1, 15):
            want = reference_logits(reference, prompts[index], results[index].token_ids)
            assert (logits_of(harness, answers[index]) - want).abs().max() < 2e-4


def test_nothing_crosses_between_adapters_weights_and_the_base(zoo: Zoo) -> None:
    prompt = [*SYSTEM[:90], 7, 8]
    arms: list[Selection] = [None, "x", "y", {"x": 0.5}, {"x": 0.5, "y": 0.5}, {"x": 0.25, "y": 0.75}]
    with Harness(zoo.base, zoo.registry, prefix_cache=False) as harness:
        plain = []
        for arm in arms:
            answer = harness.generate(arm, prompt, 4)
            answer.wait()
            plain.append(logits_of(harness, answer))
        assert harness.engine.stats().reused_tokens == harness.engine.stats().reusable_tokens == 0
    assert min((a - b).abs().max() for i, a in enumerate(plain) for b in plain[:i] if len(a) == len(b)) > 0.01
    with Harness(zoo.base, zoo.registry) as harness:
        for found in (0, 80):
            for arm, want in zip(arms, plain, strict=True):
                before = harness.engine.stats().reused_tokens
                answer = harness.generate(arm, prompt, 4)
                answer.wait()
                assert harness.engine.stats().reused_tokens - before == found
                assert (logits_of(harness, answer) - want).abs().max() < 1e-4


def test_a_name_with_new_weights_finds_nothing_of_the_old_ones(zoo: Zoo, tmp_path: Path) -> None:
    own = Zoo(zoo.base, Registry.open(tmp_path / "registry"))
    own.add("n", tmp_path / "one", targets=["q_proj", "v_proj"], seed=1)
    prompt = [*SYSTEM[:70], 5]
    with Harness(own.base, own.registry) as harness:

        def ask(reference: str) -> int:
            before = harness.engine.stats().reused_tokens
            answer = harness.generate(reference, prompt, 4)
            folder = tmp_path / ("one" if reference.endswith("@1") else "two")
            want = reference_logits(peft_model(own.base, folder), prompt, answer.generated().token_ids)
            assert (logits_of(harness, answer) - want).abs().max() < 1e-4
            return harness.engine.stats().reused_tokens - before

        own.registry.set_alias("n", "live", 1)
        assert harness.generate("n@live", prompt, 4).generated()
        own.add("n", tmp_path / "two", targets=["q_proj", "v_proj"], seed=2)
        own.registry.set_alias("n", "live", 2)
        assert ask("n@live") == 0
        assert ask("n@2") == 64
        assert ask("n@1") == 64, "the old version by its own digest"
        harness.idle()
        harness.engine.adapters.unload(harness.arm("n@2").parts[0].digest).result(10)
        assert ask("n@2") == 64, "the same digest has the same weights when it is loaded again"


def test_longer_answers_are_found_by_the_next_turn(zoo: Zoo) -> None:
    prompt = SYSTEM[:40]
    with Harness(zoo.base, zoo.registry) as harness:
        first = harness.generate("x", prompt, 30).generated().token_ids
        conversation = [*prompt, *first, 9, 9, 9]
        second = harness.generate("x", conversation, 4)
        want = reference_logits(peft_model(zoo.base, zoo.folders["x"]), conversation, second.generated().token_ids)
        assert (logits_of(harness, second) - want).abs().max() < 1e-4
        assert harness.engine.stats().reused_tokens == 64  # of 69 positions that were written


def test_labels_and_embeddings_reuse_only_what_they_do_not_pool(zoo: Zoo) -> None:
    text = [*SYSTEM[:100], 3]
    with Harness(zoo.base, zoo.registry, step_tokens=48) as harness:
        for found in (0, 96):
            before = harness.engine.stats().reused_tokens
            label = harness.classify("c", text).classified()
            assert harness.engine.stats().reused_tokens - before == found
            reference = peft_model(zoo.base, zoo.folders["c"], "SEQ_CLS", num_labels=2)
            with torch.no_grad():
                want = reference(input_ids=torch.tensor([text])).logits[0]
            assert (torch.tensor(label.logits) - want).abs().max() < 1e-4
        vectors = {}
        for pooling in Pooling:
            for again in range(2):
                before = harness.engine.stats().reused_tokens
                answer = harness.embed("y", text, pooling=pooling).wait()
                found = harness.engine.stats().reused_tokens - before
                assert found == (96 if pooling is Pooling.LAST else 0)
                vectors[pooling, again] = torch.tensor(answer.values)
            assert (vectors[pooling, 0] - vectors[pooling, 1]).abs().max() < 1e-4
        reference = peft_model(zoo.base, zoo.folders["y"])
        with torch.no_grad():
            states = reference.base_model.model.model(input_ids=torch.tensor([text])).last_hidden_state[0]
        for pooling, want in ((Pooling.MEAN, states.mean(0)), (Pooling.FIRST, states[0]), (Pooling.LAST, states[-1])):
            assert (vectors[pooling, 1] - want).abs().max() < 1e-4


@pytest.mark.parametrize("end", ["cancel", "fault"])
def test_who_waits_for_a_row_that_does_not_finish_computes_itself(zoo: Zoo, end: str) -> None:
    prompts = [[*SYSTEM[:200], 5, index] for index in range(3)]
    with Harness(zoo.base, zoo.registry, step_tokens=32) as harness:
        runner = harness.engine._loop._runner
        run = runner.run
        steps: list[Sequence[Share]] = []

        def ending(step: Sequence[Share]) -> StepResult:
            steps.append(step)
            if len(steps) == 3:
                if end == "fault":
                    raise ZeroDivisionError
                harness.engine.cancel(step[0].row.request)
            return run(step)

        runner.run = ending  # type: ignore[method-assign]
        with held(harness.engine):
            answers = [harness.generate("x", prompt, 4) for prompt in prompts]
        with pytest.raises(Cancelled if end == "cancel" else EngineFault):
            answers[0].wait()
        reference = peft_model(zoo.base, zoo.folders["x"])
        for prompt, answer in zip(prompts[1:], answers[1:], strict=True):
            want = reference_logits(reference, prompt, answer.generated().token_ids)
            assert (logits_of(harness, answer) - want).abs().max() < 1e-4
        assert all(len(step) == 1 for step in steps[:6]), "one row computed what all of them begin with"
        harness.idle()


def test_any_traffic_through_a_small_cache_answers_as_without_one(zoo: Zoo) -> None:
    """Shared beginnings, turns, evictions, preemptions, cancelled rows: every answer is that of an engine without."""
    rng = random.Random(11)
    systems = [[rng.randrange(6, 262) for _ in range(rng.randint(10, 120))] for _ in range(4)]
    arms: list[Selection] = [None, "x", "y", {"x": 0.5, "y": 0.5}, {"x": 1.5, "y": -0.5}]
    asked = []
    for _ in range(60):
        system = rng.choice(systems)
        prompt = [*system[: rng.randint(1, len(system))], *(rng.randrange(6, 262) for _ in range(rng.randint(0, 20)))]
        sampling = {"temperature": 1.0, "seed": rng.randrange(100)} if rng.random() < 0.3 else {}
        asked.append((rng.choice(arms), prompt, rng.choice([1, 10, 60]), sampling))
    with Harness(zoo.base, zoo.registry, prefix_cache=False) as harness:
        answers = [harness.generate(arm, prompt, most, **s) for arm, prompt, most, s in asked]
        plain = [answer.generated().token_ids for answer in answers]
    with Harness(zoo.base, zoo.registry, max_rows=8, step_tokens=64) as harness:
        shrink(harness, 26)
        answers, cancelled = [], []
        for index, (arm, prompt, most, sampling) in enumerate(asked):
            answers.append(harness.generate(arm, prompt, most, **sampling))
            if index % 5 == 0:  # somebody else with the same beginning, who leaves
                cancelled.append(harness.generate(arm, prompt, 60))
                request = cancelled[-1].request
                assert request is not None
                request.deadline = time.monotonic() + rng.random()
        for want, answer in zip(plain, answers, strict=True):
            assert answer.generated().token_ids == want
        for answer in cancelled:
            assert answer.done.wait(20)
        harness.idle()
        stats = harness.engine.stats()
        assert stats.reused_tokens > 0
        assert stats.preemptions > 0
        ledger = harness.engine._blocks.ledger
        assert not any(ledger._holders)
        assert not harness.engine._loop.scheduler._under_way
        assert not harness.engine._loop.scheduler._group_of


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_nothing_of_a_used_block_reaches_the_next_row(zoo: Zoo, prefix_cache: bool) -> None:
    prompt = list(range(30, 70))
    with Harness(zoo.base, zoo.registry, prefix_cache=prefix_cache) as harness:
        shrink(harness, 8)
        for start in (0, 100):  # all of them, and some twice
            harness.generate("x", SYSTEM[start : start + 80], 30).wait()
        harness.idle()
        pool = harness.engine._blocks
        for store in (*pool.keys, *pool.values):
            store[BLOCK_TOKENS:].fill_(float("nan"))
        answer = harness.generate("x", prompt, 12)
        want = reference_logits(peft_model(zoo.base, zoo.folders["x"]), prompt, answer.generated().token_ids)
        assert (logits_of(harness, answer) - want).abs().max() < 1e-4


def test_names_follow_from_everything_before_them() -> None:
    tokens = list(range(100, 164))

    def names(tokens: list[int], identity: object = (), **settings: object) -> list[bytes]:
        return BlockNames(seed(identity), **settings).first(tokens, len(tokens) // BLOCK_TOKENS)  # type: ignore[arg-type]

    plain = names(tokens)
    assert len(set(plain)) == 4
    assert names(tokens[:50])[:3] == plain[:3]
    for at in range(64):
        changed = names([*tokens[:at], 7, *tokens[at + 1 :]])
        assert [a == b for a, b in zip(plain, changed, strict=True)] == [index < at // 16 for index in range(4)]
    identities: list[object] = [
        (),
        (("sha256:a", 1.0),),
        (("sha256:a", 0.5),),
        (("sha256:a", 1.0), ("sha256:b", 1.0)),
        (("sha256:a", LayerWeights(1.0, (("q_proj", 0.5),))),),
        (("sha256:a", LayerWeights(1.0, (("q_proj", 0.25),))),),
    ]
    assert len({seed(identity) for identity in identities} | {seed((), 3), seed((), 4)}) == len(identities) + 2
    own = seed((("sha256:a", 1.0),))
    switched = {at: names(tokens, activation=(at, own)) for at in range(1, 64)}
    for at, chain in switched.items():
        assert [a == b for a, b in zip(plain, chain, strict=True)] == [16 * (index + 1) <= at for index in range(4)]
    assert len({chain[3] for chain in switched.values()}) == 63
    with pytest.raises(TypeError):
        seed(((object(), 1.0),))
