"""Attention over a flattened step: every row's new tokens lie one after another, no padding anywhere.

transformers calls `attend` through its attention interface with query [1, heads, tokens, size] and the new keys and
values [1, kv heads, tokens, size]. What belongs to which row stands in the step's `AttentionPlan`. Decoding rows
(one new token each) come first and are computed together over their gathered blocks; prefilling rows are computed one
by one, over their own keys or, in a later chunk, over their blocks.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterbay.registry.errors import UnsupportedMethod
from adapterbay.server.kv import BLOCK_TOKENS, BlockPool, LayerShape

NAME = "adapterbay"
"""The name under which `attend` is registered with transformers."""

HARMLESS = frozenset(
    {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "is_causal", "cache_position"}
)
"""Keyword arguments that models pass along and that do not change what attention computes here."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A prefilling row: its new tokens [start, stop) of the step, and where all its tokens so far lie in the cache.

    `slots` is None when the row has no earlier tokens: its own keys are all there is.
    """

    start: int
    stop: int
    slots: Tensor | None


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
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

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
    **others: Any,
) -> tuple[Tensor, None]:
    """Returns [1, tokens, heads, value size]."""
    plan = current.plan
    if plan is None:
        raise RuntimeError("attention was called outside a step")
    layer: int = getattr(module, "layer_idx", 0) or 0
    if plan.probe is not None:
        _refuse_unknown(module, attention_mask, dropout, others)
        plan.probe.append((layer, LayerShape(key.shape[1], key.shape[3], value.shape[3])))
    q, k, v = query[0], key[0], value[0]
    if plan.write_slots is not None:
        assert plan.pool is not None
        new_k, new_v = k.transpose(0, 1), v.transpose(0, 1)
        if plan.write_tokens is not None:
            new_k, new_v = new_k[plan.write_tokens], new_v[plan.write_tokens]
        plan.pool.keys[layer].index_copy_(0, plan.write_slots, new_k)
        plan.pool.values[layer].index_copy_(0, plan.write_slots, new_v)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = q.new_empty(1, q.shape[1], q.shape[0], v.shape[2])
    if plan.decode_rows:
        out[0, : plan.decode_rows] = _decode(plan, layer, q, scale, sliding_window)
    for segment in plan.segments:
        out[0, segment.start : segment.stop] = _prefill(plan, layer, segment, q, k, v, scale, sliding_window)
    return out, None


def _decode(plan: AttentionPlan, layer: int, q: Tensor, scale: float, window: int | None) -> Tensor:
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
    mask = plan.decode_mask(window, q.dtype).expand(-1, 1, heads // kv_heads, -1)
    attended = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
    return attended.reshape(rows, heads, v.shape[3])


def _prefill(
    plan: AttentionPlan, layer: int, segment: Segment, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
) -> Tensor:
    """[new tokens, heads, value size] of one row."""
    new = segment.stop - segment.start
    row_q = q[:, segment.start : segment.stop]
    if segment.slots is None:
        row_k, row_v = k[:, segment.start : segment.stop], v[:, segment.start : segment.stop]
    else:
        assert plan.pool is not None
        row_k = plan.pool.keys[layer].index_select(0, segment.slots).transpose(0, 1)
        row_v = plan.pool.values[layer].index_select(0, segment.slots).transpose(0, 1)
    total = row_k.shape[1]
    mask = None
    whole = plan.causal and total == new
    if (plan.causal and not whole) or (window is not None and total > window):
        query_at = torch.arange(total - new, total, device=q.device)[:, None]
        key_at = torch.arange(total, device=q.device)[None, :]
        seen = key_at <= query_at if plan.causal else torch.ones_like(key_at <= query_at)
        if window is not None:
            seen = seen & (key_at > query_at - window)
            if not plan.causal:
                seen = seen & (key_at < query_at + window)
        mask = seen[None, None]
    attended = F.scaled_dot_product_attention(
        row_q[None],
        row_k[None],
        row_v[None],
        attn_mask=mask,
        is_causal=whole and mask is None,
        scale=scale,
        enable_gqa=row_k.shape[0] != row_q.shape[0],
    )
    return attended[0].transpose(0, 1)


def _refuse_unknown(module: nn.Module, mask: Tensor | None, dropout: float, others: dict[str, Any]) -> None:
    """A base whose attention needs something that is not computed here is refused at load, not served wrongly."""
    unknown = sorted(name for name, value in others.items() if value is not None and name not in HARMLESS)
    if mask is not None:
        unknown.append("attention_mask")
    if dropout:
        unknown.append("dropout")
    if unknown:
        raise UnsupportedMethod(
            f"{type(module).__name__} asks its attention for {', '.join(unknown)}, which is not served yet."
        )
