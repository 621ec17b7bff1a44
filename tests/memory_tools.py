"""A host memory over forms of chosen sizes, whose engine does what a test says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from adapterbay.registry import Manifest, Registry
from adapterbay.registry.errors import Corrupted
from adapterbay.server.adapters.claims import Claim
from adapterbay.server.adapters.forms import LinearForm, ServingForm
from adapterbay.server.adapters.memory import HostMemory
from adapterbay.server.adapters.residency import Resident

SECONDS = 20


class Memory:
    """A host memory over forms of chosen sizes. `files` is what the registry says, `forms` what comes of it."""

    def __init__(self, manifest: Manifest, budget: int, files: Mapping[str, int], forms: Mapping[str, int]) -> None:
        self.gates: dict[str, threading.Event] = {}
        self.loads: list[str] = []
        self.vacated: list[str] = []
        self._manifest = manifest
        self._forms = {**files, **forms}
        self.vacating: list[Resident] = []
        self.engine_stands = False
        self.wakes = 0
        self.host = HostMemory(
            self._load,
            files.__getitem__,
            budget_bytes=budget,
            threads=2,
            vacate=self._vacate,
            wake=self._wake,
        )

    def _load(self, digest: str) -> ServingForm:
        self.loads.append(digest)
        if digest in self.gates:
            assert self.gates[digest].wait(SECONDS)
        if digest.startswith("bad"):
            raise Corrupted(f"{digest} is not what it was.")
        form = LinearForm(bias=torch.zeros(self._forms[digest] // 4))
        return ServingForm(digest=digest, manifest=self._manifest, layers={"only": form})

    def _vacate(self, resident: Resident) -> None:
        """As the engine's thread does, which may stand still."""
        self.vacated.append(resident.digest)
        if self.engine_stands:
            self.vacating.append(resident)
        else:
            self.host.emptied(resident)

    def _wake(self) -> None:
        self.wakes += 1

    def hold(self, digest: str, claim: Claim | None = None) -> Resident:
        """A hold, by a request of its own unless `claim` says whose."""
        return self.host.hold(digest, claim or Claim())

    def release(self, resident: Resident) -> None:
        """Ends the last hold."""
        self.host.release(resident, resident.claims[-1])

    def used(self, digest: str, claim: Claim | None = None) -> Resident:
        """Holds until it is there."""
        resident = self.hold(digest, claim)
        resident.loading.result(SECONDS)
        return resident

    def touched(self, *digests: str) -> None:
        for digest in digests:
            self.release(self.used(digest))

    def step(self) -> None:
        """The engine comes to what it was told meanwhile."""
        for resident in self.vacating:
            self.host.emptied(resident)
        self.vacating.clear()


Make = Callable[..., Memory]


@contextmanager
def memories(registry: Registry) -> Iterator[Make]:
    """Makes memories, and closes them."""
    manifest = registry.manifest(registry.resolve("a0").digest)
    made: list[Memory] = []

    def memory(budget: int, files: Mapping[str, int], **forms: int) -> Memory:
        made.append(Memory(manifest, budget, files, forms))
        return made[-1]

    yield memory
    for each in made:
        each.host.close()
