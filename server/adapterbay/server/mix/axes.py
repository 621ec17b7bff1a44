"""Where the tokens are in what a module of the base gets: seen once, at load, and never guessed.

A step is [1, tokens, …], but a module within a layer may see it otherwise: Qwen3 normalizes heads in
[1, tokens, heads, size], Gemma 3 in [1, heads, tokens, size]. What a token's adapters change must lie along its own
axis. An axis that has as many entries as the text has tokens, for texts of different lengths, is the tokens'.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class TokenAxis:
    """A module's inputs have `axes` axes, of which number `at` is the tokens'; each has `vectors` vectors there."""

    axes: int
    at: int
    vectors: int = 1

    def check(self, shape: torch.Size, tokens: int) -> None:
        """Raises RuntimeError for an input of another kind, whose slices would be parts of other tokens."""
        if len(shape) != self.axes or shape[self.at] != tokens:
            raise RuntimeError(f"a mix of {tokens} tokens met an input of {list(shape)}, not along axis {self.at}")


FLAT = TokenAxis(3, 1)
"""[1, tokens, features]."""


class ShapeWatch:
    """Notes what modules get for texts of several lengths."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._seen: dict[str, dict[int, list[torch.Size]]] = defaultdict(dict)

    @contextmanager
    def of(self, tokens: int) -> Iterator[None]:
        """A context in which the model computes `tokens` tokens."""
        hooks = [
            module.register_forward_pre_hook(self._hook(path, tokens), with_kwargs=True)
            for path, module in self._modules.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def axis(self, path: str) -> TokenAxis | None:
        """Where the tokens were each time; None where that cannot be told, or was not the same. The last axis, a
        vector's own features, is nobody's."""
        seen = self._seen.get(path, {})
        if len(seen) < 2 or len({len(shapes) for shapes in seen.values()}) != 1:
            return None
        lengths = list(seen)
        found = {_axis(lengths, shapes) for shapes in zip(*seen.values(), strict=True)}
        return found.pop() if len(found) == 1 else None

    def _hook(self, path: str, tokens: int) -> Any:
        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            got = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if got is not None:  # else nothing is known of it, and what changes it is refused
                self._seen[path].setdefault(tokens, []).append(got.shape)

        return note


def _axis(lengths: list[int], shapes: tuple[torch.Size, ...]) -> TokenAxis | None:
    """The only axis that differs between one call's inputs, which are as long as the texts there."""
    if len({len(shape) for shape in shapes}) != 1:
        return None
    differing = [at for at, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
    if len(differing) != 1 or differing[0] == len(shapes[0]) - 1:
        return None
    at = differing[0]
    if [shape[at] for shape in shapes] != lengths:
        return None
    return TokenAxis(len(shapes[0]), at, math.prod(shapes[0][:-1]) // lengths[0])
