"""Labels as written in the data to classes of a head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from adapterbay.registry.errors import InvalidArgument


def label_text(value: object) -> str:
    """One writing for one label: 1, 1.0, True's `true` and ` 1 ` as text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


class LabelSet:
    """The classes, in the order of the head's outputs, and which written label means which.

    With `named` (written label → name) its order counts and a label may also be written as its name. Without, classes
    are the labels found: in numeric order where all are integers, else in alphabetical order.
    """

    def __init__(self, written: Iterable[str], named: Mapping[str, str], *, source: str) -> None:
        found = Counter(written)
        if named:
            self.names = tuple(dict.fromkeys(named.values()))
            meaning = {**{name: name for name in self.names}, **named}
            if unknown := [label for label in found if label not in meaning]:
                listed = ", ".join(f"'{label}' ({found[label]} rows)" for label in sorted(unknown)[:10])
                raise InvalidArgument(
                    f"{source} has labels that data.label_names does not name: {listed}; it names "
                    f"{', '.join(named)}. Name them, or leave their rows out with data.filter.",
                    field="data.label_names",
                )
        else:
            self.names = tuple(sorted(found, key=_numeric_order if all(map(_is_integer, found)) else str))
            meaning = {name: name for name in self.names}
        self._meaning = meaning
        self._index = {name: index for index, name in enumerate(self.names)}

    def name(self, written: str) -> str:
        """The class name of a written label."""
        return self._meaning[written]

    def index(self, written: str) -> int:
        """The head output of a written label."""
        return self._index[self._meaning[written]]


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _numeric_order(text: str) -> int:
    return int(text)
