"""A linear layer that many adapters share: one base product, and for each token the deltas of its own adapters.

The delta of one token under parts p with weights w_p (LoRA, Hu et al. 2021, arXiv:2106.09685, equation 3):

    y += Σ_p  w_p · s_p · B_p A_p x          s_p = alpha / r, or alpha / √r for rsLoRA (arXiv:2312.03732)

All resident adapters of a layer lie in one pool, rank row under rank row: A is [rows, in], Bᵀ is [rows, out], and an
adapter is a span of rows. Two products then serve any mix of adapters, of any ranks: `h = x Aᵀ`, each token's h set
to zero outside its own spans and scaled by w·s inside, `y += h Bᵀ`. A fusion is a token with several spans, so it
needs no merged weight, and a padded rank does not exist. Punica (arXiv:2310.18547) and S-LoRA (arXiv:2311.03285)
gather instead; on few tokens reading each row once and masking is as cheap, and it needs no kernel of its own.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from adapterbay.server import packed

FEW_TOKENS = 32
"""A run of at least this many tokens under one arm gets products of its own; shorter runs are masked together."""


@dataclass(frozen=True, slots=True)
class Span:
    """Where an adapter's rank rows lie in a pool, and its scaling there."""

    start: int
    rank: int
    scaling: float


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens [start, stop) under one arm: (digest, weight) parts, never empty."""

    start: int
    stop: int
    parts: tuple[tuple[str, float], ...]


class Layout:
    """Which adapter lies where in a pool. Pools with equal spans share one object, and so the plans made for it."""

    __slots__ = ("__weakref__", "spans")
    _known: ClassVar[weakref.WeakValueDictionary[tuple[tuple[str, Span], ...], Layout]] = weakref.WeakValueDictionary()

    def __init__(self, spans: dict[str, Span]) -> None:
        self.spans = spans

    @classmethod
    def of(cls, spans: dict[str, Span]) -> Layout:
        """The layout with these spans."""
        key = tuple(sorted(spans.items(), key=lambda item: item[0]))
        layout = cls._known.get(key)
        if layout is None:
            layout = cls._known[key] = cls(dict(spans))
        return layout


class RankPool:
    """The rank rows of every adapter that is resident at one layer. Grows by doubling; freed rows are reused.

    Rows never hold NaN or Inf (admission sees to it, and fresh rows are zero), so masked rows add exactly nothing.
    """

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device) -> None:
        self.a = torch.zeros(0, in_features, dtype=dtype, device=device)
        self.b = torch.zeros(0, out_features, dtype=dtype, device=device)
        self.spans: dict[str, Span] = {}
        self.layout = Layout.of({})
        self.packs = packed.can_pack(dtype, device)
        self._packed: tuple[slice, Tensor, Tensor] | None = None

    def place(self, digest: str, a: Tensor, b: Tensor, scaling: float) -> None:
        """Copies one adapter in. `a` [rank, in], `b` [rank, out] (B transposed)."""
        rank = a.shape[0]
        start = self._first_fit(rank)
        if start + rank > self.a.shape[0]:
            self._grow(max(start + rank, 2 * self.a.shape[0]))
        self.a[start : start + rank].copy_(a)
        self.b[start : start + rank].copy_(b)
        self.spans[digest] = Span(start, rank, scaling)
        self._relayout()

    def remove(self, digest: str) -> None:
        """Frees one adapter's rows; they are zeroed, so that nothing of it can be read again."""
        span = self.spans.pop(digest, None)
        if span is None:
            return
        self.a[span.start : span.start + span.rank].zero_()
        self.b[span.start : span.start + span.rank].zero_()
        self._relayout()
        used = max((s.start + s.rank for s in self.spans.values()), default=0)
        if used <= self.a.shape[0] // 4:
            self.a = self.a[:used].clone()
            self.b = self.b[:used].clone()

    @property
    def bytes(self) -> int:
        """What the pool takes, free rows included."""
        return self.a.nbytes + self.b.nbytes

    def _first_fit(self, rank: int) -> int:
        start = 0
        for span in sorted(self.spans.values(), key=lambda s: s.start):
            if span.start - start >= rank:
                break
            start = span.start + span.rank
        return start

    def _grow(self, rows: int) -> None:
        grown_a = self.a.new_zeros(rows, self.a.shape[1])
        grown_b = self.b.new_zeros(rows, self.b.shape[1])
        grown_a[: self.a.shape[0]] = self.a
        grown_b[: self.b.shape[0]] = self.b
        self.a, self.b = grown_a, grown_b

    def packed(self, rows: slice) -> tuple[Tensor, Tensor] | None:
        """A and B of these rows in oneDNN's layout, packed anew when the pool changed; None where packing is no use."""
        if not self.packs:
            return None
        if self._packed is None or self._packed[0] != rows:
            self._packed = (rows, packed.pack(self.a[rows]), packed.pack(self.b[rows].t()))
        return self._packed[1:]

    def _relayout(self) -> None:
        self.layout = Layout.of(self.spans)
        self._packed = None


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


Plan = tuple[_Masked | _Single, ...]


class AdapterMix:
    """Which token uses which adapters, for one step. Plans are made once for each distinct pool layout."""

    def __init__(self, tokens: int, runs: Iterable[Run], dtype: torch.dtype, device: torch.device) -> None:
        self.tokens = tokens
        self.runs = tuple(runs)
        self._dtype = dtype
        self._device = device
        self._plans: dict[Layout, Plan] = {}

    def add_to(self, y: Tensor, x: Tensor, pool: RankPool) -> Tensor:
        """`y` [..., out] with every token's deltas added, from `x` [..., in]; `y` itself may be changed."""
        plan = self._plans.get(pool.layout)
        if plan is None:
            plan = self._plans[pool.layout] = self._plan(pool.layout)
        if not plan:
            return y
        flat_x = x.reshape(-1, x.shape[-1])
        if flat_x.shape[0] != self.tokens:
            raise RuntimeError(f"a mix of {self.tokens} tokens met a layer input of {flat_x.shape[0]}")
        flat_y = y.view(-1, y.shape[-1])
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

    def _plan(self, layout: Layout) -> Plan:
        here = [
            (run, [(layout.spans[key], weight) for key, weight in run.parts if key in layout.spans])
            for run in self.runs
        ]
        here = [(run, spans) for run, spans in here if spans]
        plan: list[_Masked | _Single] = []
        few: list[tuple[Run, list[tuple[Span, float]]]] = []
        for run, spans in here:
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

    def _close(self, few: Sequence[tuple[Run, list[tuple[Span, float]]]]) -> list[_Masked | _Single]:
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


def _singles(run: Run, spans: list[tuple[Span, float]]) -> Iterable[_Single]:
    for span, weight in spans:
        yield _Single(run.start, run.stop, slice(span.start, span.start + span.rank), weight * span.scaling)


class StepContext(threading.local):
    """What the layers of the model that is computing in this thread need to know of the step."""

    mix: AdapterMix | None = None


step_context = StepContext()


class MixedLinear(nn.Module):
    """Stands where a linear layer of the base stood; `base_layer` is that layer, quantized or not, untouched."""

    def __init__(self, base_layer: nn.Module, in_features: int, out_features: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features = in_features
        self.out_features = out_features
        self.pool: RankPool | None = None

    @property
    def weight(self) -> Tensor:
        """The base layer's own weight; some models look at its dtype."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in] to [..., out]. Without adapters in the step this is the base's own layer and nothing else."""
        y: Tensor = self.base_layer(x)
        mix = step_context.mix
        if mix is None or self.pool is None or not self.pool.spans:
            return y
        return mix.add_to(y, x, self.pool)
