"""What every registry can do, wherever its versions lie: a folder, the Hugging Face Hub, or a server of our own.

One conformance suite runs over all of them. A local registry (`adapterbay.registry.local`) can do more.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from adapterbay.registry.base import BaseReference
from adapterbay.registry.views import (
    AdapterSummary,
    AliasMove,
    AnyVersion,
    PushReceipt,
    RegistryEvent,
    Resolved,
    Snapshot,
    VerifyReport,
    VersionRecord,
)


@runtime_checkable
class Backend(Protocol):
    """A registry. References are text: NAME, NAME@3, NAME@champion or NAME@sha256:…, with names as it spells them.

    Every method raises errors of `adapterbay.registry.errors`: NotFound for what is not there, Unavailable if the place
    cannot be reached now.
    """

    def push(
        self,
        folder: str | Path,
        name: str,
        *,
        aliases: Sequence[str] = (),
        base: str | BaseReference | None = None,
        task: str | None = None,
        labels: Sequence[str] | None = None,
        parents: Sequence[str] = (),
        number: int | None = None,
    ) -> PushReceipt:
        """Stores a PEFT folder as the next version of `name`, whole or not at all, and moves `aliases` to it."""

    def resolve(self, reference: str) -> Resolved:
        """What a reference means now."""

    def snapshot(self, reference: str) -> Snapshot:
        """The files of what a reference means now, every byte checked."""

    def pull(self, reference: str, destination: str | Path) -> Path:
        """Writes a version as a folder that plain PEFT loads. Whole or not at all."""

    def version(self, name: str, version: int) -> VersionRecord:
        """One version."""

    def versions(self, name: str) -> list[VersionRecord]:
        """All versions of an adapter, the oldest first."""

    def adapters(self, prefix: str = "") -> list[AdapterSummary]:
        """All adapters whose name begins with `prefix`, by name."""

    def aliases(self, name: str) -> dict[str, int]:
        """The aliases of an adapter and the versions they point at."""

    def set_alias(self, name: str, alias: str, version: int, *, expected: int | AnyVersion | None = ...) -> AliasMove:
        """Points an alias at a version, if it points at `expected` now (None: if it is not set). Raises StaleAlias."""

    def remove_alias(self, name: str, alias: str, *, expected: int | AnyVersion | None = ...) -> AliasMove:
        """Removes an alias, if it points at `expected` now. Raises StaleAlias."""

    def rollback(self, name: str, alias: str) -> AliasMove:
        """Points an alias at where it was before its last move."""

    def history(self, name: str) -> list[RegistryEvent]:
        """What happened to an adapter, the oldest first, as far as the place remembers."""

    def verify(self, name: str | None = None) -> VerifyReport:
        """Reads everything and checks every digest."""

    def close(self) -> None:
        """Gives connections back."""
