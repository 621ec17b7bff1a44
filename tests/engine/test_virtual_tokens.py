"""Prompts and prefixes in a mixed batch against plain PEFT alone: positions, reuse, chunks, labels, pooling, limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_tools import Answer, Harness, held
from peft import PeftConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from tiny import TARGETS, greedy, load_reference, make_base
from torch import Tensor
from zoo import Zoo

from adapterbay.registry import Registry
from adapterbay.registry.errors import InvalidArgument, UnsupportedMethod
from adapterbay.server.blocks import BlockLedger
from adapterbay.server.requests import GenerateTask, Pooling, SamplingSpec

MOST = 6
LABELS = ["bad", "so-so", "good"]
TEXTS = [[20 + (index + 3 * at) % 200 for at in range(length)] for index, length in enumerate((9, 30, 50, 17, 64, 2))]

KINDS: dict[str, Callable[..., PeftConfig]] = {
    "prompt": lambda task: PromptTuningConfig(num_virtual_tokens=5, task_type=task),
    "long": lambda task: PromptTuningConfig(num_virtual_tokens=37, task_type=task),
    "encoded": lambda task: PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, task_type=task),
    "prefix": lambda task: PrefixTuningConfig(num_virtual_tokens=5, task_type=task),
    "block": lambda task: PrefixTuningConfig(num_virtual_tokens=16, task_type=task),
    "far": lambda task: PrefixTuningConfig(num_virtual_tokens=37, task_type=task),
}


def make(zoo: Zoo, folder: Path, kind: str, task: str) -> Path:
    """An adapter with virtual tokens that show, made and saved by PEFT."""
    torch.manual_seed(len(kind))
    extra: dict[str, Any] = {"num_labels": 3, "id2label": dict(enumerate(LABELS))} if task == "SEQ_CLS" else {}
    model = get_peft_model(load_reference(zoo.base, task, **extra), KINDS[kind](task))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "prompt_encoder" in name:
                parameter.normal_(0, 0.5)
            elif "modules_to_save" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


def make_zoo(root: Path, architecture: str, kinds: Sequence[str], tasks: Sequence[str]) -> Zoo:
    zoo = Zoo(make_base(root / "base", architecture, layers=2), Registry.open(root / "registry"))
    for task in tasks:
        for kind in kinds:
            name = kind if task != "SEQ_CLS" else f"{kind}-labels"
            zoo.folders[name] = make(zoo, root / name, kind, task)
            labels = LABELS if task == "SEQ_CLS" else None
            zoo.registry.push(zoo.folders[name], name, base=f"folder:{zoo.base}", labels=labels)
    task = "FEATURE_EXTRACTION" if architecture == "bert" else "CAUSAL_LM"
    zoo.add("plain", root / "plain", targets=TARGETS[architecture][0], rank=4, seed=1, scale=0.5, task=task)
    return zoo


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Zoo]:
    return {
        "llama": make_zoo(tmp_path_factory.mktemp("llama"), "llama", [*KINDS], ["CAUSAL_LM"]),
        "gpt2": make_zoo(tmp_path_factory.mktemp("gpt2"), "gpt2", ["prompt", "far"], ["CAUSAL_LM"]),
    }


@pytest.fixture(scope="module")
def labelling(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Zoo]:
    kinds = ["prompt", "prefix"]
    return {
        "llama": make_zoo(tmp_path_factory.mktemp("labels"), "llama", kinds, ["SEQ_CLS"]),
        "bert": make_zoo(tmp_path_factory.mktemp("bert"), "bert", kinds, ["SEQ_CLS", "FEATURE_EXTRACTION"]),
    }


def peft(zoo: Zoo, name: str, task: str = "CAUSAL_LM") -> PeftModel:
    extra: dict[str, Any] = {"num_labels": 3} if task == "SEQ_CLS" else {}
    return PeftModel.from_pretrained(load_reference(zoo.base, task, **extra), zoo.folders[name]).eval()


def reference(model: Any, text: Sequence[int], generated: Sequence[int]) -> Tensor:
    """What PEFT computes for each generated position. [generated, vocabulary]"""
    ids = torch.tensor([[*text, *generated]])
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    return logits[-len(generated) - 1 : -1]


def check(harness: Harness, model: Any, text: Sequence[int], answer: Answer) -> None:
    result = answer.generated()
    assert answer.request is not None
    assert result.prompt_tokens == len(text), "virtual tokens are nobody's text"
    want = reference(model, text, result.token_ids)
    assert (torch.stack(harness.logits[answer.request.id]) - want).abs().max() < 2e-4
    assert result.token_ids == greedy(model, text, len(result.token_ids)).tokens


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("step_tokens", [512, 16])
def test_rows_with_virtual_tokens_equal_peft_alone(causal: dict[str, Zoo], architecture: str, step_tokens: int) -> None:
    """In one batch with others, in chunks that cut through the virtual tokens, and again from the cache."""
    zoo = causal[architecture]
    arms = [*zoo.folders, *zoo.folders, None]
    models = {name: peft(zoo, name) for name in zoo.folders}
    with Harness(zoo.base, zoo.registry, step_tokens=step_tokens) as harness:
        for again in (False, True):
            with held(harness.engine):
                asked = [
                    (arm, text, harness.generate(arm, text, MOST))
                    for arm, text in zip(arms, (TEXTS * 3)[: len(arms)], strict=True)
                ]
            for arm, text, answer in asked:
                if arm is None:
                    with models["plain"].disable_adapter():
                        check(harness, models["plain"], text, answer)
                else:
                    check(harness, models[arm], text, answer)
            assert not again or harness.engine.stats().reused_tokens >= 16 * len(arms) // 3
        harness.idle()


def test_virtual_tokens_are_computed_once_and_for_their_adapter_only(causal: dict[str, Zoo]) -> None:
    zoo = causal["llama"]
    text = TEXTS[1]
    with Harness(zoo.base, zoo.registry) as harness:
        found = []
        for arm in ("long", "far", "block", None, "plain", "long", "far", "block"):
            before = harness.engine.stats().reused_tokens
            harness.generate(arm, [*text, len(found)], 2).wait()
            found.append(harness.engine.stats().reused_tokens - before)
        assert found == [0, 0, 0, 0, 0, 64, 64, 32]  # of 37 + 31, 37 + 31 and 16 + 31 positions


def test_rows_with_virtual_tokens_give_way_and_go_on(causal: dict[str, Zoo]) -> None:
    zoo = causal["llama"]
    arms = ("far", "long", "prefix", "prompt")
    for prefix_cache in (False, True):
        with Harness(zoo.base, zoo.registry, prefix_cache=prefix_cache) as harness:
            ledger = BlockLedger(13)
            harness.engine._blocks.ledger = harness.engine._loop.scheduler._blocks = ledger
            with held(harness.engine):
                answers = [harness.generate(arm, TEXTS[0], 40) for arm in arms]
            for arm, answer in zip(arms, answers, strict=True):
                check(harness, peft(zoo, arm), TEXTS[0], answer)
            assert harness.engine.stats().preemptions > 0


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_labels_equal_peft(labelling: dict[str, Zoo], architecture: str) -> None:
    zoo = labelling[architecture]
    models = {name: peft(zoo, name, "SEQ_CLS") for name in ("prompt-labels", "prefix-labels")}
    with Harness(zoo.base, zoo.registry, step_tokens=32) as harness:
        for _ in range(2):  # the second time from the cache, where there is one
            answers = [(name, text, harness.classify(name, text)) for name in models for text in TEXTS]
            for name, text, answer in answers:
                ids = torch.tensor([text])
                with torch.no_grad():
                    want = models[name](input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
                result = answer.classified()
                assert result.tokens == len(text)
                assert (torch.tensor(result.logits) - want).abs().max() < 2e-4


def test_embeddings_are_pooled_over_the_text_alone(labelling: dict[str, Zoo]) -> None:
    zoo = labelling["bert"]
    with Harness(zoo.base, zoo.registry) as harness:
        for name in ("prompt", "prefix", "plain"):
            model = peft(zoo, name, "FEATURE_EXTRACTION")
            for text in TEXTS[:3]:
                ids = torch.tensor([text])
                with torch.no_grad():
                    states = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
                own = states[-len(text) :]
                wanted = {Pooling.MEAN: own.mean(0), Pooling.FIRST: own[0], Pooling.LAST: own[-1]}
                for pooling, want in wanted.items():
                    result = harness.embed(name, text, pooling=pooling).wait()
                    assert (torch.tensor(result.values) - want).abs().max() < 1e-4


def test_virtual_tokens_count_against_the_context(causal: dict[str, Zoo], labelling: dict[str, Zoo]) -> None:
    zoo = causal["llama"]
    with Harness(zoo.base, zoo.registry) as harness:
        limit = harness.engine.base.max_length
        with pytest.raises(InvalidArgument, match="behind the adapter's 37 virtual tokens") as caught:
            harness.generate("long", [9] * (limit - 40), 4).wait()
        assert caught.value.field == "sampling.max_tokens"
        with pytest.raises(InvalidArgument, match="37 virtual tokens") as caught:
            harness.generate("far", [9] * (limit - 37), 1).wait()
        assert caught.value.field == "input"
        assert len(harness.generate("long", [9] * (limit - 40), 3).generated().token_ids) == 3
        task = GenerateTask((9,) * (limit - 40), SamplingSpec(ignore_end=True))
        assert len(harness.submit("far", task).generated().token_ids) == 3, "what is left, if nobody asked for more"
        with pytest.raises(UnsupportedMethod, match="virtual tokens"):
            harness.generate({"prompt": 0.5, "plain": 0.5}, TEXTS[0], 2).wait()
        harness.idle()
    encoder = labelling["bert"]
    with Harness(encoder.base, encoder.registry) as harness:
        limit = harness.engine.base.max_length
        assert harness.classify("prompt-labels", [9] * (limit - 5)).classified()
        for name in ("prompt-labels", "prefix-labels"):
            with pytest.raises(InvalidArgument, match="5 virtual tokens"):
                harness.classify(name, [9] * (limit - 4)).wait()
