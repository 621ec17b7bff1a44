"""Which token of a step uses which adapters, and the products that serve any mix of them.

The delta of one token under parts p with weights w_p (LoRA, Hu et al. 2021, arXiv:2106.09685, equation 3):

    y += Σ_p  w_p · s_p · B_p A_p x          s_p = alpha / r, or alpha / √r for rsLoRA (arXiv:2312.03732)

Two products over the pool serve every token: `h = x Aᵀ`, each token's h set to zero outside its own spans and scaled by
w·s inside, `y += h Bᵀ`. A fusion is a token with several spans, so it needs no merged weight. Punica (arXiv:2310.18547)
and S-LoRA (arXiv:2311.03285) gather instead; on few tokens reading each row once and masking is as cheap, and it needs
no kernel of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from adapterbay.server import packed
from adapterbay.server.kernels import ops
from adapterbay.server.mix.pools import Layout, RankPool, Span, VectorPool

FEW_TOKENS = 32
"""A run of at least this many tokens under one arm gets products of its own; shorter runs are masked together."""


class ByLayer(Protocol):
    """A weight that differs from layer to layer. Hashable."""

    def at(self, path: str) -> float:
        """The weight at a module of the base, by its backbone-relative path."""
        ...


Weight = float | ByLayer
Part = tuple[str, Weight]


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens [start, stop) under one arm: (key, weight) parts, never empty."""

    start: int
    stop: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class _Masked:
    """Tokens [start, stop) of several arms: `rows` of the pool (a slice, or an index that gathers), and their weights.

    `weights` is [tokens, rows], zero where a token does not use a row.
    """

    start: int
    stop: int
    rows: slice | Tensor
    weights: Tensor
    used: Tensor


@dataclass(frozen=True, slots=True)
class _Single:
    """Tokens [start, stop) of one part."""

    start: int
    stop: int
    rows: slice
    factor: float


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [start, stop) that use one resident thing with a weight."""

    start: int
    stop: int
    key: str
    weight: float


RankPlan = tuple[_Masked | _Single, ...]
Placed = tuple[Run, list[tuple[Span, float]]]


class AdapterMix:
    """Which token uses which adapters, for one step. Plans are made once for each distinct pool layout."""

    def __init__(
        self, tokens: int, runs: Iterable[Run], dtype: torch.dtype, device: torch.device, *, kernels: bool = False
    ) -> None:
        """`kernels`: the compiled ones are loaded, and add the low-rank deltas."""
        self.tokens = tokens
        self._kernels = kernels and device.type == "cpu" and dtype in ops.KERNEL_DTYPES
        self.runs = tuple(runs)
        self._dtype = dtype
        self._device = device
        self._by_layer = any(not isinstance(weight, float | int) for run in self.runs for _, weight in run.parts)
        self._plans: dict[tuple[Layout, str], RankPlan] = {}
        self._kernel_plans: dict[tuple[Layout, str], Tensor] = {}
        self._weights: dict[tuple[Layout, str], Tensor | None] = {}
        self._subset: tuple[tuple[int, ...], AdapterMix] | None = None

    def add_to(self, y: Tensor, x: Tensor, pool: RankPool, path: str = "") -> Tensor:
        """`y` [..., out] with every token's low-rank deltas added, from `x` [..., in]; `y` itself may be changed."""
        flat_x = self._flat(x)
        flat_y = y.view(-1, y.shape[-1])
        if self._kernels and flat_x.dtype is flat_y.dtype is pool.a.dtype:
            rows = self.rank_plan(pool.layout, path)
            if rows.numel():
                ops.add_ranks(flat_x.contiguous(), flat_y, [(pool.a, pool.b, rows)])
            return y
        key = (pool.layout, path if self._by_layer else "")
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._plan(pool.layout, path)
        for part in plan:
            if isinstance(part, _Masked) and isinstance(part.rows, slice) and (pair := pool.packed(part.rows)):
                h = packed.linear(flat_x[part.start : part.stop], pair[0])
                h = torch.where(part.used, h * part.weights, 0)
                mine = flat_y[part.start : part.stop]
                added = packed.linear_add(h, pair[1], mine)
                if part.stop - part.start == self.tokens and len(plan) == 1:
                    return added.view_as(y)
                mine.copy_(added)
                continue
            a, b = (
                (pool.a[part.rows], pool.b[part.rows])
                if isinstance(part.rows, slice)
                else (pool.a.index_select(0, part.rows), pool.b.index_select(0, part.rows))
            )
            if pool.packs and isinstance(part, _Single) and part.stop - part.start == 1:
                # one row: broadcasting reads each factor once, where oneDNN lays it out first
                h = (flat_x[part.start] * a).sum(-1).mul_(part.factor)
                flat_y[part.start] += (h[:, None] * b).sum(0)
                continue
            h = torch.mm(flat_x[part.start : part.stop].to(a.dtype), a.t())
            if isinstance(part, _Single):
                h.mul_(part.factor)
            else:
                # where, not only a product: a row that overflowed must not turn a neighbour's zero into NaN
                h = torch.where(part.used, h * part.weights, 0)
            target = flat_y[part.start : part.stop]
            if target.dtype == h.dtype:
                target.addmm_(h, b)
            else:
                target.add_(torch.mm(h, b))
        return y

    def rank_plan(self, layout: Layout, path: str) -> Tensor:
        """What `ops.add_ranks` does to a site with this layout; empty where it does nothing."""
        key = (layout, path if self._by_layer else "")
        plan = self._kernel_plans.get(key)
        if plan is None:
            runs = []
            for run, spans in self._placed(layout, path):
                parts = [(span.start, span.rank, weight * span.scaling) for span, weight in spans if weight]
                if parts:
                    runs.append((run.start, run.stop, parts))
            plan = self._kernel_plans[key] = ops.rank_plan(runs)
        return plan

    def sums(self, pool: VectorPool, path: str) -> Tensor | None:
        """Σ_p w_p v_p for every token, [tokens, features] in float32; None when no token of the step has a vector."""
        key = (pool.layout, path if self._by_layer else "")
        if key not in self._weights:
            self._weights[key] = self._vector_weights(pool.layout, path)
        weights = self._weights[key]
        return None if weights is None else weights @ pool.rows[: weights.shape[1]]

    def pieces(self, resident: Collection[str], path: str) -> Iterator[Piece]:
        """Which tokens use which of `resident`, in the order of the tokens."""
        for run in self.runs:
            for key, weight in run.parts:
                if key in resident and (factor := _at(weight, path)):
                    yield Piece(run.start, run.stop, key, factor)

    def arms(self, resident: Collection[str], path: str) -> Iterator[tuple[int, int, list[tuple[str, float]]]]:
        """(start, stop, parts) of the runs that use any of `resident`, with those parts only."""
        for run in self.runs:
            parts = [(key, _at(weight, path)) for key, weight in run.parts if key in resident]
            if parts:
                yield run.start, run.stop, parts

    def only(self, tokens: tuple[int, ...]) -> AdapterMix:
        """The mix of some of the step's tokens, in ascending order."""
        if self._subset is None or self._subset[0] != tokens:
            runs = []
            for run in self.runs:
                inside = [at for at, token in enumerate(tokens) if run.start <= token < run.stop]
                if inside:
                    runs.append(Run(inside[0], inside[-1] + 1, run.parts))
            self._subset = (tokens, AdapterMix(len(tokens), runs, self._dtype, self._device, kernels=self._kernels))
        return self._subset[1]

    def _flat(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if flat.shape[0] != self.tokens:
            raise RuntimeError(f"a mix of {self.tokens} tokens met a layer input of {flat.shape[0]}")
        return flat

    def _placed(self, layout: Layout, path: str) -> list[Placed]:
        placed = []
        for run in self.runs:
            spans = [(layout.spans[key], _at(weight, path)) for key, weight in run.parts if key in layout.spans]
            if spans:
                placed.append((run, spans))
        return placed

    def _vector_weights(self, layout: Layout, path: str) -> Tensor | None:
        placed = self._placed(layout, path)
        if not placed:
            return None
        rows = max(span.start for _, spans in placed for span, _ in spans) + 1
        weights = torch.zeros(self.tokens, rows)
        for run, spans in placed:
            for span, weight in spans:
                weights[run.start : run.stop, span.start] += weight
        return weights.to(self._device)

    def _plan(self, layout: Layout, path: str) -> RankPlan:
        plan: list[_Masked | _Single] = []
        few: list[Placed] = []
        for run, spans in self._placed(layout, path):
            if few and run.start - few[-1][0].stop > FEW_TOKENS:
                plan.extend(self._close(few))
                few = []
            if run.stop - run.start < FEW_TOKENS:
                few.append((run, spans))
                continue
            plan.extend(self._close(few))
            few = []
            plan.extend(_singles(run, spans))
        plan.extend(self._close(few))
        return tuple(plan)

    def _close(self, few: Sequence[Placed]) -> list[_Masked | _Single]:
        """Short runs of several arms become one masked product; a lone run stays as it is."""
        if not few:
            return []
        if len(few) == 1:
            return list(_singles(*few[0]))
        start, stop = few[0][0].start, few[-1][0].stop
        used_spans = {span for _, spans in few for span, _ in spans}
        low = min(span.start for span in used_spans)
        high = max(span.start + span.rank for span in used_spans)
        active = sum(span.rank for span in used_spans)
        weights = torch.zeros(stop - start, high - low)
        for run, spans in few:
            for span, weight in spans:
                columns = slice(span.start - low, span.start - low + span.rank)
                weights[run.start - start : run.stop - start, columns] = weight * span.scaling
        rows: slice | Tensor = slice(low, high)
        if high - low > 3 * active:  # mostly idle adapters in between: gathering is cheaper than reading them
            columns_used = (weights != 0).any(0).nonzero().flatten()
            weights = weights[:, columns_used]
            rows = (columns_used + low).to(self._device)
        weights = weights.to(self._device)
        return [_Masked(start, stop, rows, weights.to(self._dtype), weights != 0)]


def _at(weight: Weight, path: str) -> float:
    return weight if isinstance(weight, float | int) else weight.at(path)


def _singles(run: Run, spans: list[tuple[Span, float]]) -> Iterable[_Single]:
    for span, weight in spans:
        yield _Single(run.start, run.stop, slice(span.start, span.start + span.rank), weight * span.scaling)
