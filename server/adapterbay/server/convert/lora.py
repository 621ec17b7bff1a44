"""LoRA's factors to the form of a linear layer, without PEFT: the method that nearly everybody uses loads fastest."""

from __future__ import annotations

import torch
from torch import Tensor

from adapterbay.server.adapters.forms import LinearForm, LowRank
from adapterbay.server.convert.effect import negligible


def lora_form(a: Tensor, b: Tensor, scaling: float, *, b_bias: Tensor | None = None) -> LinearForm:
    """y = W x + scaling · (B A x + b_bias). a [rank, in], b [out, rank], b_bias [out] (`lora_bias`)."""
    bias = None if b_bias is None else scaling * b_bias.float()
    return LinearForm(low_rank=LowRank(a=a, b=b.t(), scaling=scaling), bias=bias)


def dora_form(
    a: Tensor, b: Tensor, scaling: float, magnitude: Tensor, weight: Tensor, base_bias: Tensor | None
) -> LinearForm:
    """DoRA (Liu et al. 2024, arXiv:2402.09353, equation 5): y = m / ‖W + s B A‖ ⊙ (W + s B A) x + bias.

    The norm is that of each row of the [out, in] weight. magnitude [out]; weight [out, in], dequantized, in float32;
    base_bias [out] is not scaled. What depends on the base is computed here, once. Scales that are 1 up to rounding, as
    before the training, are 1.
    """
    a, b = a.float(), b.float()
    norm = torch.linalg.vector_norm(torch.addmm(weight, b, a, alpha=scaling), dim=1)
    scale = magnitude.flatten().float() / norm
    if negligible(scale - 1, torch.ones(1)):
        scale = torch.ones_like(scale)
    return LinearForm(
        low_rank=LowRank(a=a, b=(b * scale[:, None]).t().contiguous(), scaling=scaling),
        out_scale=scale,
        bias=None if base_bias is None else (1 - scale) * base_bias,
    )


def embedding_factors(a: Tensor, b: Tensor, scaling: float) -> LowRank:
    """LoRA on an embedding: row t gains scaling · B A[:, t]. a [rank, vocabulary], b [hidden, rank]."""
    return LowRank(a=a, b=b.t(), scaling=scaling)
