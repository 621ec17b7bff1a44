"""Every row of a mixed batch equals plain PEFT alone with the same weights.

Tolerance: 1e-4 in logits, float32. Both sides sum the same products in another order (our batch is flattened, masked
and read from cache blocks), so differences of a few units in the last place remain and grow over layers; on logits of
size about 10 they were measured below 2e-5.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from engine_tools import Answer, Harness, References, Selection, held, reference_logits
from safetensors.torch import load_file, save_file
from tiny import CAUSAL, OTHER_CAUSAL, greedy, load_reference
from zoo import Zoo

ATOL = 1e-4

# PEFT's `cat` keeps the first adapter's use_rslora, which makes the sum's scaling √r instead of 1 (peft 0.21.2), so no
# rank-stabilized adapter (a2, a5) stands first.
FUSED: list[Selection] = [{"a1": 0.7, "a4": 0.3}, {"a0": 1.5, "a6": -0.5}, {"a3": 0.25, "a2": 0.5, "a5": 0.25}]
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
    assert result.token_ids == greedy(model, prompt, most).tokens


@pytest.mark.parametrize(
    ("architecture", "popularity", "mode"),
    [
        *((architecture, popularity, "auto") for architecture, popularity in itertools.product(CAUSAL, POPULARITY)),
        *((architecture, "distinct", "off") for architecture in CAUSAL),
        *((architecture, "distinct", "auto") for architecture in OTHER_CAUSAL),
    ],
)
def test_mixed_rows_equal_peft_alone(architecture: str, popularity: str, mode: str, zoos: dict[str, Zoo]) -> None:
    """Requests join and leave at every step: prompts of 1 to 90 tokens in chunks of 48, different lengths of answer,
    arriving a few at a time, more of them than rows."""
    zoo = zoos[architecture]
    selections = POPULARITY[popularity]
    texts = prompts(len(selections))
    most = [4 + 3 * (i % 5) for i in range(len(selections))]
    with Harness(zoo.base, zoo.registry, max_rows=8, step_tokens=48, compile=mode) as harness:
        with held(harness.engine):
            answers = [harness.generate(selections[index], texts[index], most[index]) for index in range(6)]
        for index in range(6, len(selections)):
            answers.append(harness.generate(selections[index], texts[index], most[index]))
            if index % 3 == 2:
                time.sleep(0.01)
        for answer in answers:
            answer.wait()
        assert max(harness.step_sizes) >= 5, "the rows were not batched"
        harness.idle()
        references = References(load_reference(zoo.base), zoo.folders, selections)
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
def test_labels_and_embeddings_equal_peft_alone_beside_generation(
    architecture: str, zoos: dict[str, Zoo], tmp_path: Path
) -> None:
    """Heads of two sizes, a fusion of two heads, embeddings and (on causal bases) generation in one batch."""
    zoo = zoos[architecture]
    texts = prompts(9, seed=3, longest=60)
    arms: list[Selection] = ["c0", "c1", "c2"]
    fusion = {"c0": 0.75, "c1": 0.25}
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
        references = References(load_reference(zoo.base, "SEQ_CLS", num_labels=labels), zoo.folders, [arm])
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

    # PEFT refuses to fuse adapters that bring modules, so the reference fuses the deltas and averages the heads itself.
    bare = {name: without_head(zoo.folders[name], tmp_path / name) for name in fusion}
    references = References(load_reference(zoo.base, "SEQ_CLS", num_labels=2), bare, [fusion])
    heads_of = [head_of(zoo.folders[name]) for name in fusion]
    with references.of(fusion) as model:
        wrapped = model.base_model.model.classifier if architecture == "bert" else model.base_model.model.score
        for text, answer in blended:
            with torch.no_grad():
                state = _head_input(model, wrapped, text, architecture)
            expected = sum(
                w * (state @ weight.T + bias) for w, (weight, bias) in zip((0.75, 0.25), heads_of, strict=True)
            )
            torch.testing.assert_close(torch.tensor(answer.classified().logits), expected, rtol=0, atol=ATOL)

    references = References(
        load_reference(zoo.base, "FEATURE_EXTRACTION" if not causal else "CAUSAL_LM"),
        zoo.folders,
        ["a1", "a6"],
    )
    for selection, text, answer in embedded:
        with references.of(selection) as model, torch.no_grad():
            out = model(input_ids=torch.tensor([text]), output_hidden_states=True).hidden_states[-1][0].mean(0)
        torch.testing.assert_close(torch.tensor(answer.wait().values), out, rtol=0, atol=ATOL)


def without_head(folder: Path, copy: Path) -> Path:
    """The adapter's deltas alone, as PEFT loads them."""
    copy.mkdir()
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"modules_to_save": None, "task_type": None}
    (copy / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if ".lora_" in k}, copy / "adapter_model.safetensors")
    return copy


def head_of(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The head's weight and bias (zeros where it has none)."""
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {k.rpartition(".")[2]: v for k, v in tensors.items() if ".lora_" not in k}
    return found["weight"], found.get("bias", torch.zeros(found["weight"].shape[0]))


def _head_input(model: object, wrapped: torch.nn.Module, text: Sequence[int], architecture: str) -> torch.Tensor:
    """What the reference hands to its head for the label: the last token's state, or an encoder's pooled one."""
    seen: list[torch.Tensor] = []
    hook = wrapped.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        model(input_ids=torch.tensor([text]))  # type: ignore[operator]
    finally:
        hook.remove()
    return seen[0][0] if architecture == "bert" else seen[0][0, -1]


@pytest.mark.parametrize(
    ("architecture", "quantize"), [*((name, "nf4") for name in CAUSAL), *((name, "int8-bnb") for name in CAUSAL)]
)
def test_over_the_same_quantized_base(architecture: str, quantize: str, zoos: dict[str, Zoo]) -> None:
    """PEFT over transformers' own bitsandbytes base against ours, computing in float32.

    Tolerance 0.05 in logits (of size up to 5): the quantized weights are bit-equal, but on a CPU with AVX512-BF16
    bitsandbytes' 4-bit product rounds activations and results to bfloat16 whatever the compute dtype, so that a last
    bit that differs upstream can become one bfloat16 step (2^-8 of a value) downstream; INT8 rounds activations to 8
    bits for each token, with the same consequence. Measured: up to 0.012. The
    adapters' own effects are above 1.
    """
    zoo = zoos[architecture]
    texts = prompts(len(ALL), seed=7, longest=40)
    with Harness(zoo.base, zoo.registry, quantize=quantize, max_rows=8, step_tokens=48) as harness:
        assert harness.engine.base.quantization == quantize
        answers = [harness.generate(selection, text, 6) for selection, text in zip(ALL, texts, strict=True)]
        for answer in answers:
            answer.wait()
        from adapterbay.base.load import quantization_config

        model = load_reference(zoo.base, quantization_config=quantization_config(quantize, torch.float32))
        references = References(model, zoo.folders, ALL)
        for answer, selection, text in zip(answers, ALL, texts, strict=True):
            with references.of(selection) as alone:
                expected = reference_logits(alone, text, answer.generated().token_ids)
            got = torch.stack(harness.logits[answer.request.id])  # type: ignore[union-attr]
            torch.testing.assert_close(got, expected, rtol=0, atol=0.05)


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this CPU has no native bfloat16")
def test_in_bfloat16_rows_stay_close_to_float32(zoos: dict[str, Zoo]) -> None:
    """The default on such CPUs, with packed weights. bfloat16 keeps 8 bits, so PEFT in bfloat16 and we are both off
    from float32; we may be off by no more than twice what PEFT is, plus a bfloat16 step of a logit of size 4."""
    zoo = zoos["llama"]
    texts = prompts(len(ALL), seed=11, longest=40)
    with Harness(zoo.base, zoo.registry, dtype="bfloat16", max_rows=12) as harness:
        answers = [harness.generate(selection, text, 4) for selection, text in zip(ALL, texts, strict=True)]
        for answer in answers:
            answer.wait()
    exact = References(load_reference(zoo.base), zoo.folders, ALL)
    coarse = References(load_reference(zoo.base, dtype=torch.bfloat16), zoo.folders, ALL)
    for answer, selection, text in zip(answers, ALL, texts, strict=True):
        tokens = answer.generated().token_ids
        with exact.of(selection) as model:
            expected = reference_logits(model, text, tokens)
        with coarse.of(selection) as model:
            theirs = (reference_logits(model, text, tokens) - expected).abs().max()
        ours = (torch.stack(harness.logits[answer.request.id]) - expected).abs().max()  # type: ignore[union-attr]
        assert ours <= 2 * theirs + 2**-6 * 4, (selection, ours, theirs)
