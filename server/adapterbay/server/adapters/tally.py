"""What happened to adapters and rows since the server began, in plain counts. Knows nothing of who exports them."""

from __future__ import annotations

import bisect
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from adapterbay.server.scheduler import Seat

if TYPE_CHECKING:
    from adapterbay.server.adapters.residency import Resident
    from adapterbay.server.batch import Group, Row

SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the histograms' buckets, in seconds; what is longer has a bucket of its own."""


class Histogram:
    """How many durations fell into each bucket, and their sum. Thread-safe."""

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self.bounds = tuple(bounds)
        self._counts = [0] * (len(self.bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def add(self, seconds: float) -> None:
        """Counts one duration; a bound belongs to the bucket below it."""
        with self._lock:
            self._counts[bisect.bisect_left(self.bounds, seconds)] += 1
            self._sum += seconds

    def read(self) -> tuple[tuple[int, ...], float]:
        """The counts of the buckets, not cumulated, and the sum of all durations."""
        with self._lock:
            return tuple(self._counts), self._sum


class Counts:
    """Counts by labels, all counts with as many of them. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, ...]] = Counter()

    def add(self, *labels: str, count: int = 1) -> None:
        """Counts."""
        with self._lock:
            self._counts[labels] += count

    def of(self, *labels: str) -> int:
        """One count."""
        with self._lock:
            return self._counts[labels]

    def read(self) -> dict[tuple[str, ...], int]:
        """Everything that was counted."""
        with self._lock:
            return dict(self._counts)


@dataclass(frozen=True, slots=True)
class HostCounts:
    """How many adapters the host memory has: loaded, those of them on the device, pinned, loading, and waiting for
    room to load."""

    loaded: int
    on_device: int
    pinned: int
    loading: int
    queued: int


class TierTally:
    """What happened to adapters in one tier of memory: rows that found theirs there or not, and who gave way."""

    def __init__(self) -> None:
        self.hits = Counts()
        self.misses = Counts()
        self.evictions = Counts()


class HostTally(TierTally):
    """What happened to adapters in host memory. Failures of loads are counted by the error's reason."""

    def __init__(self) -> None:
        super().__init__()
        self.unloads = Counts()
        self.failures = Counts()
        self.load_seconds = Histogram()


class RowTally:
    """What became of rows. A row that left the queue without a step is counted in `unstarted` and nowhere else."""

    def __init__(self) -> None:
        self.rows = Counts()
        self.unstarted = Counts()
        self.prompt_tokens = Counts()
        self.generated_tokens = Counts()
        self.queue_seconds = Histogram()
        self.first_seconds = Histogram()

    def ended(self, row: Row) -> None:
        """Counts a row that is over, whatever its end."""
        if not row.started_at:
            self.unstarted.add()
            return
        self.rows.add()
        self.queue_seconds.add(row.started_at - row.request.submitted_at)
        if row.first_at:
            self.prompt_tokens.add(count=row.prompt_tokens)
            self.generated_tokens.add(count=len(row.output.token_ids) if row.generates else 0)
            self.first_seconds.add(row.first_at - row.request.submitted_at)


class Places(Protocol):
    """The device's memory, as far as it is counted here."""

    def renew(self) -> None: ...
    def seat(self, group: Group, *, alone: bool) -> Seat: ...
    def leave(self, row: Row) -> None: ...
    def placed(self) -> Iterable[Resident]: ...


class CountedPlaces:
    """Seats groups in the device's memory and counts what that took."""

    def __init__(self, places: Places, tally: TierTally) -> None:
        self._places = places
        self._tally = tally

    def renew(self) -> None:
        """A step begins."""
        self._places.renew()

    def seat(self, group: Group, *, alone: bool) -> Seat:
        """Places every adapter of the group; see `scheduler.Slots`. Counts once for a group that begins: what it found
        whole when it first asked as hits, what had to be placed as misses, be it over several steps."""
        before = {resident.key for resident in self._places.placed()}
        seat = self._places.seat(group, alone=alone)
        self._tally.evictions.add(count=len(before - {resident.key for resident in self._places.placed()}))
        if seat is Seat.FULL:
            return seat
        wanted = {resident.key for row in group.rows for resident in row.residents}
        group.waited_for |= wanted - before
        if seat is Seat.TAKEN:
            self._tally.hits.add(count=len(wanted - group.waited_for))
            self._tally.misses.add(count=len(wanted & group.waited_for))
            group.waited_for.clear()  # it may give way and ask again
        return seat

    def leave(self, row: Row) -> None:
        """Ends one row's hold on its adapters' slots."""
        self._places.leave(row)
