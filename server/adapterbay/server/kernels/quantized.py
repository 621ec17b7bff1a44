"""Linear layers of fewer bits on a CPU, multiplied by the kernels or, where these are not, by torch (`by_torch`).
`dense()` is the weight that they compute with, so that a reference can be had.

Inputs are rounded to eight bits when they come, each 32 neighbours of a row with a scale of their own, and products are
summed as exact integers. A row's bits do not depend on its company.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from adapterbay.server.kernels import by_torch, ops
from adapterbay.server.kernels.by_torch import GROUP
from adapterbay.server.kernels.weights import PANEL, KernelLinear, dense

Bits = Literal[4, 8]


class QuantizedLinear(KernelLinear):
    """A linear layer over a weight as `pack8` or `pack4` lays it out, or some panels of it. `dtype` is that of its
    inputs and outputs; `compiled`: the kernels are loaded, and compute in it."""

    bits: Bits

    def __init__(self, stored: Tensor, bias: Tensor | None, dtype: torch.dtype, *, compiled: bool = True) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = self._inputs(stored), PANEL * stored.shape[0]
        self.packed = stored
        self.bias = bias  # type: ignore[assignment]
        self._dtype = dtype
        self.compiled = compiled

    @classmethod
    def of(cls, layer: nn.Module, *, compiled: bool = True) -> QuantizedLinear:
        """A plain or packed layer quantized. Raises ValueError for a shape or a kind that does not fit."""
        weight = dense(layer)
        bias: Tensor | None = layer.bias  # type: ignore[assignment]
        return cls(cls._pack(weight), None if bias is None else bias.detach(), weight.dtype, compiled=compiled)

    @property
    def weight(self) -> Tensor:
        """As `PackedLinear.weight`."""
        return torch.empty(self.out_features, self.in_features, dtype=self._dtype, device="meta")

    def piece(self, stored: Tensor, bias: Tensor | None) -> QuantizedLinear:
        """As `KernelLinear.piece`."""
        return type(self)(stored, bias, self._dtype, compiled=self.compiled)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in] to [..., out]."""
        flat = x.reshape(-1, self.in_features)
        product = ops.linear if self.compiled else by_torch.linear
        return product(flat, self.packed, self.bias).view(*x.shape[:-1], self.out_features)

    @staticmethod
    def _inputs(stored: Tensor) -> int:
        raise NotImplementedError

    @staticmethod
    def _pack(weight: Tensor) -> Tensor:
        raise NotImplementedError


class Int8Linear(QuantizedLinear):
    """Weights as int8 with a scale for each output: the numbers of bitsandbytes' INT8 without outliers."""

    bits = 8

    def dense(self) -> Tensor:
        """[out, in] in float32."""
        values, scales = unpack8(self.packed)
        return values.float() * scales[:, None]

    @staticmethod
    def _inputs(stored: Tensor) -> int:
        return 4 * (stored.shape[1] - 1)

    @staticmethod
    def _pack(weight: Tensor) -> Tensor:
        return pack8(weight)


class Int4Linear(QuantizedLinear):
    """Weights as four bits, w = q · step + least, with a step and a least value for each 32 inputs of an output."""

    bits = 4

    def dense(self) -> Tensor:
        """[out, in] in float32."""
        values, steps, least = unpack4(self.packed)
        weight = values.view(*steps.shape, GROUP) * steps[..., None] + least[..., None]
        return weight.view(self.out_features, self.in_features)

    @staticmethod
    def _inputs(stored: Tensor) -> int:
        return GROUP * stored.shape[1]

    @staticmethod
    def _pack(weight: Tensor) -> Tensor:
        return pack4(weight)


def fits(out_features: int, in_features: int) -> bool:
    """Whether a weight of this shape can be laid out."""
    return out_features % PANEL == 0 and in_features % GROUP == 0


def _check(weight: Tensor) -> tuple[int, int]:
    out, size = weight.shape
    if not fits(out, size):
        raise ValueError(f"a weight of {out} by {size} does not fit into panels of {PANEL} by {GROUP}")
    return out, size


def pack8(weight: Tensor) -> Tensor:
    """[out, in] to uint8 [out / 16, in / 4 + 1, 16, 4]: 128 + round(w / s), s = max |w| / 127 of each output; behind a
    panel's weights its scales as float32. Raises ValueError for a shape that does not fit."""
    out, size = _check(weight)
    wide = weight.float()
    scales = wide.abs().amax(1) / 127
    values = (torch.where(scales[:, None] > 0, wide / scales[:, None], 0).round() + 128).to(torch.uint8)
    panels = values.view(out // PANEL, PANEL, size // 4, 4).transpose(1, 2)
    tail = scales.view(torch.uint8).view(out // PANEL, 1, PANEL, 4)
    return torch.cat([panels, tail], 1).contiguous()


def unpack8(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The int8 weights [out, in] and their scales [out]."""
    values = packed[:, :-1].transpose(1, 2).reshape(packed.shape[0] * PANEL, -1)
    return (values.int() - 128).to(torch.int8), packed[:, -1].contiguous().view(torch.float32).flatten()


def pack4(weight: Tensor) -> Tensor:
    """[out, in] to uint8 [out / 16, in / 32, 5, 16, 4]: round((w - least) / step), step = (most - least) / 15 of 32
    inputs of an output, as bfloat16. Of 32 inputs the first 16 lie in the low halves of four times 64 bytes, the last
    16 in the high halves; behind them the steps and the least values of the panel. Raises ValueError for a shape that
    does not fit.
    """
    out, size = _check(weight)
    groups = weight.float().view(out, -1, GROUP)
    least = groups.amin(-1).bfloat16()
    steps = ((groups.amax(-1) - least.float()).clamp_min(0) / 15).bfloat16()
    wide = steps.float()[..., None]
    values = torch.where(wide > 0, (groups - least.float()[..., None]) / wide, 0).round().clamp(0, 15).to(torch.uint8)
    fours = values.view(out // PANEL, PANEL, -1, 8, 4).permute(0, 2, 3, 1, 4)  # [panels, groups, 8, 16, 4]
    both = fours[:, :, :4] | (fours[:, :, 4:] << 4)
    ends = torch.stack([steps, least], -1).view(out // PANEL, PANEL, -1, 2).permute(0, 2, 3, 1).contiguous()
    tail = ends.view(torch.uint8).view(out // PANEL, size // GROUP, 1, PANEL, 4)
    return torch.cat([both, tail], 2).contiguous()


def unpack4(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weights [out, in] from 0 to 15, and their steps and least values [out, in / 32], all in float32."""
    panels, groups = packed.shape[:2]
    both = packed[:, :, :4]
    fours = torch.cat([both & 15, both >> 4], 2).permute(0, 3, 1, 2, 4)
    ends = packed[:, :, 4].contiguous().view(torch.bfloat16).view(panels, groups, 2, PANEL).permute(2, 0, 3, 1)
    steps, least = ends.reshape(2, panels * PANEL, groups).float()
    return fours.reshape(panels * PANEL, -1).float(), steps, least
