"""The input embedding: rows that differ from token to token, and virtual tokens that stand in no table at all."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterbay.server.adapters.forms import TableForm
from adapterbay.server.mix.context import step_context


class _Own:
    """One resident adapter's rows, those that it replaces sorted by token."""

    def __init__(self, form: TableForm, dtype: torch.dtype, device: torch.device) -> None:
        self.tokens = self.rows = self.a = self.b = None
        self.scaling = 1.0
        if form.tokens is not None and form.rows is not None:
            order = form.tokens.argsort()
            self.tokens = form.tokens[order].to(device)
            self.rows = form.rows[order].to(device, dtype)
        if form.low_rank is not None:
            self.a = form.low_rank.a.t().contiguous().to(device, dtype)
            self.b = form.low_rank.b.to(device, dtype)
            self.scaling = form.low_rank.scaling

    def delta(self, ids: Tensor, plain: Tensor, scale: float) -> Tensor:
        """What is added to the base's rows `plain` [tokens, hidden] of `ids` [tokens], in float32."""
        delta = torch.zeros(plain.shape, device=plain.device)
        if self.tokens is not None and self.rows is not None:
            at = torch.searchsorted(self.tokens, ids).clamp_(max=len(self.tokens) - 1)
            hit = self.tokens[at] == ids
            delta[hit] = self.rows[at[hit]].float() * scale - plain[hit].float()
        if self.a is not None and self.b is not None:
            delta += scale * self.scaling * F.embedding(ids, self.a).float() @ self.b.float()
        return delta


class MixedTable(nn.Module):
    """Stands where the input embedding of the base stood. A table that multiplies what it gives (Gemma's) multiplies
    an adapter's rows too, as PEFT does."""

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
            flat_ids = ids.reshape(-1)
            scale = float(getattr(self.base_layer, "scalar_embed_scale", 1.0))
            for start, stop, parts in mix.arms(self._own, self.path):
                rows = slice(start, stop)
                plain = flat[rows].clone()
                deltas = [weight * self._own[key].delta(flat_ids[rows], plain, scale) for key, weight in parts]
                flat[rows] = (plain.float() + torch.stack(deltas).sum(0)).to(y.dtype)
        if virtual is not None:
            flat.index_copy_(0, virtual[0], virtual[1].to(y.dtype))
        return y
