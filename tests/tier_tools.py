"""Many small adapters in a registry, and which rows took part in which step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from engine_tools import Answer, Harness
from safetensors.torch import load_file, save_file
from tiny import make_adapter

from adapterbay.registry import Registry
from adapterbay.server.batch import Share
from adapterbay.server.runner import StepResult

PROMPT = list(range(40, 72))
RANK = 4


def push_many(base: Path, root: Path, count: int) -> Registry:
    """Adapters n0, n1, … of one size and random weights, through the registry's own push."""
    registry = Registry.open(root / "registry")
    folder = make_adapter(base, root / "n", targets=["q_proj", "v_proj"], rank=RANK, scale=0.5)
    shapes = load_file(folder / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for number in range(count):
        weights = {key: torch.randn(like.shape, generator=generator) * 0.2 for key, like in shapes.items()}
        save_file(weights, folder / "adapter_model.safetensors")
        registry.push(folder, f"n{number}", base=f"folder:{base}")
    return registry


def record_steps(harness: Harness) -> list[set[int]]:
    """Which rows take part in each step from now on."""
    steps: list[set[int]] = []
    runner = harness.engine._loop._runner
    run = runner.run

    def recording(shares: Sequence[Share]) -> StepResult:
        steps.append({share.row.request.id for share in shares})
        return run(shares)

    runner.run = recording  # type: ignore[method-assign]
    return steps


def never_waited(answer: Answer, steps: Sequence[set[int]], most: int) -> bool:
    """Whether a row was in every step from its first to its last, one token each."""
    assert answer.request is not None
    own = [index for index, rows in enumerate(steps) if answer.request.id in rows]
    return own == list(range(own[0], own[0] + most))
