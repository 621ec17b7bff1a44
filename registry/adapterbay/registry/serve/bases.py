"""Which bases the server may look at. A path that a client names is never opened, and nothing is downloaded for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from adapterbay.registry.admission.origins import FindBase
from adapterbay.registry.base import BaseFiles, BaseReference, locate
from adapterbay.registry.base.sources import cached_hub_folder
from adapterbay.registry.errors import AdapterbayError, BaseNotFound
from adapterbay.registry.serve.settings import BaseChoice


@dataclass(frozen=True, slots=True)
class KnownBase:
    """A base that the operator named. `names` are what clients may call it."""

    names: frozenset[str]
    files: BaseFiles


class Bases:
    """The bases that the operator gave, and those of the Hub's cache and of installed packages."""

    def __init__(self, choices: Iterable[BaseChoice]) -> None:
        """Locates every choice now (a base on the Hub is fetched). Raises BaseNotFound and what `locate` raises."""
        self._known: list[KnownBase] = []
        for choice in choices:
            files = locate(choice.reference)
            # What PEFT writes down for a base is the folder that it was loaded from.
            names = {str(choice.reference), choice.reference.target, str(files.reference), str(files.folder)}
            if choice.name is not None:
                names.add(choice.name)
            self._known.append(KnownBase(frozenset(names), files))

    def find(self, reference: str | BaseReference) -> BaseFiles:
        """The base that a client's files name. Raises BaseNotFound, which says what the operator can do."""
        called = _names_of(reference)
        for known in self._known:
            if called & known.names:
                return known.files
        parsed = _parsed(reference)
        if parsed is not None and parsed.scheme == "hub" and cached_hub_folder(parsed) is not None:
            return locate(parsed)
        if parsed is not None and parsed.scheme == "package":
            return locate(parsed)
        name = str(reference)[:200]
        raise BaseNotFound(
            f"The server knows no base called {name}. Its operator can give it one: `registry serve --base "
            f"{parsed.target[:200] if parsed else name}=PLACE`, with PLACE a folder, a GGUF file, package:NAME or "
            "hub:ORG/REPO."
        )

    def finder(self, fingerprint: str | None) -> FindBase:
        """How admission finds the base of files that tell this fingerprint: by it, else by the name."""
        found = next((known.files for known in self._known if known.files.fingerprint == fingerprint), None)
        return self.find if found is None else lambda _: found


def _names_of(reference: str | BaseReference) -> set[str]:
    """What a base may be called: as it is written, without its scheme and revision, and by the last part alone."""
    texts = {str(reference)}
    parsed = _parsed(reference)
    if parsed is not None:
        texts |= {parsed.target, f"{parsed.scheme}:{parsed.target}"}
        texts.add(Path(parsed.target).name)
    return texts


def _parsed(reference: str | BaseReference) -> BaseReference | None:
    if isinstance(reference, BaseReference):
        return reference
    try:
        return BaseReference.parse(reference)
    except AdapterbayError:
        return None
