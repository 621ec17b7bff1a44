"""The host budget's books: who has memory, who waits for it, and whose turn it is."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from adapterbay.registry.errors import AdapterbayError, InvalidArgument, QueueFull
from adapterbay.server.adapters.claims import Claim
from adapterbay.server.adapters.residency import Residency, ResidencyInfo, Resident
from adapterbay.server.adapters.tally import HostCounts

PASSED_SECONDS: Final = 1.0
"""A load that rows wait for and that finds no room is passed by those that do for so long. Then what becomes free is
kept for it."""
BEYOND_SECONDS: Final = 10.0
"""A load that rows wait for goes beyond the budget after so long, and one that nobody waits for is refused."""
FILES_FOR_FORM: Final = 2
"""Files may be so many times larger than the budget: copies of the base's weights in them are not kept."""


@dataclass(slots=True)
class Turn:
    """What a look at the books has decided."""

    begin: list[Resident] = field(default_factory=list)  # to be loaded, counted already
    evict: list[Resident] = field(default_factory=list)  # out of the table
    refuse: list[tuple[Resident, AdapterbayError]] = field(default_factory=list)  # out of the queue and the table


class Books:
    """Adapters by digest, the least recently used first, and those that wait for room. Not thread-safe; knows nothing
    of threads, and decides only: `HostMemory` does it.

    Bytes are taken from the moment a load begins until the engine's thread has let go of the form.

    Who waits, in order: a load begins when there is room or others can give way. One that finds none is passed by those
    that do. For a load that rows wait for, what becomes free is kept after `passed_seconds`, and it goes beyond the
    budget after `beyond_seconds`, or when nothing runs, or at once when the pinned leave no room that it could ever
    have. Only one request goes beyond the budget at a time, with all that it needs. Whoever comes anew for what it took
    while others wait does not join it, but queues behind them: so its turn ends with the rows that are there.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.passed_seconds = PASSED_SECONDS
        self.beyond_seconds = BEYOND_SECONDS
        self.table: OrderedDict[str, Resident] = OrderedDict()
        self.leaving: list[Resident] = []
        self.queue: list[Resident] = []
        self.taken = 0  # bytes of all that load, are loaded, or leave
        self.vacating = 0  # those of them that go as soon as the engine's thread comes to it
        self.loads = 0  # under way
        self._beyond: list[Resident] = []  # what was loaded although there was no room, while the budget is exceeded

    def pinned_bytes(self, besides: str = "") -> int:
        """What the pinned take or will take."""
        return sum(r.size for r in self.table.values() if r.pinned and r.digest != besides)

    def closed_to(self, resident: Resident, claim: Claim | None) -> bool:
        """Whether a request does not join those that use an adapter: it went beyond the budget, and others wait."""
        if claim is None or resident.pinned or resident not in self._beyond or claim in resident.claims:
            return False
        return self.taken > self.budget and any(r.claims for r in self.queue)

    def enqueue(self, resident: Resident, now: float, *, first: bool = False) -> None:
        """A resident waits for room from `now` on; when it was loaded and waits again, too."""
        resident.queued, resident.queued_at = True, now
        self.queue.insert(0 if first else len(self.queue), resident)

    def dequeue(self, resident: Resident) -> None:
        """It waits no more."""
        self.queue.remove(resident)
        resident.queued = False

    def loaded(self, resident: Resident, size: int, turn: Turn, now: float) -> bool:
        """A form is there, and its size is known. False when it cannot stay: it is larger than expected and waits again
        for others to give way, or it is refused. A pin that does not fit beside the others is undone."""
        larger = size > resident.size
        self.taken += size - resident.size
        resident.size = size
        if resident.pinned and self.pinned_bytes() > self.budget:
            resident.pinned = False
            if not resident.claims:
                self.taken -= size
                others = self.pinned_bytes()
                turn.refuse.append((resident, beside_pins("pinned", resident.digest, others, self.budget, size)))
                return False
        if not larger or resident in self._beyond:
            return True
        going = self._least_recent(self.taken - self.vacating - self.budget)
        if going is None:
            self.taken -= size
            self.enqueue(resident, now, first=True)
            return False
        turn.evict += self._evict(going)
        return True

    def gone(self, resident: Resident) -> None:
        """Nothing is left of a resident that loaded or was loaded."""
        self.taken -= resident.size
        if resident.vacating is not None:
            self.vacating -= resident.size
        if resident in self._beyond:
            self._beyond.remove(resident)

    def leave(self, resident: Resident) -> None:
        """Nobody holds a resident that is out of the table; its bytes count until `gone`."""
        resident.vacating = resident.size * (2 if resident.on_device else 1)
        self.vacating += resident.size

    def settle(self, turn: Turn, now: float, *, stuck: bool = False) -> None:
        """Whatever can be done now: who went beyond the budget gives way, and loads begin or are refused. `stuck` says
        that rows wait and none can run."""
        if self.taken <= self.budget:
            self._beyond.clear()
        elif self.taken - self.vacating > self.budget:
            turn.evict += self._evict(self._idle_first(self.taken - self.vacating - self.budget))
        if not self.queue:
            return
        stuck = stuck and not self.loads and not self.vacating and not self._somebody_can_run()
        idle = sum(r.size for r in self.table.values() if r.idle)
        pinned = self.pinned_bytes()
        promised, kept = 0, False  # bytes that others were evicted for; whether room is kept for who waits longest
        for resident in tuple(self.queue):
            waited = now - resident.queued_at
            others = pinned - (resident.size if resident.pinned else 0)
            never = others + resident.size > self.budget
            if not never and not kept:
                missing = self.taken - self.vacating + promised + resident.size - self.budget
                if missing <= idle:
                    going = self._least_recent(missing)
                    assert going is not None
                    idle -= sum(r.size for r in going)
                    turn.evict += self._evict(going)
                    if self.taken + promised + resident.size <= self.budget:
                        self._begin(resident, turn)
                    else:
                        promised += resident.size  # when they have gone, this is tried again
                    continue
            if resident.claims:
                if self._may_exceed(resident, overdue=never or stuck or waited >= self.beyond_seconds):
                    self._beyond.append(resident)
                    self._begin(resident, turn)
                elif not never and waited >= self.passed_seconds:
                    kept = True
            elif never:
                self._refuse(resident, beside_pins("loaded", resident.digest, others, self.budget, resident.size), turn)
                pinned = others
            elif waited >= self.beyond_seconds:
                self._refuse(resident, _no_room(resident, self.budget, self.beyond_seconds), turn)
                pinned = others

    def due(self, now: float) -> float | None:
        """When time alone may change something, as `now` counts; None if it cannot."""
        steps = (self.passed_seconds, self.beyond_seconds)
        moments = [r.queued_at + seconds for r in self.queue for seconds in steps]
        return min((moment for moment in moments if moment > now), default=None)

    def residency(self, digest: str) -> ResidencyInfo:
        """What of a digest is in memory, residents that are leaving counted in."""
        current = self.table.get(digest)
        all_of_it = [r for r in self.leaving if r.digest == digest] + ([current] if current else [])
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

    def counts(self) -> HostCounts:
        """How many adapters are here; those that are leaving count until they have left."""
        everyone = (*self.table.values(), *self.leaving)
        loaded = sum(r.form is not None for r in everyone)
        queued = sum(r.queued for r in everyone)
        return HostCounts(
            loaded=loaded,
            on_device=sum(r.on_device for r in everyone),
            pinned=sum(r.pinned for r in self.table.values()),
            loading=len(everyone) - loaded - queued,
            queued=queued,
        )

    def _begin(self, resident: Resident, turn: Turn) -> None:
        self.dequeue(resident)
        self.taken += resident.size
        self.loads += 1
        turn.begin.append(resident)

    def _refuse(self, resident: Resident, error: AdapterbayError, turn: Turn) -> None:
        self.dequeue(resident)
        turn.refuse.append((resident, error))

    def _somebody_can_run(self) -> bool:
        """Whether a request has all of its adapters: the engine may not have heard of it yet."""
        return any(claim.complete for r in (*self.table.values(), *self.leaving) for claim in r.claims)

    def _may_exceed(self, resident: Resident, *, overdue: bool) -> bool:
        """Whether a load may begin although there is no room: it is the first, or one request's whose turn it is."""
        self._beyond = [r for r in self._beyond if not r.pinned]
        if not self._beyond:
            return overdue
        holders = {claim for r in self._beyond for claim in r.claims}
        if not holders or any(claim.complete for claim in holders):
            return False  # it will be let go
        return min(holders, key=lambda claim: claim.serial) in resident.claims

    def _idle_first(self, missing: int) -> list[Resident]:
        """Who gives way so that less is taken beyond the budget: first who went beyond it; all of them if need be."""
        going = []
        for resident in (*self._beyond, *self.table.values()):
            if missing > 0 and resident.idle and resident not in going and resident.leaving is None:
                going.append(resident)
                missing -= resident.size
        return going

    def _least_recent(self, missing: int) -> list[Resident] | None:
        """Who gives way so that so much becomes free; None if all of them would not be enough."""
        going = []
        for resident in self.table.values():
            if missing <= 0:
                break
            if resident.idle:
                going.append(resident)
                missing -= resident.size
        return going if missing <= 0 else None

    def _evict(self, going: list[Resident]) -> list[Resident]:
        for resident in going:
            del self.table[resident.digest]
            self.leaving.append(resident)
            self.leave(resident)
        return going


def too_large(digest: str, size: int, budget: int) -> InvalidArgument:
    """An adapter that does not fit, whoever gives way."""
    return InvalidArgument(
        f"{digest} takes {size} bytes; the host budget for all adapters is {budget}. Raise host_bytes.", field="adapter"
    )


def beside_pins(what: str, digest: str, pinned: int, budget: int, size: int) -> InvalidArgument:
    """What cannot be `what` because of the pinned."""
    return InvalidArgument(
        f"{digest} cannot be {what}: the pinned adapters take {pinned} bytes of the host budget of {budget}, and it "
        f"takes {size}. Unpin one, or raise host_bytes.",
        field="adapter",
    )


def _no_room(resident: Resident, budget: int, seconds: float) -> QueueFull:
    return QueueFull(
        f"{resident.digest} cannot be loaded: all of the host budget of {budget} bytes is in use or pinned, and it "
        f"takes {resident.size}. Try again when fewer rows run, or raise host_bytes.",
        retry_after_seconds=seconds,
    )
