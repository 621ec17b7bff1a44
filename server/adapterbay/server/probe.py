"""Whether a base computes for two texts in one flattened step what it computes for each alone: once, at load.

What does not is refused here, by name, and never served wrongly: a base with attention of its own, with layers beside
attention in which a token sees others (convolutions, recurrent states), with positions that are counted in another
way, with a pooler that is more than its module.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adapterbay.registry.errors import AdapterbayError, UnsupportedMethod
from adapterbay.server import attention
from adapterbay.server.adapters.forms import LM_HEAD
from adapterbay.server.attention import AttentionPlan, Segment
from adapterbay.server.kv import LayerShape
from adapterbay.server.mix.axes import ShapeWatch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adapterbay.server.mix.sites import Sites
    from adapterbay.server.model import ServingModel

LENGTHS = (3, 2)
"""Tokens of the two texts."""

TOLERANCE = 1e-2
"""Of the largest value. Both sides run the same products, over five tokens and over three or two."""


def probe(model: ServingModel) -> list[LayerShape]:
    """What each attention layer caches, by layer index. Raises UnsupportedMethod."""
    who = type(model.base.model).__name__
    try:
        with torch.inference_mode():
            return _probe(model, who)
    except AdapterbayError:
        raise
    except (AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        raise UnsupportedMethod(f"{who} cannot compute several texts as one row of tokens: {error!r}") from error


def _probe(model: ServingModel, who: str) -> list[LayerShape]:
    found: list[tuple[int, LayerShape]] = []
    first, total = LENGTHS[0], sum(LENGTHS)
    bounds = ((0, first), (first, total))
    usable = (token for token in range(model.base.info.vocabulary_size) if token != model.padding)
    ids = torch.tensor([next(usable) for _ in range(total)], device=model.device)
    places = torch.tensor([place for length in LENGTHS for place in range(length)], device=model.device)
    at = torch.tensor([total - 1], device=model.device) if model.causal else None
    segments = tuple(Segment(start, stop, None) for start, stop in bounds)
    plan = AttentionPlan(causal=model.causal, segments=segments, probe=found)
    watch = ShapeWatch(model.sites.linears | model.sites.norms)
    with watch.of(total):
        states, _ = model.forward(ids, places, None, plan, logits_at=at, want_hidden=True)
    shapes = dict(found)
    if not found:
        raise UnsupportedMethod(
            f"{who} does not use transformers' attention interface, so its rows cannot be kept apart in a mixed batch."
        )
    if model.causal and (len(shapes) != len(found) or sorted(shapes) != list(range(len(shapes)))):
        raise UnsupportedMethod(f"{who} does not number its attention layers.")
    if states is None:
        raise UnsupportedMethod(f"{who} does not call its backbone as others do.")
    for start, stop in bounds:
        with watch.of(stop - start):
            output = _alone(model, ids[start:stop])
        if not _close(states[start:stop], output.last_hidden_state[0]):
            why = "its tokens see those of other texts" if start else "its positions are counted in another way"
            raise UnsupportedMethod(f"{who} computes something else beside another text than alone: {why}.")
        if model.pooler is not None and not _close(model.pool(states[start : start + 1], None), output.pooler_output):
            raise UnsupportedMethod(f"{who} does more than its pooler says, which is not served.")
    _tell_axes(model.sites, watch)
    return [shapes[layer] for layer in sorted(shapes)]


def _tell_axes(sites: Sites, watch: ShapeWatch) -> None:
    """Notes where adapters can tell tokens apart. A pooler's layers get a text's first token, the language-model head
    the tokens that are drawn: both know which."""
    sites.token_axes = {path: axis for path in sites.norms if (axis := watch.axis(path)) is not None}
    layers = (path for path in sites.linears if path != LM_HEAD and path.partition(".")[0] != "pooler")
    sites.apart = {path for path in layers if (axis := watch.axis(path)) is None or axis.vectors > 1}


def _alone(model: ServingModel, ids: Tensor) -> Any:
    """The backbone's own output for one text: it is told nothing but the tokens."""
    backbone: Any = model.base.backbone
    plan = AttentionPlan(causal=model.causal, segments=(Segment(0, len(ids), None),))
    with _planned(plan):
        if model.pooler is None:
            return backbone(input_ids=ids[None], use_cache=False)
        backbone.pooler = model.pooler
        try:
            return backbone(input_ids=ids[None], use_cache=False)
        finally:
            backbone.pooler = None


@contextmanager
def _planned(plan: AttentionPlan) -> Iterator[None]:
    attention.current.plan = plan
    try:
        yield
    finally:
        attention.current.plan = None


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """Values that are not finite cannot be compared: a base may overflow in float16 on tokens without meaning."""
    if ours.shape != theirs.shape:
        return False
    largest = theirs.float().abs().max()
    if not largest.isfinite():
        return True
    return bool((ours.float() - theirs.float()).abs().max() <= TOLERANCE * largest)
