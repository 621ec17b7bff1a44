"""What is resident at one module: rank rows, vectors and whatever is kept per adapter.

All rank rows of a layer lie in one pool, row under row: A is [rows, in], Bᵀ is [rows, out], and an adapter is a span of
rows, so that adapters of any ranks lie side by side and a padded rank does not exist.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adapterbay.server import packed


@dataclass(frozen=True, slots=True)
class Span:
    """Where an adapter's rows lie in a pool, and its scaling there."""

    start: int
    rank: int
    scaling: float


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


class _Rows:
    """First-fit places for spans of rows."""

    def __init__(self) -> None:
        self.spans: dict[str, Span] = {}
        self.layout = Layout.of({})

    def _first_fit(self, rank: int) -> int:
        start = 0
        for span in sorted(self.spans.values(), key=lambda s: s.start):
            if span.start - start >= rank:
                break
            start = span.start + span.rank
        return start

    @property
    def _used(self) -> int:
        return max((s.start + s.rank for s in self.spans.values()), default=0)


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
        self._packed: tuple[slice, Tensor, Tensor] | None = None

    def place(self, key: str, a: Tensor, b: Tensor, scaling: float) -> None:
        """Copies one adapter in. `a` [rank, in], `b` [rank, out] (B transposed)."""
        rank = a.shape[0]
        start = self._first_fit(rank)
        if start + rank > self.a.shape[0]:
            rows = max(start + rank, 2 * self.a.shape[0])
            self.a, self.b = _grown(self.a, rows), _grown(self.b, rows)
        self.a[start : start + rank].copy_(a)
        self.b[start : start + rank].copy_(b)
        self.spans[key] = Span(start, rank, scaling)
        self._relayout()

    def remove(self, key: str) -> None:
        """Frees one adapter's rows; they are zeroed, so that nothing of it can be read again."""
        span = self.spans.pop(key, None)
        if span is None:
            return
        self.a[span.start : span.start + span.rank].zero_()
        self.b[span.start : span.start + span.rank].zero_()
        self._relayout()
        if self._used <= self.a.shape[0] // 4:
            self.a = self.a[: self._used].clone()
            self.b = self.b[: self._used].clone()

    @property
    def bytes(self) -> int:
        """What the pool takes, free rows included."""
        return self.a.nbytes + self.b.nbytes

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


class VectorPool(_Rows):
    """One vector for each adapter, in float32: what is added to a factor of 1, or to the output."""

    def __init__(self, features: int, device: torch.device) -> None:
        super().__init__()
        self.rows = torch.zeros(0, features, device=device)

    def place(self, key: str, vector: Tensor) -> None:
        """Copies one adapter's vector [features] in."""
        start = self._first_fit(1)
        if start >= self.rows.shape[0]:
            self.rows = _grown(self.rows, max(4, 2 * start))
        self.rows[start].copy_(vector)
        self.spans[key] = Span(start, 1, 1.0)
        self.layout = Layout.of(self.spans)

    def remove(self, key: str) -> None:
        """Frees and zeroes one adapter's row."""
        span = self.spans.pop(key, None)
        if span is not None:
            self.rows[span.start].zero_()
            self.layout = Layout.of(self.spans)
