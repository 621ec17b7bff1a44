"""Linear layers of fewer bits on a CPU. `dense()` is the weight that they compute with, so that a reference can be had.

Int8Linear is a product of the kernels and goes into the fused path. Int4Linear is torch's own, of use for single rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

from adapterbay.server.kernels.weights import PANEL, KernelLinear, dense
from adapterbay.server.mix.linear import MixedLinear
from adapterbay.server.packed import PackedLinear

GROUP: Final = 32
"""Inputs of one output that share a scale in Int4Linear."""


class Int8Linear(KernelLinear):
    """Weights as int8 with a scale for each output, inputs as uint8 with a scale for each row, exact sums."""

    def __init__(self, stored: Tensor, bias: Tensor | None) -> None:
        """`stored` is what `pack8` gives, or some panels of it."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = 4 * (stored.shape[1] - 2), PANEL * stored.shape[0]
        self.packed = stored
        self.bias = bias  # type: ignore[assignment]

    @classmethod
    def of(cls, layer: nn.Module) -> Int8Linear:
        """A plain or packed layer quantized. Raises ValueError for a shape that does not fit."""
        bias: Tensor | None = layer.bias  # type: ignore[assignment]
        return cls(pack8(dense(layer)), None if bias is None else bias.detach())

    def dense(self) -> Tensor:
        """[out, in] in float32."""
        values, scales = unpack8(self.packed)
        return values.float() * scales[:, None]


def pack8(weight: Tensor) -> Tensor:
    """[out, in] to int8 [out / 16, in / 4 + 2, 16, 4]: round(w / s), s = max |w| / 127 of each output; behind a panel's
    weights its scales as float32 and the sums of its weights as int32. Raises ValueError for a shape that does not fit.
    """
    out, size = weight.shape
    if out % PANEL or size % 4:
        raise ValueError(f"a weight of {out} by {size} does not fit into panels of {PANEL} by 4")
    wide = weight.float()
    scales = wide.abs().amax(1) / 127
    values = torch.where(scales[:, None] > 0, wide / scales[:, None], 0).round().to(torch.int8)
    panels = values.view(out // PANEL, PANEL, size // 4, 4).transpose(1, 2)
    tail = torch.stack([scales.view(torch.int32), values.int().sum(1, dtype=torch.int32)], 0).view(2, -1, PANEL)
    return torch.cat([panels, tail.transpose(0, 1).contiguous().view(torch.int8).view(-1, 2, PANEL, 4)], 1).contiguous()


def unpack8(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The int8 weights [out, in] and their scales [out]."""
    values = packed[:, :-2].transpose(1, 2).reshape(packed.shape[0] * PANEL, -1)
    return values, packed[:, -2].contiguous().view(torch.float32).flatten()


class Int4Linear(PackedLinear):
    """Weights as four bits with a scale for each 32 inputs of an output, by torch's product; inputs stay whole.

    w ≈ (q - 8) · s, q from 0 to 15. bfloat16 only.
    """

    def __init__(self, layer: nn.Module) -> None:
        """Raises ValueError for a shape that does not fit."""
        nn.Module.__init__(self)
        weight = dense(layer).float()
        self.out_features, self.in_features = weight.shape
        if self.in_features % GROUP or self.out_features % PANEL:
            raise ValueError(
                f"a weight of {self.out_features} by {self.in_features} does not fit into groups of {GROUP}"
            )
        groups = weight.view(self.out_features, -1, GROUP)
        at = groups.abs().argmax(-1, keepdim=True)
        # The value that is largest by magnitude becomes exactly -8: one more step than on the other side.
        scales = (groups.gather(-1, at)[..., 0] / -8).bfloat16()
        steps = torch.where(scales[..., None] != 0, groups / scales.float()[..., None], 0)
        values = (steps.round() + 8).clamp(0, 15).to(torch.int32).view(self.out_features, self.in_features)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 2)
        self._scales = torch.stack([scales.t(), torch.zeros_like(scales.t())], -1).contiguous()  # [groups, out, 2]
        bias: Tensor | None = layer.bias  # type: ignore[assignment]
        self.bias = bias  # type: ignore[assignment]

    def dense(self) -> Tensor:
        """[out, in] in float32."""
        eye = torch.eye(self.in_features, dtype=torch.bfloat16)
        return self._product(eye).t().float()

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in] to [..., out], bfloat16."""
        y = self._product(x.reshape(-1, self.in_features))
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, GROUP, self._scales)
        return y


def requantize(layers: list[MixedLinear], make: Callable[[nn.Module], nn.Module]) -> None:
    """Puts `make(layer)` in the place of every base layer, before the base is fused. Raises what `make` raises."""
    for layer in layers:
        layer.base_layer = make(layer.base_layer)
