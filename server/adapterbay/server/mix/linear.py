"""A linear layer that many adapters share: one base product, and for each token what its own adapters change of it.

A token under parts p with weights w_p gets W' = W + Σ_p w_p (W'_p - W), W'_p being the layer under p alone: the
arithmetic of task vectors (Ilharco et al. 2023, arXiv:2212.04089), which for LoRA is the weighted sum of the deltas.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterbay.server import packed
from adapterbay.server.adapters.forms import Bottleneck, LinearForm, Turn
from adapterbay.server.mix.bottleneck import PlacedBottleneck
from adapterbay.server.mix.context import step_context
from adapterbay.server.mix.plan import AdapterMix
from adapterbay.server.mix.pools import DOUBLING, RankPool, VectorPool


class Dense:
    """A delta of a whole weight, in the layout that products like best here."""

    def __init__(self, delta: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        delta = delta.to(device, dtype)
        self._packs = packed.can_pack(dtype, device)
        self._delta = packed.pack(delta) if self._packs else delta

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [rows, in] to [rows, out]."""
        return packed.linear(x, self._delta) if self._packs else F.linear(x.to(self._delta.dtype), self._delta)


class LinearSite:
    """What is resident at one linear layer: low-rank deltas in `pool`, and what is rarer in stores of its own."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device) -> None:
        self.pool = RankPool(in_features, out_features, dtype, device)
        self.in_scales = VectorPool(in_features, device)
        self.out_scales = VectorPool(out_features, device)
        self.biases = VectorPool(out_features, device)
        self.rotations: dict[str, Tensor] = {}
        self.turns: dict[str, Turn] = {}
        self.dense: dict[str, Dense] = {}
        self.bottlenecks: dict[str, PlacedBottleneck] = {}
        self._dtype = dtype
        self._device = device
        self._keys: set[str] = set()
        self._plain: set[str] = set()

    @property
    def pools(self) -> tuple[RankPool | VectorPool, ...]:
        """All that hold several adapters in one store."""
        return self.pool, self.in_scales, self.out_scales, self.biases

    @property
    def free_bytes(self) -> int:
        """What the pools' free rows take."""
        return sum(pool.free_bytes for pool in self.pools)

    @property
    def used(self) -> bool:
        """Whether any resident adapter changes this layer."""
        return bool(self._keys)

    @property
    def only_ranks(self) -> bool:
        """Whether all that is resident are low-rank deltas."""
        return len(self._plain) == len(self._keys)

    def only_ranks_of(self, keys: Collection[str]) -> bool:
        """Whether all that these adapters have here, if anything, are low-rank deltas."""
        return self.only_ranks or not any(key in self._keys and key not in self._plain for key in keys)

    def place(
        self, key: str, form: LinearForm | None, bottleneck: Bottleneck | None = None, *, growth: float = DOUBLING
    ) -> None:
        """Copies one adapter in. `growth`: see `pools`."""
        self._keys.add(key)
        if form is not None:
            self._place(key, form, growth)
        if bottleneck is not None:
            self.bottlenecks[key] = PlacedBottleneck(bottleneck, self._device)
        if bottleneck is None and form is not None and form.only_ranks:
            self._plain.add(key)

    def remove(self, key: str) -> None:
        """Frees what one adapter has here."""
        self._keys.discard(key)
        self._plain.discard(key)
        for pool in self.pools:
            pool.remove(key)
        for store in (self.rotations, self.turns, self.dense, self.bottlenecks):
            store.pop(key, None)

    def _place(self, key: str, form: LinearForm, growth: float) -> None:
        if form.low_rank is not None:
            self.pool.place(key, form.low_rank.a, form.low_rank.b, form.low_rank.scaling, growth=growth)
        if form.in_scale is not None:
            self.in_scales.place(key, form.in_scale.float() - 1, growth=growth)
        if form.out_scale is not None:
            self.out_scales.place(key, form.out_scale.float() - 1, growth=growth)
        if form.bias is not None:
            self.biases.place(key, form.bias, growth=growth)
        if form.rotation is not None:
            self.rotations[key] = form.rotation.to(self._device, torch.float32)
        if form.turn is not None:
            self.turns[key] = Turn(form.turn.values.to(self._device, torch.float32), form.turn.partner.to(self._device))
        if form.dense is not None:
            self.dense[key] = Dense(form.dense, self._dtype, self._device)


class MixedLinear(nn.Module):
    """Stands where a linear layer of the base stood; `base_layer` is that layer, quantized or not, untouched."""

    def __init__(
        self, base_layer: nn.Module, in_features: int, out_features: int, path: str = "", *, head: bool = False
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features = in_features
        self.out_features = out_features
        self.path = path
        self.site: LinearSite | None = None
        self._head = head  # only the tokens in `step_context.kept` reach it

    @property
    def weight(self) -> Tensor:
        """The base layer's own weight; some models look at its dtype."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's own bias."""
        bias: Tensor | None = self.base_layer.bias  # type: ignore[assignment]
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in] to [..., out]. Without adapters in the step this is the base's own layer and nothing else."""
        mix, site = step_context.mix, self.site
        if mix is None or site is None or not site.used:
            return self.base_layer(x)  # type: ignore[no-any-return]
        if self._head and step_context.kept is not None:
            mix = mix.only(step_context.kept)
        if site.only_ranks:
            return mix.add_to(self.base_layer(x), x, site.pool, self.path)
        return self._mixed(x, mix, site)

    def _mixed(self, x: Tensor, mix: AdapterMix, site: LinearSite) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        y: Tensor = self.base_layer(self._turned_in(x, flat, mix, site))
        y = self._turned_out(y, mix, site)
        y = mix.add_to(y, x, site.pool, self.path)
        flat_y = y.view(-1, self.out_features)
        for piece in mix.pieces(site.dense, self.path):
            rows = slice(piece.start, piece.stop)
            flat_y[rows] += (site.dense[piece.key](flat[rows]) * piece.weight).to(y.dtype)
        sums = mix.sums(site.biases, self.path)
        if sums is not None:
            flat_y.copy_(flat_y.float() + sums)
        for piece in mix.pieces(site.bottlenecks, self.path):
            rows = slice(piece.start, piece.stop)
            flat_y[rows] += site.bottlenecks[piece.key].delta(flat_y[rows]) * piece.weight
        return y

    def _turned_in(self, x: Tensor, flat: Tensor, mix: AdapterMix, site: LinearSite) -> Tensor:
        """The input with every token's own scales and rotations; `x` itself when there are none."""
        scales = mix.sums(site.in_scales, self.path)
        rotating = list(mix.pieces(site.rotations, self.path))
        if scales is None and not rotating:
            return x
        turned = flat.float() if scales is None else flat.float() * (1 + scales)
        if rotating and scales is None and flat.dtype is torch.float32:
            turned = turned.clone()
        for piece in rotating:
            rows = slice(piece.start, piece.stop)
            mine = flat[rows].float()
            turned[rows] += piece.weight * (rotate(mine, site.rotations[piece.key]) - mine)
        return turned.to(x.dtype).view_as(x)

    def _turned_out(self, y: Tensor, mix: AdapterMix, site: LinearSite) -> Tensor:
        """The base's output with every token's own scales and turns."""
        scales = mix.sums(site.out_scales, self.path)
        turning = list(mix.pieces(site.turns, self.path))
        if scales is None and not turning:
            return y
        flat = y.reshape(-1, self.out_features).float()
        turned = flat.clone() if scales is None else flat * (1 + scales)
        for piece in turning:
            rows, turn = slice(piece.start, piece.stop), site.turns[piece.key]
            turned[rows] += piece.weight * turn.values * flat[rows][:, turn.partner]
        return turned.to(y.dtype).view_as(y)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Block-diagonal R on each row: `x` [rows, blocks · size], `rotation` [blocks, size, size]."""
    blocks, size, _ = rotation.shape
    return torch.einsum("nbi,bji->nbj", x.view(-1, blocks, size), rotation).reshape(x.shape)
