"""Heads of every architecture, for texts and for tokens, beside each other and beside generation in one batch.

The reference is transformers' own model class under PEFT; tolerance 1e-4 of logits, float32.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_tools import Harness, held, reference_logits
from tiny import TARGETS, greedy, load_reference, make_base, peft_model
from torch import Tensor
from transformers import BertForMaskedLM
from zoo import Zoo

from adapterbay.registry import Registry
from adapterbay.registry.errors import AdapterbayError, Rejected, TaskMismatch, UnsupportedMethod
from adapterbay.server.heads import Head, HeadLayer, HeadPooling, average_heads, head_from

ATOL = 1e-4
LABELS = {"c2": ["no", "yes"], "c3": ["bad", "so-so", "good"], "t4": ["O", "B", "I", "E"], "t2": ["O", "X"]}
HEADS = {name: "TOKEN_CLS" if name.startswith("t") else "SEQ_CLS" for name in LABELS}
ARCHITECTURES = ("bert", "roberta", "distilbert", "electra", "albert", "llama", "gpt2", "opt-projected")


def heads_of(architecture: str) -> dict[str, str]:
    """transformers has no OPTForTokenClassification."""
    return {name: task for name, task in HEADS.items() if task == "SEQ_CLS" or not architecture.startswith("opt")}


def make_zoo(root: Path, architecture: str) -> Zoo:
    zoo = Zoo(make_base(root / "base", architecture), Registry.open(root / "registry"))
    for index, (name, task) in enumerate(heads_of(architecture).items()):
        saved = {"modules_to_save": ["pre_classifier", "classifier"]} if architecture == "distilbert" else {}
        zoo.add(
            name,
            root / name,
            targets=TARGETS[architecture][index % 4],
            rank=2 + 3 * index,
            seed=70 + index,
            task=task,
            labels=LABELS[name],
            scale=0.5,
            settings=saved if task == "SEQ_CLS" else None,
        )
    return zoo


@pytest.fixture(scope="module")
def headed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Zoo]:
    class Made(dict[str, Zoo]):
        def __missing__(self, architecture: str) -> Zoo:
            self[architecture] = make_zoo(tmp_path_factory.mktemp(f"headed-{architecture}"), architecture)
            return self[architecture]

    return Made()


def prompts(count: int, seed: int, longest: int = 60) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(6, 262) for _ in range(rng.choice([1, 5, 18, longest]))] for _ in range(count)]


def reference(zoo: Zoo, name: str) -> Any:
    return peft_model(zoo.base, zoo.folders[name], HEADS[name], num_labels=len(LABELS[name]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_heads_of_all_sizes_and_tasks_share_a_batch(architecture: str, headed: dict[str, Zoo]) -> None:
    """Chunks of 32 tokens on causal bases, so that the tokens of one text are labelled over several steps."""
    zoo = headed[architecture]
    causal = architecture in ("llama", "gpt2", "opt-projected")
    texts = prompts(3, seed=1)
    asked = [(name, text) for text in texts for name in heads_of(architecture)]
    with Harness(zoo.base, zoo.registry, step_tokens=32 if causal else 512, max_rows=32) as harness:
        harness.load(*heads_of(architecture))
        with held(harness.engine):
            spoken = [harness.generate(None, text, 6) for text in texts] if causal else []
            embedded = [harness.embed("c2", text) for text in texts]
            answers = [
                (harness.classify if HEADS[name] == "SEQ_CLS" else harness.classify_tokens)(name, text)
                for name, text in asked
            ]
        results = [answer.wait() for answer in answers]
        vectors = [answer.wait() for answer in embedded]
        generated = [answer.generated() for answer in spoken]
        if causal:
            kinds = len({type(answer.request.task) for answer in [*spoken, *embedded, *answers] if answer.request})
            assert any(len(shared) == kinds for shared in harness.kinds), "the kinds never shared a step"
        harness.idle()
    models = {name: reference(zoo, name) for name in heads_of(architecture)}
    for (name, text), result in zip(asked, results, strict=True):
        assert result.labels == tuple(LABELS[name])
        assert result.tokens == len(text)
        with torch.no_grad():  # [labels] for a text, [tokens, labels] for its tokens
            expected = models[name](input_ids=torch.tensor([text])).logits[0]
        got = torch.tensor(result.logits)
        torch.testing.assert_close(got, expected, rtol=0, atol=ATOL)
        torch.testing.assert_close(torch.tensor(result.probabilities), got.softmax(-1), rtol=0, atol=1e-6)
    for text, vector in zip(texts, vectors, strict=True):
        with torch.no_grad():
            states = models["c2"](input_ids=torch.tensor([text]), output_hidden_states=True).hidden_states[-1][0]
        torch.testing.assert_close(torch.tensor(vector.values), states.mean(0), rtol=0, atol=ATOL)
    if causal:
        alone = load_reference(zoo.base)
        for text, answer, result in zip(texts, spoken, generated, strict=True):
            assert answer.request is not None
            logits = torch.stack(harness.logits[answer.request.id])
            torch.testing.assert_close(logits, reference_logits(alone, text, result.token_ids), rtol=0, atol=ATOL)
            assert result.token_ids == greedy(alone, text, 6).tokens


def test_a_head_for_texts_labels_no_tokens_nor_the_other_way(headed: dict[str, Zoo]) -> None:
    zoo = headed["bert"]
    with Harness(zoo.base, zoo.registry) as harness:
        for ask, name, say in (
            (harness.classify, "t4", "labels tokens, not texts; call ClassifyTokens"),
            (harness.classify_tokens, "c2", "labels texts, not tokens; call Classify"),
        ):
            with pytest.raises(TaskMismatch, match=say):
                ask(name, [10, 11]).wait()
        with pytest.raises(TaskMismatch, match="base has no classification head"):
            harness.classify_tokens(None, [10, 11])


def test_a_base_without_a_pooler_has_no_place_for_such_a_head(tmp_path: Path) -> None:
    """BERT saved as a masked language model has no pooler."""
    base = make_base(tmp_path / "base", "bert")
    BertForMaskedLM.from_pretrained(base).save_pretrained(base)
    zoo = Zoo(base, Registry.open(tmp_path / "registry"))
    zoo.add("texts", tmp_path / "texts", targets=["query"], task="SEQ_CLS", labels=["a", "b"])
    zoo.add("tokens", tmp_path / "tokens", targets=["query"], task="TOKEN_CLS", labels=["a", "b"])
    with Harness(base, zoo.registry) as harness:
        with pytest.raises(TaskMismatch, match="needs a pooler"):
            harness.classify("texts", [10, 11]).wait()
        assert len(harness.classify_tokens("tokens", [10, 11]).wait().logits) == 2


def test_two_fused_heads_of_two_layers_give_the_average_of_their_logits() -> None:
    torch.manual_seed(0)

    def head(*, bias: bool = True, middle: bool = False) -> Head:
        layers = [HeadLayer(torch.randn(6, 8), torch.randn(6) if bias else None, "tanh")]
        if middle:
            layers.append(HeadLayer(torch.randn(6, 6), torch.randn(6), "relu"))
        layers.append(HeadLayer(torch.randn(3, 6), torch.randn(3) if bias else None))
        return Head(tuple(layers), ("a", "b", "c"), HeadPooling.FIRST)

    states = torch.randn(5, 8)
    for first, second in ((head(), head()), (head(), head(bias=False)), (head(middle=True), head(middle=True))):
        fused = average_heads([first, second], [3.0, -1.0])
        expected = 1.5 * first.logits(states) - 0.5 * second.logits(states)
        torch.testing.assert_close(fused.logits(states), expected, rtol=0, atol=1e-5)
    with pytest.raises(TaskMismatch, match="built differently"):
        average_heads([head(), head(middle=True)], [1.0, 1.0])


WEIGHTS = {"weight": torch.zeros(2, 8), "bias": torch.zeros(2)}
DENSE = {"weight": torch.zeros(8, 8), "bias": torch.zeros(8)}


def named(**layers: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        f"{layer.replace('__', '.')}.{part}": tensor
        for layer, parts in layers.items()
        for part, tensor in parts.items()
    }


@pytest.mark.parametrize(
    ("parts", "model_type", "kind", "said"),
    [
        (named(classifier=WEIGHTS), "distilbert", Rejected, "pre_classifier"),
        (named(classifier__dense=DENSE, classifier__out_proj=WEIGHTS), "bigbird", UnsupportedMethod, "bigbird"),
        (named(classifier__dense=DENSE), "roberta", UnsupportedMethod, "classifier.dense"),
        (named(score={"bias": torch.zeros(2)}), "llama", Rejected, "no weight"),
        (named(classifier__dense=WEIGHTS, classifier__out_proj=WEIGHTS), "roberta", Rejected, "do not follow"),
        (named(score=DENSE), "llama", Rejected, "8 rows"),
    ],
)
def test_what_is_no_head_is_refused(
    parts: dict[str, Tensor], model_type: str, kind: type[AdapterbayError], said: str
) -> None:
    config: dict[str, Any] = {"model_type": model_type}
    with pytest.raises(kind, match=said):
        head_from(parts, config, "sequence-classification", ("no", "yes"))


def test_one_arm_has_one_head_until_its_adapter_leaves(headed: dict[str, Zoo]) -> None:
    """Rows of an arm share an object, so that a step labels them in one product; unloading lets go of it."""
    zoo = headed["bert"]
    with Harness(zoo.base, zoo.registry) as harness:
        first = [harness.classify("c2", text) for text in prompts(6, seed=4)]
        first += [harness.classify({"c2": 0.5}, [10, 12]), harness.classify({"c2": 0.25}, [10, 12])]
        for answer in first:
            answer.wait()
        heads = harness.engine._heads._known
        assert len(heads) == 3
        digest = harness.arm("c2").parts[0].digest
        harness.engine.adapters.unload(digest).result(20)
        with held(harness.engine):
            assert not heads
