"""PEFT's own layers to the one formula of `LinearForm`, by what they compute.

Whatever a method calls its parameters, on a linear layer it computes an affine map of the layer's input. Methods with a
cheap form (scales, rotations, factors) are read by `direct`. For the others PEFT's layer is asked for its delta, or, if
that is not what it adds, the map is read off the layer itself: its outputs for the rows of the identity matrix and for
zero give W' and b'. A delta of low rank is stored as its factors, so that it shares the pool with LoRA. What was read
is checked against the layer it came from, on random input.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from adapterbay.registry.errors import Rejected, UnsupportedMethod
from adapterbay.server.adapters.forms import LinearForm, LowRank
from adapterbay.server.convert.direct import ADAPTER, DIRECT
from adapterbay.server.convert.effect import negligible
from adapterbay.server.convert.tree import Conv1DView, weight_of
from adapterbay.server.mix.linear import rotate

PROBE_RANK: Final = 72
"""Deltas of at most about this rank are found to be so, and stored as factors."""

RANK_TOLERANCE: Final = 1e-6
"""Of the largest singular value: what is smaller is float32's rounding and no part of the delta."""

CHECK_TOLERANCE: Final = 2e-4
"""How far a form may be from its layer on random input, relative to the layer's largest output (float32)."""

CHECKED_OF_A_KIND: Final = 3
"""So many layers of each shape are checked: what reads them right reads all of them right."""

DENSE_METHODS: Final = frozenset(
    {"BOFT", "C3A", "FOURIERFT", "FROD", "GLORA", "HIRA", "LOHA", "LOKR", "SHIRA", "SUPERTUNING"} | {"WAVEFT"}
)
"""Methods whose delta has, as a rule, full rank: looking for factors would be in vain."""

FACTOR_METHODS: Final = frozenset({"DEFT", "DELORA", "PSOFT", "TINYLORA", "UNILORA", "VBLORA"})
"""Methods whose delta is a product of factors: stored so whatever the rank, so that it is batched and fused as LoRA."""


class LayerReader:
    """Reads the layers of one adapter."""

    def __init__(self, method: str, dtype: torch.dtype) -> None:
        self._method = method
        self._dtype = dtype
        self._checked: Counter[tuple[str, torch.Size]] = Counter()
        self._adds_its_delta = True

    def read(self, layer: Any, view: nn.Module, path: str) -> LinearForm:
        """The form of one of PEFT's layers over `view`. `layer` is in eval mode, in float32, and holds only ADAPTER.

        Whole deltas are given in the dtype in which they will run; all else is float32. Raises UnsupportedMethod when
        the layer does not compute an affine map of its input.
        """
        weight = weight_of(view)
        direct = DIRECT.get(self._method)
        if direct is not None:
            form = direct(layer, weight)
            self._check(layer, view, weight, form, path)
        else:
            form = self._by_delta(layer, view, weight) or self._by_probing(layer, view, weight, path)
        return form if form.dense is None else form.with_dense(form.dense.to(self._dtype))

    def _by_delta(self, layer: Any, view: nn.Module, weight: Tensor) -> LinearForm | None:
        """From what PEFT itself would merge, if that is what the layer adds to the base."""
        if not self._adds_its_delta:
            return None
        delta = _merged_delta(layer, view, weight)
        form = None if delta is None else self._compact(delta, delta.abs().max())
        # once it is not so, no other layer is asked: a delta costs as much as probing does
        self._adds_its_delta = form is not None and self._agrees(layer, view, weight, form) is None
        return form if self._adds_its_delta else None

    def _by_probing(self, layer: Callable[[Tensor], Tensor], view: nn.Module, weight: Tensor, path: str) -> LinearForm:
        zero = layer(torch.zeros(1, weight.shape[1]))[0]
        delta = (layer(torch.eye(weight.shape[1])) - zero).t() - weight
        base_bias: Tensor | None = view.bias  # type: ignore[assignment]
        bias = zero - base_bias if base_bias is not None else zero
        form = self._compact(delta.contiguous(), torch.maximum(delta.abs().max(), weight.abs().max()))
        if not negligible(bias, base_bias):
            form = form.plus_bias(bias.clone())
        self._check(layer, view, weight, form, path)
        return form

    def _compact(self, delta: Tensor, largest: Tensor) -> LinearForm:
        if negligible(delta, largest):
            return LinearForm()
        if self._method in DENSE_METHODS:
            return LinearForm(dense=delta)
        tolerance = 4 * RANK_TOLERANCE * float(largest)
        low_rank = factor(delta, tolerance, at_any_rank=self._method in FACTOR_METHODS)
        return LinearForm(low_rank=low_rank) if low_rank is not None else LinearForm(dense=delta)

    def _agrees(
        self, layer: Callable[[Tensor], Tensor], view: nn.Module, weight: Tensor, form: LinearForm
    ) -> float | None:
        """None if the form computes what the layer does, else how far they are apart. Raises Rejected (NOT_FINITE)."""
        kind = (type(view).__name__, weight.shape)
        if self._checked[kind] >= CHECKED_OF_A_KIND:
            return None
        x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(1))
        expected = layer(x)
        if not expected.isfinite().all():
            raise Rejected(
                f"The tensors of this {self._method} adapter are too large: its layers compute no finite numbers.",
                reason="NOT_FINITE",
            )
        distance = float((apply(form, weight, view.bias, x) - expected).abs().max())  # type: ignore[arg-type]
        if distance <= CHECK_TOLERANCE * float(expected.abs().max()):
            self._checked[kind] += 1
            return None
        return distance

    def _check(
        self, layer: Callable[[Tensor], Tensor], view: nn.Module, weight: Tensor, form: LinearForm, path: str
    ) -> None:
        distance = self._agrees(layer, view, weight, form)
        if distance is not None:
            raise UnsupportedMethod(
                f"{self._method} on {path} is not served: PEFT's layer is no affine map of its input there (it differs "
                f"by {distance:.3g} on random input).",
                metadata={"peft_type": self._method, "module": path},
            )


def _merged_delta(layer: Any, view: nn.Module, weight: Tensor) -> Tensor | None:
    """What PEFT would add to the base's weight when it merges, [out, in] in float32; None: it has no such thing."""
    merged = getattr(layer, "get_delta_weight", None)
    if merged is None:
        return None
    try:
        delta = merged(ADAPTER)
    except (TypeError, RuntimeError, NotImplementedError):
        return None
    if not isinstance(delta, Tensor):
        return None
    if delta.is_sparse:
        delta = delta.to_dense()
    if isinstance(view, Conv1DView) and delta.shape == weight.t().shape:
        delta = delta.t()
    return delta.detach().float() if delta.shape == weight.shape else None


def factor(delta: Tensor, tolerance: float, *, at_any_rank: bool = False) -> LowRank | None:
    """`delta` [out, in] as B A when its rank is small enough to gain from it, by a randomized range finder (Halko,
    Martinsson and Tropp 2011, arXiv:0909.4061, algorithm 4.1); None when what is left over exceeds `tolerance`.
    `at_any_rank`: never None."""
    out_features, in_features = delta.shape
    generator = torch.Generator().manual_seed(0)
    full = min(out_features, in_features)
    widths = [PROBE_RANK // 4, PROBE_RANK]
    while at_any_rank and widths[-1] < full:
        widths.append(4 * widths[-1])
    for width in widths:
        width = min(width, full)
        basis, _ = torch.linalg.qr(delta @ torch.randn(in_features, width, generator=generator))
        inner = basis.t() @ delta
        if (delta - basis @ inner).abs().max() <= tolerance:
            break
    else:
        if not at_any_rank:
            return None
    u, s, v = torch.linalg.svd(inner, full_matrices=False)
    rank = max(int((s > max(RANK_TOLERANCE * float(s[0]), tolerance)).sum()), 1)
    if not at_any_rank and rank * (out_features + in_features) > out_features * in_features // 2:
        return None
    root = s[:rank].sqrt()
    return LowRank(a=v[:rank] * root[:, None], b=((basis @ u[:, :rank]) * root).t().contiguous(), scaling=1.0)


def apply(form: LinearForm, weight: Tensor, base_bias: Tensor | None, x: Tensor) -> Tensor:
    """What a form computes from `x` [rows, in], in float32: the formula, written plainly. weight [out, in]."""
    turned = x if form.in_scale is None else x * form.in_scale
    if form.rotation is not None:
        turned = rotate(turned, form.rotation)
    y = turned @ weight.t()
    if base_bias is not None:
        y = y + base_bias
    plain = y
    if form.out_scale is not None:
        y = y * form.out_scale
    if form.turn is not None:
        y = y + form.turn.values * plain[:, form.turn.partner]
    if form.low_rank is not None:
        y = y + form.low_rank.scaling * (x @ form.low_rank.a.float().t()) @ form.low_rank.b.float()
    if form.dense is not None:
        y = y + x @ form.dense.t()
    return y if form.bias is None else y + form.bias


def tuner_layers(root: nn.Module) -> dict[str, Any]:
    """PEFT's layers by their path below the tree that PEFT was given."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {path: module for path, module in root.named_modules() if isinstance(module, BaseTunerLayer)}
