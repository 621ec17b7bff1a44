"""What is resident at one module: rank rows, vectors and whatever is kept per adapter.

All rank rows of a layer lie in one pool, row under row: A is [rows, in], Bᵀ is [rows, out], and an adapter is a span of
rows, so that adapters of any ranks lie side by side and a padded rank does not exist.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from adapterbay.server import packed

PACKED_SLICES: Final = 4
"""So many slices of a pool are kept packed. A step reads one, and one more for each long run between short ones."""


@dataclass(frozen=True, slots=True)
class Span:
    """Where an adapter's rows lie in a pool, and its scaling there."""

    start: int
    rank: int
    scaling: float


class Layout:
    """Which adapter lies where in a pool. Pools with equal spans share one object, and so the plans made for it.

    A base has hundreds of pools, and an adapter comes to all of them or leaves all: what the last one asked a layout is
    remembered there.
    """

    __slots__ = ("__weakref__", "_fits", "_next", "spans", "used")
    _known: ClassVar[weakref.WeakValueDictionary[tuple[tuple[str, Span], ...], Layout]] = weakref.WeakValueDictionary()

    def __init__(self, spans: dict[str, Span]) -> None:
        self.spans = spans
        self.used = max((s.start + s.rank for s in spans.values()), default=0)
        self._fits: dict[int, int] = {}
        # Weak: a chain of layouts, each with the next, would keep all that ever were.
        self._next: tuple[str, Span | None, weakref.ref[Layout]] | None = None

    @classmethod
    def of(cls, spans: dict[str, Span]) -> Layout:
        """The layout with these spans."""
        key = tuple(sorted(spans.items(), key=lambda item: item[0]))
        layout = cls._known.get(key)
        if layout is None:
            layout = cls._known[key] = cls(dict(spans))
        return layout

    def first_fit(self, rank: int) -> int:
        """Where `rank` rows are free."""
        start = self._fits.get(rank)
        if start is None:
            start = 0
            for span in sorted(self.spans.values(), key=lambda s: s.start):
                if span.start - start >= rank:
                    break
                start = span.start + span.rank
            self._fits[rank] = start
        return start

    def moved(self, key: str, span: Span | None) -> Layout:
        """The layout with `key` at `span`, or without it."""
        if self._next is not None and self._next[:2] == (key, span):
            layout = self._next[2]()
            if layout is not None:
                return layout
        spans = {name: own for name, own in self.spans.items() if name != key}
        layout = Layout.of(spans if span is None else spans | {key: span})
        self._next = (key, span, weakref.ref(layout))
        return layout


class _Rows:
    """Places for spans of rows."""

    def __init__(self) -> None:
        self.layout = Layout.of({})

    @property
    def spans(self) -> dict[str, Span]:
        """Who has rows here, and which."""
        return self.layout.spans


def _grown(store: Tensor, rows: int) -> Tensor:
    grown = store.new_zeros(rows, store.shape[1])
    grown[: store.shape[0]] = store
    return grown


class RankPool(_Rows):
    """The rank rows of every adapter that is resident at one layer.

    Rows never hold NaN or Inf (admission sees to it, and fresh rows are zero), so masked rows add exactly nothing.
    """

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.a = torch.zeros(0, in_features, dtype=dtype, device=device)
        self.b = torch.zeros(0, out_features, dtype=dtype, device=device)
        self.packs = packed.can_pack(dtype, device)
        self._packed: OrderedDict[tuple[int, int], tuple[Tensor, Tensor]] = OrderedDict()

    def place(self, key: str, a: Tensor, b: Tensor, scaling: float) -> None:
        """Copies one adapter in. `a` [rank, in], `b` [rank, out] (B transposed)."""
        rank = a.shape[0]
        start = self.layout.first_fit(rank)
        if start + rank > self.a.shape[0]:
            rows = max(start + rank, 2 * self.a.shape[0])
            self.a, self.b = _grown(self.a, rows), _grown(self.b, rows)
        self.a[start : start + rank].copy_(a)
        self.b[start : start + rank].copy_(b)
        self._relayout(key, Span(start, rank, scaling))

    def remove(self, key: str) -> None:
        """Frees one adapter's rows; they are zeroed, so that nothing of it can be read again."""
        span = self.spans.get(key)
        if span is None:
            return
        self.a[span.start : span.start + span.rank].zero_()
        self.b[span.start : span.start + span.rank].zero_()
        self._relayout(key, None)
        if self.layout.used <= self.a.shape[0] // 4:
            self.a = self.a[: self.layout.used].clone()
            self.b = self.b[: self.layout.used].clone()

    @property
    def bytes(self) -> int:
        """What the pool takes, free rows included."""
        return self.a.nbytes + self.b.nbytes

    def packed(self, rows: slice) -> tuple[Tensor, Tensor] | None:
        """A and B of these rows in oneDNN's layout, packed anew when the pool changed; None where packing is no use.

        The last PACKED_SLICES are kept: a step that reads several asks for the same ones as long as its rows go on.
        """
        if not self.packs:
            return None
        span = (rows.start, rows.stop)
        pair = self._packed.get(span)
        if pair is None:
            pair = self._packed[span] = (packed.pack(self.a[rows]), packed.pack(self.b[rows].t()))
            if len(self._packed) > PACKED_SLICES:
                self._packed.popitem(last=False)
        else:
            self._packed.move_to_end(span)
        return pair

    def _relayout(self, key: str, span: Span | None) -> None:
        self.layout = self.layout.moved(key, span)
        self._packed.clear()


class VectorPool(_Rows):
    """One vector for each adapter, in float32: what is added to a factor of 1, or to the output."""

    def __init__(self, features: int, device: torch.device) -> None:
        super().__init__()
        self.rows = torch.zeros(0, features, device=device)

    def place(self, key: str, vector: Tensor) -> None:
        """Copies one adapter's vector [features] in."""
        start = self.layout.first_fit(1)
        if start >= self.rows.shape[0]:
            self.rows = _grown(self.rows, max(4, 2 * start))
        self.rows[start].copy_(vector)
        self.layout = self.layout.moved(key, Span(start, 1, 1.0))

    def remove(self, key: str) -> None:
        """Frees and zeroes one adapter's row."""
        span = self.spans.get(key)
        if span is not None:
            self.rows[span.start].zero_()
            self.layout = self.layout.moved(key, None)
            if self.layout.used <= self.rows.shape[0] // 4:
                self.rows = self.rows[: self.layout.used].clone()

    @property
    def bytes(self) -> int:
        """What the pool takes, free rows included."""
        return self.rows.nbytes
