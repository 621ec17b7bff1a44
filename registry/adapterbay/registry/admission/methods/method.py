"""What a method is: its settings, its tensors and their shapes, where it sits, and when it changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from adapterbay.registry.admission.methods.fields import Fields
from adapterbay.registry.admission.methods.settings import Settings
from adapterbay.registry.admission.places import Base, Kind, Place

LINEAR: Final[frozenset[Kind]] = frozenset({"linear", "output"})
MATRICES: Final[frozenset[Kind]] = LINEAR | {"conv1d"}
TABLES: Final[frozenset[Kind]] = frozenset({"embedding"})

Shape: TypeAlias = "tuple[int | None, ...]"
"""None is any size."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor that a site or the adapter has. `needed`: it must be there.

    `below`: it holds indices, whole numbers from 0 to below the one number, or below that of its row.
    """

    shape: Shape
    needed: bool = True
    below: tuple[int, ...] = ()


def optional(*shape: int | None) -> Tensor:
    """A tensor that may be missing."""
    return Tensor(shape, needed=False)


Expected: TypeAlias = "Mapping[str, Tensor]"


def shapes(**tensors: tuple[int | None, ...]) -> dict[str, Tensor]:
    """Needed tensors of numbers, by suffix."""
    return {suffix: Tensor(shape) for suffix, shape in tensors.items()}


def dotted(tensors: Mapping[str, tuple[int | None, ...]]) -> dict[str, Tensor]:
    """`shapes` for suffixes that hold a dot."""
    return {suffix: Tensor(shape) for suffix, shape in tensors.items()}


def _nothing(_: Settings) -> None:
    return None


def _no_rank(_: Settings, __: Place | None) -> int:
    return 0


def _nothing_drawn(_: Settings, __: Sequence[Place]) -> int:
    return 0


def _no_shared(_: Settings, __: Base, ___: Sequence[Place]) -> Expected:
    return {}


def _fits(_: Settings, __: Place, ___: Mapping[str, tuple[int, ...]]) -> None:
    return None


def _one(_: Settings, __: Place) -> float:
    return 1.0


@dataclass(frozen=True, slots=True)
class Method:
    """One method.

    `suffixes` are expressions for what follows a module in a tensor's name; `shared` for tensors of the whole adapter.
    `tensors` and `shared_tensors` say which must be there, in which shapes; `check` refuses settings that can be judged
    without the base. `verify` compares the shapes of a site's tensors with each other.

    A site changes nothing if every group of `still` has a tensor at its neutral value: all zero, or the number in
    `neutral`. A group's tensors are factors of one product, of which `scaling` is a factor as well. No group: the
    tensors alone do not tell. `still_shared`: the adapter changes nothing if one of these is all zero.

    `factors`: `rank` is that of factors which every layer is served with. `drawn`: how many values PEFT draws from a
    seed that the checkpoint holds in their place.
    """

    peft_type: str
    title: str
    fields: Fields
    kinds: frozenset[Kind] = frozenset()
    suffixes: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    tensors: Callable[[Settings, Place], Expected] | None = None
    shared_tensors: Callable[[Settings, Base, Sequence[Place]], Expected] = _no_shared
    still: tuple[tuple[str, ...], ...] = ()
    neutral: Mapping[str, float] = field(default_factory=dict)
    still_shared: tuple[str, ...] = ()
    rank: Callable[[Settings, Place | None], int] = _no_rank
    factors: bool = True
    drawn: Callable[[Settings, Sequence[Place]], int] = _nothing_drawn
    scaling: Callable[[Settings, Place], float] = _one
    check: Callable[[Settings], None] = _nothing
    verify: Callable[[Settings, Place, Mapping[str, tuple[int, ...]]], None] = _fits
    refused: str | None = None
    virtual: bool = False

    @property
    def prefix(self) -> str:
        """What PEFT puts before the names of modules."""
        return "base_model." if self.virtual else "base_model.model."
