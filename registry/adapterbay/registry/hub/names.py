"""What may be asked of a registry on the Hub: its place, the names in it, and references to versions.

A name here is `ORG/REPO` as the Hub spells it. In the registry `hub:ORG` a bare `REPO` means `ORG/REPO`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from adapterbay.registry.errors import InvalidReference
from adapterbay.registry.reference import HubReference, check_alias, check_hub_part

MAIN: Final = "main"

_MOVE = re.compile(r"moved from ([0-9a-f]{40})")
_TAG_OF_VERSION = re.compile(r"v([1-9][0-9]{0,17})")


@dataclass(frozen=True, slots=True)
class Namespace:
    """The place of a registry on the Hub: all repositories of `org`, or the one named `repo`."""

    org: str
    repo: str | None = None

    def __post_init__(self) -> None:
        for part in (self.org, self.repo):
            if part is not None:
                check_hub_part(part)

    @classmethod
    def parse(cls, place: str) -> Namespace:
        """Reads `hub:ORG` or `hub:ORG/REPO`; `hub:` may be left out. Raises InvalidReference."""
        org, _, repo = place.removeprefix("hub:").partition("/")
        if "@" in place:
            raise InvalidReference(f"{place[:200]!r} is no place: a registry is hub:ORG or hub:ORG/REPO, with no '@'.")
        return cls(org, repo or None)

    def __str__(self) -> str:
        return f"hub:{self.org}" + ("" if self.repo is None else f"/{self.repo}")

    def name(self, name: str) -> str:
        """`ORG/REPO` for a name of this registry. Raises InvalidReference for a name outside of it."""
        return self._inside(self._parsed(name), name)

    def reference(self, text: str) -> HubReference:
        """A reference of this registry: `REPO`, `ORG/REPO` or `hub:ORG/REPO`, and what follows '@'."""
        parsed = self._parsed(text)
        self._inside(parsed, text)
        return parsed

    def _parsed(self, text: str) -> HubReference:
        body = text.removeprefix("hub:")
        path, separator, revision = body.partition("@")
        if "/" not in path:
            path = f"{self.org}/{path}"
        if path.count("/") > 1:
            raise InvalidReference(
                f"{text[:200]!r} cannot be on the Hub: names there are ORG/REPO, so write one such as "
                f"{self.org}/{path.rpartition('/')[2]}.",
                field="adapter",
            )
        return HubReference.parse(f"hub:{path}{separator}{revision}")

    def _inside(self, parsed: HubReference, text: str) -> str:
        if parsed.org != self.org or self.repo not in (None, parsed.repo):
            raise InvalidReference(f"{text[:200]!r} is not in the registry {self}.", field="adapter")
        return parsed.name


def version_tag(version: int) -> str:
    """The tag of a version."""
    return f"v{version}"


def tagged_version(tag: str) -> int | None:
    """The version that a tag stands for, if it is the tag of one."""
    match = _TAG_OF_VERSION.fullmatch(tag)
    return int(match[1]) if match else None


def move_message(commit: str) -> str:
    """The message of a tag that is made to move it away from `commit`. The Hub shows it; our server goes by it."""
    return f"moved from {commit}"


def moved_from(message: object) -> str | None:
    """The commit in a message that `move_message` wrote."""
    match = _MOVE.fullmatch(message) if isinstance(message, str) else None
    return match[1] if match else None


def check_hub_alias(alias: str) -> str:
    """Returns an alias that can be a tag beside those of the versions. Raises InvalidReference."""
    check_alias(alias)
    if tagged_version(alias) is not None or alias == MAIN:
        raise InvalidReference(
            f"The alias {alias} cannot be on the Hub: {'the branch' if alias == MAIN else 'the tag of a version'} has "
            "that name.",
            field="alias",
        )
    return alias
