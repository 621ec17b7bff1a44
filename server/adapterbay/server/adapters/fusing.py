"""Whether adapters can be one, and the adapter that is derived from them where the weighted sum is not what was asked.

The weighted sum is the arithmetic of task vectors, W' = W + Σ w_p (W'_p − W) (arXiv:2212.04089), for everything that an
adapter changes; the step computes it from the parts, so that a new set of weights costs nothing. All other methods
(`FusionSettings`) are for low-rank deltas: one form is made of the parts' forms, once, and is an adapter like others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adapterbay.registry.errors import InvalidArgument, NoEffect, TaskMismatch, UnsupportedMethod
from adapterbay.server.adapters.forms import LinearForm, LowRank, ServingForm, TableForm
from adapterbay.server.adapters.merging import merge_low_rank
from adapterbay.server.heads import Head, average_heads
from adapterbay.server.requests import ArmSpec, Part
from adapterbay.server.weights import LayerWeights, weight_at

Named = tuple[Part, ServingForm]


def check_fusable(arm: ArmSpec, forms: Sequence[ServingForm]) -> None:
    """Whether `forms`, one for each part of `arm`, can be applied with their weights as one.

    Raises UnsupportedMethod for what has no weighted sum (or, under another method, is no low-rank delta),
    InvalidArgument for a pattern of layers that matches none, NoEffect for weights that leave nothing of an adapter.
    The base alone, and one adapter as it is, always can.
    """
    named = list(zip(arm.parts, forms, strict=True))
    if arm.fusion is None and (not named or (len(named) == 1 and arm.parts[0].applied == 1.0)):
        return
    for part, form in named:
        if form.virtual is not None:
            raise UnsupportedMethod(
                f"{_who(part, form)} puts virtual tokens before the text, which have no weight and no sum: ask for it "
                "alone, at weight 1."
            )
        if form.invocation != forms[0].invocation:
            raise UnsupportedMethod(
                f"{_who(part, form)} and {_who(*named[0])} do not begin at the same tokens: only activated LoRAs with "
                "the same invocation tokens can be fused, and with nothing else."
            )
        _check_layers(part, form)
    if arm.fusion is None:
        _check_turns(named)
        _check_bottlenecks(named)
    else:
        for part, form in named:
            _check_low_rank(part, form, arm.fusion.method)


def fuse_forms(arm: ArmSpec, forms: Sequence[ServingForm]) -> ServingForm:
    """The adapter that is derived from the parts by `arm.fusion`; its digest is that of the arm's key.

    Heads are averaged by weight where they can be; where not, the result has none. Raises what `check_fusable` raises,
    InvalidArgument for ranks that must be equal and are not, NoEffect if nothing is left.
    """
    if arm.fusion is None:
        raise ValueError("a weighted sum needs no form of its own")
    check_fusable(arm, forms)
    settings = arm.fusion.completed()
    # In one order, whatever that of the request was: it is the same fusion.
    named = sorted(zip(arm.parts, forms, strict=True), key=lambda pair: pair[0].digest)
    known = [(part, dict(form.low_ranks())) for part, form in named]
    rank = settings.rank or max(delta.rank for _, deltas in known for delta in deltas.values())

    def fused(path: str) -> LowRank | None:
        here = [(deltas[path], weight_at(part.applied, path)) for part, deltas in known if path in deltas]
        here = [(delta, weight) for delta, weight in here if weight]  # without weight it has no vote either
        if not here:
            return None
        deltas, weights = [delta for delta, _ in here], [weight for _, weight in here]
        return merge_low_rank(deltas, weights, settings, rank=rank, path=path)

    layers = {path: fused(path) for path in _union(form.layers for _, form in named)}
    tables = {path: fused(path) for path in _union(form.tables for _, form in named)}
    head = _blended([form for _, form in named], [part.weight for part, _ in named])
    made = (*layers.values(), *tables.values())
    if head is None and not any(delta is not None and delta.has_effect for delta in made):
        raise NoEffect(
            f"Nothing is left of {' and '.join(map(str, arm.parts))} when they are fused by {settings.method}."
        )
    return ServingForm(
        digest=arm.key[0][0],
        manifest=named[0][1].manifest,
        layers={path: LinearForm(low_rank=delta) for path, delta in layers.items() if delta is not None},
        tables={path: TableForm(low_rank=delta) for path, delta in tables.items() if delta is not None},
        head=head,
        invocation=forms[0].invocation,
    )


def check_fused_head(arm: ArmSpec, forms: Sequence[ServingForm]) -> None:
    """Raises TaskMismatch for a row to be labelled by a derived adapter that has no head."""
    if arm.fusion is not None and forms[0].head is None:
        raise TaskMismatch(
            f"The fusion of {' and '.join(map(str, arm.parts))} has no classification head: none of them brings one, "
            "or their labels differ, or the weights of their heads do not add up to more than 0."
        )


def _check_layers(part: Part, form: ServingForm) -> None:
    paths = _paths(form)
    if isinstance(part.applied, LayerWeights):
        pattern = part.applied.unmatched(paths)
        if pattern is not None:
            raise InvalidArgument(
                f"The pattern {pattern!r} matches none of the layers that {_who(part, form)} changes, for instance "
                f"{next(iter(paths), 'none at all')}.",
                field="fusion.adapters.layer_weights",
            )
    if paths and form.head is None and not any(weight_at(part.applied, path) for path in paths):
        raise NoEffect(f"The weights of {_who(part, form)} are 0 at every layer that it changes: leave it out.")


def _check_turns(named: Sequence[Named]) -> None:
    """W' = W + Σ w (W'_p − W) is one layer again if all parts turn the same side of W: S_out W S_in is no sum."""
    for path in _union(form.layers for _, form in named):
        here = [(part, form) for part, form in named if path in form.layers]
        turning = [(part, form) for part, form in here if not form.layers[path].additive]
        inward = [pair for pair in turning if pair[1].layers[path].turns_input]
        outward = [pair for pair in turning if pair[1].layers[path].turns_output]
        alone = len(turning) == 1 and weight_at(turning[0][0].applied, path) == 1.0
        if inward and outward and not alone:
            both = " and ".join(dict.fromkeys((_who(*inward[0]), _who(*outward[0]))))
            raise UnsupportedMethod(
                f"{both} scale or turn the input of {path} as well as its output, which has no weighted sum: fuse only "
                "methods that change one side of a layer."
            )


def _check_bottlenecks(named: Sequence[Named]) -> None:
    for path in _union(form.bottlenecks for _, form in named):
        here = [_who(part, form) for part, form in named if path in form.bottlenecks]
        if len(here) > 1:
            raise UnsupportedMethod(
                f"{here[0]} and {here[1]} both put a bottleneck behind {path}; a network behind another is no sum."
            )


def _check_low_rank(part: Part, form: ServingForm, method: str) -> None:
    plain = all(layer.low_rank is not None and layer.only_ranks for layer in form.layers.values())
    plain = plain and all(table.only_ranks for table in form.tables.values())
    if not plain or form.lasting or form.norms or form.bottlenecks or form.attention or not any(form.low_ranks()):
        raise UnsupportedMethod(
            f"{_who(part, form)} is more than low-rank deltas, and {method} is for those alone: use linear."
        )


def _paths(form: ServingForm) -> dict[str, None]:
    """The layers that a weight can be for, as the step calls them (`mix.attention` for prompts)."""
    attention = {f"layers.{index}.self_attn": prompt for index, prompt in form.attention.items()}
    return _union([form.layers, form.lasting, form.norms, form.tables, form.bottlenecks, attention])


def _union(kinds: Iterable[Mapping[str, Any]]) -> dict[str, None]:
    """All keys, each once, in order."""
    return {path: None for kind in kinds for path in kind}


def _blended(forms: Sequence[ServingForm], weights: Sequence[float]) -> Head | None:
    try:
        pairs = [(form.head, weight) for form, weight in zip(forms, weights, strict=True) if form.head is not None]
        return average_heads(*map(list, zip(*pairs, strict=True))) if pairs else None
    except TaskMismatch:
        return None  # it generates and embeds all the same; who asks for a label is told


def _who(part: Part, form: ServingForm) -> str:
    return f"{part} ({form.manifest.peft_type})"
