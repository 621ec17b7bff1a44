"""What is known of an adapter that is loading or loaded, and where its weights are."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum

from adapterbay.server.adapters.claims import Claim
from adapterbay.server.adapters.forms import ServingForm


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
    """One loading or loaded adapter. `key` names it in the device's pools and is never used twice.

    [engine] fields belong to the engine's thread, all others to `HostMemory` under its lock.
    """

    key: str
    digest: str
    size: int  # expected bytes until the form is there
    loading: Future[float] = field(default_factory=Future)  # seconds
    form: ServingForm | None = None
    claims: list[Claim] = field(default_factory=list)  # one entry for each row that waits or runs on it
    seats: int = 0  # [engine] rows of the batch that compute with it
    on_device: bool = False  # [engine]
    pinned: bool = False
    asked: bool = False  # somebody wants it loaded whether rows come or not
    queued: bool = False  # waits for room
    queued_at: float = 0.0  # time.monotonic()
    leaving: Future[int] | None = None  # it is out of the table; the bytes that go, once they have gone
    vacating: int | None = None  # nobody holds it: what goes with it, once the engine's thread is free of it
    unloaded: bool = False  # on demand: its memory is to go back to the system

    @property
    def holds(self) -> int:
        """How many rows wait or run on it."""
        return len(self.claims)

    @property
    def wanted(self) -> bool:
        """Whether somebody wants it loaded."""
        return bool(self.claims) or (self.leaving is None and (self.pinned or self.asked))

    @property
    def idle(self) -> bool:
        """Whether it may give way."""
        return self.form is not None and not self.claims and not self.pinned

    @property
    def ready(self) -> ServingForm:
        """The form of a loaded adapter."""
        if self.form is None:
            raise RuntimeError(f"{self.digest} is not loaded")
        return self.form
