"""The base as PEFT sees it while it reads an adapter: a tree of its own that shares the base's weights and cannot
change them.

PEFT builds an adapter's layers by walking a model and putting its own modules in the place of linear layers. The tree
that it gets is a shallow copy whose linear layers are views: plain `nn.Linear` (or Conv1D) in float32 whose weight is
copied out of the serving base, unpacked and dequantized, whenever it is asked for. What PEFT writes goes to the view.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapterbay.registry.errors import UnsupportedMethod
from adapterbay.server.mix.linear import MixedLinear
from adapterbay.server.mix.norm import MixedNorm
from adapterbay.server.mix.table import MixedTable
from adapterbay.server.packed import PackedLinear


class _View:
    """What both kinds of views share. A view that `keeps` holds on to its weight when it is first asked for it, so
    that what PEFT writes there stays. One that does not show values gives the weight's shape with any values in it."""

    keeps: bool
    shows_values: bool
    _layer: tuple[nn.Module]  # in a tuple, so that it is no child
    _held: nn.Parameter | None
    in_features: int
    out_features: int

    @property
    def weight(self) -> Tensor:
        """As the base layer's kind stores it: [out, in], or [in, out] of a Conv1D."""
        if not self.shows_values:
            shape = (self.in_features, self.out_features)
            return torch.empty(shape if isinstance(self, Conv1D) else shape[::-1])
        if self.keeps and self._held is None:
            self._held = nn.Parameter(self.dense(), requires_grad=False)
        return self.dense() if self._held is None else self._held

    @property
    def bias(self) -> Tensor | None:
        """[out]."""
        bias: Any = self._layer[0].bias
        return None if bias is None else bias.detach().float().clone()

    def hold(self, weight: Tensor) -> None:
        """From now on this stands in the base's weight's place; `dense` and `weight_of` go on to give the base's."""
        self._held = nn.Parameter(weight, requires_grad=False)

    def dense(self) -> Tensor:
        """The base's own weight, copied."""
        weight = dense_weight(self._layer[0])
        return weight.t().contiguous() if isinstance(self, Conv1D) else weight


class LinearView(_View, nn.Linear):  # type: ignore[misc,override]
    """A linear layer of the base, in float32."""

    def __init__(self, layer: nn.Module, in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._layer, self._held, self.keeps, self.shows_values = (layer,), None, False, True


class Conv1DView(_View, Conv1D):  # type: ignore[misc]
    """A Conv1D of the base, in float32."""

    def __init__(self, layer: nn.Module, in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)
        self.nx, self.nf = self.in_features, self.out_features = in_features, out_features
        self._layer, self._held, self.keeps, self.shows_values = (layer,), None, False, True


View = LinearView | Conv1DView


class Root(nn.Module):
    """Holds a backbone under the name that models with a head give to it."""

    def __init__(self, backbone: nn.Module, prefix: str) -> None:
        super().__init__()
        self.config = copy.copy(backbone.config)
        self.base_model_prefix = prefix
        setattr(self, prefix, backbone)

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's."""
        backbone = self.get_submodule(self.base_model_prefix)
        found: nn.Module = backbone.get_input_embeddings()  # type: ignore[operator]
        return found


def dense_weight(layer: nn.Module) -> Tensor:
    """A linear layer's weight [out, in] in float32, a copy, whatever form it is held in.

    bitsandbytes' weights are dequantized. Raises UnsupportedMethod for a kind that cannot be read.
    """
    if isinstance(layer, MixedLinear):
        layer = layer.base_layer
    if isinstance(layer, PackedLinear):
        return layer.dense().to(torch.float32, copy=True)
    if isinstance(layer, Conv1D):
        transposed: Tensor = layer.weight.detach().t()
        return transposed.to(torch.float32, copy=True)
    weight = layer.weight
    if type(layer).__name__ == "Linear8bitLt":
        # PEFT's own function changes the layer's state; a weight is its 8-bit row times the row's largest value / 127
        state: Any = layer.state
        values: Any = weight if state.CB is None else state.CB
        largest: Any = weight.SCB if state.SCB is None else state.SCB  # type: ignore[union-attr]
        return values.detach().float() * (largest.float() / 127)[:, None]  # type: ignore[no-any-return]
    if type(layer).__name__ == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        dense: Tensor = dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[union-attr]
        return dense.to(torch.float32, copy=True)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight.detach().to(torch.float32, copy=True)
    raise UnsupportedMethod(f"The weight of a {type(layer).__name__} cannot be read back.")


def view_of(layer: nn.Module) -> View:
    """A view of a linear layer of the base."""
    inner = layer.base_layer if isinstance(layer, MixedLinear) else layer
    if isinstance(inner, Conv1D):
        return Conv1DView(inner, int(inner.nx), int(inner.nf))
    return LinearView(inner, int(inner.in_features), int(inner.out_features))  # type: ignore[arg-type]


def copy_tree(module: nn.Module) -> nn.Module:
    """A shallow copy of a wrapped base without its wrappers, linear layers as views. Small parameters are copied, the
    embeddings are shared."""
    if isinstance(module, MixedLinear | nn.Linear | Conv1D | PackedLinear):
        return view_of(module)
    if isinstance(module, MixedNorm | MixedTable):
        module = module.base_layer
    made = copy.copy(module)
    made._modules = {name: child if child is None else copy_tree(child) for name, child in module._modules.items()}
    made._buffers = dict(module._buffers)
    made._parameters = {
        name: nn.Parameter(p.detach().float().clone(), requires_grad=False) if p is not None and p.dim() == 1 else p
        for name, p in module._parameters.items()
    }
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        setattr(made, hooks, type(getattr(module, hooks))())
    return made


def peft_root(
    model: nn.Module, backbone: nn.Module, prefix: str, *, prefixed: bool, head: bool, pooler: nn.Module | None = None
) -> nn.Module:
    """The tree that an adapter's names fit: a backbone under `prefix` if `prefixed`, else the bare backbone.

    `head`: with the language-model head beside it, if the base has one. `pooler`: the encoder's own, which its backbone
    does not hold while it serves.
    """
    if prefixed and head and model is not backbone:
        made = copy_tree(model)
        made.config = copy.copy(model.config)
        return made
    inner = copy_tree(backbone)
    if pooler is not None:
        inner.pooler = copy_tree(pooler)
    return Root(inner, prefix) if prefixed else inner


def make_plain(root: nn.Module) -> None:
    """Puts torch's own nn.Linear, with a copy of the weight, in the place of every view."""
    for path, module in list(root.named_modules()):
        if isinstance(module, LinearView):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            plain.weight = nn.Parameter(module.dense(), requires_grad=False)
            if module.bias is not None:
                plain.bias = nn.Parameter(module.bias, requires_grad=False)
            parent, _, name = path.rpartition(".")
            setattr(root.get_submodule(parent), name, plain)


def weight_of(layer: nn.Module) -> Tensor:
    """The base's own weight [out, in] behind a view, whatever PEFT has written to the view."""
    if isinstance(layer, Conv1DView):
        return layer.dense().t()
    if isinstance(layer, LinearView):
        return layer.dense()
    return dense_weight(layer)
