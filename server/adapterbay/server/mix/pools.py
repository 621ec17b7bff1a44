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

DOUBLING: Final = 2.0
"""How a pool grows where memory is plenty: rarely, since all of it is copied then."""
TIGHT: Final = 1.125
"""How it grows where memory is short."""


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

    __slots__ = ("__weakref__", "_fits", "_next", "_tight", "spans", "taken", "used")
    _known: ClassVar[weakref.WeakValueDictionary[tuple[tuple[str, Span], ...], Layout]] = weakref.WeakValueDictionary()

    def __init__(self, spans: dict[str, Span]) -> None:
        self.spans = spans
        self.used = max((s.start + s.rank for s in spans.values()), default=0)
        self.taken = sum(s.rank for s in spans.values())
        self._fits: dict[int, int] = {}
        # Weak: a chain of layouts, each with the next, would keep all that ever were.
        self._next: tuple[str, Span | None, weakref.ref[Layout]] | None = None
        self._tight: weakref.ref[Layout] | None = None

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

    def tight(self) -> Layout:
        """The layout of the same adapters in the same order, without free rows between them."""
        layout = None if self._tight is None else self._tight()
        if layout is None:
            spans, start = {}, 0
            for key, span in sorted(self.spans.items(), key=lambda item: item[1].start):
                spans[key] = Span(start, span.rank, span.scaling)
                start += span.rank
            layout = Layout.of(spans)
            self._tight = weakref.ref(layout)
        return layout


class _Rows:
    """Places for spans of rows in stores [rows, …] of equal length."""

    STORES: ClassVar[tuple[str, ...]]

    def __init__(self, row_bytes: int) -> None:
        self.layout = Layout.of({})
        self.capacity = 0  # in rows, free ones included
        self.free_bytes = 0
        self._row_bytes = row_bytes

    @property
    def spans(self) -> dict[str, Span]:
        """Who has rows here, and which."""
        return self.layout.spans

    @property
    def bytes(self) -> int:
        """What the pool takes, free rows included."""
        return self.capacity * self._row_bytes

    def remove(self, key: str) -> None:
        """Frees one adapter's rows; they are zeroed, so that nothing of it can be read again."""
        span = self.spans.get(key)
        if span is None:
            return
        for name in self.STORES:
            getattr(self, name)[span.start : span.start + span.rank].zero_()
        self._left(self.layout.moved(key, None))

    def trim(self) -> bool:
        """Gives all free rows back; whether there were any."""
        free = self.free_bytes > 0
        if free:
            self._move(self.layout.taken)
        return free

    def _room(self, rank: int, growth: float) -> int:
        """Where `rank` rows are free. If that is nowhere, all rows move together, into stores for `growth` times as
        many as are taken."""
        start = self.layout.first_fit(rank)
        if start + rank > self.capacity:
            start = self.layout.taken
            self._move(max(start + rank, int(growth * start)))
        return start

    def _left(self, layout: Layout) -> None:
        """Somebody's rows are free from now on."""
        self._take(layout)
        if layout.used <= self.capacity // 4:
            self.trim()

    def _move(self, rows: int) -> None:
        old, new = self.layout, self.layout.tight()
        stores: list[Tensor] = [getattr(self, name) for name in self.STORES]
        moved = [store.new_zeros(rows, store.shape[1]) for store in stores]  # all of them before anything changes
        for store, there in zip(stores, moved, strict=True):
            if old is new:
                there[: old.used] = store[: old.used]
                continue
            for key, span in new.spans.items():
                start = old.spans[key].start
                there[span.start : span.start + span.rank] = store[start : start + span.rank]
        for name, there in zip(self.STORES, moved, strict=True):
            setattr(self, name, there)
        self.capacity = rows
        self._take(new)

    def _take(self, layout: Layout) -> None:
        self.layout = layout
        self.free_bytes = (self.capacity - layout.taken) * self._row_bytes


class RankPool(_Rows):
    """The rank rows of every adapter that is resident at one layer.

    Rows never hold NaN or Inf (admission sees to it, and fresh rows are zero), so masked rows add exactly nothing.
    """

    STORES = ("a", "b")

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__((in_features + out_features) * dtype.itemsize)
        self.a = torch.zeros(0, in_features, dtype=dtype, device=device)
        self.b = torch.zeros(0, out_features, dtype=dtype, device=device)
        self.packs = packed.can_pack(dtype, device)
        self._packed: OrderedDict[tuple[int, int], tuple[Tensor, Tensor]] = OrderedDict()

    def place(self, key: str, a: Tensor, b: Tensor, scaling: float, *, growth: float = DOUBLING) -> None:
        """Copies one adapter in. `a` [rank, in], `b` [rank, out] (B transposed)."""
        rank = a.shape[0]
        start = self._room(rank, growth)
        self.a[start : start + rank].copy_(a)
        self.b[start : start + rank].copy_(b)
        self._take(self.layout.moved(key, Span(start, rank, scaling)))

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

    def _take(self, layout: Layout) -> None:
        super()._take(layout)
        self._packed.clear()


class VectorPool(_Rows):
    """One vector for each adapter, in float32: what is added to a factor of 1, or to the output."""

    STORES = ("rows",)

    def __init__(self, features: int, device: torch.device) -> None:
        super().__init__(features * torch.float32.itemsize)
        self.rows = torch.zeros(0, features, dtype=torch.float32, device=device)

    def place(self, key: str, vector: Tensor, *, growth: float = DOUBLING) -> None:
        """Copies one adapter's vector [features] in."""
        start = self._room(1, growth)
        self.rows[start].copy_(vector)
        self._take(self.layout.moved(key, Span(start, 1, 1.0)))
