"""An adapter that was saved before it was trained is refused, at the push or at the load, whatever its method."""

from __future__ import annotations

from pathlib import Path

import peft_zoo
import pytest
import torch
from engine_tools import Harness
from tiny import make_base

from adapterbay.registry import Registry
from adapterbay.registry.errors import NoEffect

METHODS = (
    "lora", "dora", "ia3", "ln_tuning", "trainable_tokens", "osf", "hra", "psoft", "oft", "boft", "road", "vera",
)  # fmt: skip
"""Some that admission refuses, and those of which only the base at hand can tell."""

IDS = torch.tensor([[7, 10, 20, 30, 40, 41, 42, 9, 50, 60]])


def test_untrained_adapters_are_never_served_as_the_base(tmp_path: Path) -> None:
    """Which methods begin as the base is what PEFT itself computes: no logit further away than 1e-5."""
    base = make_base(tmp_path / "base", "llama", layers=2)
    registry = Registry.open(tmp_path / "registry")
    plain = peft_zoo.load_base(base, "CAUSAL_LM")
    with torch.no_grad():
        expected = plain(IDS).logits
    silent, at_push = [], []
    for name in METHODS:
        folder = peft_zoo.make(base, tmp_path / name, name, trained=False)
        with torch.no_grad():
            logits = peft_zoo.load(base, folder, name)(IDS, **peft_zoo.inputs(name)).logits
        if (logits[:, -IDS.shape[1] :] - expected).abs().max() > 1e-5:
            continue
        silent.append(name)
        try:
            registry.push(folder, name, base=f"folder:{base}")
        except NoEffect:
            at_push.append(name)
    assert set(silent) == set(METHODS)
    with Harness(base, registry) as harness:
        for name in sorted(set(silent) - set(at_push)):
            with pytest.raises(NoEffect, match="changes nothing"):
                harness.generate(name, [7, 10, 20, 9], 1).wait()
