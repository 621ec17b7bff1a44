"""bfloat16 products on a CPU with weights laid out once. oneDNN otherwise lays them out again at every call.

Measured, all linear layers of one step of SmolLM2-135M, 2 threads: 16 rows 43.5 ms as they are, 30.5 ms packed; one row
27.8 and 17.4 ms (bench/NOTES.md). The operators are those that torch's inductor compiles a bfloat16 linear layer to.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

TYPICAL_ROWS = 16
"""The layout is chosen for about so many rows; any number can be computed with it."""


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN computes this natively here; otherwise packing would gain nothing."""
    return device.type == "cpu" and dtype is torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(weight: Tensor) -> Tensor:
    """A weight [out, in] in oneDNN's own layout."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TYPICAL_ROWS)
    return packed


def linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] to [..., out]."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


def linear_add(x: Tensor, packed: Tensor, y: Tensor) -> Tensor:
    """y + x Wᵀ as a new tensor. x [rows, in], y [rows, out]."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, y, packed, None, "add")
    return out


class PackedLinear(nn.Module):
    """A linear layer whose weight exists in oneDNN's layout only."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.packed = pack(layer.weight.detach())
        self.bias = layer.bias

    @property
    def weight(self) -> Tensor:
        """Nothing to compute with: only what the weight's shape and dtype were, which some models look at."""
        return torch.empty(self.out_features, self.in_features, dtype=self.packed.dtype, device="meta")

    def dense(self) -> Tensor:
        """The weight [out, in] as it was."""
        return self.packed.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in] to [..., out]."""
        return linear(x, self.packed, self.bias)
