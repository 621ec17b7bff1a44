"""How a base is named. `parse` and `str` are inverse functions.

hub:ORG/REPO[@REVISION]          a repository on the Hugging Face Hub; a bare ORG/REPO means the same
modelscope:ORG/REPO[@REVISION]   a repository on ModelScope
gguf:PATH                        a GGUF file; a plain path that ends in .gguf means the same
folder:PATH                      a folder in Hugging Face format; a plain path to an existing folder, or one that
                                 begins with /, ./, ../ or ~, means the same
package:NAME                     weights inside the folder of an installed Python package
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, cast, get_args

from adapterbay.registry.errors import InvalidReference

Scheme = Literal["hub", "modelscope", "gguf", "folder", "package"]

_SCHEMES: Final = get_args(Scheme)
_HUB_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_MODELSCOPE_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,254}")
_PACKAGE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_REPOSITORIES: Final[Mapping[str, tuple[re.Pattern[str], str]]] = {
    "hub": (_HUB_REPO, "a Hub repository is ORG/REPO"),
    "modelscope": (_MODELSCOPE_REPO, "a ModelScope repository is ORG/REPO"),
}
_PATH_BEGINNINGS: Final = ("/", "./", "../", "~")


@dataclass(frozen=True, slots=True)
class BaseReference:
    """The name of a base model. `revision` is for `hub` and `modelscope`: a branch, a tag or a commit."""

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
        if self.scheme in _REPOSITORIES:
            return self._repository_problem(*_REPOSITORIES[self.scheme])
        if self.revision is not None:
            return f"only {' and '.join(f'{scheme}:' for scheme in _REPOSITORIES)} have a revision"
        if self.scheme == "package" and _PACKAGE.fullmatch(self.target) is None:
            return "a package is named as pip names it"
        return None

    def _repository_problem(self, pattern: re.Pattern[str], what: str) -> str | None:
        # A double dash separates ORG from REPO in the names of cache folders.
        if pattern.fullmatch(self.target) is None or ".." in self.target or "--" in self.target:
            return what
        if self.revision is not None and (_REVISION.fullmatch(self.revision) is None or ".." in self.revision):
            return f"{self.revision[:200]!r} is not a revision"
        return None

    @classmethod
    def parse(cls, text: str) -> BaseReference:
        """Reads any of the forms above. Raises InvalidReference."""
        scheme, separator, rest = text.partition(":")
        if separator and scheme in _SCHEMES:
            named = cast(Scheme, scheme)
            return cls._repository(named, rest) if scheme in _REPOSITORIES else cls(named, rest)
        if text.endswith(".gguf"):
            return cls("gguf", text)
        if text.startswith(_PATH_BEGINNINGS) or text in (".", "..") or _is_folder(text):
            return cls("folder", text)
        if _HUB_REPO.fullmatch(text.partition("@")[0]):
            return cls._repository("hub", text)
        raise InvalidReference(
            f"{text[:200]!r} does not name a base: write hub:ORG/REPO, modelscope:ORG/REPO, gguf:PATH, folder:PATH or "
            "package:NAME.",
            field="base",
        )

    @classmethod
    def _repository(cls, scheme: Scheme, text: str) -> BaseReference:
        repo, separator, revision = text.partition("@")
        return cls(scheme, repo, revision if separator else None)

    def __str__(self) -> str:
        return f"{self.scheme}:{self.target}" + ("" if self.revision is None else f"@{self.revision}")


def _is_folder(text: str) -> bool:
    try:
        return bool(text) and Path(text).is_dir()
    except (ValueError, OSError):  # a NUL inside, or a name too long
        return False
