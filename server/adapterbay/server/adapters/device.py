"""The device's adapter slots, within a budget of bytes. Used on the engine's thread only."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

import torch

from adapterbay.server.adapters.residency import Resident
from adapterbay.server.batch import Group, Row
from adapterbay.server.mix.sites import Sites


class DeviceMemory:
    """Places adapters into the layers' pools within a budget; idle ones give way, pinned ones last."""

    def __init__(
        self,
        sites: Sites,
        budget_bytes: int,
    ) -> None:
        self._sites = sites
        self._dtype = sites.dtype
        self._budget = budget_bytes
        self._placed: OrderedDict[str, Resident] = OrderedDict()
        self.used_bytes = 0

    @property
    def budget_bytes(self) -> int:
        """The most that placed adapters may take together."""
        return self._budget

    def size(self, resident: Resident) -> int:
        """What an adapter takes in the pools, in bytes."""
        return device_bytes(resident, self._dtype)

    def seat(self, group: Group) -> bool:
        """Places and holds every adapter of the group; False, with nothing changed for it, when there is no room."""
        wanted = {r.key: r for row in group.rows for r in row.residents}
        missing = [r for key, r in wanted.items() if key not in self._placed]
        if not self._make_room(sum(map(self.size, missing)), wanted):
            return False
        for resident in missing:
            self._place(resident)
        for row in group.rows:
            for resident in row.residents:
                resident.seats += 1
                self._placed.move_to_end(resident.key)
        return True

    def leave(self, row: Row) -> None:
        """Ends one row's hold on its adapters' slots."""
        for resident in row.residents:
            resident.seats -= 1

    def vacate(self, resident: Resident) -> None:
        """Frees an adapter's slots."""
        if self._placed.pop(resident.key, None) is None:
            return
        self._sites.remove(resident.key, resident.ready)
        resident.on_device = False
        self.used_bytes -= self.size(resident)

    def placed(self) -> Iterable[Resident]:
        """Who is on the device, the least recently used first."""
        return tuple(self._placed.values())

    def _place(self, resident: Resident) -> None:
        self._sites.place(resident.key, resident.ready)
        self._placed[resident.key] = resident
        resident.on_device = True
        self.used_bytes += self.size(resident)

    def _make_room(self, needed: int, wanted: Mapping[str, Resident]) -> bool:
        idle = [r for r in self._placed.values() if not r.seats and r.key not in wanted]
        idle.sort(key=lambda r: r.pinned)  # stable: within each half the least recently used stay first
        if self.used_bytes - sum(map(self.size, idle)) + needed > self._budget:
            return False
        for resident in idle:
            if self.used_bytes + needed <= self._budget:
                break
            self.vacate(resident)
        return True


def device_bytes(resident: Resident, dtype: torch.dtype) -> int:
    """What an adapter takes in pools of `dtype`."""
    form = resident.ready
    placed = (form.layers, form.norms, form.tables, form.bottlenecks)
    return dtype.itemsize * sum(t.numel() for kind in placed for part in kind.values() for t in part.tensors())
