"""Whether an adapter changes anything at all, where its tensors alone do not tell.

A DoRA, an LN tuning or an OSF that was saved before it was trained is full of numbers that give the base's own output.
It would answer as the base does, in silence, so that it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from adapterbay.server.adapters.forms import LinearForm, NormForm, ServingForm, TableForm
from adapterbay.server.mix.sites import Sites

ROUNDING: Final = 2e-6
"""What float32 leaves of a scale that should be 1, or of a delta that should be 0, relative to what it came from. Who
reads a delta or a bias as a difference takes that away there; what a form holds of them is there to be added."""


def negligible(difference: Tensor, of: Tensor | None) -> bool:
    """Whether a difference of two numbers as large as `of` is nothing but what float32 leaves of 0."""
    largest = 0.0 if of is None else float(of.abs().max())
    return float(difference.abs().max()) <= ROUNDING * largest < math.inf


def has_effect(form: ServingForm, sites: Sites) -> bool:
    """Whether any part of the form differs from what the base computes without it. A head, virtual tokens and modules
    behind layers always do: admission has seen that they are not zero."""
    if form.head is not None or form.virtual is not None or form.bottlenecks or form.attention:
        return True
    return (
        any(_linear(layer) for layer in (*form.layers.values(), *form.lasting.values()))
        or any(_norm(norm, sites.norms[path]._parameters) for path, norm in form.norms.items())
        or any(_table(table, sites.tables[path].weight) for path, table in form.tables.items())
    )


def _linear(form: LinearForm) -> bool:
    if form.low_rank is not None and form.low_rank.has_effect:
        return True
    scales = [scale for scale in (form.in_scale, form.out_scale) if scale is not None]
    if any(bool((scale.float() - 1).abs().max() > ROUNDING) for scale in scales):
        return True
    if _turns(form.rotation):
        return True
    parts = (form.bias, form.dense, None if form.turn is None else form.turn.values)
    return any(part is not None and bool(part.any()) for part in parts)


def _turns(rotation: Tensor | None) -> bool:
    """Whether a rotation [blocks, size, size] is more than the identity."""
    return rotation is not None and bool((rotation.float() - torch.eye(rotation.shape[-1])).abs().max() > ROUNDING)


def _norm(form: NormForm, base: Mapping[str, Tensor | None]) -> bool:
    pairs = [(own, base.get(name)) for name, own in form.parameters.items()]
    return any(there is None or not torch.equal(own.to(there), there) for own, there in pairs)


def _table(form: TableForm, weight: Tensor) -> bool:
    if any(factors is not None and factors.has_effect for factors in (form.low_rank, form.gain)):
        return True
    if _turns(form.rotation):
        return True
    if form.tokens is None:
        return False
    assert form.rows is not None
    there = weight.detach()[form.tokens.to(weight.device)]
    return not torch.equal(form.rows.to(there), there)
