"""T5 with adapters on encoder, decoder and cross-attention: every row of a mixed batch equals plain PEFT alone.

Tolerance 1e-4 of logits, float32. T5 does not scale its scores, so rounding grows more than elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_tools import Answer, Harness, References, Selection, held
from peft import LoraConfig, get_peft_model
from tiny import SPECIAL, TARGETS, greedy, load_reference, make_base, peft_model
from zoo import Zoo

from adapterbay.registry import Registry
from adapterbay.registry.errors import InvalidArgument, UnsupportedMethod

ATOL = 1e-4
START = SPECIAL.index("<|im_end|>")
ARMS: list[Selection] = ["a0", "a1", "a2", "a3", {"a0": 0.7, "a1": 0.4}, None]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    root = tmp_path_factory.mktemp("t5")
    made = Zoo(make_base(root / "base", "t5", layers=2), Registry.open(root / "registry"))
    for index, targets in enumerate(TARGETS["t5"]):
        made.add(
            f"a{index}",
            root / f"a{index}",
            targets=targets,
            rank=2 << index,
            seed=index,
            task="SEQ_2_SEQ_LM",
            scale=0.4,
        )
    saved = {"modules_to_save": ["classification_head"]}  # PEFT does not by itself
    labels = ["a", "b", "c"]
    made.add(
        "labels", root / "labels", targets=["q", "v"], seed=9, task="SEQ_CLS", labels=labels, scale=0.4, settings=saved
    )
    made.add("tokens", root / "tokens", targets=["wi"], seed=10, task="TOKEN_CLS", labels=["O", "X"], scale=0.4)
    return made


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Each ends with T5's end token, by which its head knows where to look, and has it nowhere else."""
    rng = random.Random(seed)
    return [[*(rng.randrange(6, 262) for _ in range(rng.choice([1, 3, 15, 16, 40, 90]))), START] for _ in range(count)]


def check(answer: Answer, harness: Harness, model: Any, prompt: Sequence[int], most: int) -> None:
    want = greedy(model, prompt, most)
    assert answer.generated().token_ids == want.tokens
    assert answer.request is not None
    torch.testing.assert_close(torch.stack(harness.logits[answer.request.id]), want.logits, rtol=0, atol=ATOL)


def test_mixed_rows_equal_peft_alone(zoo: Zoo) -> None:
    texts, most = prompts(len(ARMS)), [4, 20, 9, 35, 13, 6]
    with Harness(zoo.base, zoo.registry, max_rows=4, step_tokens=128) as harness:
        harness.load("a0", "a1", "a2", "a3")
        assert harness.engine.base.kind == "encoder-decoder"
        with held(harness.engine):
            answers = [harness.generate(*asked) for asked in zip(ARMS, texts, most, strict=True)]
        for answer in answers:
            answer.wait()
        assert max(harness.step_sizes) > 2, "the rows were not batched"
        harness.idle()
    references = References(load_reference(zoo.base, "SEQ_2_SEQ_LM"), zoo.folders, ARMS)
    for answer, selection, text, count in zip(answers, ARMS, texts, most, strict=True):
        with references.of(selection) as model:
            check(answer, harness, model, text, count)
    first = {tuple(harness.logits[answer.request.id][0].tolist()) for answer in answers if answer.request}
    assert len(first) == len(ARMS)


def test_rows_that_give_way_read_their_text_again(zoo: Zoo) -> None:
    texts = [text for text in prompts(60, seed=2) if len(text) == 17][:4]
    with Harness(zoo.base, zoo.registry, kv_bytes=1 << 20, max_rows=4) as harness:
        harness.load("a1")
        ledger = harness.engine._blocks.ledger
        with held(harness.engine):
            away = ledger.take(ledger.blocks - 18)  # 2 for each text, 3 for each answer
            answers = [harness.generate("a1", text, 40) for text in texts]
        for answer in answers:
            answer.wait()
        assert harness.engine.stats().preemptions > 0, "nobody had to give way"
        with held(harness.engine):
            ledger.give_back(away)
        harness.idle()
    model = peft_model(zoo.base, zoo.folders["a1"], "SEQ_2_SEQ_LM")
    for answer, text in zip(answers, texts, strict=True):
        check(answer, harness, model, text, 40)


def test_labels_and_embeddings_beside_generation(zoo: Zoo) -> None:
    texts = prompts(4, seed=3)
    with Harness(zoo.base, zoo.registry, max_rows=32) as harness:
        harness.load("a0", "a1", "labels", "tokens")
        with held(harness.engine):
            spoken = [harness.generate("a0", text, 5) for text in texts]
            labelled = [harness.classify("labels", text) for text in texts]
            tagged = [harness.classify_tokens("tokens", text) for text in texts]
            embedded = [harness.embed("a1", text) for text in texts]
        for answer in [*spoken, *labelled, *tagged, *embedded]:
            answer.wait()
        assert any(len(kinds) == 4 for kinds in harness.kinds), "the kinds never shared a step"
        harness.idle()
    generator = peft_model(zoo.base, zoo.folders["a0"], "SEQ_2_SEQ_LM")
    labeller = peft_model(zoo.base, zoo.folders["labels"], "SEQ_CLS", num_labels=3)
    tagger = peft_model(zoo.base, zoo.folders["tokens"], "TOKEN_CLS", num_labels=2)
    encoder = peft_model(zoo.base, zoo.folders["a1"], "SEQ_2_SEQ_LM").get_encoder()
    for text, said, label, tags, vector in zip(texts, spoken, labelled, tagged, embedded, strict=True):
        check(said, harness, generator, text, 5)
        ids = torch.tensor([text])
        with torch.no_grad():
            expected = [
                labeller(input_ids=ids).logits[0],
                tagger(input_ids=ids).logits[0],
                encoder(input_ids=ids).last_hidden_state[0].mean(0),
            ]
        got = [label.wait().logits, tags.wait().logits, vector.wait().values]
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(torch.tensor(ours), theirs, rtol=0, atol=ATOL)


def test_a_lora_on_the_embedding_has_no_effect_in_peft_and_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    torch.manual_seed(3)
    base = load_reference(zoo.base, "SEQ_2_SEQ_LM")
    settings = LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["shared"], init_lora_weights=False)
    feed = {"input_ids": torch.tensor([[7, 9, START]]), "decoder_input_ids": torch.tensor([[START, 8]])}
    with torch.no_grad():
        plain = base(**feed).logits
        adapted = get_peft_model(base, settings).eval()
        assert torch.equal(adapted(**feed).logits, plain)
    adapted.save_pretrained(tmp_path / "shared", save_embedding_layers=False)
    zoo.registry.push(tmp_path / "shared", "shared", base=f"folder:{zoo.base}")
    with Harness(zoo.base, zoo.registry) as harness, pytest.raises(UnsupportedMethod, match="would have no effect"):
        harness.generate("shared", [7, START], 3).wait()


def test_text_and_answer_have_a_context_each(zoo: Zoo) -> None:
    with Harness(zoo.base, zoo.registry, max_length=48) as harness:
        assert len(harness.generate(None, [7] * 48, 48).generated().token_ids) == 48
        for text, most in (([7] * 49, 1), ([7], 49)):
            with pytest.raises(InvalidArgument):
                harness.generate(None, text, most)


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this CPU has no native bfloat16")
def test_packed_bfloat16_weights(zoo: Zoo) -> None:
    """T5 looks at the dtype of a weight that packing has taken away. We are off from float32 by no more than twice what
    PEFT in bfloat16 is, plus a step of bfloat16 of the largest logit."""
    text = prompts(3, seed=5)[2]
    with Harness(zoo.base, zoo.registry, dtype="bfloat16") as harness:
        answer = harness.generate("a1", text, 3)
        tokens = answer.generated().token_ids
    arguments = {"input_ids": torch.tensor([text]), "decoder_input_ids": torch.tensor([[START, *tokens[:-1]]])}
    with torch.no_grad():
        exact, coarse = (
            peft_model(zoo.base, zoo.folders["a1"], "SEQ_2_SEQ_LM", dtype=dtype)(**arguments).logits[0].float()
            for dtype in (torch.float32, torch.bfloat16)
        )
    assert answer.request is not None
    ours = (torch.stack(harness.logits[answer.request.id]) - exact).abs().max()
    assert ours <= 2 * (coarse - exact).abs().max() + 2**-8 * exact.abs().max()
