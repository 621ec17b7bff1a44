"""Bases that are almost of Llama's kind: what stands in no module is found, and the base's own modules compute it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from tiny import load_reference, make_base

from adapterbay.server.attention import AttentionPlan, Segment
from adapterbay.server.config import ServerConfig
from adapterbay.server.fast.path import FastPath, Unfit
from adapterbay.server.model import ServingModel

TOKENS = 24
REASONS = {
    "granite": "computes something around its layers",
    "ministral3": "takes positions beside the rotation",
    "ernie4_5": "no layer could be fused",
}


pytestmark = pytest.mark.usefixtures("kernels")


def load(base: Path, dtype: str = "float32") -> ServingModel:
    return ServingModel.load(ServerConfig(base=str(base), dtype=dtype, device="cpu", quantize="none", compile="on"))


@pytest.mark.parametrize(("name", "dtype"), [(name, "float32") for name in REASONS] + [("ernie4_5", "bfloat16")])
def test_what_stands_in_no_module_is_not_left_out(
    name: str, dtype: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Logits are plain transformers' own within 1e-4 in float32, and 4 % of the largest in bfloat16."""
    base = make_base(tmp_path, name, layers=2)
    with caplog.at_level(logging.INFO):
        model = load(base, dtype)
    assert model.fast is None
    assert REASONS[name] in caplog.text
    ids, positions = torch.arange(10, 10 + TOKENS), torch.arange(TOKENS)
    plan = AttentionPlan(causal=True, segments=(Segment(0, TOKENS, None),))
    with torch.inference_mode():
        _, logits = model.forward(ids, positions, None, plan, logits_at=positions, want_hidden=False)
        expected = load_reference(base, dtype=getattr(torch, dtype))(ids[None]).logits[0].float()
    assert logits is not None
    limit = 1e-4 if dtype == "float32" else 0.04 * float(expected.abs().max())
    assert (logits.float() - expected).abs().max() <= limit


def test_bases_of_another_kind_are_left_alone(tmp_path: Path) -> None:
    for name in ("gemma", "gpt2"):
        model = load(make_base(tmp_path / name, name, layers=2))
        assert model.fast is None
        assert model.kernels.loaded
        assert isinstance(FastPath.build(model), Unfit)
