"""The input embedding: rows that differ from token to token, and virtual tokens that stand in no table at all."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterbay.server.adapters.forms import TableForm
from adapterbay.server.mix.axes import FLAT
from adapterbay.server.mix.context import step_context
from adapterbay.server.mix.linear import rotate


class _Own:
    """One resident adapter's rows, those that it replaces sorted by token."""

    def __init__(self, form: TableForm, dtype: torch.dtype, device: torch.device) -> None:
        self.tokens = self.rows = self.a = self.b = self.gain_a = self.gain_b = self.rotation = None
        self.scaling = self.gain = 1.0
        if form.tokens is not None and form.rows is not None:
            order = form.tokens.argsort()
            self.tokens = form.tokens[order].to(device)
            self.rows = form.rows[order].to(device, dtype)
        if form.low_rank is not None:
            self.a = form.low_rank.a.t().contiguous().to(device, dtype)
            self.b = form.low_rank.b.to(device, dtype)
            self.scaling = form.low_rank.scaling
        if form.gain is not None:
            self.gain_a = form.gain.a.t().contiguous().to(device, dtype)
            self.gain_b = form.gain.b.to(device, dtype)
            self.gain = form.gain.scaling
        if form.rotation is not None:
            self.rotation = form.rotation.to(device, torch.float32)

    def delta(self, ids: Tensor, plain: Tensor, scale: float) -> Tensor:
        """What is added to the base's rows `plain` [tokens, hidden] of `ids` [tokens], in float32."""
        delta = torch.zeros(plain.shape, device=plain.device)
        if self.tokens is not None and self.rows is not None:
            at = torch.searchsorted(self.tokens, ids).clamp_(max=len(self.tokens) - 1)
            hit = self.tokens[at] == ids
            delta[hit] = self.rows[at[hit]].float() * scale - plain[hit].float()
        if self.a is not None and self.b is not None:
            delta += scale * self.scaling * F.embedding(ids, self.a).float() @ self.b.float()
        if self.gain_a is not None and self.gain_b is not None:
            gain = self.gain * F.embedding(ids, self.gain_a).float() @ self.gain_b.float()
            delta += gain * plain.float() / scale
        if self.rotation is not None:
            delta += rotate(plain.float(), self.rotation) - plain.float()
        return delta


def table_factor(table: nn.Module) -> float:
    """What a table multiplies its rows with."""
    return float(getattr(table, "scalar_embed_scale", 1.0))


class MixedTable(nn.Module):
    """Stands where the input embedding of the base stood. A table that multiplies what it gives (Gemma's) multiplies
    an adapter's rows and low-rank deltas too, as PEFT does, and no gain."""

    def __init__(self, base_layer: nn.Module, path: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.path = path
        self._dtype = dtype
        self._own: dict[str, _Own] = {}

    @property
    def weight(self) -> Tensor:
        """The base's own table [vocabulary, hidden]."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight

    def place(self, key: str, form: TableForm) -> None:
        """Keeps one adapter's rows."""
        self._own[key] = _Own(form, self._dtype, self.weight.device)

    def remove(self, key: str) -> None:
        """Lets go of them."""
        self._own.pop(key, None)

    def forward(self, ids: Tensor) -> Tensor:
        """`ids` [1, tokens] to [1, tokens, hidden]."""
        y: Tensor = self.base_layer(ids)
        mix, virtual = step_context.mix, step_context.virtual
        flat = y.view(-1, y.shape[-1])
        if mix is not None and self._own:
            FLAT.check(y.shape, mix.tokens)
            flat_ids = ids.reshape(-1)
            scale = table_factor(self.base_layer)
            for start, stop, parts in mix.arms(self._own, self.path):
                rows = slice(start, stop)
                plain = flat[rows].clone()
                deltas = [weight * self._own[key].delta(flat_ids[rows], plain, scale) for key, weight in parts]
                flat[rows] = (plain.float() + torch.stack(deltas).sum(0)).to(y.dtype)
        if virtual is not None:
            flat.index_copy_(0, virtual[0], virtual[1].to(y.dtype))
        return y
