"""Virtual tokens on T5: every row of a mixed batch equals what plain PEFT alone generates.

Prompts stand before the encoder's text, prefixes before the decoder's answer. The reference is PEFT's `generate`: of
multitask prompts its forward pass alone takes no decoder inputs. Tolerance 1e-4 of logits, float32.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_tools import Answer, Harness, Selection, held
from peft import (
    CartridgeConfig,
    CPTConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tiny import SPECIAL, greedy, load_reference, make_base
from torch import Tensor
from zoo import Zoo

from adapterbay.registry import Registry
from adapterbay.registry.errors import InvalidArgument, UnsupportedMethod
from adapterbay.server.blocks import BlockLedger

ATOL = 1e-4
START = SPECIAL.index("<|im_end|>")
TASK = "SEQ_2_SEQ_LM"
LAYERS = 3  # PEFT gives a prefix's layers out in another order than it saved them: 0, 2, 1
LABELS = ("O", "X", "Y")
TEXTS = [[*(20 + (index + 3 * at) % 200 for at in range(length)), START] for index, length in enumerate((9, 30, 1, 50))]

KINDS: Mapping[str, Callable[[], PeftConfig]] = {
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=5, task_type=TASK),
    "one-sided": lambda: PromptTuningConfig(num_virtual_tokens=20, task_type=TASK, num_transformer_submodules=1),
    "encoded": lambda: PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, task_type=TASK),
    "multitask": lambda: MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=1, task_type=TASK),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=5, task_type=TASK),
    "projected": lambda: PrefixTuningConfig(
        num_virtual_tokens=16, prefix_projection=True, encoder_hidden_size=16, task_type=TASK
    ),
    "far": lambda: PrefixTuningConfig(num_virtual_tokens=37, task_type=TASK),
    "cartridge": lambda: CartridgeConfig(num_virtual_tokens=4, task_type=TASK),
    "tags": lambda: PromptTuningConfig(num_virtual_tokens=3, task_type="TOKEN_CLS"),
}


def make(base: Path, folder: Path, config: PeftConfig) -> Path:
    """An adapter with virtual tokens that show, made and saved by PEFT."""
    torch.manual_seed(len(folder.name))
    task = TASK if config.task_type == "CAUSAL_LM" else str(config.task_type)  # T5 is none
    labels: dict[str, Any] = {"num_labels": 3, "id2label": dict(enumerate(LABELS))} if "CLS" in task else {}
    model = get_peft_model(load_reference(base, task, **labels), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    root = tmp_path_factory.mktemp("t5-virtual")
    made = Zoo(make_base(root / "base", "t5", layers=LAYERS), Registry.open(root / "registry"))
    for name, config in KINDS.items():
        made.folders[name] = make(made.base, root / name, config())
        made.registry.push(
            made.folders[name], name, base=f"folder:{made.base}", labels=list(LABELS) if name == "tags" else None
        )
    made.add("plain", root / "plain", targets=["q", "v", "wo"], rank=4, seed=1, task=TASK, scale=0.4)
    return made


@functools.cache
def plain(base: Path) -> Any:
    return load_reference(base, TASK)


@functools.cache
def alone(base: Path, folder: Path, task: str = TASK) -> Any:
    extra: dict[str, Any] = {"num_labels": 3} if "CLS" in task else {}
    return PeftModel.from_pretrained(load_reference(base, task, **extra), folder).eval()


def check(zoo: Zoo, harness: Harness, selection: Selection, text: Sequence[int], most: int, answer: Answer) -> Tensor:
    assert selection is None or isinstance(selection, str)
    extra = {"task_ids": torch.zeros(1, dtype=torch.long)} if selection == "multitask" else {}
    model = plain(zoo.base) if selection is None else alone(zoo.base, zoo.folders[selection])
    tokens, logits = greedy(model, text, most, **extra)
    result = answer.generated()
    assert answer.request is not None
    assert result.prompt_tokens == len(text), "virtual tokens are nobody's text"
    torch.testing.assert_close(torch.stack(harness.logits[answer.request.id]), logits, rtol=0, atol=ATOL)
    assert result.token_ids == tokens
    return logits


def test_mixed_rows_equal_peft_alone(zoo: Zoo) -> None:
    """Beside LoRA and the base, in steps of several groups; answers of one token, and some that outgrow a block."""
    arms: list[Selection] = [*(name for name in zoo.folders if name != "tags"), None]
    asked = [(arm, TEXTS[index % len(TEXTS)], (1, 20, 6)[index % 3]) for index, arm in enumerate([*arms, *arms])]
    with Harness(zoo.base, zoo.registry, step_tokens=256, max_rows=32) as harness:
        harness.load(*(arm for arm in arms if isinstance(arm, str)))
        with held(harness.engine):
            answers = [harness.generate(*each) for each in asked]
        first = {}
        for each, answer in zip(asked, answers, strict=True):
            first[each[0]] = check(zoo, harness, *each, answer)[0]
        assert max(harness.step_sizes) > len(arms) // 2, "the rows were not batched"
        harness.idle()
    with torch.no_grad():
        for arm, logits in first.items():
            text = next(text for name, text, _ in reversed(asked) if name == arm)
            feed = {"input_ids": torch.tensor([text]), "decoder_input_ids": torch.tensor([[START]])}
            effect = float((plain(zoo.base)(**feed).logits[0, -1] - logits).abs().max())
            assert effect < ATOL if arm is None else effect > 20 * ATOL, (arm, effect)


def test_rows_give_way_and_go_on(zoo: Zoo) -> None:
    """A row that gave way has its text read again, behind its prompt, and its prefix written again."""
    arms = ("far", "prompt", "prefix", "one-sided")
    with Harness(zoo.base, zoo.registry) as harness:
        harness.load(*arms)
        ledger = BlockLedger(17)
        harness.engine._blocks.ledger = harness.engine._loop.scheduler._blocks = ledger
        with held(harness.engine):
            answers = [harness.generate(arm, TEXTS[0], 40) for arm in arms]
        for arm, answer in zip(arms, answers, strict=True):
            check(zoo, harness, arm, TEXTS[0], 40, answer)
        assert harness.engine.stats().preemptions > 0, "nobody had to give way"
        harness.idle()


def test_encoder_rows_see_prompts(zoo: Zoo) -> None:
    """Embeddings are pooled over the text alone, and every token of the text gets a label."""
    with Harness(zoo.base, zoo.registry) as harness:
        harness.load("prompt", "tags", "plain")
        with held(harness.engine):
            tagged = [harness.classify_tokens("tags", text) for text in TEXTS]
            embedded = [harness.embed("prompt", text) for text in TEXTS]
            spoken = harness.generate("plain", TEXTS[0], 3)
        tagger = alone(zoo.base, zoo.folders["tags"], "TOKEN_CLS")
        model = alone(zoo.base, zoo.folders["prompt"])
        for text, tags, vector in zip(TEXTS, tagged, embedded, strict=True):
            ids = torch.tensor([text])
            with torch.no_grad():
                labels = tagger(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(text) :]
                before = torch.cat([model.get_prompt(1)[:, :5], model.word_embeddings(ids)], 1)
                states = model.base_model.encoder(inputs_embeds=before).last_hidden_state[0, -len(text) :]
            for ours, theirs in ((tags.wait().logits, labels), (vector.wait().values, states.mean(0))):
                torch.testing.assert_close(torch.tensor(ours), theirs, rtol=0, atol=ATOL)
        check(zoo, harness, "plain", TEXTS[0], 3, spoken)


def test_virtual_tokens_count_where_they_stand(zoo: Zoo) -> None:
    with Harness(zoo.base, zoo.registry, max_length=64) as harness:
        assert len(harness.generate("prompt", [7] * 59, 64).generated().token_ids) == 64
        with pytest.raises(InvalidArgument, match="5 virtual tokens"):
            harness.generate("prompt", [7] * 60, 1).wait()
        assert len(harness.generate("far", [7] * 64, 27).generated().token_ids) == 27
        with pytest.raises(InvalidArgument, match="37 virtual tokens"):
            harness.generate("far", [7], 28).wait()
        with pytest.raises(InvalidArgument, match="3 virtual tokens"):
            harness.classify_tokens("tags", [7] * 62).wait()
        harness.idle()
    with Harness(zoo.base, zoo.registry) as harness:
        harness.engine._blocks.ledger = harness.engine._loop.scheduler._blocks = BlockLedger(5)
        with pytest.raises(InvalidArgument, match="need 6 cache blocks"):  # 1 for the text, 5 for 37 and 40 tokens
            harness.generate("far", TEXTS[0], 40).wait()


def test_what_has_no_meaning_is_refused_by_name(zoo: Zoo, tmp_path: Path) -> None:
    refused: dict[str, tuple[PeftConfig, str]] = {
        "labels": (
            PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS", modules_to_save=["classification_head"]),
            "classifier of whole texts",
        ),
        "cpt": (
            CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[10], cpt_mask=[1], cpt_tokens_type_mask=[1]),
            "decoders alone",
        ),
        "both": (
            PrefixTuningConfig(num_virtual_tokens=3, task_type=TASK, num_transformer_submodules=1),
            "do not agree",
        ),
        "tag-prefix": (PrefixTuningConfig(num_virtual_tokens=3, task_type="TOKEN_CLS"), "in the decoder"),
        "activated": (
            LoraConfig(task_type="CAUSAL_LM", target_modules=["q"], alora_invocation_tokens=[40, 41]),
            "Activated adapters",
        ),
    }
    registry = Registry.open(tmp_path / "registry")
    for name, (config, _) in refused.items():
        folder = make(zoo.base, tmp_path / name, config)
        task = json.loads((folder / "adapter_config.json").read_text())["task_type"]
        registry.push(folder, name, base=f"folder:{zoo.base}", labels=list(LABELS) if "CLS" in task else None)
    activated = LoraConfig(task_type=TASK, target_modules=["q"], alora_invocation_tokens=[40, 41])
    with pytest.raises(UnsupportedMethod, match="for CAUSAL_LM only"):
        registry.push(make(zoo.base, tmp_path / "alora", activated), "alora", base=f"folder:{zoo.base}")
    with Harness(zoo.base, registry) as harness:
        for name, (_, why) in refused.items():
            with pytest.raises(UnsupportedMethod, match=why):
                harness.load(name)
    with Harness(zoo.base, zoo.registry) as harness:
        with pytest.raises(UnsupportedMethod, match="PREFIX_TUNING puts its prefix into the decoder"):
            harness.embed("prefix", TEXTS[0]).wait()
        with pytest.raises(UnsupportedMethod, match="virtual tokens"):
            harness.generate({"prompt": 0.5, "plain": 0.5}, TEXTS[0], 2).wait()
        harness.idle()


def test_an_encoder_deeper_than_the_decoder(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "t5", layers=4)
    model: Any = load_reference(base, TASK)
    model.config.num_decoder_layers = 2
    model.decoder.block = model.decoder.block[:2]
    model.save_pretrained(base)
    zoo = Zoo(base, Registry.open(tmp_path / "registry"))
    zoo.folders["prefix"] = make(base, tmp_path / "prefix", KINDS["prefix"]())
    zoo.registry.push(zoo.folders["prefix"], "prefix", base=f"folder:{base}")
    with Harness(base, zoo.registry) as harness:
        check(zoo, harness, "prefix", TEXTS[0], 4, harness.generate("prefix", TEXTS[0], 4))
