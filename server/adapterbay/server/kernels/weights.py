"""Weights in the layout that the kernels' matrix product reads, and linear layers that are pieces of one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapterbay.server.kernels import ops
from adapterbay.server.packed import PackedLinear

PANEL = 16
"""Outputs that lie together."""


def can_pack(weight: Tensor) -> bool:
    """Whether the product would be computed natively here, and the shape fits."""
    return (
        weight.dtype is torch.bfloat16
        and weight.device.type == "cpu"
        and bool(torch.ops.adapterbay.native_bf16())
        and weight.shape[0] % PANEL == 0
        and weight.shape[1] % 2 == 0
    )


def pack(weight: Tensor) -> Tensor:
    """[out, in] to [out / 16, in / 2, 16, 2]."""
    out, size = weight.shape
    return weight.view(out // PANEL, PANEL, size // 2, 2).permute(0, 2, 1, 3).contiguous()


def unpack(packed: Tensor) -> Tensor:
    """`pack` undone."""
    panels, pairs = packed.shape[:2]
    return packed.permute(0, 2, 1, 3).reshape(panels * PANEL, pairs * 2)


class KernelLinear(PackedLinear):
    """A linear layer over a weight in the kernels' layout, or over rows [out, in] of a plain one."""

    def __init__(self, stored: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        if stored.dim() == 4:
            self.in_features, self.out_features = 2 * stored.shape[1], PANEL * stored.shape[0]
        else:
            self.out_features, self.in_features = stored.shape
        self.packed = stored
        self.bias = bias  # type: ignore[assignment]

    def dense(self) -> Tensor:
        """The weight [out, in] as it was, a copy."""
        return unpack(self.packed) if self.packed.dim() == 4 else self.packed.clone()

    def piece(self, stored: Tensor, bias: Tensor | None) -> KernelLinear:
        """A layer of the same kind over other panels."""
        return KernelLinear(stored, bias)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in] to [..., out]."""
        flat = x.reshape(-1, self.in_features)
        return ops.linear(flat, self.packed, self.bias).view(*x.shape[:-1], self.out_features)


def together(layers: list[nn.Module]) -> tuple[Tensor, Tensor | None, list[KernelLinear]]:
    """One stored weight for layers that share their input, its bias, and the layers as pieces of it.

    Layers in the kernels' layout are joined as they are, of whatever bits. Raises ValueError for layers of a kind that
    cannot be joined.
    """
    first = layers[0]
    if (
        isinstance(first, KernelLinear)
        and first.packed.dim() > 2
        and all(type(layer) is type(first) for layer in layers)
    ):
        return _joined(first.piece, [layer.packed for layer in layers], [layer.bias for layer in layers], PANEL)  # type: ignore[misc]
    weights = [dense(layer) for layer in layers]
    packs = all(can_pack(weight) for weight in weights)
    stored = [pack(weight) if packs else weight for weight in weights]
    biases: list[Tensor | None] = [layer.bias for layer in layers]  # type: ignore[misc]
    return _joined(KernelLinear, stored, biases, PANEL if packs else 1)


def _joined(
    make: Callable[[Tensor, Tensor | None], KernelLinear],
    parts: list[Tensor],
    biases: list[Tensor | None],
    unit: int,
) -> tuple[Tensor, Tensor | None, list[KernelLinear]]:
    there = [bias.detach() for bias in biases if bias is not None]
    if len(there) not in (0, len(parts)):
        raise ValueError("some of the layers have a bias and some have none")
    stored = torch.cat(parts)
    bias = torch.cat(there) if there else None
    pieces, start = [], 0
    for part in parts:
        stop = start + part.shape[0]
        own = None if bias is None else bias[start * unit : stop * unit]
        pieces.append(make(stored[start:stop], own))
        start = stop
    return stored, bias, pieces


def dense(layer: nn.Module) -> Tensor:
    """The weight [out, in] of a plain or packed linear layer, GPT-2's too. Raises ValueError for another kind."""
    if type(layer) in (PackedLinear, KernelLinear):
        weight: Tensor = layer.dense()  # type: ignore[operator]
        return weight
    if type(layer) is nn.Linear:
        return layer.weight.detach()
    if isinstance(layer, Conv1D):
        transposed: Tensor = layer.weight.detach().t()
        return transposed
    raise ValueError(f"a {type(layer).__name__} is no plain linear layer")
