"""Copies versions from one registry to another, in any direction between a folder, the Hub and our own server.

Digests stay the same, since a copy is the portable folder of a version. Version numbers stay the same too: a number
that was deleted at the source is left out at the destination. Before anything is copied, everything is compared; a
number that means something else at the destination is a Conflict, and then nothing was done. What is there already is
not copied again, so a mirror that was killed goes on where it was. Tags, guards, deprecations and comparisons stay
behind: they are the source's own judgement.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from adapterbay.registry.backend import Backend
from adapterbay.registry.base import BaseReference
from adapterbay.registry.errors import (
    AdapterbayError,
    Conflict,
    Corrupted,
    InvalidArgument,
    NotFound,
    PromotionRefused,
)
from adapterbay.registry.hub.backend import HubRegistry
from adapterbay.registry.hub.names import check_hub_alias
from adapterbay.registry.portable import write_folder
from adapterbay.registry.reference import check_name
from adapterbay.registry.views import VersionRecord


@dataclass(frozen=True, slots=True)
class Copy:
    """A version to copy, or that was copied. `name` is the source's, `to` the destination's."""

    name: str
    to: str
    version: int
    digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class AliasCopy:
    """An alias to set, or that was set, at the destination. `previous` is where it pointed there; None: nowhere."""

    to: str
    alias: str
    version: int
    previous: int | None


@dataclass(frozen=True, slots=True)
class MirrorReport:
    """What a mirror does or did. `present` counts versions that were there; `left_out` says what was not, and why."""

    copied: tuple[Copy, ...]
    aliases: tuple[AliasCopy, ...]
    present: int
    left_out: tuple[str, ...]


@dataclass(slots=True)
class _Plan:
    copies: list[Copy] = field(default_factory=list)
    aliases: list[AliasCopy] = field(default_factory=list)
    present: int = 0
    left_out: list[str] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)

    def report(self) -> MirrorReport:
        return MirrorReport(tuple(self.copies), tuple(self.aliases), self.present, tuple(self.left_out))


def plan(
    source: Backend, destination: Backend, names: Mapping[str, str] | None = None, *, aliases: bool = True
) -> MirrorReport:
    """What `mirror` would do. `names` maps names of the source to those of the destination; None: all, unchanged.

    Raises Conflict with everything that stands in the way, InvalidArgument for names that cannot be at the destination,
    NotFound for names that are not at the source.
    """
    wanted = {found.name: found.name for found in source.adapters()} if names is None else dict(names)
    wanted = {name: _name_at(destination, name, to) for name, to in wanted.items()}
    if len(set(wanted.values())) != len(wanted):
        raise InvalidArgument("Two of the names mean one adapter at the destination: give each its own.", field="name")
    work = _Plan()
    for name, to in sorted(wanted.items()):
        _plan_adapter(source, destination, name, to, aliases, work)
    if work.conflicts:
        raise Conflict(
            f"Nothing was copied: {'; '.join(work.conflicts)}. Mirror under another name (NAME=OTHER) or into an empty "
            "registry.",
            reason="VERSION_TAKEN",
        )
    return work.report()


def mirror(
    source: Backend,
    destination: Backend,
    names: Mapping[str, str] | None = None,
    *,
    aliases: bool = True,
    base: str | BaseReference | None = None,
    progress: Callable[[Copy], None] = lambda _: None,
) -> MirrorReport:
    """Copies what `plan` says, the oldest version first, then sets the aliases. `base` says where the base is here.

    An alias that its guard at the destination holds back is named among `left_out`; the next run tries it again.
    Raises what `plan` raises; what a push raises (every version passes admission again); Corrupted if a version is not
    what its digest says; Conflict if the destination numbers versions by itself and counts otherwise.
    """
    found = plan(source, destination, names, aliases=aliases)
    for copy in found.copied:
        _copy(source, destination, copy, base)
        progress(copy)
    moved, refused = [], []
    for alias in found.aliases:
        try:
            destination.set_alias(alias.to, alias.alias, alias.version, expected=alias.previous)
        except PromotionRefused as error:
            refused.append(f"the alias {alias.to}@{alias.alias}: {error.message.rstrip('.')}")
        else:
            moved.append(alias)
    return replace(found, aliases=tuple(moved), left_out=(*found.left_out, *refused))


def parse_names(texts: Sequence[str]) -> dict[str, str] | None:
    """Reads `NAME` and `NAME=OTHER`; None for no names at all. Raises InvalidArgument."""
    found: dict[str, str] = {}
    for text in texts:
        name, separator, other = text.partition("=")
        if not name or (separator and not other) or name in found:
            raise InvalidArgument(f"{text[:200]!r}: give each adapter once, as NAME or NAME=OTHER.", field="name")
        found[name] = other if separator else name
    return found or None


def _name_at(destination: Backend, name: str, to: str) -> str:
    try:
        return destination.namespace.name(to) if isinstance(destination, HubRegistry) else check_name(to)
    except InvalidArgument as error:
        raise InvalidArgument(
            f"{error.message} Say its name at the destination: {name}=OTHER.", field="name"
        ) from error


def _plan_adapter(source: Backend, destination: Backend, name: str, to: str, aliases: bool, work: _Plan) -> None:
    there = _versions(destination, to)
    deleted = _deleted(destination, to)
    copied = set()
    for version in source.versions(name):
        number = version.version
        present = there.get(number)
        if present is not None and present.digest == version.digest:
            work.present += 1
        elif present is not None:
            work.conflicts.append(f"{to}@{number} is {present.digest} there and {version.digest} at the source")
        elif number in deleted:
            work.left_out.append(f"{to}@{number} was deleted at the destination")
            continue
        elif number <= max(there, default=0) or number <= max(deleted, default=0):
            work.conflicts.append(f"{to}@{number} cannot be made there any more: later versions are there")
        else:
            work.copies.append(Copy(name, to, number, version.digest, version.size_bytes))
        copied.add(number)
    if aliases:
        _plan_aliases(source, destination, name, to, copied, work)


def _plan_aliases(source: Backend, destination: Backend, name: str, to: str, versions: set[int], work: _Plan) -> None:
    now = _aliases(destination, to)
    for alias, number in source.aliases(name).items():
        if number not in versions:
            work.left_out.append(f"the alias {to}@{alias}: its version {number} is left out")
            continue
        if isinstance(destination, HubRegistry):
            try:
                check_hub_alias(alias)
            except InvalidArgument as error:
                work.left_out.append(f"the alias {to}@{alias}: {error.message.rstrip('.')}")
                continue
        if now.get(alias) != number:
            work.aliases.append(AliasCopy(to, alias, number, now.get(alias)))


def _versions(backend: Backend, name: str) -> dict[int, VersionRecord]:
    with contextlib.suppress(NotFound):
        return {version.version: version for version in backend.versions(name)}
    return {}


def _aliases(backend: Backend, name: str) -> dict[str, int]:
    with contextlib.suppress(NotFound):
        return backend.aliases(name)
    return {}


def _deleted(backend: Backend, name: str) -> set[int]:
    with contextlib.suppress(NotFound):
        return {event.version for event in backend.history(name) if event.kind == "deleted"}
    return set()


def _copy(source: Backend, destination: Backend, copy: Copy, base: str | BaseReference | None) -> None:
    snapshot = source.snapshot(f"{copy.name}@{copy.version}")
    if snapshot.manifest.digest != copy.digest:
        raise Corrupted(
            f"{copy.name}@{copy.version} is {snapshot.manifest.digest} instead of {copy.digest}: verify it."
        )
    with tempfile.TemporaryDirectory(prefix="adapterbay-mirror-") as place:
        folder = write_folder(snapshot, Path(place) / "version")
        try:
            receipt = destination.push(folder, copy.to, base=base, number=copy.version)
        except AdapterbayError as error:
            error.message = f"{copy.name}@{copy.version} could not be copied to {copy.to}: {error.message}"
            raise
    if receipt.digest != copy.digest:
        raise Corrupted(f"{copy.to}@{receipt.version} became {receipt.digest} on the way, not {copy.digest}.")
    if receipt.version != copy.version:
        raise Conflict(
            f"The destination made {copy.to}@{receipt.version} of version {copy.version}: it numbers versions by "
            "itself and cannot leave out the numbers that were deleted at the source.",
            reason="VERSION_TAKEN",
        )
