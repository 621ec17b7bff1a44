"""The real small models, and adapters of different ranks and targets on them, made once for the session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import load_reference
from zoo import MINILM, RANKS, SMOLLM2, Zoo

from adapterbay.registry import Registry, locate

LLAMA_TARGETS = (
    ["q_proj", "v_proj"],
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ["down_proj"],
    ["gate_proj", "up_proj"],
)
BERT_TARGETS = (["query", "value"], ["query", "key", "value", "dense"], ["intermediate.dense"], ["output.dense"])


def fill(zoo: Zoo, root: Path, reference: str, task: str, targets: tuple[list[str], ...], labels: list[int]) -> None:
    """Random adapters of every rank, saved by PEFT from one model, and pushed. `labels`: how many each head has."""
    for index, rank in enumerate(RANKS):
        torch.manual_seed(index)
        name = f"a{index}"
        settings = {"num_labels": labels[index % len(labels)]} if labels else {}
        config = LoraConfig(
            r=rank,
            lora_alpha=16,
            target_modules=targets[index % 4],
            task_type=task,
            init_lora_weights=False,
            use_rslora=index == 2,
        )
        peft = get_peft_model(load_reference(zoo.base, task, **settings), config)
        with torch.no_grad():
            for parameter_name, parameter in peft.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.mul_(0.1)
                elif "modules_to_save" in parameter_name:
                    parameter.normal_(0, 0.1)
        peft.save_pretrained(root / name)
        zoo.registry.push(root / name, name, base=reference)
        zoo.folders[name] = root / name


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    root = tmp_path_factory.mktemp("smollm2")
    zoo = Zoo(locate(SMOLLM2).folder, Registry.open(root / "registry"))
    fill(zoo, root, SMOLLM2, "CAUSAL_LM", LLAMA_TARGETS, [])
    return zoo


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    root = tmp_path_factory.mktemp("minilm")
    zoo = Zoo(locate(MINILM).folder, Registry.open(root / "registry"))
    fill(zoo, root, MINILM, "SEQ_CLS", BERT_TARGETS, [2, 3, 5])
    return zoo
