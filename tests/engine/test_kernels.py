"""Each kernel against plain torch: float32 to 1e-5 of the largest result, bfloat16 to two roundings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_tools import drawn, rows_keep_to_themselves
from torch import Tensor, nn

from adapterbay.registry.errors import Unavailable
from adapterbay.server.kernels import loader, ops, quantized, weights

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2}
DTYPES = list(LIMIT)


pytestmark = pytest.mark.usefixtures("kernels")


def near(got: Tensor, expected: Tensor, limit: float | None = None) -> None:
    """`expected` is computed in float32 from the same inputs."""
    limit = LIMIT[got.dtype] if limit is None else limit
    assert got.shape == expected.shape
    assert (got.float() - expected).abs().max() <= limit * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 9, 16, 17, 30, 100])
def test_product_with_packed_weights(rows: int) -> None:
    weight, bias, x = drawn(80, 46).bfloat16(), drawn(80).bfloat16(), drawn(rows, 46).bfloat16()
    packed = weights.pack(weight)
    assert torch.equal(weights.unpack(packed), weight)
    near(ops.linear(x, packed, bias), F.linear(x.float(), weight.float(), bias.float()), 5e-3)
    near(ops.linear(x[:, :46], packed), x.float() @ weight.float().t(), 5e-3)


def test_a_rows_bits_do_not_depend_on_its_company() -> None:
    packed, x = weights.pack(drawn(112, 64).bfloat16()), drawn(40, 64).bfloat16()
    alone = torch.cat([ops.linear(row[None], packed) for row in x])
    for rows in (2, 7, 13, 16, 40):
        assert torch.equal(ops.linear(x[:rows].clone(), packed), alone[:rows])


def test_product_with_plain_weights_is_torchs_own() -> None:
    weight, x = drawn(5, 7), drawn(3, 7)
    assert torch.equal(ops.linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_that_share_an_input_become_pieces_of_one(dtype: torch.dtype) -> None:
    layers = [nn.Linear(32, out).to(dtype).requires_grad_(False) for out in (48, 16, 16)]
    stored, bias, pieces = weights.together(list(layers))
    x = drawn(3, 2, 32, dtype=dtype)
    both = ops.linear(x.view(-1, 32), stored, bias)
    assert both.shape == (6, 80)
    for layer, piece, part in zip(layers, pieces, both.split([48, 16, 16], 1), strict=True):
        assert torch.equal(piece.dense(), layer.weight)
        piece.dense().zero_()  # a copy: who reads the base cannot change it
        assert torch.equal(piece.dense(), layer.weight)
        assert piece.packed.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()
        near(
            piece(x),
            F.linear(x.float(), layer.weight.float(), layer.bias.float()),
            5e-3 if dtype != torch.float32 else None,
        )
        near(part.contiguous(), piece(x).view(6, -1).float())
    layers[1].bias = None
    with pytest.raises(ValueError, match="bias"):
        weights.together(list(layers))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 40, 576])
def test_residual_and_norm(dtype: torch.dtype, size: int) -> None:
    x, delta, weight = drawn(5, size, dtype=dtype), drawn(5, size, dtype=dtype, seed=1), drawn(size, dtype=dtype)
    total = x + delta
    plain = total.float() * torch.rsqrt(total.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    y = ops.add_rms_norm(x, delta, weight, 1e-5)
    assert torch.equal(x, total)
    near(y, (weight * plain.to(dtype)).float())
    assert torch.equal(ops.add_rms_norm(x, None, weight, 1e-5), y)
    assert torch.equal(x, total)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate(dtype: torch.dtype) -> None:
    gate_up = torch.cat([drawn(4, 70, dtype=dtype) * 8, drawn(4, 70, dtype=dtype, seed=1)], 1)
    gate_up[0, :4] = torch.tensor([0.0, 100.0, -100.0, -60.0])
    gate, up = gate_up.float().chunk(2, 1)
    near(ops.silu_mul(gate_up), F.silu(gate) * up)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "normed"), [(16, False), (24, True), (64, True)])
def test_rotation_and_cache(dtype: torch.dtype, size: int, normed: bool) -> None:
    heads, kv_heads, tokens = 4, 2, 5
    qkv = drawn(tokens, (heads + 2 * kv_heads) * size, dtype=dtype)
    angle = drawn(tokens, size // 2).repeat(1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    norms = (drawn(size, dtype=dtype, seed=2), drawn(size, dtype=dtype, seed=3)) if normed else None
    q, k, v = qkv.float().view(tokens, -1, size).split([heads, kv_heads, kv_heads], 1)
    if norms is not None:
        q, k = (
            x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * n.float()
            for x, n in zip((q, k), norms, strict=True)
        )
    q, k = rotated(q, cos.float(), sin.float()), rotated(k, cos.float(), sin.float())
    cache = (torch.zeros(32, kv_heads, size, dtype=dtype), torch.zeros(32, kv_heads, size, dtype=dtype))
    slots, written = torch.tensor([31, 3, 8]), torch.tensor([4, 0, 2])
    ops.rotate_write(qkv, cos, sin, heads, kv_heads, norms=norms, eps=1e-6, cache=cache, slots=slots, tokens=written)
    near(qkv, torch.cat([q, k, v], 1).flatten(1))
    assert torch.equal(cache[0][slots], qkv.view(tokens, -1, size)[written, heads : heads + kv_heads])
    assert torch.equal(cache[1][slots].float(), v[written])
    assert int((cache[0] != 0).any(-1).any(-1).sum()) == 3
    with pytest.raises(RuntimeError, match="no such slot"):
        ops.rotate_write(
            qkv, cos, sin, heads, kv_heads, cache=cache, slots=torch.tensor([32]), tokens=torch.tensor([0])
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (4, 4, 24), (4, 1, 40)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (7, None), (None, 2.0)])
def test_decode_attention_over_blocks(
    dtype: torch.dtype, heads: int, kv_heads: int, size: int, window: int | None, softcap: float | None
) -> None:
    lengths = [1, 16, 17, 45, 33]
    table = torch.zeros(5, 3, dtype=torch.long)
    table.view(-1)[torch.arange(15)] = torch.randperm(15, generator=torch.Generator().manual_seed(0)) + 1
    keys, values = drawn(16 * 16, kv_heads, size, dtype=dtype), drawn(16 * 16, kv_heads, size, dtype=dtype, seed=1)
    wide = drawn(5, (heads + 3) * size, dtype=dtype)
    q = wide[:, : heads * size].view(5, heads, size)
    scale = size**-0.5
    got = ops.paged_attention(q, keys, values, table, torch.tensor(lengths), scale, window, softcap)
    for row, length in enumerate(lengths):
        slots = [int(table[row, at // 16]) * 16 + at % 16 for at in range(max(0, length - (window or length)), length)]
        k = keys[slots].float().repeat_interleave(heads // kv_heads, 1)
        v = values[slots].float().repeat_interleave(heads // kv_heads, 1)
        scores = torch.einsum("hd,lhd->hl", q[row].float(), k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        near(got[row], torch.einsum("hl,lhd->hd", scores.softmax(-1), v))


def test_attention_reads_nothing_beyond_its_row() -> None:
    """NaN in other blocks, and behind a row's last token, reaches nobody."""
    keys, values = drawn(64, 2, 16), drawn(64, 2, 16, seed=1)
    table, q = torch.tensor([[1, 2], [3, 0]]), drawn(2, 4, 16)
    expected = ops.paged_attention(q, keys, values, table, torch.tensor([20, 5]), 0.25)
    for store in (keys, values):
        store[36:48] = math.nan
        store[53:] = math.nan
        store[:16] = math.nan
    assert torch.equal(ops.paged_attention(q, keys, values, table, torch.tensor([20, 5]), 0.25), expected)
    with pytest.raises(RuntimeError, match="no such block"):
        ops.paged_attention(q, keys, values, table + 3, torch.tensor([20, 5]), 0.25)


def ranked(x: Tensor, y: Tensor, sites: list[tuple[Tensor, Tensor, list[Any]]]) -> Tensor:
    """The formula, token by token, in float32."""
    out, column = y.float().clone(), 0
    for a, b, runs in sites:
        for start, stop, spans in runs:
            for row, rank, factor in spans:
                own = slice(row, row + rank)
                out[start:stop, column : column + b.shape[1]] += (
                    factor * (x[start:stop].float() @ a[own].float().t()) @ b[own].float()
                )
        column += b.shape[1]
    return out


RUNS: dict[str, list[Any]] = {
    "distinct": [(t, t + 1, [(8 * t, 8, 0.5 + t)]) for t in range(6)],
    "uniform": [(0, 3, [(0, 5, 1.0)]), (3, 5, [(5, 1, -2.0)]), (5, 6, [(6, 64, 0.1)])],
    "identical": [(0, 6, [(3, 16, 2.0)])],
    "fused": [(1, 2, [(0, 4, 0.3), (40, 17, -0.7), (20, 3, 1.0)]), (3, 6, [(4, 2, 0.5), (10, 6, 0.5)])],
    "one": [(2, 3, [(7, 9, 1.5)])],
    "none": [],
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", RUNS)
def test_low_rank_deltas(kind: str, dtype: torch.dtype, threads: int) -> None:
    x, y = drawn(6, 40, dtype=dtype), drawn(6, 96 + 24 + 7, dtype=dtype, seed=1)
    factors = [
        (drawn(80, 40, dtype=dtype, seed=i), drawn(80, out, dtype=dtype, seed=i)) for i, out in enumerate((96, 24, 7))
    ]
    runs = [RUNS[kind], [], RUNS["uniform" if kind != "none" else "none"]]
    expected = ranked(x, y, [(a, b, r) for (a, b), r in zip(factors, runs, strict=True)])
    got = y.clone()
    was = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ops.add_ranks(x, got, [(a, b, ops.rank_plan(r)) for (a, b), r in zip(factors, runs, strict=True)])
    finally:
        torch.set_num_threads(was)
    near(got, expected)
    touched = {t for start, stop, _ in runs[0] for t in range(start, stop)}
    for token in set(range(6)) - touched:
        assert torch.equal(got[token, :120], y[token, :120])


def test_large_ranks_and_long_runs() -> None:
    x, y, a, b = drawn(70, 48), drawn(70, 64, seed=1), drawn(600, 48), drawn(600, 64)
    runs = [(0, 33, [(0, 512, 0.01)]), (33, 70, [(512, 88, 0.02), (3, 1, 1.0)])]
    got = y.clone()
    ops.add_ranks(x, got, [(a, b, ops.rank_plan(runs))])
    near(got, ranked(x, y, [(a, b, runs)]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_adapter_or_row_keeps_to_itself(bad: float) -> None:
    x, y, a, b = drawn(4, 32), drawn(4, 32, seed=1), drawn(16, 32), drawn(16, 32)
    plan = ops.rank_plan([(0, 2, [(0, 8, 1.0)]), (2, 3, [(8, 8, 1.0)])])
    expected = y.clone()
    ops.add_ranks(x, expected, [(a, b, plan)])
    a[3], b[5], x[1] = bad, bad, bad
    ops.add_ranks(x, y, [(a, b, plan)])
    assert torch.equal(y[2:], expected[2:])
    assert not y[:2].isfinite().any()


def test_a_plan_that_does_not_fit_is_refused() -> None:
    x, y, a, b = drawn(2, 8), drawn(2, 8), drawn(4, 8), drawn(4, 8)
    for runs, message in (([(0, 3, [(0, 1, 1.0)])], "run"), ([(0, 1, [(3, 2, 1.0)])], "span")):
        with pytest.raises(RuntimeError, match=message):
            ops.add_ranks(x, y, [(a, b, ops.rank_plan(runs))])
    with pytest.raises(RuntimeError, match="cut off"):
        ops.add_ranks(x, y, [(a, b, ops.rank_plan([(0, 1, [(0, 1, 1.0)])])[:-1])])


QUANTIZED = [quantized.Int8Linear, quantized.Int4Linear]


def by_hand(x: Tensor) -> Tensor:
    """Each 32 inputs of a row as round(x / s) · s, s = max |x| / 127."""
    groups = x.float().view(*x.shape[:-1], -1, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups / scale).round().nan_to_num(0) * scale).view(x.shape)


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 6, 7, 8, 16, 50, 400])
def test_a_quantized_layer_is_its_own_dense_weight(
    rows: int, dtype: torch.dtype, kind: type[quantized.QuantizedLinear]
) -> None:
    """Exact up to the float32 sums of the reference, and the rounding of the result."""
    plain = nn.Linear(96, 48).to(dtype).requires_grad_(False)
    layer = kind.of(plain)
    x = drawn(rows, 96, dtype=dtype)
    x[0, 0] = 30.0
    near(layer(x), by_hand(x) @ layer.dense().t() + plain.bias.float(), 4e-3 if dtype is torch.bfloat16 else 2e-6)
    assert torch.equal(layer(x)[-1:], layer(x[-1:]))
    assert layer.weight.dtype is dtype
    assert layer.weight.shape == plain.weight.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_weights_are_within_half_a_step(dtype: torch.dtype) -> None:
    """Eight bits: a step is an output's largest weight over 127. Four: the range of 32 weights over 15, and the step
    and the least value are rounded to bfloat16 themselves."""
    plain = nn.Linear(96, 48).to(dtype).requires_grad_(False)
    wide = plain.weight.float()
    wide[3, 32:64] = 0.25
    wide[5] = 0
    plain.weight.copy_(wide)
    step = wide.abs().amax(1, keepdim=True) / 127
    assert ((quantized.Int8Linear.of(plain).dense() - wide).abs() <= step / 2 + 1e-6).all()
    groups = wide.view(48, 3, 32)
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    off = (quantized.Int4Linear.of(plain).dense().view(48, 3, 32) - groups).abs()
    assert (off <= (most - least) / 30 + 2**-8 * (most - least) + 2**-8 * least.abs()).all()
    assert not off[3, 1].any()
    assert not off[5].any()


def test_int8_weights_are_bitsandbytes_own() -> None:
    """So `--quantize int8` means the same numbers, whoever computes them. A tie may be rounded the other way."""
    import bitsandbytes.functional

    weight = drawn(48, 96)
    theirs, largest, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
    ours, scales = quantized.unpack8(quantized.pack8(weight.half()))
    assert (ours.int() - theirs.int()).abs().max() <= 1
    assert (ours != theirs).float().mean() < 0.01
    near(scales, largest.float() / 127, 1e-6)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_rows_keep_to_themselves(kind: type[quantized.QuantizedLinear]) -> None:
    rows_keep_to_themselves(kind.of(nn.Linear(64, 16, bias=False).requires_grad_(False)))


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_layers_are_joined(kind: type[quantized.QuantizedLinear]) -> None:
    layers = [nn.Linear(64, out).bfloat16().requires_grad_(False) for out in (32, 16)]
    quants = [kind.of(layer) for layer in layers]
    stored, bias, pieces = weights.together(list(quants))
    x = drawn(5, 64).bfloat16()
    assert torch.equal(ops.linear(x, stored, bias), torch.cat([layer(x) for layer in quants], 1))
    for piece, layer in zip(pieces, quants, strict=True):
        assert type(piece) is kind
        assert torch.equal(piece.dense(), layer.dense())
        assert piece.weight.dtype is torch.bfloat16
        assert piece.packed.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()
    with pytest.raises(ValueError, match=kind.__name__):
        weights.together([quants[0], layers[1]])
    for shape in ((64, 20), (40, 16)):
        with pytest.raises(ValueError, match="does not fit"):
            kind.of(nn.Linear(*shape))


def test_operators_are_registered_whole() -> None:
    x, weight = drawn(3, 32), drawn(16, 32)
    packed = weights.pack(weight.bfloat16())
    for operator, arguments in (
        ("linear", (x, weight, None)),
        ("linear", (x.bfloat16(), packed, None)),
        ("linear", (x, quantized.pack8(weight), None)),
        ("linear", (x, quantized.pack4(weight), None)),
        ("silu_mul", (x,)),
        ("add_rms_norm", (x.clone(), x.clone(), drawn(32), 1e-5)),
        (
            "paged_attention",
            (drawn(1, 2, 8), drawn(32, 1, 8), drawn(32, 1, 8), torch.tensor([[1]]), torch.tensor([3]), 1.0, 0, 0.0),
        ),
        ("add_ranks", (x, drawn(3, 16), [drawn(2, 32), drawn(2, 16), ops.rank_plan([(0, 1, [(0, 2, 1.0)])])])),
    ):
        torch.library.opcheck(
            getattr(torch.ops.adapterbay, operator).default, arguments, test_utils=("test_schema", "test_faketensor")
        )


def test_off_compiles_nothing_and_on_tells_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not loader.load("off").loaded
    monkeypatch.setattr(loader, "_state", None)
    monkeypatch.setenv("ADAPTERBAY_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    assert "no C++ compiler" in loader.load("auto").reason
    with pytest.raises(Unavailable, match="--compile off"):
        loader.load("on")
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\necho 'error: out of order' >&2\nexit 3\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    assert "out of order" in loader.load("auto").reason
    assert not list(tmp_path.rglob("*.so"))


def test_sources_that_cannot_be_read_are_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_state", None)
    monkeypatch.setattr(loader, "SOURCES", tmp_path / "nowhere")
    assert "nowhere" in loader.load("auto").reason
    with pytest.raises(Unavailable, match="nowhere"):
        loader.load("on")


def test_a_restart_is_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_state", None)
    again = loader.load("on")
    assert again.loaded
    assert not again.compiled
