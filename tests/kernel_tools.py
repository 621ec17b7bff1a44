"""What tests of the kernels, and of what stands in for them, have in common."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers, the same for the same shape and seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def rows_keep_to_themselves(layer: nn.Module) -> None:
    """A row of zeros gives zeros, one that is not finite nothing finite, and neither changes its neighbours. The layer
    is of 64 inputs, without a bias."""
    x = drawn(4, 64)
    x[3] = 0
    expected = layer(x)
    assert not expected[3].any()
    for bad in (math.nan, math.inf, -math.inf):
        x[1, 5] = bad
        got = layer(x)
        assert torch.equal(got[[0, 2, 3]], expected[[0, 2, 3]])
        assert not got[1].isfinite().any()
    assert not layer(torch.full((1, 64), 1e-38)).any()
