"""Which adapters are in memory: registry → host → device, budgets in bytes, the least recently used give way.

Loads run on threads of their own and never touch the device. Placing on the device happens on the engine's thread
between steps. Whoever uses an adapter holds its `Resident` object, not its name: an unload takes the object out of the
table, its rows finish on it, and the next request loads anew under another key, so no slot is ever read by a key that
it was not written for.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial

from adapterbay.registry.errors import AdapterbayError, EngineFault, InvalidArgument, Unavailable
from adapterbay.server.adapters.alarm import Alarm
from adapterbay.server.adapters.claims import Claim
from adapterbay.server.adapters.events import Listeners
from adapterbay.server.adapters.forms import ServingForm
from adapterbay.server.adapters.loaders import attempted, beside, loading_threads
from adapterbay.server.adapters.memory_books import FILES_FOR_FORM, Books, Turn, beside_pins, too_large
from adapterbay.server.adapters.residency import ResidencyInfo, Resident
from adapterbay.server.adapters.tally import HostCounts, HostTally
from adapterbay.server.trim import DELAY_SECONDS, trim

log = logging.getLogger(__name__)

Load = Callable[[str], ServingForm]
"""Reads, verifies and admits one digest; runs on a loading thread."""

KNOWN_SIZES = 8192
"""So many forms' sizes are remembered, the last ones seen."""


class HostMemory:
    """Loaded adapters by digest. Thread-safe. The budget is kept as `Books` says.

    There is one lock. It guards the books, the residents and the claims, and is not taken twice: methods with a leading
    underscore are called under it, but for `_expected`, `_run_load` and `_look`. Nobody else's code runs under
    it: the registry is asked for sizes before, and whom a change concerns (futures, listeners, `vacate`, `wake`) is
    told by `_change` behind it. A form is read without it: it never changes, and goes when nobody holds its resident.
    """

    def __init__(
        self,
        load: Load,
        size_of: Callable[[str], int],
        *,
        budget_bytes: int,
        threads: int,
        vacate: Callable[[Resident], None],
        wake: Callable[[], None],
    ) -> None:
        self._load = load
        self._size_of = size_of
        self._vacate = vacate  # frees the resident's device slots on the engine's thread, which calls `emptied` then
        self._wake = wake  # has the engine look whether it is still stuck
        self._lock = threading.Lock()
        self._news: list[Callable[[], None]] = []
        self._serial = itertools.count(1)
        self.books = Books(budget_bytes)
        self._sizes: OrderedDict[str, int] = OrderedDict()  # of forms, as they were seen
        self._executor = loading_threads(threads)
        self._closed = False
        self._alarm = Alarm(self._look)
        self._trimming = Alarm(trim)
        self.listeners = Listeners()
        self.tally = HostTally()

    def close(self) -> None:
        """Ends the loading threads; loads that have not begun fail as Unavailable, as does what is asked later. For
        when the engine's thread has ended: what waits for it is let go."""
        with self._change():
            self._closed = True
            for resident in tuple(self.books.queue):
                self.books.dequeue(resident)
                self._give_up(resident, _stopping())
            for resident in tuple(self.books.leaving):
                if resident.vacating is not None:
                    self._gone(resident)
        self._alarm.close()
        self._trimming.close()
        self._executor.shutdown(wait=True)

    def hold(self, digest: str, claim: Claim) -> Resident:
        """The resident of a digest, loading if need be, kept for a row of `claim` until `release`.

        Raises InvalidArgument for one that would never fit, Unavailable when the memory is closed.
        """
        expected = self._expected(digest)
        with self._change():
            resident = self._touch(digest, expected, claim)
            (self.tally.misses if resident.form is None else self.tally.hits).add()
            resident.claims.append(claim)
            claim.residents.append(resident)
            return resident

    def release(self, resident: Resident, claim: Claim) -> None:
        """Ends one hold. What waited to load for nobody else is not loaded."""
        with self._change():
            resident.claims.remove(claim)
            claim.residents.remove(resident)
            if resident.claims:
                return
            if resident.queued and not resident.wanted:
                self.books.dequeue(resident)
                self._give_up(resident, _unwanted())
            elif resident.leaving is not None and resident.form is not None:
                self._leave(resident)

    def form(self, digest: str) -> ServingForm | None:
        """The form of a digest that is loaded, which counts as a use of it; None for all others."""
        with self._lock:
            resident = self.books.table.get(digest)
            if resident is None or resident.form is None:
                return None
            self.books.table.move_to_end(digest)
            return resident.form

    def load(self, digest: str) -> Future[float]:
        """Begins to load a digest; the future has the seconds it took, 0 if it was there.

        It has an error instead when there is no room: InvalidArgument if the pinned leave too little, QueueFull if what
        others use does for `BEYOND_SECONDS`.
        """
        expected = self._expected(digest)
        with self._change():
            resident = self._touch(digest, expected, None)
            resident.asked = True
            if resident.form is None:
                return resident.loading
        done: Future[float] = Future()
        done.set_result(0.0)
        return done

    def unload(self, digest: str) -> Future[int]:
        """Takes a digest out of the table. Its memory goes when the rows that hold it have finished and the device is
        free of it; then the future has the bytes.

        Raises InvalidArgument for a pinned adapter.
        """
        with self._change():
            resident = self.books.table.get(digest)
            if resident is not None and resident.pinned:
                raise InvalidArgument(f"{digest} is pinned; unpin it before unloading.", field="adapter")
            freed: Future[int] = Future()
            if resident is None:
                freed.set_result(0)
                return freed
            self._take_out(resident, freed)
            resident.unloaded = True
            self.tally.unloads.add()
            if not resident.claims:
                if resident.form is not None:
                    self._leave(resident)
                elif resident.queued:
                    self.books.dequeue(resident)
                    self._give_up(resident, Unavailable("The adapter was unloaded while it waited to load."))
            return freed

    def emptied(self, resident: Resident) -> None:
        """The engine's thread is free of a resident that nobody holds, and was the last to need its form.

        What was unloaded on demand goes back to the system a little later, with what is unloaded until then; what gave
        way to another adapter is kept for that one.
        """
        with self._change():
            if resident in self.books.leaving:
                self._gone(resident)

    def pin(self, digest: str, pinned: bool) -> None:
        """Keeps a digest in host memory whatever the load (loading it if need be), or lets it go again.

        Raises InvalidArgument when the pinned adapters would take more than the budget. A form's size is known once it
        was loaded: if that does not fit, the pin is undone, and whoever waits for the load gets the same error.
        """
        expected = self._expected(digest) if pinned else 0
        with self._change():
            if pinned:
                others = self.books.pinned_bytes(besides=digest)
                if others + expected > self.books.budget:
                    raise beside_pins("pinned", digest, others, self.books.budget, expected)
                self._touch(digest, expected, None).pinned = True
            elif digest in self.books.table:
                self.books.table[digest].pinned = False

    def residency(self, digest: str) -> ResidencyInfo:
        """What of a digest is in memory, residents that are leaving counted in."""
        with self._lock:
            return self.books.residency(digest)

    def resident(self) -> tuple[str, ...]:
        """The digests that are loaded."""
        with self._lock:
            return tuple(digest for digest, r in self.books.table.items() if r.form is not None)

    def counts(self) -> HostCounts:
        """How many adapters are here; those that are leaving count until they have left."""
        with self._lock:
            return self.books.counts()

    def relieve(self) -> None:
        """Rows wait and none can run: if that is because they hold what others of them need, the next request's loads
        go beyond the budget. While a load is under way nothing is done; `wake` is called when it has ended."""
        with self._change(stuck=True):
            pass

    @property
    def used_bytes(self) -> int:
        """Host memory that adapters take: those that load, are loaded, or have not left yet."""
        return self.books.taken

    @property
    def budget_bytes(self) -> int:
        """The most that they may take together; see `Books`."""
        return self.books.budget

    def meanwhile(self, work: Callable[[], None]) -> Callable[[], None]:
        """For a loading thread: see `beside`."""
        return beside(self._executor, work)

    @contextmanager
    def _change(self, *, stuck: bool = False) -> Iterator[None]:
        """A change under the lock, and what follows from it; whom it concerns is told when the lock is free again."""
        news: list[Callable[[], None]] = []
        try:
            with self._lock:
                try:
                    yield
                finally:
                    try:
                        self._settle(stuck=stuck)
                    finally:
                        news, self._news = self._news, news
        finally:
            for tell in news:
                try:
                    tell()
                except Exception:
                    log.exception("not everybody could be told of a change in memory")

    def _settle(self, *, stuck: bool) -> None:
        if not self._closed:
            turn, now = Turn(), time.monotonic()
            self.books.settle(turn, now, stuck=stuck)
            self._follow(turn)
            if (due := self.books.due(now)) is not None:
                self._alarm.by(due)

    def _follow(self, turn: Turn) -> None:
        """Does what the books have decided."""
        for resident in turn.evict:
            resident.leaving = Future()
            self.tally.evictions.add()
            self._news.append(partial(self._vacate, resident))
        for resident, error in turn.refuse:
            self._refused(resident, error)
        for resident in turn.begin:
            self._executor.submit(self._run_load, resident)

    def _look(self) -> None:
        with self._change():
            pass

    def _expected(self, digest: str) -> int:
        """What a digest takes in memory: as it was seen, or else as its files are, which may be more than what is made
        of them. Raises InvalidArgument for what would never fit."""
        current = self.books.table.get(digest)
        if current is not None:
            return current.size
        size, budget = self._sizes.get(digest), self.books.budget
        if size is None:
            files = self._size_of(digest)
            size = files if files > FILES_FOR_FORM * budget else min(files, budget)
        if size > budget:
            raise too_large(digest, size, budget)
        return size

    def _touch(self, digest: str, expected: int, claim: Claim | None) -> Resident:
        resident = self.books.table.get(digest)
        if resident is not None and self.books.closed_to(resident, claim):
            self._take_out(resident, Future())
            self.tally.evictions.add()
            if not resident.claims and resident.form is not None:
                self._leave(resident)
            resident = None
        if resident is None:
            if self._closed:
                raise _stopping()
            resident = Resident(key=f"{digest}#{next(self._serial)}", digest=digest, size=expected)
            self.books.table[digest] = resident
            self.books.enqueue(resident, time.monotonic())
        self.books.table.move_to_end(digest)
        return resident

    def _run_load(self, resident: Resident) -> None:
        """On a loading thread. Whatever goes wrong, `loading` is answered: nobody looks at what the executor has."""
        began = time.monotonic()
        form = _stopping() if self._closed else attempted(self._load, resident.digest)
        seconds = time.monotonic() - began
        if isinstance(form, AdapterbayError):
            for error in (form, form.__cause__):
                traceback.clear_frames(error.__traceback__ if error is not None else None)  # they hold its files
        with self._change():
            self.books.loads -= 1
            try:
                if isinstance(form, AdapterbayError):
                    self._failed(resident, form)
                else:
                    self._loaded(resident, form, seconds)
            except BaseException as mistake:
                log.exception("a loaded adapter could not be taken in")
                self._failed(resident, EngineFault(f"Loading {resident.digest} failed: {mistake!r}"))
            if not self.books.loads and any(each.claims for each in self.books.queue):
                self._news.append(self._wake)

    def _loaded(self, resident: Resident, form: ServingForm, seconds: float) -> None:
        digest, size, budget = resident.digest, form.bytes, self.books.budget
        self._sizes[digest] = size
        self._sizes.move_to_end(digest)
        if len(self._sizes) > KNOWN_SIZES:
            self._sizes.popitem(last=False)
        if size > budget:
            self._failed(resident, too_large(digest, size, budget))
            return
        turn = Turn()
        stays = self.books.loaded(resident, size, turn, time.monotonic())
        self._follow(turn)
        if stays:
            resident.form = form
            self.tally.load_seconds.add(seconds)
            self._news.append(partial(self.listeners.tell, "loaded", digest))
            self._news.append(partial(resident.loading.set_result, seconds))
            if resident.leaving is not None and not resident.claims:
                self._leave(resident)
        elif resident.queued and (self._closed or not resident.wanted):
            self.books.dequeue(resident)
            self._give_up(resident, _stopping() if self._closed else _unwanted())

    def _failed(self, resident: Resident, error: AdapterbayError) -> None:
        self.books.gone(resident)
        self._refused(resident, error)

    def _refused(self, resident: Resident, error: AdapterbayError) -> None:
        self.tally.failures.add(error.reason)
        self._news.append(partial(self.listeners.tell, "load_failed", resident.digest, error.message))
        self._give_up(resident, error)

    def _give_up(self, resident: Resident, error: AdapterbayError) -> None:
        """A resident that is not taking memory will not be loaded."""
        if self.books.table.get(resident.digest) is resident:
            del self.books.table[resident.digest]
        if resident.leaving is not None:
            self.books.leaving.remove(resident)
            self._news.append(partial(resident.leaving.set_result, 0))
        self._news.append(partial(resident.loading.set_exception, error))

    def _take_out(self, resident: Resident, freed: Future[int]) -> None:
        """Nobody new will find it."""
        del self.books.table[resident.digest]
        resident.leaving = freed
        self.books.leaving.append(resident)

    def _leave(self, resident: Resident) -> None:
        """Nobody holds a loaded resident that was taken out: the engine's thread is to let go of it."""
        self.books.leave(resident)
        if self._closed:  # there is no such thread any more
            self._gone(resident)
        else:
            self._news.append(partial(self._vacate, resident))

    def _gone(self, resident: Resident) -> None:
        """Nothing needs the form of a resident that leaves."""
        assert resident.leaving is not None
        self.books.leaving.remove(resident)
        self.books.gone(resident)
        resident.form = None
        if resident.unloaded:
            self._trimming.by(time.monotonic() + DELAY_SECONDS)
        self._news.append(partial(self.listeners.tell, "unloaded", resident.digest))
        self._news.append(partial(resident.leaving.set_result, resident.vacating or 0))


def _stopping() -> Unavailable:
    return Unavailable("The server is stopping.")


def _unwanted() -> Unavailable:
    return Unavailable("Nobody waits for this load any more.")
