"""Every row of a mixed batch equals plain PEFT alone with the same weights.

Tolerance: 1e-4 in logits, float32. Both sides sum the same products in another order (our batch is flattened, masked
and read from cache blocks), so differences of a few units in the last place remain and grow over layers; on logits of
size about 10 they were measured below 2e-5.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence

import pytest
import torch
from engine_tools import Answer, Harness, References, Selection, reference_greedy, reference_logits
from tiny import CAUSAL, load_reference
from zoo import Zoo

ATOL = 1e-4

FUSED: list[Selection] = [{"a1": 0.7, "a4": 0.3}, {"a0": 1.5, "a6": -0.5}, {"a2": 0.5, "a3": 0.25, "a5": 0.25}]
ALL: list[Selection] = [*(f"a{i}" for i in range(8)), *FUSED, None]

POPULARITY: dict[str, list[Selection]] = {
    "distinct": ALL,
    "identical": ["a5"] * 12,
    "uniform": [ALL[i % 3] for i in range(12)],
    "skewed": [ALL[min(int(random.Random(i).paretovariate(1.5)) - 1, 11)] for i in range(12)],
}


def prompts(count: int, seed: int = 0, longest: int = 90) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(6, 262) for _ in range(rng.choice([1, 3, 9, 17, 40, longest]))] for _ in range(count)]


def check(answer: Answer, harness: Harness, model: object, prompt: Sequence[int], most: int) -> None:
    result = answer.generated()
    assert answer.request is not None
    got = torch.stack(harness.logits[answer.request.id])
    expected = reference_logits(model, prompt, result.token_ids)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=0, atol=ATOL)
    assert result.token_ids == reference_greedy(model, prompt, most)


@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("architecture", CAUSAL)
def test_mixed_rows_equal_peft_alone(architecture: str, popularity: str, zoos: dict[str, Zoo]) -> None:
    """Requests join and leave at every step: prompts of 1 to 90 tokens in chunks of 48, different lengths of answer,
    arriving a few at a time, more of them than rows."""
    zoo = zoos[architecture]
    selections = POPULARITY[popularity]
    texts = prompts(len(selections))
    most = [4 + 3 * (i % 5) for i in range(len(selections))]
    with Harness(zoo.base, zoo.registry, max_rows=8, step_tokens=48) as harness:
        answers = []
        for index, (selection, text) in enumerate(zip(selections, texts, strict=True)):
            answers.append(harness.generate(selection, text, most[index]))
            if index % 3 == 2:
                time.sleep(0.01)
        for answer in answers:
            answer.wait()
        assert max(harness.step_sizes) >= 5, "the rows were not batched"
        harness.idle()
        references = References(load_reference(zoo.base), zoo.folders)
        for answer, selection, text, count in zip(answers, selections, texts, most, strict=True):
            with references.of(selection) as model:
                check(answer, harness, model, text, count)


@pytest.mark.parametrize("architecture", CAUSAL)
def test_different_adapters_answer_differently(architecture: str, zoos: dict[str, Zoo]) -> None:
    """The parity test would pass trivially if adapters had no effect."""
    zoo = zoos[architecture]
    with Harness(zoo.base, zoo.registry) as harness:
        text = prompts(1, seed=5)[0]
        answers = [harness.generate(selection, text, 1) for selection in ALL]
        logits = []
        for answer in answers:
            answer.wait()
            logits.append(harness.logits[answer.request.id][0])  # type: ignore[union-attr]
        for one, other in itertools.combinations(logits, 2):
            assert (one - other).abs().max() > 0.01


@pytest.mark.parametrize("architecture", [*CAUSAL, "bert"])
def test_labels_and_embeddings_equal_peft_alone_beside_generation(architecture: str, zoos: dict[str, Zoo]) -> None:
    """Heads of two sizes, a fusion of two heads, embeddings and (on causal bases) generation in one batch."""
    zoo = zoos[architecture]
    texts = prompts(9, seed=3, longest=60)
    arms: list[Selection] = ["c0", "c1", "c2"]
    fusion: Selection = {"c0": 0.75, "c1": 0.25}
    causal = architecture in CAUSAL
    with Harness(zoo.base, zoo.registry, step_tokens=64, max_rows=32) as harness:
        generated = [harness.generate(arm, text, 8) for arm, text in zip(ALL, texts, strict=False)] if causal else []
        labelled = [(arm, text, harness.classify(arm, text)) for text in texts for arm in arms]
        blended = [(text, harness.classify(fusion, text)) for text in texts]
        embedded = [(arm, text, harness.embed(arm, text)) for text in texts[:4] for arm in ("a1", "a6", None)]
        for answer in [*generated, *(a for *_, a in labelled), *(a for *_, a in blended), *(a for *_, a in embedded)]:
            answer.wait()
        if causal:
            assert any(len(kinds) == 3 for kinds in harness.kinds), "the kinds never shared a step"
        harness.idle()

    heads = {}
    for arm in arms:
        labels = 3 if arm == "c2" else 2
        references = References(load_reference(zoo.base, "SEQ_CLS", num_labels=labels), {arm: zoo.folders[arm]})
        with references.of(arm) as model:
            heads[arm] = model
            for selection, text, answer in labelled:
                if selection == arm:
                    with torch.no_grad():
                        expected = model(input_ids=torch.tensor([text])).logits[0]
                    result = answer.classified()
                    torch.testing.assert_close(torch.tensor(result.logits), expected, rtol=0, atol=ATOL)
                    assert result.labels == (("bad", "so-so", "good") if labels == 3 else ("no", "yes"))
                    assert sum(result.probabilities) == pytest.approx(1.0)

    references = References(
        load_reference(zoo.base, "SEQ_CLS", num_labels=2), {name: zoo.folders[name] for name in ("c0", "c1")}
    )
    with references.of({"c0": 0.75, "c1": 0.25}) as model:
        head = "classifier" if architecture == "bert" else "score"
        wrapped = getattr(model.base_model.model, head)
        blended_weight = sum(w * wrapped.modules_to_save[n].weight for n, w in (("c0", 0.75), ("c1", 0.25)))
        bias = [wrapped.modules_to_save[n].bias for n in ("c0", "c1")]
        for text, answer in blended:
            with torch.no_grad():
                states = _head_input(model, wrapped, text, architecture)
                expected = states @ blended_weight.T
                if bias[0] is not None:
                    expected = expected + 0.75 * bias[0] + 0.25 * bias[1]
            torch.testing.assert_close(torch.tensor(answer.classified().logits), expected, rtol=0, atol=ATOL)

    references = References(
        load_reference(zoo.base, "FEATURE_EXTRACTION" if not causal else "CAUSAL_LM"),
        {name: zoo.folders[name] for name in ("a1", "a6")},
    )
    for selection, text, answer in embedded:
        with references.of(selection) as model, torch.no_grad():
            out = model(input_ids=torch.tensor([text]), output_hidden_states=True).hidden_states[-1][0].mean(0)
        torch.testing.assert_close(torch.tensor(answer.wait().values), out, rtol=0, atol=ATOL)


def _head_input(model: object, wrapped: torch.nn.Module, text: Sequence[int], architecture: str) -> torch.Tensor:
    """What the reference hands to its head for the label: the last token's state, or an encoder's pooled one."""
    seen: list[torch.Tensor] = []
    hook = wrapped.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        model(input_ids=torch.tensor([text]))  # type: ignore[operator]
    finally:
        hook.remove()
    return seen[0][0] if architecture == "bert" else seen[0][0, -1]


@pytest.mark.parametrize("architecture", CAUSAL)
def test_over_the_same_nf4_base(architecture: str, zoos: dict[str, Zoo]) -> None:
    """PEFT over transformers' own bitsandbytes base against ours, computing in float32.

    Tolerance 1e-3 in logits: the quantized weights are bit-equal, but bitsandbytes' 4-bit product on a CPU picks
    another kernel by batch size (a packed one for few rows), with rounding of its own.
    """
    zoo = zoos[architecture]
    texts = prompts(len(ALL), seed=7, longest=40)
    with Harness(zoo.base, zoo.registry, quantize="nf4", max_rows=8, step_tokens=48) as harness:
        assert harness.engine.base.quantization == "nf4"
        answers = [harness.generate(selection, text, 6) for selection, text in zip(ALL, texts, strict=True)]
        for answer in answers:
            answer.wait()
        from adapterbay.base.load import quantization_config

        model = load_reference(zoo.base, quantization_config=quantization_config("nf4", torch.float32))
        references = References(model, zoo.folders)
        for answer, selection, text in zip(answers, ALL, texts, strict=True):
            with references.of(selection) as alone:
                expected = reference_logits(alone, text, answer.generated().token_ids)
            got = torch.stack(harness.logits[answer.request.id])  # type: ignore[union-attr]
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)
