"""Boxes in columns, edges from left to right, few crossings and no overlap: a layered drawing of a directed graph.

In four steps (Sugiyama, Tagawa, Toda 1981): every box goes into the column after all that point at it; edges that
pass a column get an empty place in it; the places of a column are ordered by the mean of their neighbours; and they
are moved up and down until they lie level with their neighbours, as far as those above and below leave room.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

_SWEEPS: Final = 12
_LEVEL_WEIGHT: Final = 20.0


@dataclass(frozen=True, slots=True)
class Box:
    """What is placed: its height, and its rank among boxes that could change places (smaller is higher)."""

    id: str
    height: float
    order: int = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """`columns` and `middles` are by box id: the column, and the vertical middle. `bends` are by edge: the vertical
    middles of the places that the edge passes, one for each column between its ends.
    """

    columns: Mapping[str, int]
    middles: Mapping[str, float]
    bends: Mapping[tuple[str, str], tuple[float, ...]]
    height: float


def arrange(
    boxes: Sequence[Box],
    edges: Iterable[tuple[str, str]],
    *,
    pulled: frozenset[str] = frozenset(),
    level: frozenset[tuple[str, str]] = frozenset(),
    gap: float = 24.0,
) -> Layout:
    """Places boxes. `edges` are (source, target), without cycles; `pulled` boxes stand right before their targets.

    `level` are the edges that should run straight, at the expense of the others. `gap` is the least distance between
    two boxes of a column. Raises ValueError if the edges have a cycle.
    """
    links = list(dict.fromkeys(edges))
    columns = _columns([box.id for box in boxes], links, pulled)
    drawing = _Drawing(boxes, links, columns, level, gap)
    drawing.reduce_crossings()
    return drawing.placed()


def _columns(ids: Sequence[str], edges: Sequence[tuple[str, str]], pulled: frozenset[str]) -> dict[str, int]:
    before: dict[str, list[str]] = {id: [] for id in ids}
    after: dict[str, list[str]] = {id: [] for id in ids}
    for source, target in edges:
        before[target].append(source)
        after[source].append(target)
    columns: dict[str, int] = {}
    missing = {id: len(before[id]) for id in ids}
    ready = [id for id in ids if missing[id] == 0]
    while ready:
        current = ready.pop()
        columns[current] = max((columns[source] + 1 for source in before[current]), default=0)
        for target in after[current]:
            missing[target] -= 1
            if missing[target] == 0:
                ready.append(target)
    if len(columns) != len(before):
        raise ValueError("the edges have a cycle")
    for id in pulled:
        if after[id] and not before[id]:
            columns[id] = min(columns[target] for target in after[id]) - 1
    return columns


class _Drawing:
    """Places are box ids, and (source, target, column) for what an edge passes."""

    def __init__(
        self,
        boxes: Sequence[Box],
        edges: Sequence[tuple[str, str]],
        columns: Mapping[str, int],
        level: frozenset[tuple[str, str]],
        gap: float,
    ) -> None:
        self._columns = columns
        self._edges = edges
        self._gap = gap
        self._heights: dict[object, float] = {box.id: box.height for box in boxes}
        self._orders: dict[object, int] = {box.id: box.order for box in boxes}
        self._rows: list[list[object]] = [[] for _ in range(max(columns.values(), default=-1) + 1)]
        for box in sorted(boxes, key=lambda box: box.order):
            self._rows[columns[box.id]].append(box.id)
        self._left: dict[object, list[object]] = {box.id: [] for box in boxes}
        self._right: dict[object, list[object]] = {box.id: [] for box in boxes}
        self._weights: dict[tuple[object, object], float] = {}
        self._passed: dict[tuple[str, str], list[object]] = {}
        for edge in edges:
            self._add_edge(*edge, weight=_LEVEL_WEIGHT if edge in level else 1.0)

    def _add_edge(self, source: str, target: str, *, weight: float) -> None:
        passed: list[object] = []
        for column in range(self._columns[source] + 1, self._columns[target]):
            place = (source, target, column)
            self._heights[place] = 8.0
            self._orders[place] = self._orders[source]
            self._left[place], self._right[place] = [], []
            self._rows[column].append(place)
            passed.append(place)
        self._passed[source, target] = passed
        chain = [source, *passed, target]
        for left, right in itertools.pairwise(chain):
            self._right[left].append(right)
            self._left[right].append(left)
            self._weights[left, right] = self._weights[right, left] = weight

    def reduce_crossings(self) -> None:
        """Sorts columns by the mean place of their neighbours, to and fro; the best order found is kept."""
        best, fewest = [list(row) for row in self._rows], self._crossings()
        for sweep in range(_SWEEPS):
            forward = sweep % 2 == 0
            for row in self._rows if forward else reversed(self._rows):
                self._sort(row, self._left if forward else self._right)
            crossings = self._crossings()
            if crossings < fewest:
                best, fewest = [list(row) for row in self._rows], crossings
        self._rows = best

    def _sort(self, row: list[object], neighbours: Mapping[object, list[object]]) -> None:
        places = {place: index for other in self._rows for index, place in enumerate(other)}
        wanted = {}
        for index, place in enumerate(row):
            beside = [places[other] for other in neighbours[place]]
            wanted[place] = sum(beside) / len(beside) if beside else float(index)
        row.sort(key=lambda place: (wanted[place], self._orders[place]))

    def _crossings(self) -> int:
        places = {place: index for row in self._rows for index, place in enumerate(row)}
        count = 0
        for row in self._rows:
            lines = [(places[left], places[right]) for left in row for right in self._right[left]]
            count += sum((a[0] - b[0]) * (a[1] - b[1]) < 0 for index, a in enumerate(lines) for b in lines[index + 1 :])
        return count

    def placed(self) -> Layout:
        """Moves the places of each column towards the means of their neighbours."""
        middles: dict[object, float] = {}
        for row in self._rows:
            middles.update(zip(row, self._spread(row, [0.0] * len(row)), strict=True))
        for sweep in range(_SWEEPS):
            forward = sweep % 2 == 0
            for row in self._rows if forward else reversed(self._rows):
                wanted = []
                for place in row:
                    beside = [*self._left[place], *self._right[place]] if sweep >= _SWEEPS - 2 else []
                    beside = beside or (self._left if forward else self._right)[place]
                    weights = [self._weights[place, other] for other in beside]
                    middle = sum(weight * middles[other] for weight, other in zip(weights, beside, strict=True))
                    wanted.append(middle / sum(weights) if beside else middles[place])
                middles.update(zip(row, self._spread(row, wanted), strict=True))
        top = min((middles[place] - self._heights[place] / 2 for place in middles), default=0.0)
        bottom = max((middles[place] + self._heights[place] / 2 for place in middles), default=0.0)
        return Layout(
            columns=self._columns,
            middles={id: middles[id] - top for id in self._columns},
            bends={edge: tuple(middles[place] - top for place in self._passed[edge]) for edge in self._edges},
            height=bottom - top,
        )

    def _spread(self, row: Sequence[object], wanted: Sequence[float]) -> list[float]:
        """The middles nearest to `wanted`, in least squares, at which no two places of a column overlap.

        With the offsets of a packed column taken away, this is regression to a rising sequence: neighbours that are out
        of order are pooled at their mean (pool adjacent violators, Ayer et al. 1955).
        """
        offsets: list[float] = []
        for index, place in enumerate(row):
            if index == 0:
                offsets.append(0.0)
                continue
            before = row[index - 1]
            offsets.append(offsets[-1] + (self._heights[before] + self._heights[place]) / 2 + self._gap)
        pools: list[tuple[float, float, int]] = []
        for place, value, offset in zip(row, wanted, offsets, strict=True):
            mean, weight, count = value - offset, self._pull(place), 1
            while pools and pools[-1][0] > mean:
                other, other_weight, size = pools.pop()
                mean = (mean * weight + other * other_weight) / (weight + other_weight)
                weight, count = weight + other_weight, count + size
            pools.append((mean, weight, count))
        flat = [mean for mean, _, count in pools for _ in range(count)]
        return [mean + offset for mean, offset in zip(flat, offsets, strict=True)]

    def _pull(self, place: object) -> float:
        """How much it matters where a place stands: as much as the straightest edge that it has."""
        beside = [*self._left[place], *self._right[place]]
        return max((self._weights[place, other] for other in beside), default=1.0)
