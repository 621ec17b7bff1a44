"""How strongly an adapter counts, and at which layers. Knows nothing of torch, gRPC or any store."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from adapterbay.registry.digest import digest_json
from adapterbay.registry.errors import InvalidArgument
from adapterbay.registry.fusing import FusionSettings

MAX_PATTERN: Final = 200
_NAME = re.compile(r"[A-Za-z0-9_]+")
_NUMBERS = re.compile(r"([0-9]{1,6})-([0-9]{1,6})")
FUSED: Final = "fusion:"
"""What the digest of a derived adapter begins with."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """An adapter's weight, layer by layer: `weight` times the factor of the first rule that matches the layer's path.

    `rules` are (pattern, factor); a layer that none matches has the factor 1. A pattern is names with dots between
    them, and matches where they are names of the path that follow each other: `q_proj`, `layers.3`, `mlp.up_proj`. A
    `*` is any one name, `0-9` a number in this range. A weight is known by what it is, whatever else is compared.
    """

    weight: float
    rules: tuple[tuple[str, float], ...]

    def at(self, path: str) -> float:
        """The weight at a module of the base, by its backbone-relative path."""
        return self.weight * _factor(self.rules, path)

    def unmatched(self, paths: Iterable[str]) -> str | None:
        """The first pattern that matches none of `paths`; None if each matches one."""
        everywhere = tuple(paths)
        missing = (pattern for pattern, _ in self.rules if not any(matches(pattern, path) for path in everywhere))
        return next(missing, None)

    # Rows are sorted by what they are computed with, so that those of one arm lie together; any order will do.
    def __lt__(self, other: Weight) -> bool:
        return _order(self) < _order(other)

    def __gt__(self, other: Weight) -> bool:
        return _order(self) > _order(other)


Weight = float | LayerWeights
"""The factor on an adapter's delta: the same at every layer, or not."""


def weight_at(weight: Weight, path: str) -> float:
    """The weight at a module of the base."""
    return weight.at(path) if isinstance(weight, LayerWeights) else weight


def check_pattern(pattern: str) -> None:
    """Raises InvalidArgument for what is no pattern of layers."""
    problem = ""
    if not pattern:
        problem = "it is empty"
    elif len(pattern) > MAX_PATTERN:
        problem = f"it has {len(pattern)} characters; {MAX_PATTERN} are allowed"
    for name in pattern.split("."):
        numbers = _NUMBERS.fullmatch(name)
        if numbers is not None and int(numbers[1]) > int(numbers[2]):
            problem = f"the range {name} is empty"
        elif numbers is None and name != "*" and not _NAME.fullmatch(name):
            problem = problem or f"{name!r} is neither a name, nor *, nor a range such as 0-9"
    if problem:
        raise InvalidArgument(
            f"{pattern[:60]!r} is not a pattern of layers: {problem}. Write names with dots between them, such as "
            "q_proj, layers.3 or layers.0-9.mlp."
        )


@lru_cache(maxsize=65_536)
def matches(pattern: str, path: str) -> bool:
    """Whether a pattern of layers matches a module's path. Linear in the path for every pattern."""
    wanted, names = pattern.split("."), path.split(".")
    return any(
        all(_is(want, name) for want, name in zip(wanted, names[start:], strict=False))
        for start in range(len(names) - len(wanted) + 1)
    )


def _is(want: str, name: str) -> bool:
    if want in ("*", name):
        return True
    numbers = _NUMBERS.fullmatch(want)
    return numbers is not None and name.isdecimal() and int(numbers[1]) <= int(name) <= int(numbers[2])


@lru_cache(maxsize=65_536)
def _factor(rules: tuple[tuple[str, float], ...], path: str) -> float:
    return next((factor for pattern, factor in rules if matches(pattern, path)), 1.0)


def _order(weight: Weight) -> tuple[float, tuple[tuple[str, float], ...]]:
    return (float(weight.weight), weight.rules) if isinstance(weight, LayerWeights) else (float(weight), ())


def fusion_digest(parts: Sequence[tuple[str, Weight]], settings: FusionSettings) -> str:
    """The identity of the adapter that is fused from parts (digest, weight): the same in whatever order they come."""
    settings = settings.completed()
    return FUSED + digest_json(
        {
            "schema": 1,
            "method": settings.method,
            "density": settings.density,
            "majority_sign": settings.majority_sign,
            "rank": settings.rank,
            "seed": settings.seed,
            "parts": sorted([digest, *_order(weight)] for digest, weight in parts),
        }
    )
