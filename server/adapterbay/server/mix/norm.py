"""A normalization layer that differs from token to token: by its parameters (LN tuning, Zhao et al. 2023,
arXiv:2312.11420), or by a bottleneck adapter before it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from adapterbay.server.adapters.forms import Bottleneck, NormForm
from adapterbay.server.mix.axes import TokenAxis
from adapterbay.server.mix.bottleneck import PlacedBottleneck
from adapterbay.server.mix.context import step_context


class MixedNorm(nn.Module):
    """Stands where a normalization layer of the base stood: the base's own for all tokens, an adapter's own for its."""

    def __init__(self, base_layer: nn.Module, path: str, device: torch.device, axis: TokenAxis) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.path = path
        self._axis = axis
        self._device = device
        self._own: dict[str, Callable[[Tensor], Tensor]] = {}

    def place(self, key: str, form: NormForm | None, bottleneck: Bottleneck | None = None) -> None:
        """Keeps what one adapter has here. Raises KeyError for a parameter that the layer does not have."""
        own = with_parameters(self.base_layer, form.parameters) if form is not None else self.base_layer
        self._own[key] = own if bottleneck is None else _Through(own, PlacedBottleneck(bottleneck, self._device))

    def changes(self, keys: Collection[str]) -> bool:
        """Whether any of these adapters has anything of its own here."""
        return any(key in self._own for key in keys)

    def remove(self, key: str) -> None:
        """Lets go of it."""
        self._own.pop(key, None)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., tokens, ..., features] to the same shape: a token may have several vectors (heads). A fusion is the
        base's output with the weighted differences added."""
        y: Tensor = self.base_layer(x)
        mix = step_context.mix
        if mix is None or not self._own:
            return y
        self._axis.check(x.shape, mix.tokens)
        for start, stop, parts in mix.arms(self._own, self.path):
            mine_x, mine_y = (side.narrow(self._axis.at, start, stop - start) for side in (x, y))
            if len(parts) == 1 and parts[0][1] == 1:
                mine_y.copy_(self._own[parts[0][0]](mine_x))
                continue
            plain = mine_y.float()
            changed = [weight * (self._own[key](mine_x).float() - plain) for key, weight in parts]
            mine_y.copy_(plain + torch.stack(changed).sum(0))
        return y


class _Through:
    """A bottleneck before a normalization N, which looks through it: N(x + delta(N(x)))."""

    def __init__(self, norm: nn.Module, bottleneck: PlacedBottleneck) -> None:
        self._norm = norm
        self._bottleneck = bottleneck

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._norm(x + self._bottleneck.delta(self._norm(x)))
        return y


def with_parameters(module: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """The same module with some other parameters [hidden]; what is not named is shared with it."""
    own = copy.copy(module)
    own._parameters = dict(module._parameters)
    for name, tensor in parameters.items():
        there = module._parameters.get(name)
        if there is None:
            raise KeyError(name)
        own._parameters[name] = nn.Parameter(tensor.to(there.device, there.dtype), requires_grad=False)
    return own
