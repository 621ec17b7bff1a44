"""What may change about a version after its push: who points at it, what is said of it, and whether it is there."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from adapterbay.registry.errors import Conflict, InvalidArgument, NotFound
from adapterbay.registry.gate import Comparison, Guard
from adapterbay.registry.local import queries
from adapterbay.registry.local.blobs import BlobStore, Staged
from adapterbay.registry.local.commit import Force, Writer, unknown_name, unknown_version
from adapterbay.registry.local.index import Index
from adapterbay.registry.local.reading import Reader
from adapterbay.registry.local.records import EVERY_ADAPTER, Change
from adapterbay.registry.reference import check_alias, check_name
from adapterbay.registry.views import ANY, AliasMove, AnyVersion

MAX_TEXT: Final = 4_000
_TAG_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,63}")


class Lifecycle(Reader):
    """A registry that can be changed. `by` is who the changes are recorded for."""

    def __init__(self, blobs: BlobStore, index: Index, writer: Writer, by: str) -> None:
        super().__init__(blobs, index)
        self.writer = writer
        self.by = by

    def set_alias(
        self,
        name: str,
        alias: str,
        version: int,
        *,
        expected: int | AnyVersion | None = ANY,
        force: Force | None = None,
    ) -> AliasMove:
        """Points an alias at a version, if it points at `expected` now (None: if it is not set; ANY: in any case).

        `force` overrules the alias's guard, and is recorded. Raises StaleAlias with both versions, PromotionRefused,
        NotFound for an unknown adapter or version, InvalidReference.
        """
        check_alias(check_name(name) and alias)
        return self.writer.set_alias(name, alias, version, by=self.by, expected=expected, force=force)

    def remove_alias(self, name: str, alias: str, *, expected: int | AnyVersion | None = ANY) -> AliasMove:
        """Removes an alias, if it points at `expected` now. Raises StaleAlias or NotFound."""
        check_alias(check_name(name) and alias)
        return self.writer.remove_alias(name, alias, by=self.by, expected=expected)

    def rollback(self, name: str, alias: str, *, force: Force | None = None) -> AliasMove:
        """Points an alias at where it was before its last move; a second rollback goes one move further back.

        Checked by the alias's guard as any move is. Raises NotFound if it never was elsewhere, or if the version it
        was at is deleted; PromotionRefused; StaleAlias if somebody moves it at this moment.
        """
        check_alias(check_name(name) and alias)
        places: list[int | None] = []
        for event in self.history(name):
            if event.alias != alias or event.kind not in ("alias_set", "alias_removed"):
                continue
            if event.detail.get("rollback") and len(places) > 1:
                places.pop()
            else:
                places.append(event.version if event.kind == "alias_set" else None)
        current = places.pop() if places else None
        earlier = [place for place in places if place is not None]
        if not earlier:
            what = f"was never set on {name}" if current is None else f"is at {current}, where it was first set"
            raise NotFound(f"There is nothing to go back to: {alias} {what}.")
        return self.writer.set_alias(name, alias, earlier[-1], by=self.by, expected=current, force=force, rollback=True)

    def tag(
        self, name: str, version: int, tags: Mapping[str, str] | None = None, *, remove: Sequence[str] = ()
    ) -> dict[str, str]:
        """Sets and removes tags of a version (a key, and a value that may be empty). Returns all that it has now.

        Raises NotFound, also for a tag to remove that is not there, or InvalidArgument.
        """
        wanted = dict(tags or {})
        for key, value in wanted.items():
            if _TAG_KEY.fullmatch(key) is None:
                raise InvalidArgument(
                    f"{key[:80]!r} is no tag: at most 64 of A-Z, a-z, 0-9, '.', '_', '/', '-'.",
                    field="tag",
                )
            _check_text(value, "tag")
        if not wanted and not remove:
            raise InvalidArgument("Say which tags to set or to remove.", field="tag")

        def build(db: sqlite3.Connection, at: str) -> Iterator[Change]:
            record = queries.version(db, check_name(name), version)
            if record is None:
                raise unknown_version(db, name, version)
            missing = [key for key in remove if key not in record.tags]
            if missing:
                raise NotFound(f"{name}@{version} has no tag {missing[0][:80]}.", near=sorted(record.tags)[:3])
            yield self._about(name, version, "tagged", at, {"set": wanted, "removed": list(remove)})

        self.writer.change(build)
        return dict(self.version(name, version).tags)

    def deprecate(self, name: str, version: int, reason: str | None) -> None:
        """Says that a version should not be used any more, and why; None takes it back. It stays usable. NotFound."""
        if reason is not None:
            _check_text(reason, "reason", needed=True)

        def build(db: sqlite3.Connection, at: str) -> Iterator[Change]:
            record = queries.version(db, check_name(name), version)
            if record is None:
                raise unknown_version(db, name, version)
            if record.deprecated != reason:
                yield self._about(name, version, "deprecated", at, {"reason": reason})

        self.writer.change(build)

    def delete(self, name: str, version: int, reason: str = "") -> None:
        """Takes a version away for good. Its number and digest stay known and its number is never used again.

        Its files are removed by the next `gc`. Raises Conflict (ALIASED) while an alias points at it, or NotFound.
        """
        _check_text(reason, "reason")

        def build(db: sqlite3.Connection, at: str) -> Iterator[Change]:
            if queries.version_by_number(db, check_name(name), version) is None:
                raise unknown_version(db, name, version)
            pointing = [alias for alias, number in queries.aliases(db, name).items() if number == version]
            if pointing:
                raise Conflict(
                    f"{name}@{version} is {', '.join(pointing)}: move or remove the alias before you delete it.",
                    reason="ALIASED",
                )
            yield self._about(name, version, "deleted", at, {"reason": reason})

        self.writer.change(build)

    def guard(self, name: str | None, alias: str, guard: Guard | None) -> None:
        """Demands that versions meet `guard` before `alias` may point at them; None takes the guard away.

        `name` None: the alias of every adapter, beside what an adapter's own guard demands. The version that the alias
        points at now is not asked. Raises NotFound.
        """
        check_alias(alias)
        place = EVERY_ADAPTER if name is None else check_name(name)

        def build(db: sqlite3.Connection, at: str) -> Iterator[Change]:
            if name is not None and queries.newest_version(db, name) is None:
                raise unknown_name(db, name)
            there = queries.guards(db, place)
            if guard is None:
                if alias not in there:
                    raise NotFound(
                        f"{alias if name is None else f'{name}@{alias}'} is not guarded.", near=sorted(there)
                    )
                yield Change("guard_removed", place, at, self.by, alias=alias)
            else:
                yield Change("guard_set", place, at, self.by, alias=alias, detail=guard.to_document())

        self.writer.change(build)

    def record_comparison(self, name: str, version: int, comparison: Comparison) -> None:
        """Records how a version did against another one, or against the base, as evidence for guards. NotFound."""
        self._change_version(name, version, "compared", comparison.to_document())

    def attach_signature(self, name: str, version: int, bundle: bytes, *, key: str | None = None) -> None:
        """Stores the signature of a version; `key` is the fingerprint of the public key. Raises NotFound."""
        with self.blobs.staging() as staging:
            staged = staging.add_bytes(bundle)
            detail = {"signature": staged.digest, "size": staged.size, **({"key": key} if key else {})}
            self._change_version(name, version, "signed", detail, [staged])

    def _change_version(
        self, name: str, version: int, kind: Any, detail: Mapping[str, Any], files: Sequence[Staged] = ()
    ) -> None:
        def build(db: sqlite3.Connection, at: str) -> Iterator[Change]:
            if queries.version_by_number(db, check_name(name), version) is None:
                raise unknown_version(db, name, version)
            yield self._about(name, version, kind, at, detail)

        self.writer.change(build, files)

    def _about(self, name: str, version: int, kind: Any, at: str, detail: Mapping[str, Any]) -> Change:
        return Change(kind, name, at, self.by, version, detail=detail)


def _check_text(text: str, field: str, *, needed: bool = False) -> None:
    if needed and not text.strip():
        raise InvalidArgument(f"The {field} is missing.", field=field)
    if len(text) > MAX_TEXT or not all(character.isprintable() or character == "\n" for character in text):
        raise InvalidArgument(f"The {field} must be printable text of at most {MAX_TEXT} characters.", field=field)
