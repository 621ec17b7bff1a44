"""The operators of the compiled kernels, `torch.ops.adapterbay.*`, with their shapes. `loader.load` comes first.

All take contiguous CPU tensors in float32 or bfloat16, sum in float32, and round once where transformers rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.bfloat16)
MOST_KEYS = 8192
"""The longest text of `text_attention`."""

_fakes = False


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [rows, in] to [rows, out]. `weight` is [out, in], or as `weights.pack` lays it out (bfloat16), or as
    `quantized.pack8` or `quantized.pack4` do."""
    y: Tensor = torch.ops.adapterbay.linear(x, weight, bias)
    return y


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """x += delta [rows, hidden] in place; returns weight · x / rms(x)."""
    y: Tensor = torch.ops.adapterbay.add_rms_norm(x, delta, weight, eps)
    return y


def silu_mul(gate_up: Tensor) -> Tensor:
    """[rows, 2 · size], gate before up, to silu(gate) · up [rows, size]."""
    y: Tensor = torch.ops.adapterbay.silu_mul(gate_up)
    return y


def rotate_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    *,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    cache: tuple[Tensor, Tensor] | None = None,
    slots: Tensor | None = None,
    tokens: Tensor | None = None,
) -> None:
    """Rotates q and k of `qkv` [tokens, (heads + 2 · kv_heads) · size] in place, and writes k and v to the cache.

    cos and sin [tokens, size]; `norms` of q and k [size] come before the rotation (Qwen3). `cache` is keys and values
    [slots, kv_heads, size]; `slots` [writes] says where to, `tokens` [writes] which tokens, all of them if None.
    """
    q_norm, k_norm = norms or (None, None)
    keys, values = cache or (None, None)
    torch.ops.adapterbay.rotate_write(qkv, cos, sin, heads, kv_heads, q_norm, k_norm, eps, keys, values, slots, tokens)


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of one token for each row over the row's blocks of 16 tokens, read in place: q [rows, heads, size] to
    [rows, heads, value size].

    keys [slots, kv heads, size], values likewise; block_table [rows, blocks] and lengths [rows] are int64. `window`:
    only the last so many tokens are seen. `softcap` c: scores become c · tanh(score / c).
    """
    y: Tensor = torch.ops.adapterbay.paged_attention(
        q, keys, values, block_table, lengths, scale, window or 0, softcap or 0.0
    )
    return y


def text_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    texts: Tensor,
    scale: float,
    out: Tensor,
    *,
    causal: bool,
    window: int | None = None,
) -> None:
    """Attention of texts' last tokens, or of all of them, each over its own text, with `causal` over what comes up to
    it: q [heads, tokens, size], k and v [kv heads, keys, size] into `out` [tokens, heads, value size].

    `texts` [texts, 4], int64: which tokens [begin, end), and where their text's keys lie, [first, last), at most
    MOST_KEYS; the tokens are the last of them. Tokens of no text are left alone. `window`: a query sees keys that are
    less than so many away.
    """
    torch.ops.adapterbay.text_attention(q, k, v, texts, scale, causal, window or 0, out)


def add_ranks(x: Tensor, y: Tensor, sites: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Adds each token's low-rank deltas to `y` [tokens, Σ out] in place, from `x` [tokens, in].

    `sites` lie side by side in y's columns, in order: (a [rows, in], b [rows, out], plan). A plan (`rank_plan`) is
    empty where nothing is added.
    """
    torch.ops.adapterbay.add_ranks(x, y, [tensor for site in sites for tensor in site])


def rank_plan(runs: Sequence[tuple[int, int, Sequence[tuple[int, int, float]]]]) -> Tensor:
    """A plan for `add_ranks`: runs of tokens [start, stop) in order that do not overlap, each with its spans
    (first row, rank, factor) of the pool."""
    if not runs:
        return torch.empty(0, dtype=torch.int32)
    heads: list[int] = []
    spans: list[tuple[int, int]] = []
    factors: list[float] = []
    for start, stop, parts in runs:
        heads.extend((start, stop, len(spans), len(spans) + len(parts)))
        for row, rank, factor in parts:
            spans.append((row, rank))
            factors.append(factor)
    places = torch.tensor(spans, dtype=torch.int32).view(-1, 2)
    bits = torch.tensor(factors, dtype=torch.float32).view(torch.int32)
    table = torch.cat([places, bits[:, None]], 1).flatten()
    return torch.cat([torch.tensor([len(runs), len(spans), *heads], dtype=torch.int32), table])


def register_fakes() -> None:
    """Shapes without computing, for torch's compiler and its checks of operators."""
    global _fakes
    if _fakes:
        return
    _fakes = True
    fake = torch.library.register_fake

    def outputs(weight: Tensor) -> int:
        return weight.shape[0] * (16 if weight.dim() > 2 else 1)

    def product(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
        return x.new_empty(x.shape[0], outputs(weight))

    def projected(x: Tensor, _norm: Tensor, _eps: float, weight: Tensor, *_: Any) -> Tensor:
        return x.new_empty(x.shape[0], outputs(weight))

    def attended(q: Tensor, _keys: Tensor, values: Tensor, *_: Any) -> Tensor:
        return q.new_empty(q.shape[0], q.shape[1], values.shape[2])

    def context(q: Tensor, heads: int, _keys: Tensor, values: Tensor, table: Tensor, *_: Any) -> Tensor:
        return q.new_empty(table.shape[0], heads * values.shape[2])

    fake("adapterbay::linear", product)
    fake("adapterbay::llama_in", projected)
    fake("adapterbay::add_rms_norm", lambda x, *_: torch.empty_like(x))
    fake("adapterbay::silu_mul", lambda x: x.new_empty(x.shape[0], x.shape[1] // 2))
    fake("adapterbay::paged_attention", attended)
    fake("adapterbay::decode_context", context)
    for name in ("rotate_write", "text_attention", "add_ranks", "llama_out"):
        fake(f"adapterbay::{name}", lambda *_: None)
