"""Attention over a flattened step: every row's new tokens lie one after another, no padding anywhere.

transformers calls `attend` through its attention interface with query [1, heads, tokens, size] and the new keys and
values [1, kv heads, tokens, size]. What belongs to which row stands in the step's `AttentionPlan`. Decoding rows
(one new token each) come first and are computed together over their gathered blocks; prefilling rows are computed one
by one, over their own keys or, in a later chunk, over their blocks. Where the compiled kernels are, those that see
their new tokens and no others are computed together.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterbay.registry.errors import UnsupportedMethod
from adapterbay.server.adapters.forms import Prefix
from adapterbay.server.blocks import BLOCK_TOKENS
from adapterbay.server.kernels.ops import KERNEL_DTYPES, MOST_KEYS, text_attention
from adapterbay.server.kv import BlockPool, LayerShape
from adapterbay.server.mix.context import step_context

NAME = "adapterbay"
"""The name under which `attend` is registered with transformers."""

HARMLESS = frozenset(
    {
        "position_ids",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "is_causal",
        "cache_position",
    }
)
"""Keyword arguments that models pass along and that do not change what attention computes here."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A prefilling row: its new tokens [start, stop) of the step, and where all its tokens so far lie in the cache.

    `slots` is None when the row has no earlier tokens: its own keys are all there is. Where there is no cache,
    `prefix` stands before them.
    """

    start: int
    stop: int
    slots: Tensor | None
    prefix: Prefix | None = None

    @property
    def keys(self) -> int:
        """How many tokens its last one sees, the cache's and the prefix's included."""
        if self.slots is not None:
            return len(self.slots)
        return self.stop - self.start + (self.prefix.count if self.prefix is not None else 0)


@dataclass(slots=True)
class AttentionPlan:
    """Who attends to what in one step."""

    causal: bool
    decode_rows: int = 0
    block_table: Tensor | None = None  # [decode rows, blocks], long, padded with block 0
    lengths: Tensor | None = None  # [decode rows], tokens so far with the new one
    segments: tuple[Segment, ...] = ()
    write_tokens: Tensor | None = None  # [writes], which tokens of the step go to the cache; None: all
    write_slots: Tensor | None = None  # [writes], where to; None: nothing is written
    pool: BlockPool | None = None
    probe: list[tuple[int, LayerShape]] | None = None  # filled by a probing step: (layer index, its shape)
    sources: AttentionPlan | None = None  # of an encoder-decoder: who looks at which row's text
    kernels: bool = False  # the compiled ones are loaded
    biases: dict[int, Tensor] = field(default_factory=dict)  # by segment start, -1 for decoding rows; see `relative`
    _masks: dict[int | None, Tensor] = field(default_factory=dict)
    _texts: tuple[Tensor, tuple[tuple[Segment, Tensor | None], ...]] | None = None

    def texts(self) -> tuple[Tensor, tuple[tuple[Segment, Tensor | None], ...]]:
        """The segments as `text_attention` has them, made once for all layers: those that see their new tokens only,
        [texts, 4]; and the others, each with a text of its own [1, 4], or None where that is too long."""
        if self._texts is None:
            together: list[tuple[int, ...]] = []
            others: list[tuple[Segment, Tensor | None]] = []
            for segment in self.segments:
                if segment.keys > MOST_KEYS:
                    others.append((segment, None))
                elif segment.slots is None and segment.prefix is None:
                    together.append(2 * (segment.start, segment.stop))
                else:
                    others.append((segment, torch.tensor([[segment.start, segment.stop, 0, segment.keys]])))
            self._texts = torch.tensor(together, dtype=torch.long).view(-1, 4), tuple(others)
        return self._texts

    def decode_mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[decode rows, 1, 1, tokens]: 0 where a row may look, -inf elsewhere."""
        mask = self._masks.get(window)
        if mask is None:
            assert self.block_table is not None
            assert self.lengths is not None
            positions = torch.arange(self.block_table.shape[1] * BLOCK_TOKENS, device=self.lengths.device)
            seen = positions < self.lengths[:, None]
            if window is not None:
                seen &= positions >= self.lengths[:, None] - window
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
            mask = self._masks[window] = mask[:, None, None, :]
        return mask


class Relative(Protocol):
    """A bias on scores that depends on the distance between key and query (T5)."""

    def __call__(self, key_at: Tensor, query_at: Tensor) -> Tensor:
        """For positions that broadcast to [..., queries, keys]: [..., heads, queries, keys]."""
        ...


@dataclass(frozen=True, slots=True)
class Scoring:
    """How scores come about: scale · q kᵀ, then c · tanh(score / c) with a `softcap` c (Gemma 2), then the bias of
    `relative`. `window`: a query sees so many keys."""

    scale: float
    window: int | None
    softcap: float | None
    relative: Relative | None


class _Current(threading.local):
    plan: AttentionPlan | None = None


current = _Current()


def register() -> None:
    """Makes `attend` known to transformers under NAME. No mask function goes with it, so models build no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    relative: Relative | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Returns [1, tokens, heads, value size]. `Scoring` says what the settings mean."""
    plan = current.plan
    if plan is None:
        raise RuntimeError("attention was called outside a step")
    layer: int = getattr(module, "layer_idx", 0) or 0
    if plan.probe is not None:
        _refuse_unknown(module, plan.causal, attention_mask, dropout, others)
        plan.probe.append((layer, LayerShape(key.shape[1], key.shape[3], value.shape[3])))
    q, k, v = query[0], key[0], value[0]
    if plan.write_slots is not None:
        assert plan.pool is not None
        new_k, new_v = k.transpose(0, 1), v.transpose(0, 1)
        if plan.write_tokens is not None:
            new_k, new_v = new_k[plan.write_tokens], new_v[plan.write_tokens]
        plan.pool.keys[layer].index_copy_(0, plan.write_slots, new_k)
        plan.pool.values[layer].index_copy_(0, plan.write_slots, new_v)
    scoring = Scoring(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, relative)
    out = q.new_empty(1, q.shape[1], q.shape[0], v.shape[2])
    if plan.decode_rows:
        out[0, : plan.decode_rows] = _decode(plan, layer, q, scoring)
    prefill(plan, layer, q, k, v, scoring, out[0])
    if step_context.prompts is not None and step_context.mix is not None:
        step_context.prompts.add_to(out[0], q, step_context.mix, layer, f"layers.{layer}.self_attn")
    return out, None


def _decode(plan: AttentionPlan, layer: int, q: Tensor, scoring: Scoring) -> Tensor:
    """[decode rows, heads, value size]. The heads that share a key head stand in as its queries: no key is repeated."""
    assert plan.pool is not None
    assert plan.block_table is not None
    rows, blocks = plan.block_table.shape
    keys, values = plan.pool.keys[layer], plan.pool.values[layer]
    table = plan.block_table.view(-1)
    k = keys.view(-1, BLOCK_TOKENS, *keys.shape[1:]).index_select(0, table)
    v = values.view(-1, BLOCK_TOKENS, *values.shape[1:]).index_select(0, table)
    k = k.view(rows, blocks * BLOCK_TOKENS, *keys.shape[1:]).transpose(1, 2)
    v = v.view(rows, blocks * BLOCK_TOKENS, *values.shape[1:]).transpose(1, 2)
    heads, kv_heads = q.shape[0], keys.shape[1]
    grouped = q[:, :rows].transpose(0, 1).reshape(rows, kv_heads, heads // kv_heads, q.shape[2])
    mask = plan.decode_mask(scoring.window, q.dtype).expand(-1, 1, heads // kv_heads, -1)
    if scoring.relative is not None:
        mask = mask + _decode_bias(plan, scoring.relative, k.shape[2]).view(rows, kv_heads, heads // kv_heads, -1)
    if scoring.softcap is None:
        attended = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scoring.scale)
    else:
        attended = _capped(grouped, k, v, mask, scoring.scale, scoring.softcap)
    return attended.reshape(rows, heads, v.shape[3])


def _decode_bias(plan: AttentionPlan, relative: Relative, keys: int) -> Tensor:
    """[decode rows, heads, 1, keys], made once for all layers."""
    bias = plan.biases.get(-1)
    if bias is None:
        assert plan.lengths is not None
        key_at = torch.arange(keys, device=plan.lengths.device)
        bias = plan.biases[-1] = relative(key_at, plan.lengths[:, None, None] - 1)
    return bias


def prefill(plan: AttentionPlan, layer: int, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, out: Tensor) -> None:
    """All prefilling rows of a step: q, k and v [heads, tokens, size] into `out` [tokens, heads, value size]."""
    rows: Iterable[tuple[Segment, Tensor | None]] = ((segment, None) for segment in plan.segments)
    if plan.kernels and q.dtype in KERNEL_DTYPES and scoring.softcap is None and scoring.relative is None:
        texts, rows = plan.texts()
        if len(texts):
            text_attention(q, k, v, texts, scoring.scale, out, causal=plan.causal, window=scoring.window)
    for segment, text in rows:
        row_k, row_v = _keys_and_values(plan, layer, segment, k, v)
        if text is not None:
            text_attention(q, row_k, row_v, text, scoring.scale, out, causal=plan.causal, window=scoring.window)
        else:
            row_q = q[:, segment.start : segment.stop]
            out[segment.start : segment.stop] = _prefill(plan, segment, row_q, row_k, row_v, scoring)


def _keys_and_values(plan: AttentionPlan, layer: int, segment: Segment, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """All that one row sees, [kv heads, tokens so far, size]."""
    if segment.slots is not None:
        assert plan.pool is not None
        cached = (plan.pool.keys[layer], plan.pool.values[layer])
        row_k, row_v = (each.index_select(0, segment.slots).transpose(0, 1) for each in cached)
        return row_k, row_v
    row_k, row_v = k[:, segment.start : segment.stop], v[:, segment.start : segment.stop]
    if segment.prefix is not None:
        row_k = torch.cat([segment.prefix.keys[layer].to(k).transpose(0, 1), row_k], 1)
        row_v = torch.cat([segment.prefix.values[layer].to(v).transpose(0, 1), row_v], 1)
    return row_k, row_v


def _prefill(
    plan: AttentionPlan, segment: Segment, row_q: Tensor, row_k: Tensor, row_v: Tensor, scoring: Scoring
) -> Tensor:
    """[new tokens, heads, value size] of one row, by torch: row_q, row_k and row_v [heads, tokens, size]."""
    new = segment.stop - segment.start
    total, window = row_k.shape[1], scoring.window
    mask = None
    whole = plan.causal and total == new
    biased = scoring.softcap is not None or scoring.relative is not None
    if (plan.causal and not whole) or (window is not None and total > window) or (plan.causal and biased):
        query_at = torch.arange(total - new, total, device=row_q.device)[:, None]
        key_at = torch.arange(total, device=row_q.device)[None, :]
        seen = key_at <= query_at if plan.causal else torch.ones_like(key_at <= query_at)
        if window is not None:
            seen = seen & (key_at > query_at - window)
            if not plan.causal:
                seen = seen & (key_at < query_at + window)
        mask = seen[None, None]
    if biased:
        mask = _prefill_bias(plan, segment, scoring.relative, new, total, mask, row_q)
    if scoring.softcap is not None:
        groups = row_q.shape[0] // row_k.shape[0]
        k_all, v_all = row_k.repeat_interleave(groups, 0), row_v.repeat_interleave(groups, 0)
        capped = _capped(row_q[None], k_all[None], v_all[None], mask, scoring.scale, scoring.softcap)
        return capped[0].transpose(0, 1)
    attended = F.scaled_dot_product_attention(
        row_q[None],
        row_k[None],
        row_v[None],
        attn_mask=mask,
        is_causal=whole and mask is None,
        scale=scoring.scale,
        enable_gqa=row_k.shape[0] != row_q.shape[0],
    )
    return attended[0].transpose(0, 1)


def _prefill_bias(
    plan: AttentionPlan,
    segment: Segment,
    relative: Relative | None,
    new: int,
    total: int,
    seen: Tensor | None,
    q: Tensor,
) -> Tensor:
    """What is added to one row's scores, [1, heads or 1, new, total]; with `relative` made once for all layers."""
    if relative is None:
        bias = q.new_zeros(1, 1, new, total)
    elif segment.start in plan.biases:
        return plan.biases[segment.start]
    else:
        key_at = torch.arange(total, device=q.device)
        bias = relative(key_at, torch.arange(total - new, total, device=q.device)[:, None])[None].to(q.dtype)
    if seen is not None:
        bias = bias.masked_fill(~seen, float("-inf"))
    if relative is not None:
        plan.biases[segment.start] = bias
    return bias


def _capped(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, softcap: float) -> Tensor:
    """Attention whose scores are bounded before the mask, as no kernel of torch's does it. [rows, heads, tokens, size].

    softmax(c · tanh(q kᵀ · scale / c) + bias) v, the softmax in float32 (Gemma 2, arXiv:2408.00118, section 2.2).
    """
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale
    scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    return torch.matmul(scores.softmax(-1, dtype=torch.float32).to(q.dtype), v)


def _refuse_unknown(
    module: nn.Module, causal: bool, mask: Tensor | None, dropout: float, others: dict[str, Any]
) -> None:
    """A base whose attention needs something that is not computed here is refused at load, not served wrongly."""
    unknown = sorted(name for name, value in others.items() if value is not None and name not in HARMLESS)
    if bool(getattr(module, "is_causal", causal)) != causal:
        unknown.append("attention in both directions" if causal else "causal attention")
    if mask is not None:
        unknown.append("attention_mask")
    if dropout:
        unknown.append("dropout")
    if unknown:
        raise UnsupportedMethod(
            f"{type(module).__name__} asks its attention for {', '.join(unknown)}, which is not served yet."
        )
