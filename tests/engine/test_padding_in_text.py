"""Texts that hold the base's padding token: a decoder's head takes the last token that is none, RoBERTa's positions
count none. Both as transformers does."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft_zoo
import pytest
import torch
from engine_tools import Harness, held
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft_zoo import LABELS, randomize
from tiny import END, SPECIAL, load_reference, make_base
from transformers import AutoModelForSequenceClassification

from adapterbay.registry import Registry
from adapterbay.server.requests import Pooling

ATOL = 2e-5
LONG = [50 + (3 * at) % 200 for at in range(40)]
DECODERS = {"llama": "q_proj", "gpt2": "c_attn", "opt": "q_proj"}
TEXTS = {
    "ends so": [7, 8, 9, 10, END],
    "ends so twice": [7, 8, 9, END, END],
    "holds one": [7, END, 9, 10],
    "is nothing else": [END, END, END],
    "is one and another": [7, END],
    "long": [*LONG, *[END] * 20],
    "none": LONG[:37],
}


def push(registry: Registry, base: Path, name: str, model: Any, labels: list[str] | None = None) -> None:
    folder = base.parent / name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        randomize(model, len(name))
        model.save_pretrained(folder)
    registry.push(folder, name, base=f"folder:{base}", labels=labels)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("architecture", list(DECODERS))
def test_a_decoders_head_takes_the_last_token_that_is_no_padding(
    tmp_path: Path, architecture: str, known: bool
) -> None:
    base = make_base(tmp_path / "base", architecture, layers=2)
    if not known:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))

    def labelling() -> Any:
        labels = {"num_labels": len(LABELS), "id2label": dict(enumerate(LABELS))}
        return AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32, **labels).eval()

    registry = Registry.open(tmp_path / "registry")
    lora = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=[DECODERS[architecture]])
    models: dict[str, Any] = {"lora": get_peft_model(labelling(), lora).eval()}
    if architecture != "opt":
        config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
        models["prompt"] = get_peft_model(labelling(), config).eval()
    for name, model in models.items():
        push(registry, base, name, model, list(LABELS))
    for step_tokens in (512, 16):
        with Harness(base, registry, step_tokens=step_tokens) as harness:
            harness.load(*models)
            for _ in range(2):  # the second time over blocks that are there already
                with held(harness.engine):
                    asked = {(n, text): harness.classify(n, ids) for text, ids in TEXTS.items() for n in models}
                for (name, text), answer in asked.items():
                    with torch.no_grad():
                        want = models[name](input_ids=torch.tensor([TEXTS[text]])).logits[0]
                    got = torch.tensor(answer.classified().logits)
                    torch.testing.assert_close(got, want, rtol=0, atol=ATOL, msg=f"{name}: {text}")


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta", "camembert"])
def test_robertas_positions_skip_padding(tmp_path: Path, model_type: str) -> None:
    base = make_base(tmp_path / "base", "roberta", layers=2)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": model_type, "architectures": None}))
    pad = SPECIAL.index("[PAD]")
    assert load_reference(base, "FEATURE_EXTRACTION").config.pad_token_id == pad
    texts = [[3, 8, pad, 10, 4], [pad, pad, 3, 9, 4], [3, 8, 9, 4, pad], [pad, pad], [3, 8, 9, 10, 11, 4], [3, pad, 4]]
    registry = Registry.open(tmp_path / "registry")
    task: Any = {"task_type": "FEATURE_EXTRACTION"}
    configs = {
        "lora": LoraConfig(**task, r=4, target_modules=["query", "value"]),
        "prompt": PromptTuningConfig(**task, num_virtual_tokens=3),
        "prefix": PrefixTuningConfig(**task, num_virtual_tokens=3),
    }
    models: dict[str | None, Any] = {None: load_reference(base, "FEATURE_EXTRACTION")}
    for name, made in configs.items():
        models[name] = get_peft_model(load_reference(base, "FEATURE_EXTRACTION"), made).eval()
        push(registry, base, name, models[name])
    labels = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query"])
    models["labels"] = get_peft_model(peft_zoo.load_base(base, "SEQ_CLS"), labels).eval()
    push(registry, base, "labels", models["labels"], list(LABELS))
    with Harness(base, registry) as harness:
        harness.load(*configs, "labels")
        with held(harness.engine):
            asked = [
                (name, ids, harness.classify(name, ids) if name == "labels" else _embedded(harness, name, ids))
                for ids in texts
                for name in models
            ]
        for name, ids, answer in asked:
            with torch.no_grad():
                output = models[name](input_ids=torch.tensor([ids]))
            result = answer.wait()
            if name == "labels":
                got, want = torch.tensor(result.logits), output.logits[0]
            else:
                got, want = torch.tensor(result.values), output.last_hidden_state[0, -len(ids) :].mean(0)
            torch.testing.assert_close(got, want, rtol=0, atol=ATOL, msg=f"{name}: {ids}")


def _embedded(harness: Harness, name: str | None, ids: list[int]) -> Any:
    return harness.embed(name, ids, pooling=Pooling.MEAN)
