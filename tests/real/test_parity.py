"""SmolLM2-135M-Instruct and all-MiniLM-L6-v2: mixed batches equal plain PEFT alone, on real weights and real text.

Tolerances are those of tests/engine/test_parity.py, and for the same reasons: 1e-4 in logits in float32. With NF4 on a
CPU with AVX512-BF16, bitsandbytes rounds to bfloat16 inside every layer, over 30 layers here, so that a last bit that
differs becomes a few bfloat16 steps of a logit of size 20. Measured: at most 0.43 off, 0.08 on average; allowed: 1.0
and 0.15, and at most half of what the adapter itself changes on average.
"""

from __future__ import annotations

import pytest
import torch
from engine_tools import Harness, References, Selection, reference_logits
from tiny import greedy, load_reference
from zoo import MINILM, SMOLLM2, Zoo

from adapterbay.base.load import quantization_config
from adapterbay.base.text import encode_conversation, encode_text

pytestmark = [pytest.mark.real, pytest.mark.slow]

ATOL = 1e-4
QUESTIONS = (
    "Name three rivers in Europe.",
    "Why is the sky blue?",
    "Write one line about winter.",
    "What is 12 times 12?",
    "Give me a synonym for quick.",
    "Who wrote Hamlet?",
    "Explain rain to a child, in two sentences, and then say what snow is and why it is white and soft.",
    "Say hello.",
)
ARMS: list[Selection] = [
    *(f"a{i}" for i in range(8)),
    {"a1": 0.7, "a4": 0.3},
    {"a0": 1.5, "a6": -0.5},
    None,
    "a3",
]


POPULARITY: dict[str, list[Selection]] = {
    "distinct": ARMS,
    "identical": ["a5"] * 8,
    "uniform": [ARMS[i % 3] for i in range(8)],
    "skewed": [ARMS[i] for i in (5, 5, 5, 5, 5, 8, 10, 1, 6)],
}


@pytest.mark.parametrize("popularity", POPULARITY)
def test_smollm2_generates_as_peft_does(popularity: str, smollm2: Zoo) -> None:
    arms = POPULARITY[popularity]
    with Harness(SMOLLM2, smollm2.registry, max_rows=8, step_tokens=64) as harness:
        prompts = [
            encode_conversation(
                harness.engine.tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True
            )
            for text in (QUESTIONS * 2)[: len(arms)]
        ]
        answers = [
            harness.generate(arm, prompt, 6 + 2 * (i % 4))
            for i, (arm, prompt) in enumerate(zip(arms, prompts, strict=True))
        ]
        for answer in answers:
            answer.wait(120)
        assert max(harness.step_sizes) >= 6
    references = References(load_reference(smollm2.base), smollm2.folders, arms)
    for arm, prompt, answer in zip(arms, prompts, answers, strict=True):
        result = answer.generated()
        got = torch.stack(harness.logits[answer.request.id])  # type: ignore[union-attr]
        with references.of(arm) as model:
            torch.testing.assert_close(got, reference_logits(model, prompt, result.token_ids), rtol=0, atol=ATOL)
            assert result.token_ids == greedy(model, prompt, len(result.token_ids)).tokens


def test_smollm2_over_the_same_nf4_base(smollm2: Zoo) -> None:
    with Harness(SMOLLM2, smollm2.registry, quantize="nf4", max_rows=12) as harness:
        prompts = [encode_text(harness.engine.tokenizer, text) for text in (QUESTIONS * 2)[: len(ARMS)]]
        answers = [harness.generate(arm, prompt, 4) for arm, prompt in zip(ARMS, prompts, strict=True)]
        for answer in answers:
            answer.wait(120)
    model = load_reference(smollm2.base, quantization_config=quantization_config("nf4", torch.float32))
    references = References(model, smollm2.folders, ARMS)
    served = due = 0.0
    for arm, prompt, answer in zip(ARMS, prompts, answers, strict=True):
        tokens = answer.generated().token_ids
        got = torch.stack(harness.logits[answer.request.id])  # type: ignore[union-attr]
        with references.of(arm) as alone:
            expected = reference_logits(alone, prompt, tokens)
        off = (got - expected).abs()
        assert off.max() < 1.0
        assert off.mean() < 0.15
        if arm is None:
            continue
        with references.of(None) as base:
            there = reference_logits(base, prompt, tokens)
        effect = expected - there
        if arm not in ("a4", "a5", "a6", "a7"):
            assert effect.abs().mean() > 2 * off.mean(), arm
        else:  # nearly as small as the rounding, which points elsewhere: together they show
            served += float(((got - there) * effect).sum())
            due += float(effect.square().sum())
    assert 0.75 < served / due < 1.25


def test_minilm_labels_as_peft_does(minilm: Zoo) -> None:
    """Heads of two, three and five labels in one batch."""
    texts = (
        "a moving and beautifully acted film .",
        "dull from start to finish",
        "The plot makes no sense, but the music is lovely and the ending made me laugh out loud more than once.",
        "ok",
    )
    arms = [f"a{i}" for i in range(8)]
    with Harness(MINILM, minilm.registry, max_rows=32) as harness:
        assert harness.engine.base.kind == "encoder"
        asked = [(arm, encode_text(harness.engine.tokenizer, text)) for text in texts for arm in arms]
        answers = [harness.classify(arm, ids) for arm, ids in asked]
        embedding = harness.embed(None, asked[0][1], normalize=True)
        for answer in [*answers, embedding]:
            answer.wait(60)
        assert max(harness.step_sizes) > 8
    assert sum(v * v for v in embedding.wait().values) == pytest.approx(1.0, abs=1e-5)
    for index, arm in enumerate(arms):
        base = load_reference(minilm.base, "SEQ_CLS", num_labels=[2, 3, 5][index % 3])
        references = References(base, minilm.folders, [arm])
        with references.of(arm) as model, torch.no_grad():
            for (asked_arm, ids), answer in zip(asked, answers, strict=True):
                if asked_arm == arm:
                    expected = model(input_ids=torch.tensor([ids])).logits[0]
                    torch.testing.assert_close(torch.tensor(answer.classified().logits), expected, rtol=0, atol=ATOL)
