"""What the tokens of a step use of a group of linear layers that read the same input, as the kernels take it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adapterbay.server.mix.linear import LinearSite, MixedLinear
from adapterbay.server.mix.plan import AdapterMix
from adapterbay.server.mix.pools import Layout

NOTHING = torch.empty(0, dtype=torch.int32)


class RankPlans:
    """One mix's plans, and the keys of everything that it uses."""

    def __init__(self, mix: AdapterMix) -> None:
        self.mix = mix
        self.keys = frozenset(key for run in mix.runs for key, _ in run.parts)

    def of(self, layout: Layout, path: str) -> Tensor:
        """The plan of one site."""
        return self.mix.rank_plan(layout, path)


Operands = tuple[list[Tensor], ...]
"""For each group of layers: a, b and plan of each layer, one after another; empty when nobody uses any of them."""


class RankGroups:
    """The groups of one decoder layer."""

    def __init__(self, groups: Sequence[Sequence[MixedLinear]], dtype: torch.dtype) -> None:
        self._groups = groups
        self._idle = {
            layer.path: (
                torch.zeros(0, layer.in_features, dtype=dtype),
                torch.zeros(0, layer.out_features, dtype=dtype),
            )
            for group in groups
            for layer in group
        }

    def operands(self, plans: RankPlans | None) -> Operands | None:
        """What the kernels take; None when an adapter of the step changes more here than low-rank deltas do. Valid for
        as long as nothing is placed or removed."""
        if plans is None:
            return tuple([] for _ in self._groups)
        sites = (layer.site for group in self._groups for layer in group)
        if not all(site is None or site.only_ranks_of(plans.keys) for site in sites):
            return None
        return tuple(self._make(group, plans) for group in self._groups)

    def _make(self, group: Sequence[MixedLinear], plans: RankPlans) -> list[Tensor]:
        made: list[Tensor] = []
        used = False
        for layer in group:
            site: LinearSite | None = layer.site
            plan = NOTHING if site is None else plans.of(site.pool.layout, layer.path)
            if site is None or not plan.numel():
                made.extend((*self._idle[layer.path], NOTHING))
            else:
                used = True
                made.extend((site.pool.a, site.pool.b, plan))
        return made if used else []
