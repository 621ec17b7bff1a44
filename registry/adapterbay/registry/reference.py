"""The written grammar of adapter references. `parse` and `str` are inverse functions.

    reference  = name [ "@" selector ]  |  "hub:" org "/" repo [ "@" revision ]
    name       = segment *( "/" segment )          at most 128 characters, at most 8 segments
    segment    = [a-z0-9] *[a-z0-9._-]             no "..", no trailing ".", not a device name of Windows
    selector   = version | alias | digest | "latest"
    version    = [1-9][0-9]*                       at most 18 digits
    alias      = [a-z] *[a-z0-9_-]                 at most 64 characters, not "latest"
    digest     = "sha256:" 64 hex digits, lower case
    revision   = version | "v" version | commit | digest | "latest" | any tag or branch
    commit     = 40 hex digits, lower case

A bare name and `NAME@latest` mean the same: the newest version. Printing gives the bare name.
ASCII only, so no two names look alike; lower case only, so they are files of their own on every file system.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from adapterbay.registry.digest import is_digest
from adapterbay.registry.errors import InvalidReference

MAX_NAME: Final = 128
MAX_SEGMENTS: Final = 8
MAX_ALIAS: Final = 64
LATEST: Final = "latest"

_SEGMENT = re.compile(r"[a-z0-9][a-z0-9._-]*")
_ALIAS = re.compile(rf"[a-z][a-z0-9_-]{{0,{MAX_ALIAS - 1}}}")
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
_HUB_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_HUB_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,254}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
WINDOWS_DEVICES = frozenset(
    {"con", "prn", "aux", "nul", *(f"com{n}" for n in range(10)), *(f"lpt{n}" for n in range(10))}
)


def check_name(name: str) -> str:
    """Returns `name` if it follows the grammar, else raises InvalidReference that says what is wrong."""
    if not name:
        raise InvalidReference("An adapter name is missing: give one such as team/sentiment.", field="name")
    if len(name) > MAX_NAME:
        raise InvalidReference(
            f"The adapter name {name[:40]!r}… has {len(name)} characters; {MAX_NAME} are allowed.", field="name"
        )
    segments = name.split("/")
    if len(segments) > MAX_SEGMENTS:
        raise InvalidReference(
            f"The adapter name {name!r} has {len(segments)} parts; {MAX_SEGMENTS} are allowed.", field="name"
        )
    for segment in segments:
        _check_segment(name, segment)
    return name


def _check_segment(name: str, segment: str) -> None:
    problem = None
    if not segment:
        problem = "it has an empty part: '/' stands between two parts only"
    elif _SEGMENT.fullmatch(segment) is None:
        problem = f"the part {segment!r} must begin with a-z or 0-9 and hold only a-z, 0-9, '.', '_' and '-'"
    elif ".." in segment or segment.endswith("."):
        problem = f"the part {segment!r} must not hold '..' nor end with '.'"
    elif segment.split(".", 1)[0] in WINDOWS_DEVICES:
        problem = f"{segment!r} is a device name on Windows"
    if problem:
        raise InvalidReference(f"{name!r} is not an adapter name: {problem}.", field="name")


def check_alias(alias: str) -> str:
    """Returns `alias` if it follows the grammar, else raises InvalidReference."""
    if alias == LATEST:
        raise InvalidReference("The alias 'latest' always means the newest version and cannot be set.", field="alias")
    if _ALIAS.fullmatch(alias) is None:
        raise InvalidReference(
            f"{alias[:80]!r} is not an alias: it must begin with a-z, hold only a-z, 0-9, '_' and '-', "
            f"and have at most {MAX_ALIAS} characters.",
            field="alias",
        )
    return alias


@dataclass(frozen=True, slots=True)
class Reference:
    """A version of an adapter: by number, by alias, by digest, or the newest one (`selector` None)."""

    name: str
    selector: int | str | None = None

    def __post_init__(self) -> None:
        check_name(self.name)
        if isinstance(self.selector, bool) or (isinstance(self.selector, int) and not 0 < self.selector < 10**18):
            raise InvalidReference(f"{self.selector} is not a version number: they begin at 1.", field="version")
        if isinstance(self.selector, str) and not is_digest(self.selector):
            check_alias(self.selector)

    @property
    def alias(self) -> str | None:
        """The alias, if the selector is one."""
        return self.selector if isinstance(self.selector, str) and not is_digest(self.selector) else None

    @property
    def digest(self) -> str | None:
        """The digest, if the selector is one."""
        return self.selector if isinstance(self.selector, str) and is_digest(self.selector) else None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Reads `NAME`, `NAME@3`, `NAME@champion` or `NAME@sha256:…`. Raises InvalidReference."""
        name, separator, selector = text.partition("@")
        if not separator or selector == LATEST:
            return cls(name)
        check_name(name)
        if _VERSION.fullmatch(selector):
            return cls(name, int(selector))
        if is_digest(selector) or _ALIAS.fullmatch(selector):
            return cls(name, selector)
        raise InvalidReference(
            f"{text[:200]!r} is not a reference: after '@' comes a version such as 3, an alias such as champion, "
            "or a digest such as sha256:… with 64 hex digits.",
            field="adapter",
        )

    def __str__(self) -> str:
        return self.name if self.selector is None else f"{self.name}@{self.selector}"


def check_hub_part(part: str) -> str:
    """Returns the organization or repository of a Hub name if it can be one, else raises InvalidReference."""
    if _HUB_PART.fullmatch(part) is None or ".." in part or "--" in part:
        raise InvalidReference(f"{part[:100]!r} is not a part of a Hub repository name.", field="adapter")
    return part


@dataclass(frozen=True, slots=True)
class HubReference:
    """An adapter repository on the Hugging Face Hub. `revision` None is its newest version.

    A revision of digits alone is a version: `@3` and `@v3` mean the same version and are printed as they were written.
    """

    org: str
    repo: str
    revision: str | None = None

    def __post_init__(self) -> None:
        check_hub_part(self.org)
        check_hub_part(self.repo)
        revision = self.revision
        if revision is None or is_digest(revision):
            return
        if _HUB_REVISION.fullmatch(revision) is None or ".." in revision or revision == LATEST:
            raise InvalidReference(f"{revision[:100]!r} is not a Hub revision.", field="adapter")

    @property
    def name(self) -> str:
        """`ORG/REPO`."""
        return f"{self.org}/{self.repo}"

    @property
    def version(self) -> int | None:
        """The version, if the revision is one (`3` or `v3`)."""
        number = (self.revision or "").removeprefix("v")
        return int(number) if _VERSION.fullmatch(number) else None

    @property
    def commit(self) -> str | None:
        """The commit, if the revision is one."""
        return self.revision if self.revision and _COMMIT.fullmatch(self.revision) else None

    @property
    def digest(self) -> str | None:
        """The digest, if the revision is one."""
        return self.revision if self.revision and is_digest(self.revision) else None

    @classmethod
    def parse(cls, text: str) -> HubReference:
        """Reads `hub:ORG/REPO` or `hub:ORG/REPO@REVISION`. Raises InvalidReference."""
        body = text.removeprefix("hub:")
        path, separator, revision = body.partition("@")
        org, slash, repo = path.partition("/")
        if body == text or not slash:
            raise InvalidReference(f"{text[:200]!r} is not a Hub reference: hub:ORG/REPO@REVISION.", field="adapter")
        return cls(org, repo, revision if separator and revision != LATEST else None)

    def __str__(self) -> str:
        return f"hub:{self.org}/{self.repo}" + ("" if self.revision is None else f"@{self.revision}")


AnyReference = Reference | HubReference


def parse_reference(text: str) -> AnyReference:
    """Reads any adapter reference. Raises InvalidReference."""
    return HubReference.parse(text) if text.startswith("hub:") else Reference.parse(text)
