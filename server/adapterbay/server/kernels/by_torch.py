"""The quantized layers' product by torch's own operations, on any processor and in any dtype: the numbers of `gemm8.h`.

Inputs are rounded to eight bits in the same way. A group's 32 products of integers are summed in float32, exactly: the
sum is below 32 · 127 · 255 < 2^24. Groups are added in order by operations of single elements, so a row's bits do not
depend on its company here either.

A kernel multiplies and adds with one rounding, here each has its own; no more differs. Let a sum have n terms t_g, two
for each group of four bits, and u = 2^-24. One way is off by n u Σ |t_g| at most, the other by (n + 1) u Σ |t_g|; the
scale and the bias of y = s_w Σ t_g + bias add three roundings of y. So the two are at most
(2 n + 6) u (|s_w| Σ |t_g| + |bias|) apart in float32, also where the kernels are plain loops; rounding to another dtype
adds one unit in the last place.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from adapterbay.server.kernels.weights import PANEL

GROUP = 32
"""Inputs that share a scale."""
TEMPORARY = 1 << 21
"""Numbers in float32 (8 MiB): as many weights are unpacked at once, and as many sums of groups are held."""
TINY = 1e-36
"""Where all inputs of a group are below it they are zero, as in the kernels: its inverse would not be finite."""


def linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [rows, in] to [rows, out] in x's dtype. `packed` is as `quantized.pack8` or `quantized.pack4` lays it out."""
    values, scales = eight_bits(x.float())  # [groups, rows, 32], [groups, rows, 1]
    rests = values.sum(-1, keepdim=True).mul_(scales)
    groups, rows, panels = len(values), x.shape[0], packed.shape[0]
    y = x.new_empty(rows, panels * PANEL)
    wide = max(1, TEMPORARY // (groups * GROUP * PANEL))
    for first, last in _chunks(panels, wide):
        part = packed[first:last]
        columns = slice(first * PANEL, last * PANEL)
        weight, steps, least = _unpacked8(part) if packed.dim() == 4 else _unpacked4(part)
        for begin, end in _chunks(rows, max(1, TEMPORARY // (groups * (last - first) * PANEL))):
            terms = torch.bmm(values[:, begin:end], weight)  # [groups, rows, out], exact
            if least is not None:
                terms.mul_(steps)
            terms.mul_(scales[:, begin:end])
            total = terms.new_zeros(terms.shape[1:])
            for group in range(groups):
                total.add_(terms[group])
                if least is not None:
                    total.add_(rests[group, begin:end] * least[group])
            if least is None:
                total.mul_(steps)
            y[begin:end, columns] = total if bias is None else total.add_(bias[columns].float())
    return y


def eight_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, in] in float32 as whole numbers [groups, rows, 32] and their scales [groups, rows, 1], the largest of 32
    neighbours over 127. Of what is not finite the scale is not, and so no product with it."""
    groups = x.view(x.shape[0], x.shape[1] // GROUP, GROUP).transpose(0, 1)
    largest = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > TINY, largest.new_tensor(127.0) / largest, 0)  # `127 / largest` rounds twice
    return (groups * inverse).round_(), largest / 127


def _unpacked8(packed: Tensor) -> tuple[Tensor, Tensor, None]:
    """Weights [groups, 32, out] as whole numbers, and their scales [out]."""
    fours = packed[:, :-1].view(torch.int32) ^ _SIGNS  # w + 128 to w, four at a time
    scales = packed[:, -1].contiguous().view(torch.float32).flatten()
    return _in_groups(fours.view(len(packed), -1, 8, PANEL)).view(torch.int8).float().transpose(1, 2), scales, None


def _unpacked4(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [groups, 32, out] from 0 to 15, their steps and least values [groups, 1, out]."""
    both = packed[:, :, :4].view(torch.int32)
    fours = torch.cat([both & _LOW, (both >> 4) & _LOW], 2)
    ends = packed[:, :, 4].contiguous().view(torch.bfloat16).view(*packed.shape[:2], 2, PANEL).permute(2, 1, 0, 3)
    steps, least = ends.reshape(2, packed.shape[1], 1, -1).float()
    return _in_groups(fours.view(*fours.shape[:3], PANEL)).view(torch.uint8).float().transpose(1, 2), steps, least


_SIGNS = -0x7F7F7F80  # 0x80 in each byte
_LOW = 0x0F0F0F0F


def _in_groups(fours: Tensor) -> Tensor:
    """int32 [panels, groups, 8, 16], four weights in each, to [groups, out, 8]."""
    panels, groups = fours.shape[:2]
    return fours.permute(1, 0, 3, 2).contiguous().view(groups, panels * PANEL, 8)


def _chunks(count: int, size: int) -> Iterator[tuple[int, int]]:
    """From and to, of chunks of about the same size that are no larger."""
    parts = -(-count // size)
    return pairwise(count * part // parts for part in range(parts + 1)) if parts else iter(())
