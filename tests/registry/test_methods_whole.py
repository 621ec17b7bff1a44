"""Adapters other than plain LoRA as versions: heads, tasks, bottlenecks, cards, diffs and fusions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft_zoo
import pytest
from safetensors.numpy import load_file, save_file
from tiny import make_base

from adapterbay.registry import AdmissionReport, Registry, admit, locate
from adapterbay.registry.card import render_card
from adapterbay.registry.diff import diff_versions
from adapterbay.registry.errors import NoEffect, Rejected, UnsupportedMethod
from adapterbay.registry.fusing import FusionSettings, WeightedReference, fuse_versions, read_part

WEIGHTS = "adapter_model.safetensors"
Base = Callable[[str], Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    made: dict[str, Path] = {}

    def of(architecture: str) -> Path:
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture)
            made[architecture] = make_base(folder, architecture, layers=2)
        return made[architecture]

    return of


def report_of(base: Path, folder: Path) -> AdmissionReport:
    files: dict[str, Path | bytes] = {name: folder / name for name in ("adapter_config.json", WEIGHTS)}
    found = locate(str(base))
    return admit(files, found.tensor_shapes(), base_config=found.config)


def edit(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


HEADS = {
    "roberta": ("classifier.out_proj", ["classifier.dense", "classifier.out_proj"]),
    "distilbert": ("classifier", ["pre_classifier", "classifier"]),
    "t5": ("classification_head.out_proj", ["classification_head.dense", "classification_head.out_proj"]),
}


@pytest.mark.parametrize("architecture", HEADS)
def test_heads_of_two_layers(base: Base, tmp_path: Path, architecture: str) -> None:
    folder = peft_zoo.make(base(architecture), tmp_path / "a", "lora_classifier")
    head = report_of(base(architecture), folder).head
    name, layers = HEADS[architecture]
    assert head is not None
    assert (head.name, head.labels, head.hidden, head.has_bias) == (name, 3, 64, True)
    assert list(head.parts) == [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]
    assert head.keys == tuple(f"base_model.model.{part}" for part in head.parts)
    edit(folder, lambda t: [t.pop(key) for key in list(t) if f".{layers[0]}." in key])
    with pytest.raises(Rejected) as caught:
        report_of(base(architecture), folder)
    assert caught.value.reason == "MISSING_TENSOR"


def test_a_head_beside_virtual_tokens_has_its_own_prefix(base: Base, tmp_path: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model

    model = peft_zoo.load_base(base("bert"), "SEQ_CLS")
    get_peft_model(model, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)).save_pretrained(tmp_path / "a")
    report = report_of(base("bert"), tmp_path / "a")
    assert report.head is not None
    assert report.head.parts["classifier.weight"] == "base_model.classifier.weight"
    assert report.virtual_tokens == 3


@pytest.mark.parametrize(
    ("architecture", "name", "task"),
    [
        ("bert", "lora_tagger", "token-classification"),
        ("t5", "ia3", "seq2seq-lm"),
        ("bert", "ia3_classifier", "sequence-classification"),
        ("llama", "prompt_tuning", "causal-lm"),
    ],
)
def test_a_version_of_every_task_and_its_card(
    base: Base, tmp_path: Path, architecture: str, name: str, task: str
) -> None:
    registry = Registry.open(tmp_path / "registry")
    folder = peft_zoo.make(base(architecture), tmp_path / name, name)
    labels = list(peft_zoo.LABELS) if task.endswith("classification") else None
    receipt = registry.push(folder, "team/x", base=f"folder:{base(architecture)}", labels=labels)
    assert receipt.manifest.task == task
    assert receipt.manifest.labels == tuple(labels or ())
    card = render_card(receipt.manifest, name="team/x", version=1).decode()
    assert "rank 0" not in card
    assert f"peft_type {receipt.manifest.peft_type}" not in card


BEHIND = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "bert": ("attention.output.dense", "output.dense"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
}


@pytest.mark.parametrize("architecture", BEHIND)
def test_bottlenecks_are_admitted(base: Base, tmp_path: Path, architecture: str) -> None:
    folder = peft_zoo.make_bottleneck(base(architecture), tmp_path / "a", BEHIND[architecture], norm=True)
    report = report_of(base(architecture), folder)
    assert (report.peft_type, report.rank, report.modules, len(report.sites)) == ("BOTTLENECK", 8, (), 4)
    assert set(report.sites[0].tensors) == {
        f"adapter_{part}" for part in ("down.weight", "down.bias", "up.weight", "up.bias", "norm.weight", "norm.bias")
    }


@pytest.mark.parametrize(
    ("settings", "change", "reason"),
    [
        ({"bottleneck_size": 7}, None, "SHAPE_MISMATCH"),
        ({"bottleneck_size": None, "reduction_factor": 9}, None, "SHAPE_MISMATCH"),
        ({"reduction_factor": 8}, None, "BAD_CONFIG"),
        ({"bottleneck_size": None, "reduction_factor": 0}, None, "BAD_CONFIG"),
        ({"non_linearity": "exp"}, None, "BAD_CONFIG"),
        ({"scaling": "big"}, None, "BAD_CONFIG"),
        ({"layer_norm_before": True}, None, "MISSING_TENSOR"),
        ({"target_modules": ["mlp.up_proj"]}, None, "UNKNOWN_TENSOR"),
        ({"phase": 2}, None, "UNKNOWN_CONFIG_KEY"),
        ({}, lambda t: t.pop(min(t)), "MISSING_TENSOR"),
        ({}, lambda t: t.update({min(t): np.full_like(t[min(t)], np.inf)}), "NOT_FINITE"),
    ],
)
def test_bad_bottlenecks(base: Base, tmp_path: Path, settings: dict[str, Any], change: Any, reason: str) -> None:
    folder = peft_zoo.make_bottleneck(base("llama"), tmp_path / "a", BEHIND["llama"], settings=settings)
    if change:
        edit(folder, change)
    with pytest.raises(Rejected) as caught:
        report_of(base("llama"), folder)
    assert caught.value.reason == reason, caught.value.message


def test_bottlenecks_of_a_reduction_factor_and_those_that_change_nothing(base: Base, tmp_path: Path) -> None:
    settings = {"bottleneck_size": None, "reduction_factor": 8}
    folder = peft_zoo.make_bottleneck(base("llama"), tmp_path / "a", ("mlp.down_proj",), settings=settings)
    assert report_of(base("llama"), folder).rank == 8
    edit(folder, lambda t: t.update({key: np.zeros_like(value) for key, value in t.items() if "adapter_up" in key}))
    with pytest.raises(NoEffect):
        report_of(base("llama"), folder)


def test_a_changed_vocabulary_is_refused_by_name(base: Base, tmp_path: Path) -> None:
    folder = peft_zoo.make(base("llama"), tmp_path / "a", "lora_saved_embedding")
    key = "base_model.model.model.embed_tokens.weight"
    edit(folder, lambda t: t.update({key: np.concatenate([t[key], t[key][:8]])}))
    with pytest.raises(UnsupportedMethod, match="270 rows"):
        report_of(base("llama"), folder)


@pytest.fixture(scope="module")
def registry(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    root = tmp_path_factory.mktemp("registry")
    registry = Registry.open(root / "registry")
    for name, recipe, seed in (
        *(("ia3", "ia3", 0), ("ia3", "ia3", 1), ("lora", "lora", 0), ("lora", "lora", 1), ("vera", "vera", 0)),
        *(("dora", "dora", 0), ("pissa", "pissa", 0), ("biased", "lora_bias", 0), ("tokens", "lora_tokens", 0)),
        *(("shira", "shira", 0), ("prompt", "prompt_tuning", 0), ("prompt", "prompt_tuning", 1)),
    ):
        folder = peft_zoo.make(base("llama"), root / f"{name}{seed}", recipe, seed)
        registry.push(folder, name, base=f"folder:{base('llama')}")
    return registry


def test_a_diff_compares_stored_tensors_where_there_are_no_factors(registry: Registry) -> None:
    found = diff_versions(registry.snapshot("ia3@1"), registry.snapshot("ia3@2"))
    assert not found.modules
    assert len(found.heads) == 6
    assert found.overall.distance == pytest.approx(np.sqrt(sum(head.distance**2 for head in found.heads)))
    assert found.overall.distance > 0
    prompts = diff_versions(registry.snapshot("prompt@1"), registry.snapshot("prompt@2"))
    assert [head.module for head in prompts.heads] == ["prompt_embeddings"]


@pytest.mark.parametrize("other", ["ia3", "vera", "dora", "pissa", "shira", "prompt", "tokens"])
def test_a_diff_of_different_methods_never_mixes_factors_and_tensors(registry: Registry, other: str) -> None:
    found = diff_versions(registry.snapshot("lora@1"), registry.snapshot(f"{other}@1"))
    assert not found.modules
    assert found.heads
    assert found.overall.norm_a > 0 < found.overall.norm_b


def test_a_diff_of_plain_lora_is_of_its_deltas(registry: Registry) -> None:
    found = diff_versions(registry.snapshot("lora@1"), registry.snapshot("lora@2"))
    assert len(found.modules) == 6
    assert not found.heads


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("ia3", "IA3"),
        ("vera", "VeRA"),
        ("prompt", "prompt tuning"),
        ("dora", "use_dora"),
        ("pissa", "init_lora_weights"),
        ("biased", "lora_bias"),
        ("tokens", "trainable_token_indices"),
    ],
)
def test_what_is_not_lora_alone_is_not_fused_into_a_version(registry: Registry, name: str, named: str) -> None:
    parts = [read_part(registry, WeightedReference(reference, 0.5)) for reference in ("lora@1", f"{name}@1")]
    with pytest.raises(UnsupportedMethod, match=named):
        fuse_versions(registry, "team/both", parts, FusionSettings("cat"))


def test_a_bottleneck_version_says_that_peft_does_not_know_it(base: Base, tmp_path: Path) -> None:
    registry = Registry.open(tmp_path / "registry")
    folder = peft_zoo.make_bottleneck(base("llama"), tmp_path / "a", BEHIND["llama"])
    receipt = registry.push(folder, "team/x", base=f"folder:{base('llama')}")
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == receipt.manifest.peft_type
    card = render_card(receipt.manifest, name="team/x", version=1).decode()
    assert "PEFT has no bottleneck adapters" in card
    assert "PeftModel" not in card
