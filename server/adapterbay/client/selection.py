"""What should answer: one adapter, a fusion, or the base alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from adapterbay.client.fusion import Fusion, FusionLike, is_fusion
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
        chosen = [self.adapter is not None, self.fusion is not None, self.base]
        if sum(chosen) != 1:
            raise ValueError(
                "Say what should answer by exactly one of adapter='NAME', fusion={'NAME': weight} and base=True."
            )
        if isinstance(self.adapter, str) and is_fusion(self.adapter):
            raise ValueError(f"{self.adapter!r} is no reference of one adapter; a fusion goes into fusion=….")
        if self.fusion is not None:
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
        """An arm of a comparison: a string is what `parse` reads."""
        return cls.parse(arm) if isinstance(arm, str) else arm

    @classmethod
    def parse(cls, text: str) -> Selection:
        """An adapter reference, or a fusion's text, such as `sentiment:0.5`. Raises ValueError."""
        return cls(fusion=Fusion.parse(text)) if is_fusion(text) else cls(adapter=text)
