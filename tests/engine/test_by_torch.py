"""Quantized products by torch's own operations: against float64 from the layer's own numbers, and against the kernels.

The bounds are those that `kernels.by_torch` derives; against exact sums it is the one
side's, (n + 3) u (|s_w| Σ |t_g| + |bias|).
"""

from __future__ import annotations

import pytest
import torch
from kernel_tools import drawn, rows_keep_to_themselves
from torch import Tensor, nn

from adapterbay.server.kernels import by_torch, loader, ops, quantized

U = 2.0**-24
KINDS = [quantized.Int8Linear, quantized.Int4Linear]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Kind = type[quantized.QuantizedLinear]


def made(kind: Kind, size: int, out: int, dtype: torch.dtype) -> quantized.QuantizedLinear:
    plain = nn.Linear(size, out).requires_grad_(False)
    plain.weight.copy_(drawn(out, size))
    plain.bias.copy_(drawn(out))
    return kind.of(plain.to(dtype), compiled=False)


def exact(layer: quantized.QuantizedLinear, x: Tensor) -> tuple[Tensor, Tensor, int]:
    """y in float64, |s_w| Σ |t_g| + |bias|, and the number of terms. Inputs are rounded as the kernels' source has it:
    by the inverse of the scale, both in float32."""
    groups = x.float().view(len(x), x.shape[1] // 32, 32)
    largest = groups.abs().amax(-1)
    whole = (groups * torch.full_like(largest, 127).div(largest)[..., None]).round().nan_to_num(0).double()
    scales = (largest / 127).double()
    assert layer.bias is not None
    bias = layer.bias.double()
    if isinstance(layer, quantized.Int8Linear):
        values, outs = quantized.unpack8(layer.packed)
        terms = torch.einsum("rgi,ogi->rog", whole, values.double().view(len(values), -1, 32)) * scales[:, None]
        terms = terms * outs.double()[:, None]
    else:
        wide, steps, least = (part.double() for part in quantized.unpack4(layer.packed))
        terms = torch.einsum("rgi,ogi->rog", whole, wide.view(len(wide), -1, 32)) * scales[:, None] * steps
        terms = torch.cat([terms, (whole.sum(-1) * scales)[:, None] * least], -1)
    return terms.sum(-1) + bias, terms.abs().sum(-1) + bias.abs(), terms.shape[-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "temporary"), [(1, by_torch.TEMPORARY), (37, by_torch.TEMPORARY), (37, 7000), (0, 7000)]
)
def test_a_product_is_exact_but_for_its_roundings(
    rows: int, temporary: int, dtype: torch.dtype, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when weights are unpacked in pieces, and rows are taken some at a time."""
    monkeypatch.setattr(by_torch, "TEMPORARY", temporary)
    layer, x = made(kind, 160, 112, dtype), drawn(rows, 160, dtype=dtype)
    x[:1, 0] = 30.0
    x[1:2, 32:64] = 0
    got = layer(x)
    assert got.dtype is dtype
    assert got.shape == (rows, 112)
    expected, size, terms = exact(layer, x)
    limit = (terms + 3) * U * size
    if dtype is not torch.float32:
        limit = limit + torch.finfo(dtype).eps / 2 * (expected.abs() + limit)
    assert ((got.double() - expected).abs() <= limit).all()
    for row in range(0, rows, 5):
        assert torch.equal(got[row : row + 1], layer(x[row : row + 1])), "a row's bits depend on its company"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("rows", [1, 16, 100])
def test_the_kernels_have_the_same_numbers(rows: int, dtype: torch.dtype, kind: Kind) -> None:
    if loader.find_compiler() is None:
        pytest.skip(loader.NO_COMPILER)
    loader.load("on")
    layer, x = made(kind, 576, 96, dtype), drawn(rows, 576, dtype=dtype)
    theirs = ops.linear(x, layer.packed, layer.bias).double()
    _, size, terms = exact(layer, x)
    limit = (2 * terms + 6) * U * size
    if dtype is torch.bfloat16:
        limit = limit + torch.finfo(dtype).eps * theirs.abs()
    assert ((layer(x).double() - theirs).abs() <= limit).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_keep_to_themselves(kind: Kind) -> None:
    rows_keep_to_themselves(kind.of(nn.Linear(64, 16, bias=False).requires_grad_(False), compiled=False))


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_unpacks_is_bounded(kind: Kind) -> None:
    """The largest tensor that a product of many weights and rows makes, beside the rounded inputs and the result."""
    layer, x = made(kind, 1024, 8192, torch.float32), drawn(48, 1024)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        layer(x)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert x.nbytes < largest <= 4 * by_torch.TEMPORARY
    assert layer.in_features * layer.out_features * 4 > 3 * largest
