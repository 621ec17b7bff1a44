"""The device's adapter slots, within a budget of bytes. Used on the engine's thread only."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Final

from torch import Tensor

from adapterbay.server.adapters.forms import LinearForm, NormForm, ServingForm, TableForm
from adapterbay.server.adapters.residency import Resident
from adapterbay.server.batch import Group, Row
from adapterbay.server.mix.pools import DOUBLING, TIGHT
from adapterbay.server.mix.sites import Sites
from adapterbay.server.scheduler import Seat

STEP_BYTES: Final = 16 << 20
"""What one step may place while rows run, so that they do not wait for it: one or two adapters of SmolLM2's size (10 MB
in bfloat16 at rank 8)."""
SITE_BYTES: Final = 32 << 10
"""What a module counts at least: placing costs as much time as copying so much would."""


SLACK: Final = 4
"""With the pools' free rows adapters take this part of the budget on top of it (1 / SLACK) at most, and one layer's
pools more."""


class _Placing:
    """An adapter on its way into the pools, module by module."""

    def __init__(self, resident: Resident, sites: Sites) -> None:
        self.resident = resident
        self._modules = sites.placing(resident.key, resident.ready)

    def go_on(self, allowance: float) -> tuple[bool, int]:
        """Places modules until it is whole or the allowance is spent; says whether it is whole, and what it spent."""
        spent = 0
        while spent < allowance:
            taken = next(self._modules, None)
            if taken is None:
                return True, spent
            spent += max(taken, SITE_BYTES)
        return False, spent


class DeviceMemory:
    """Places adapters into the layers' pools within a budget; idle ones give way, pinned ones last.

    The budget is for what adapters take. Pools have free rows besides, so that they need not grow, and with them every
    row, whenever one comes; what they may take on top of it is bounded (SLACK).

    While rows run, one step places STEP_BYTES at most, and the module that goes beyond them. An adapter that has begun
    has its room and goes on in the next step.
    """

    def __init__(
        self,
        sites: Sites,
        budget_bytes: int,
        *,
        step_bytes: int = STEP_BYTES,
    ) -> None:
        self._sites = sites
        self._budget = budget_bytes
        self._most = budget_bytes + budget_bytes // SLACK
        self._step_bytes = step_bytes
        self._left = step_bytes
        self._placed: OrderedDict[str, Resident] = OrderedDict()
        self._placing: dict[str, _Placing] = {}
        self._sizes: dict[str, int] = {}
        self.used_bytes = 0
        self._use(0)

    @property
    def budget_bytes(self) -> int:
        """The most that placed adapters may take together."""
        return self._budget

    def size(self, resident: Resident) -> int:
        """What an adapter takes in the pools, in bytes."""
        known = self._sizes.get(resident.key)
        return device_bytes(resident.ready, self._sites) if known is None else known

    def renew(self) -> None:
        """A step begins, in which so much may be placed again."""
        self._left = self._step_bytes

    def seat(self, group: Group, *, alone: bool) -> Seat:
        """Places and holds every adapter of the group. FULL, with nothing changed for it, when there is no room; LATER
        when this step has placed what it may. With `alone` nobody waits for it and it is placed whole.

        What goes wrong with an adapter is raised, and nothing of the group's cold ones is left here.
        """
        wanted = {r.key: r for row in group.rows for r in row.residents}
        missing = [r for key, r in wanted.items() if key not in self._placed]
        if missing and self._left <= 0 and not alone:
            return Seat.LATER
        begun = [r for r in missing if r.key not in self._placing]
        if not self._make_room(sum(map(self.size, begun)), wanted):
            return Seat.FULL
        try:
            for resident in begun:
                self._begin(resident)
            if not all(self._go_on(resident, alone) for resident in missing):
                return Seat.LATER
        except Exception:
            for resident in missing:
                self.vacate(resident)
            raise
        for row in group.rows:
            for resident in row.residents:
                resident.seats += 1
                self._placed.move_to_end(resident.key)
        return Seat.TAKEN

    def leave(self, row: Row) -> None:
        """Ends one row's hold on its adapters' slots."""
        for resident in row.residents:
            resident.seats -= 1

    def vacate(self, resident: Resident) -> None:
        """Frees an adapter's slots, those that are filled as yet."""
        if self._placed.pop(resident.key, None) is None and self._placing.pop(resident.key, None) is None:
            return
        resident.on_device = False
        self._use(-self._sizes.pop(resident.key))
        self._sites.remove(resident.key, resident.ready)

    def placed(self) -> Iterable[Resident]:
        """Who is on the device whole, the least recently used first."""
        return tuple(self._placed.values())

    def _begin(self, resident: Resident) -> None:
        self._sizes[resident.key] = self.size(resident)
        self._use(self._sizes[resident.key])
        self._placing[resident.key] = _Placing(resident, self._sites)

    def _use(self, size: int) -> None:
        """More or less is taken: what free rows may take is what is left of the budget and the slack."""
        self.used_bytes += size
        self._sites.slack_bytes = self._most - self.used_bytes
        self._sites.growth = DOUBLING if 2 * self.used_bytes <= self._most else TIGHT

    def _go_on(self, resident: Resident, alone: bool) -> bool:
        """Places what this step may, or all of it; whether the adapter is whole."""
        whole, spent = self._placing[resident.key].go_on(math.inf if alone else self._left)
        self._left -= spent
        if whole:
            del self._placing[resident.key]
            self._placed[resident.key] = resident
            resident.on_device = True
        return whole

    def _make_room(self, needed: int, wanted: Mapping[str, Resident]) -> bool:
        idle = [r for r in self._placed.values() if not r.seats and r.key not in wanted]
        idle.sort(key=lambda r: r.pinned)  # stable: within each half the least recently used stay first
        idle += [p.resident for key, p in self._placing.items() if key not in wanted]  # whose turn it is not, or gone
        if self.used_bytes - sum(map(self.size, idle)) + needed > self._budget:
            return False
        for resident in idle:
            if self.used_bytes + needed <= self._budget:
                break
            self.vacate(resident)
        return True


def device_bytes(form: ServingForm, sites: Sites) -> int:
    """What a form takes once it is placed at `sites`: each tensor in the dtype in which its store keeps it.

    On top of all adapters come the pools' free rows (SLACK), and the packed copies that a step on a CPU without kernels
    makes of the rows that it reads (`RankPool.packed`).
    """
    narrow = sites.dtype.itemsize
    return (
        sum(_linear(layer, narrow) for layer in (*form.layers.values(), *form.lasting.values()))
        + sum(_norm(norm, sites.norms[path]._parameters) for path, norm in form.norms.items())
        + sum(_table(table, narrow) for table in form.tables.values())
        + sum(_FLOAT32 * t.numel() for part in form.bottlenecks.values() for t in part.tensors())
        + sum(t.nbytes for part in form.attention.values() for t in part.tensors())
    )


_FLOAT32: Final = 4


def _linear(form: LinearForm, narrow: int) -> int:
    """Low-rank and whole deltas are kept in the base's dtype, all else in float32 (`LinearSite`)."""
    low_rank = () if form.low_rank is None else (form.low_rank.a, form.low_rank.b)
    turn = () if form.turn is None else (form.turn.values,)
    wide = (form.in_scale, form.out_scale, form.bias, form.rotation, *turn)
    indices = 0 if form.turn is None else form.turn.partner.nbytes
    return narrow * _numbers(*low_rank, form.dense) + _FLOAT32 * _numbers(*wide) + indices


def _norm(form: NormForm, base: Mapping[str, Tensor | None]) -> int:
    """In the dtype of the parameters that they replace (`MixedNorm`)."""
    there = ((base.get(name), own) for name, own in form.parameters.items())
    return sum(own.numel() * (own if param is None else param).itemsize for param, own in there)


def _table(form: TableForm, narrow: int) -> int:
    """Rows and factors in the base's dtype, rotations in float32 (`MixedTable`)."""
    factors = [tensor for each in (form.low_rank, form.gain) if each is not None for tensor in (each.a, each.b)]
    tokens = 0 if form.tokens is None else form.tokens.nbytes
    return narrow * _numbers(form.rows, *factors) + _FLOAT32 * _numbers(form.rotation) + tokens


def _numbers(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() for tensor in tensors if tensor is not None)
