"""Which adapters are in memory: registry → host → device, budgets in bytes, the least recently used give way.

Loads run on threads of their own and never touch the device. Placing on the device happens on the engine's thread
between steps. Whoever uses an adapter holds its `Resident` object, not its name: an unload takes the object out of the
table, its rows finish on it, and the next request loads anew under another key, so no slot is ever read by a key that
it was not written for.
"""

from __future__ import annotations

import itertools
import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum

from adapterbay.registry.errors import AdapterbayError, EngineFault, InvalidArgument, Unavailable
from adapterbay.server.adapters.events import Listeners
from adapterbay.server.adapters.forms import ServingForm
from adapterbay.server.adapters.loaders import beside, loading_threads
from adapterbay.server.adapters.tally import HostCounts, HostTally
from adapterbay.server.trim import Trimmer


class Residency(Enum):
    """Where an adapter's weights are."""

    REGISTRY = "registry"
    LOADING = "loading"
    HOST = "host"
    DEVICE = "device"


@dataclass(frozen=True, slots=True)
class ResidencyInfo:
    """What of one digest is in memory. `bytes` counts every tier; `active_rows` rows run or wait on it."""

    state: Residency
    bytes: int = 0
    pinned: bool = False
    active_rows: int = 0


@dataclass(slots=True, eq=False)
class Resident:
    """One loading or loaded adapter. `key` names it in the device's pools and is never used twice."""

    key: str
    digest: str
    size: int  # expected bytes until the form is there
    loading: Future[float] = field(default_factory=Future)  # seconds
    form: ServingForm | None = None
    holds: int = 0  # rows that wait or run on it
    seats: int = 0  # rows of the batch that compute with it
    on_device: bool = False
    pinned: bool = False
    queued: bool = False  # waits for room
    relieved: bool = False  # loads although there was no room
    leaving: Future[int] | None = None
    unloaded: bool = False  # on demand: its memory is to go back to the system

    @property
    def ready(self) -> ServingForm:
        """The form of a loaded adapter."""
        if self.form is None:
            raise RuntimeError(f"{self.digest} is not loaded")
        return self.form


Load = Callable[[str], ServingForm]
"""Reads, verifies and admits one digest; runs on a loading thread."""


class HostMemory:
    """Loaded adapters by digest, the least recently used first. Thread-safe.

    The budget is kept: a load begins when there is room for what its files take, and if its form turns out larger, it
    is kept only if others can give way for it; if not it is loaded again once they can. There is one exception, see
    `relieve`.
    """

    def __init__(
        self,
        load: Load,
        size_of: Callable[[str], int],
        *,
        budget_bytes: int,
        threads: int,
        vacate: Callable[[Resident], None],
    ) -> None:
        self._load = load
        self._size_of = size_of
        self._budget = budget_bytes
        self._vacate = vacate  # frees the resident's device slots, soon, on the engine's thread
        self._lock = threading.RLock()
        self._serial = itertools.count(1)
        self._table: OrderedDict[str, Resident] = OrderedDict()
        self._leaving: list[Resident] = []
        self._queue: deque[Resident] = deque()
        self._sizes: dict[str, int] = {}  # of forms that took more than their files
        self._executor = loading_threads(threads)
        self._loads_under_way = 0
        self._closed = False
        self._trimmer = Trimmer()
        self.listeners = Listeners()
        self.tally = HostTally()

    def close(self) -> None:
        """Ends the loading threads; loads that have not begun fail as Unavailable."""
        with self._lock:
            self._closed = True
            waiting, self._queue = list(self._queue), deque()
            self._loads_under_way += len(waiting)
        for resident in waiting:
            self._failed(resident, Unavailable("The server is stopping."))
        self._trimmer.close()
        self._executor.shutdown(wait=True)

    def hold(self, digest: str) -> Resident:
        """The resident of a digest, loading if need be, kept until `release`."""
        with self._lock:
            resident = self._touch(digest)
            (self.tally.misses if resident.form is None else self.tally.hits).add()
            resident.holds += 1
            return resident

    def release(self, resident: Resident) -> None:
        """Ends one hold."""
        with self._lock:
            resident.holds -= 1
            if resident.holds == 0 and resident.leaving is not None:
                self._leave(resident)
            self._make_room(0)  # after `relieve`; otherwise there is
            self._start_loads()

    def form(self, digest: str) -> ServingForm | None:
        """The form of a digest that is loaded, which counts as a use of it; None for all others."""
        with self._lock:
            resident = self._table.get(digest)
            if resident is None or resident.form is None:
                return None
            self._table.move_to_end(digest)
            return resident.form

    def load(self, digest: str) -> Future[float]:
        """Begins to load a digest; the future has the seconds it took, 0 if it was there."""
        with self._lock:
            resident = self._touch(digest)
            if resident.form is None:
                return resident.loading
        done: Future[float] = Future()
        done.set_result(0.0)
        return done

    def unload(self, digest: str) -> Future[int]:
        """Takes a digest out of the table; its memory goes when the rows that hold it have finished.

        Raises InvalidArgument for a pinned adapter.
        """
        with self._lock:
            resident = self._table.get(digest)
            if resident is not None and resident.pinned:
                raise InvalidArgument(f"{digest} is pinned; unpin it before unloading.", field="adapter")
            freed: Future[int] = Future()
            if resident is None:
                freed.set_result(0)
                return freed
            del self._table[digest]
            resident.leaving, resident.unloaded = freed, True
            self._leaving.append(resident)
            self.tally.unloads.add()
            if resident.holds == 0 and (resident.form is not None or resident.queued):
                self._leave(resident)
            return freed

    def emptied(self, resident: Resident) -> None:
        """The device is free of a resident that has left, which was the last to need its form.

        What was unloaded on demand goes back to the system a little later, with what is unloaded until then; what gave
        way to another adapter is kept for that one.
        """
        resident.form = None
        if resident.unloaded:
            self._trimmer.soon()

    def pin(self, digest: str, pinned: bool) -> None:
        """Keeps a digest in host memory whatever the load (loading it if need be), or lets it go again.

        Raises InvalidArgument when the pinned adapters would take more than the budget.
        """
        with self._lock:
            if pinned:
                others = sum(r.size for r in self._table.values() if r.pinned and r.digest != digest)
                if others + self._expected(digest) > self._budget:
                    raise InvalidArgument(
                        f"{digest} cannot be pinned: the pinned adapters take {others} bytes of the host budget of "
                        f"{self._budget}, and it takes {self._expected(digest)}. Unpin one, or raise host_bytes.",
                        field="adapter",
                    )
                self._touch(digest).pinned = True
            elif digest in self._table:
                self._table[digest].pinned = False
                self._start_loads()

    def residency(self, digest: str) -> ResidencyInfo:
        """What of a digest is in memory, residents that are leaving counted in."""
        with self._lock:
            current = self._table.get(digest)
            all_of_it = [r for r in self._leaving if r.digest == digest] + ([current] if current else [])
            state = Residency.REGISTRY
            if current is not None:
                state = Residency.LOADING if current.form is None else Residency.HOST
            if any(r.on_device for r in all_of_it):
                state = Residency.DEVICE
            return ResidencyInfo(
                state=state,
                bytes=sum(r.size * (2 if r.on_device else 1) for r in all_of_it if r.form is not None),
                pinned=current is not None and current.pinned,
                active_rows=sum(r.holds for r in all_of_it),
            )

    def resident(self) -> tuple[str, ...]:
        """The digests that are loaded."""
        with self._lock:
            return tuple(digest for digest, r in self._table.items() if r.form is not None)

    def counts(self) -> HostCounts:
        """How many adapters are here; those that are leaving count until they have left."""
        with self._lock:
            everyone = (*self._table.values(), *self._leaving)
            loaded = sum(r.form is not None for r in everyone)
            queued = sum(r.queued for r in everyone)
            pinned = sum(r.pinned for r in self._table.values())
            return HostCounts(
                loaded=loaded,
                on_device=sum(r.on_device for r in everyone),
                pinned=pinned,
                loading=len(everyone) - loaded - queued,
                queued=queued,
            )

    def relieve(self) -> None:
        """Begins the next load although the budget is taken. For the moment when everything in memory is pinned, or
        held by rows that wait for other adapters, so that keeping to the budget would keep them waiting for ever. Loads
        are queued in the order of their rows, so what this takes above the budget is at most one request's adapters."""
        with self._lock:
            if self._queue and not self._loads_under_way:
                self._queue[0].relieved = True
                self._begin(self._queue.popleft())

    @property
    def used_bytes(self) -> int:
        """Host memory that loaded and loading adapters take."""
        with self._lock:
            return sum(r.size for r in (*self._table.values(), *self._leaving) if not r.queued)

    @property
    def budget_bytes(self) -> int:
        """The most that loaded and loading adapters may take together."""
        return self._budget

    def meanwhile(self, work: Callable[[], None]) -> Callable[[], None]:
        """For a loading thread: see `beside`."""
        return beside(self._executor, work)

    def _expected(self, digest: str) -> int:
        """What a digest takes in memory: as it was seen, or else as its files are."""
        current = self._table.get(digest)
        return current.size if current is not None else self._sizes.get(digest) or self._size_of(digest)

    def _touch(self, digest: str) -> Resident:
        resident = self._table.get(digest)
        if resident is None:
            size = self._expected(digest)
            if size > self._budget:
                raise _too_large(digest, size, self._budget)
            resident = Resident(key=f"{digest}#{next(self._serial)}", digest=digest, size=size, queued=True)
            self._table[digest] = resident
            self._queue.append(resident)
            self._start_loads()
        self._table.move_to_end(digest)
        return resident

    def _start_loads(self) -> None:
        while self._queue and not self._closed:
            if not self._make_room(self._queue[0].size):
                return  # when a row ends or a pin goes, this is tried again
            self._begin(self._queue.popleft())

    def _begin(self, resident: Resident) -> None:
        resident.queued = False
        self._loads_under_way += 1
        self._executor.submit(self._run_load, resident)

    def _make_room(self, size: int) -> bool:
        """Lets the least recently used go until there are `size` bytes; none of them if that would not be enough."""
        missing = self.used_bytes + size - self._budget
        going: list[Resident] = []
        for resident in self._table.values():
            if missing <= 0:
                break
            if not resident.holds and not resident.pinned and resident.form is not None:
                going.append(resident)
                missing -= resident.size
        if missing > 0:
            return False
        for resident in going:
            del self._table[resident.digest]
            resident.leaving = Future()
            self._leaving.append(resident)
            self.tally.evictions.add()
            self._leave(resident)
        return True

    def _run_load(self, resident: Resident) -> None:
        began = time.monotonic()
        try:
            if self._closed:
                raise Unavailable("The server is stopping.")
            form = self._load(resident.digest)
        except AdapterbayError as error:
            self._failed(resident, error)
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, the rows that wait must hear of it
            fault = EngineFault(f"Loading {resident.digest} failed: {error!r}")
            fault.__cause__ = error
            self._failed(resident, fault)
            return
        size, seconds = form.bytes, time.monotonic() - began
        if size > self._budget:
            self._failed(resident, _too_large(resident.digest, size, self._budget))
            return
        with self._lock:
            self._loads_under_way -= 1
            larger, resident.size = size - resident.size, size
            if larger > 0:
                self._sizes[resident.digest] = size
                if not resident.relieved and not self._make_room(0):
                    resident.queued = True
                    self._queue.appendleft(resident)
                    return  # when a row ends or a pin goes, this is tried again
            resident.form = form
            self.tally.load_seconds.add(seconds)
            if resident.leaving is not None and resident.holds == 0:
                self._leave(resident)
            self._start_loads()
        self.listeners.tell("loaded", resident.digest)
        resident.loading.set_result(seconds)

    def _failed(self, resident: Resident, error: AdapterbayError) -> None:
        self.tally.failures.add(error.reason)
        traceback.clear_frames(error.__traceback__)  # which hold the adapter's files
        with self._lock:
            self._loads_under_way -= 1
            resident.queued = False
            if self._table.get(resident.digest) is resident:
                del self._table[resident.digest]
            if resident in self._leaving:
                self._leaving.remove(resident)
            resident.size = 0
            if resident.leaving is not None:
                resident.leaving.set_result(0)
            self._start_loads()
        self.listeners.tell("load_failed", resident.digest, error.message)
        resident.loading.set_exception(error)

    def _leave(self, resident: Resident) -> None:
        """Lets go of a resident that nobody holds."""
        assert resident.leaving is not None
        freed = resident.size * (2 if resident.on_device else 1) if resident.form is not None else 0
        if resident.queued:
            self._queue.remove(resident)
            resident.queued = False
            resident.loading.set_exception(Unavailable("The adapter was unloaded while it waited to load."))
        self._leaving.remove(resident)
        self._vacate(resident)
        resident.leaving.set_result(freed)
        self.listeners.tell("unloaded", resident.digest)


def _too_large(digest: str, size: int, budget: int) -> InvalidArgument:
    return InvalidArgument(
        f"{digest} takes {size} bytes; the host budget for all adapters is {budget}. Raise host_bytes.", field="adapter"
    )
