"""What should answer: one adapter, a fusion, or the base alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

from adapterbay.v1 import types_pb2


class SelectionFields(TypedDict, total=False):
    """The selection as keyword arguments of a message; exactly one is there."""

    adapter: str
    fusion: types_pb2.Fusion
    base: bool


@dataclass(frozen=True, slots=True)
class Selection:
    """Exactly one of: an adapter reference, a fusion {reference: weight}, the base alone.

    Nothing is selected by default: an answer never comes from the base unless it was asked for.
    """

    adapter: str | None = None
    fusion: Mapping[str, float] | None = None
    base: bool = False

    def __post_init__(self) -> None:
        chosen = [self.adapter is not None, self.fusion is not None, self.base]
        if sum(chosen) != 1:
            raise ValueError(
                "Say what should answer by exactly one of adapter='NAME', fusion={'NAME': weight} and base=True."
            )

    def fields(self) -> SelectionFields:
        """For the constructor of any message with the `selection` oneof."""
        if self.adapter is not None:
            return {"adapter": self.adapter}
        if self.fusion is not None:
            entries = [
                types_pb2.WeightedAdapter(adapter=reference, weight=weight) for reference, weight in self.fusion.items()
            ]
            return {"fusion": types_pb2.Fusion(adapters=entries)}
        return {"base": True}

    @classmethod
    def of(cls, arm: Selection | str) -> Selection:
        """An arm of a comparison: a string is an adapter reference."""
        return cls(adapter=arm) if isinstance(arm, str) else arm
