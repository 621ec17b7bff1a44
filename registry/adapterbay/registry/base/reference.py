"""How a base is named. `parse` and `str` are inverse functions.

hub:ORG/REPO[@REVISION]   a repository on the Hugging Face Hub; a bare ORG/REPO means the same
gguf:PATH                 a GGUF file; a plain path that ends in .gguf means the same
folder:PATH               a folder in Hugging Face format; a plain path to an existing folder, or one that begins
                          with /, ./, ../ or ~, means the same
package:NAME              weights inside the folder of an installed Python package
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, cast, get_args

from adapterbay.registry.errors import InvalidReference

Scheme = Literal["hub", "gguf", "folder", "package"]

_SCHEMES: Final = get_args(Scheme)
_HUB_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_HUB_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,254}")
_PACKAGE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_PATH_BEGINNINGS: Final = ("/", "./", "../", "~")


@dataclass(frozen=True, slots=True)
class BaseReference:
    """The name of a base model. `revision` belongs to `hub` alone: a branch, a tag or a commit."""

    scheme: Scheme
    target: str
    revision: str | None = None

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise InvalidReference(f"{self.target[:200]!r} does not name a base: {problem}.", field="base")

    def _problem(self) -> str | None:
        if self.scheme not in _SCHEMES:
            return f"the scheme {self.scheme!r} is not one of {', '.join(_SCHEMES)}"
        if "\0" in self.target or not self.target.strip():
            return f"after {self.scheme}: comes {'a path' if self.scheme in ('gguf', 'folder') else 'a name'}"
        if self.revision is not None and self.scheme != "hub":
            return "only hub: has a revision"
        if self.scheme == "package" and _PACKAGE.fullmatch(self.target) is None:
            return "a package is named as pip names it"
        if self.scheme == "hub":
            if _HUB_REPO.fullmatch(self.target) is None or ".." in self.target or "--" in self.target:
                return "a Hub repository is ORG/REPO"
            if self.revision is not None and (_HUB_REVISION.fullmatch(self.revision) is None or ".." in self.revision):
                return f"{self.revision[:200]!r} is not a revision"
        return None

    @classmethod
    def parse(cls, text: str) -> BaseReference:
        """Reads any of the forms above. Raises InvalidReference."""
        scheme, separator, rest = text.partition(":")
        if separator and scheme in _SCHEMES:
            return cls._hub(rest) if scheme == "hub" else cls(cast(Scheme, scheme), rest)
        if text.endswith(".gguf"):
            return cls("gguf", text)
        if text.startswith(_PATH_BEGINNINGS) or text in (".", "..") or _is_folder(text):
            return cls("folder", text)
        if _HUB_REPO.fullmatch(text.partition("@")[0]):
            return cls._hub(text)
        raise InvalidReference(
            f"{text[:200]!r} does not name a base: write hub:ORG/REPO, gguf:PATH, folder:PATH or package:NAME.",
            field="base",
        )

    @classmethod
    def _hub(cls, text: str) -> BaseReference:
        repo, separator, revision = text.partition("@")
        return cls("hub", repo, revision if separator else None)

    def __str__(self) -> str:
        return f"{self.scheme}:{self.target}" + ("" if self.revision is None else f"@{self.revision}")


def _is_folder(text: str) -> bool:
    try:
        return bool(text) and Path(text).is_dir()
    except ValueError:  # a NUL inside
        return False
