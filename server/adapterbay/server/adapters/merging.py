"""Low-rank deltas of one layer into one. Tensors only, float32; equal to PEFT's `add_weighted_adapter` (0.21).

DARE differs in where its chances come from, not in its algebra: PEFT draws from the process's one generator, which
other threads use too; here each layer has a generator of its own (`layer_generator`), so that a seed always means the
same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adapterbay.registry.errors import InvalidArgument
from adapterbay.registry.fusing import FusionSettings
from adapterbay.server.adapters.forms import LowRank


def layer_generator(seed: int, path: str) -> torch.Generator:
    """What DARE draws one layer's chances from: first those of every part's A, then of every part's B (or of ΔW)."""
    mixed = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed[:8], "big") >> 1)


def merge_low_rank(
    deltas: Sequence[LowRank], weights: Sequence[float], settings: FusionSettings, *, rank: int, path: str
) -> LowRank:
    """The deltas of one layer as one with scaling 1, its factors float32.

    `settings` are complete; `rank` is that of the result where the method decomposes. Raises InvalidArgument for ranks
    that are not equal where A and B are merged value by value, and for what overflows.
    """
    generator = layer_generator(settings.seed, path) if settings.seed is not None else None
    factors = [weight * delta.scaling for delta, weight in zip(deltas, weights, strict=True)]
    downs = [delta.a.float() for delta in deltas]
    ups = [delta.b.float().t().contiguous() for delta in deltas]  # B [out, rank], as PEFT has it
    if settings.method in ("cat", "svd"):
        down = torch.cat([a * factor for a, factor in zip(downs, factors, strict=True)])
        up = torch.cat(ups, dim=1)
        if settings.method == "svd":
            down, up = _truncated_product(up, down, rank)
    elif settings.decomposes:
        whole = [(b @ a) * delta.scaling for b, a, delta in zip(ups, downs, deltas, strict=True)]
        down, up = _truncated(_merged(whole, weights, settings, generator), rank)
    else:
        ranks = sorted({delta.rank for delta in deltas})
        if len(ranks) > 1:
            raise InvalidArgument(
                f"The method {settings.method} needs equal ranks, but {path} has {' and '.join(map(str, ranks))}: use "
                f"linear, or {settings.method}_svd.",
                field="fusion.method",
            )
        roots = [math.sqrt(abs(factor)) for factor in factors]
        down = _merged(
            downs, [math.copysign(root, f) for root, f in zip(roots, factors, strict=True)], settings, generator
        )
        up = _merged(ups, roots, settings, generator)
    return LowRank(a=_finite(down).contiguous(), b=_finite(up).t().contiguous(), scaling=1.0)


def _merged(
    tensors: Sequence[Tensor], weights: Sequence[float], settings: FusionSettings, generator: torch.Generator | None
) -> Tensor:
    """Σ w_p t_p of pruned tensors of one shape; with TIES the mean of those that have the majority's sign."""
    if settings.density is not None:
        tensors = [_pruned(tensor, settings.density, generator) for tensor in tensors]
    stacked = torch.stack(list(tensors))
    weighted = stacked * torch.tensor(weights, dtype=stacked.dtype).view(-1, *[1] * tensors[0].dim())
    if not settings.elects_signs:
        return weighted.sum(0)
    # TIES (arXiv:2306.01708): signs are elected from what the parts hold, before their weights.
    signs = stacked.sign()
    votes = signs.sum(0) if settings.majority_sign == "frequency" else stacked.sum(0)
    agree = signs == torch.where(votes >= 0, 1, -1)
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1.0)


def _pruned(tensor: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    """A share of the values, the others zero: the largest, or with a generator any, scaled up (DARE, 2311.03099)."""
    if density >= 1:
        return tensor
    if generator is not None:
        kept = torch.bernoulli(torch.full(tensor.shape, density), generator=generator)
        return tensor * kept / density
    kept = torch.zeros(tensor.numel())
    kept[tensor.abs().flatten().topk(int(density * tensor.numel())).indices] = 1
    return tensor * kept.view_as(tensor)


def _truncated(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank], the best product of that rank for ΔW [out, in]."""
    u, s, vh = torch.linalg.svd(_finite(delta), full_matrices=False)
    return vh[:rank], u[:, :rank] * s[:rank]


def _finite(tensor: Tensor) -> Tensor:
    if not tensor.isfinite().all():
        raise InvalidArgument(
            "The fused delta is too large for float32: take smaller weights.", field="fusion.adapters"
        )
    return tensor


def _truncated_product(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same for B A, without ever making it: with B = Q R and Aᵀ = P S, its values are those of R Sᵀ."""
    q, r = torch.linalg.qr(up)
    p, s = torch.linalg.qr(down.t())
    inner_down, inner_up = _truncated(r @ s.t(), rank)
    return inner_down @ p.t(), q @ inner_up
