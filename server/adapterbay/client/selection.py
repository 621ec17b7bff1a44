"""What should answer: one adapter, a fusion, or the base alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from adapterbay.client.fusion import Fusion, FusionLike, is_fusion
from adapterbay.client.making import shown
from adapterbay.v1 import types_pb2


class SelectionFields(TypedDict, total=False):
    """The selection as keyword arguments of a message; exactly one is there."""

    adapter: str
    fusion: types_pb2.Fusion
    base: bool


@dataclass(frozen=True, slots=True)
class Selection:
    """Exactly one of: an adapter reference, a fusion, the base alone.

    A fusion is a `Fusion`, {reference: weight} or a text such as `a:0.7+b:-0.3`; one adapter with a weight is a scale.
    Nothing is selected by default: an answer never comes from the base unless it was asked for.
    """

    adapter: str | None = None
    fusion: FusionLike | None = None
    base: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.base, bool):
            raise TypeError(f"base takes True or False, not {shown(self.base)}.")
        if (self.adapter is not None) + (self.fusion is not None) + self.base != 1:
            raise ValueError(
                "Say what should answer by exactly one of adapter='NAME', fusion={'NAME': weight} and base=True."
            )
        if self.adapter is not None:
            if not isinstance(self.adapter, str):
                raise TypeError(f"adapter takes text, not {shown(self.adapter)}.")
            if is_fusion(self.adapter):
                raise ValueError(f"{self.adapter!r} is no reference of one adapter; a fusion goes into fusion=….")
        elif self.fusion is not None:
            object.__setattr__(self, "fusion", Fusion.of(self.fusion))

    def fields(self) -> SelectionFields:
        """For the constructor of any message with the `selection` oneof."""
        if self.adapter is not None:
            return {"adapter": self.adapter}
        if self.fusion is not None:
            return {"fusion": Fusion.of(self.fusion).message()}
        return {"base": True}

    @classmethod
    def of(cls, arm: Selection | str) -> Selection:
        """An arm of a comparison: a string is what `parse` reads. Raises TypeError for anything else."""
        return arm if isinstance(arm, Selection) else cls.parse(arm)

    @classmethod
    def parse(cls, text: str) -> Selection:
        """An adapter reference, or a fusion's text, such as `sentiment:0.5`. Raises ValueError, or TypeError."""
        if not isinstance(text, str):
            raise TypeError(f"A selection is a Selection or its text, not {shown(text)}.")
        return cls(fusion=Fusion.parse(text)) if is_fusion(text) else cls(adapter=text)


def selected(adapter: str | None, fusion: FusionLike | None, base: bool) -> SelectionFields:
    """What a call was given, as a `Selection` has it; the usual reference of one adapter goes the short way."""
    if type(adapter) is str and fusion is None and base is False and not is_fusion(adapter):
        return {"adapter": adapter}
    return Selection(adapter, fusion, base).fields()
