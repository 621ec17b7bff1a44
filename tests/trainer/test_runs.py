"""Whole runs on tiny bases: what is learned, what is written, and that plain PEFT reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from adapterbay.base.text import encode_text, load_tokenizer
from adapterbay.registry.base import locate
from adapterbay.trainer import StepReport, TrainingConfig, TrainingResult, run
from adapterbay.trainer.batches import PadRight
from adapterbay.trainer.data import CleaningReport, Labelled, PromptCompletion, TrainingData, prepare
from adapterbay.trainer.data.prepare import digest
from adapterbay.trainer.tasks.classification import SequenceClassification
from adapterbay.trainer.tasks.completion import encode_pair

from .conftest import Configure

TOP_LEVEL_KEYS = {
    "schema",
    "base",
    "task",
    "labels",
    "chat_template_digest",
    "max_length",
    "settings",
    "data",
    "metrics",
    "trainable_parameters",
    "versions",
    "seed",
    "duration_seconds",
    "loss_history",
}
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
TEMPLATES = {"prompt_template": "Write a {label} review.", "completion_template": "{text}"}


class Recorder:
    """Remembers what a run told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.steps: list[StepReport] = []
        self.evaluations: list[tuple[int, dict[str, float]]] = []

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def step(self, report: StepReport) -> None:
        self.steps.append(report)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self.evaluations.append((step, dict(metrics)))


def single_row_answers(config: TrainingConfig, base: Path, result: TrainingResult) -> list[int]:
    """Each held-out row alone, unpadded, through plain transformers and PEFT."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(model, result.output).eval()
    tokenizer = load_tokenizer(base)
    answers = []
    for row in prepare(config).evaluation:
        assert isinstance(row, Labelled)
        ids = torch.tensor([encode_text(tokenizer, row.text, max_length=config.max_length)])
        with torch.no_grad():
            answers.append(int(tuned(input_ids=ids).logits.argmax()))
    return answers


@pytest.mark.parametrize("base_name", ["chat_base", "plain_base", "gpt2_base", "bert_base"])
def test_classifier_learns_and_plain_peft_reproduces_its_accuracy(
    base_name: str, configure: Configure, request: pytest.FixtureRequest
) -> None:
    base: Path = request.getfixturevalue(base_name)
    config = configure(base, data={"train_samples": None, "eval_samples": 20}, optimization={"epochs": 8})
    recorder = Recorder()
    result = run(config, progress=recorder)
    losses = [report.loss for report in recorder.steps]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert result.metrics["accuracy"] > max(0.8, result.metrics["majority_accuracy"])
    assert 0 < result.metrics["macro_f1"] <= 1
    rows = prepare(config).evaluation
    answers = single_row_answers(config, base, result)
    right = sum(answer == row.label for answer, row in zip(answers, rows, strict=True) if isinstance(row, Labelled))
    assert right / len(rows) == pytest.approx(result.metrics["accuracy"])
    assert len(recorder.steps) == recorder.steps[-1].total_steps == 80
    weights = load_file(result.output / "adapter_model.safetensors")
    assert any("score" in name or "classifier" in name for name in weights)


def test_weights_the_base_lacks_are_saved_with_the_adapter(configure: Configure, bert_base: Path) -> None:
    """A BERT saved without its pooler gets a random one at every load, so the trained one must go along."""
    result = run(configure(bert_base))
    names = set(load_file(result.output / "adapter_model.safetensors"))
    assert "base_model.model.bert.pooler.dense.weight" in names
    assert not any("pooler" in name and "lora" in name for name in names)
    assert json.loads((result.output / "adapter_config.json").read_text())["modules_to_save"] == [
        "bert.pooler.dense",
        "classifier",
        "score",
    ]


def test_record_and_folder_are_complete(configure: Configure, chat_base: Path, review_csv: Path) -> None:
    config = configure(chat_base, optimization={"evaluate": "epoch"})
    recorder = Recorder()
    result = run(config, progress=recorder)
    assert {path.name for path in result.output.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "loss.png",
        "training.json",
    }
    record = json.loads((result.output / "training.json").read_text())
    assert record == json.loads(json.dumps(result.training_record))
    assert set(record) == TOP_LEVEL_KEYS
    files = locate(str(chat_base))
    assert record["base"] == {"reference": str(files.reference), "fingerprint": files.fingerprint}
    assert record["chat_template_digest"] == files.chat_template_digest
    data = prepare(config)
    assert record["data"]["digest"] == digest(data.train, data.evaluation)
    assert (record["data"]["source"], record["data"]["train_rows"], record["data"]["eval_rows"]) == (
        str(review_csv),
        32,
        16,
    )
    assert record["data"]["cleaning"]["read"] == 96
    assert record["labels"] == ["negative", "positive"]
    assert (record["schema"], record["task"], record["seed"]) == (1, "sequence-classification", 0)
    assert {"torch", "transformers", "peft", "adapterbay", "python"} <= set(record["versions"])
    assert record["settings"]["lora"]["rank"] == 8
    assert sum("loss" in entry for entry in record["loss_history"]) == len(recorder.steps) == 8
    assert [entry["step"] for entry in record["loss_history"] if "eval_loss" in entry] == [4, 8]
    assert [step for step, _ in recorder.evaluations] == [4, 8]
    weights = load_file(result.output / "adapter_model.safetensors")
    assert record["trainable_parameters"] == sum(tensor.numel() for tensor in weights.values())
    adapter = json.loads((result.output / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(files.reference)
    assert adapter["target_modules"] == sorted(adapter["target_modules"])
    assert (result.output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(result.output.parent.glob(".*.partial"))


def test_same_seed_same_bytes_other_seed_other_bytes(configure: Configure, chat_base: Path, tmp_path: Path) -> None:
    outputs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        result = run(configure(chat_base, output=str(tmp_path / name), seed=seed, lora={"dropout": 0.1}))
        outputs.append([(result.output / file).read_bytes() for file in ADAPTER_FILES])
    assert outputs[0] == outputs[1]
    assert outputs[0][0] != outputs[2][0]


@pytest.mark.parametrize("base_name", ["chat_base", "plain_base", "gpt2_base"])
def test_causal_lm_lowers_perplexity_on_held_out_completions(
    base_name: str, configure: Configure, request: pytest.FixtureRequest
) -> None:
    base: Path = request.getfixturevalue(base_name)
    config = configure(base, task="causal-lm", data=TEMPLATES, max_length=128, optimization={"epochs": 4})
    recorder = Recorder()
    result = run(config, progress=recorder)
    assert result.metrics["perplexity"] < 0.8 * result.metrics["base_perplexity"]
    assert set(result.metrics) == {
        "perplexity",
        "completion_tokens",
        "eval_loss",
        "train_loss",
        "base_perplexity",
        "base_completion_tokens",
        "base_loss",
    }
    assert result.metrics["completion_tokens"] == result.metrics["base_completion_tokens"] > 0
    assert result.training_record["labels"] == []
    held_out = [entry["step"] for entry in result.training_record["loss_history"] if "eval_loss" in entry]
    assert held_out == [0, 16]
    assert [step for step, _ in recorder.evaluations] == [0, 16]


def test_reported_perplexity_is_that_of_single_rows(configure: Configure, chat_base: Path, tmp_path: Path) -> None:
    config = configure(chat_base, task="causal-lm", data=TEMPLATES | {"eval_samples": 7}, max_length=128)
    result = run(config)
    tokenizer = load_tokenizer(chat_base)
    # base_model_name_or_path is folder:PATH here, which only adapterbay understands; plain PEFT takes a path.
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in result.output.iterdir():
        (copy / path.name).write_bytes(path.read_bytes().replace(b"folder:/", b"/"))
    model = AutoPeftModelForCausalLM.from_pretrained(copy, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for row in prepare(config).evaluation:
        assert isinstance(row, PromptCompletion)
        learned = encode_pair(tokenizer, row, frozenset({tokenizer.eos_token_id}))
        labels = torch.tensor([learned.labels])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([learned.input_ids]), labels=labels).loss
        tokens = sum(label >= 0 for label in learned.labels)
        total, count = total + float(loss) * tokens, count + tokens
    assert torch.tensor(total / count).exp().item() == pytest.approx(result.metrics["perplexity"], rel=1e-3)


def test_texts_that_end_in_the_padding_token_are_read_at_their_end(chat_base: Path) -> None:
    """With the tokenizer's own padding id, transformers would read the class one token early in such rows."""
    texts = ["warm film<|im_end|>", "a dull and long film of three hours", "x", "fine<|im_end|><|im_end|>"]
    rows = tuple(Labelled(text, index % 2) for index, text in enumerate(texts))
    tokenizer = load_tokenizer(chat_base)
    task = SequenceClassification(tokenizer, 64, TrainingData("", rows, (), ("no", "yes"), CleaningReport()))
    model = task.load_model(chat_base, torch.device("cpu")).model.eval()
    examples = task.encode(rows, CleaningReport()).examples

    def batched() -> torch.Tensor:
        batch = task.collator(model, examples)(examples)
        logits: torch.Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits

    with torch.no_grad():
        ids = [torch.tensor([example["input_ids"]]) for example in examples]
        alone = torch.cat([model.score(model.model(row).last_hidden_state)[:, -1] for row in ids])
        assert torch.allclose(batched(), alone, atol=1e-5)
        padded = PadRight(tokenizer.pad_token_id)(examples)
        model.config.pad_token_id = tokenizer.pad_token_id
        naive = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits
        assert not torch.allclose(naive, alone, atol=1e-3)


def test_lora_settings_reach_peft(configure: Configure, chat_base: Path) -> None:
    lora: dict[str, Any] = {
        "rank": 4,
        "alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "layers": [1],
        "use_rslora": True,
        "rank_pattern": {"v_proj": 2},
    }
    result = run(configure(chat_base, lora=lora, optimization={"max_steps": 2, "gradient_accumulation": 2}))
    shapes = {
        name: tuple(tensor.shape) for name, tensor in load_file(result.output / "adapter_model.safetensors").items()
    }
    ranks = {name.split(".")[-3]: shape[0] for name, shape in shapes.items() if "lora_A" in name}
    assert ranks == {"q_proj": 4, "v_proj": 2}
    assert all(".layers.1." in name for name in shapes if "lora_" in name)
    adapter = json.loads((result.output / "adapter_config.json").read_text())
    assert adapter["use_rslora"] is True


def test_no_held_out_rows_means_no_metrics_but_training(configure: Configure, chat_base: Path) -> None:
    result = run(configure(chat_base, data={"eval_samples": 0}, optimization={"scheduler": "constant", "max_steps": 1}))
    assert set(result.metrics) == {"train_loss"}
    assert result.training_record["data"]["eval_rows"] == 0
