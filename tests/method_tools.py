"""A base with an adapter of every method in a registry."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import peft_zoo
from peft_layouts import LAYOUTS
from tiny import make_base

from adapterbay.registry import Registry

EVERYTHING = ("llama", "gpt2", "bert")
"""Architectures on which every recipe is tried; each other one gets those that differ by architecture."""

SOME = (
    "lora", "dora", "ia3", "ln_tuning", "oft", "loha", "prompt_tuning", "prefix_tuning", "trainable_tokens", "vera",
    "bias_all", "lora_embedding", "lora_lm_head", "lora_classifier", "lora_tagger",
)  # fmt: skip
REFUSED_HERE = {("t5", "lora_embedding")}
"""What PEFT can make and we refuse by name: on T5 a LoRA on the embedding has no effect in PEFT."""

OTHERS = ("qwen2", "qwen3", "mistral", "gemma", "gemma2", "opt", "gpt-neox", "roberta", "distilbert", "t5")


@dataclass
class Shelf:
    """A base, and the adapters that were made for it."""

    base: Path
    registry: Registry
    folders: dict[str, Path] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """PEFT's task type of adapters that have no head."""
        return LAYOUTS[peft_zoo.architecture_of(self.base)].task

    def recipe(self, name: str) -> peft_zoo.Recipe:
        return peft_zoo.recipes(peft_zoo.architecture_of(self.base))[name]


def fill(root: Path, architecture: str, only: Collection[str] = ()) -> Shelf:
    """Makes and pushes what the parity test has for an architecture, or `only` some of it."""
    shelf = Shelf(make_base(root / "base", architecture), Registry.open(root / "registry"))
    for name, recipe in peft_zoo.recipes(peft_zoo.architecture_of(shelf.base)).items():
        if peft_zoo.skipped(recipe) or not (architecture in EVERYTHING or name in SOME):
            continue
        if (architecture, name) in REFUSED_HERE or (only and name not in only):
            continue
        folder = peft_zoo.make(shelf.base, root / name, name, seed=1)
        labelled = recipe.task in ("SEQ_CLS", "TOKEN_CLS")
        shelf.registry.push(
            folder, name, base=f"folder:{shelf.base}", labels=list(peft_zoo.LABELS) if labelled else None
        )
        shelf.folders[name] = folder
    return shelf
