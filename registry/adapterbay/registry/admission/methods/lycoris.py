"""LoHa (Hadamard products, arXiv:2108.06098) and LoKr (Kronecker products, arXiv:2212.10650) of low-rank factors."""

from __future__ import annotations

from typing import Final

from adapterbay.registry.admission.methods.fields import Fields, dropout, fields, harmless, obeyed, training
from adapterbay.registry.admission.methods.low_rank import PLACED, RANKS, rank_of
from adapterbay.registry.admission.methods.method import LINEAR, Expected, Method, Tensor, shapes
from adapterbay.registry.admission.methods.settings import Settings, as_number
from adapterbay.registry.admission.places import Place

_SHARED: Final[Fields] = fields(
    PLACED,
    RANKS,
    dropout("rank_dropout", "module_dropout"),
    training("init_weights"),
    obeyed(alpha="the scaling is alpha / r", alpha_pattern="the alphas of single modules"),
    {"use_effective_conv2d": harmless("concerns convolutions, which are not served")},
)

_rank = rank_of(8)


def _scaling(settings: Settings, place: Place) -> float:
    alpha = settings.of("alpha_pattern", place.name, settings.number("alpha", 8))
    return as_number("alpha_pattern", alpha) / _rank(settings, place)


def _loha(settings: Settings, place: Place) -> Expected:
    rank, out, width = _rank(settings, place), place.out_features, place.in_features
    return shapes(hada_w1_a=(out, rank), hada_w1_b=(rank, width), hada_w2_a=(out, rank), hada_w2_b=(rank, width))


LOHA: Final = Method(
    "LOHA",
    "LoHa",
    _SHARED,
    LINEAR,
    (r"hada_w[12]_[ab]",),
    tensors=_loha,
    still=(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),),
    rank=_rank,
    factors=False,
    scaling=_scaling,
)


def factorization(dimension: int, factor: int) -> tuple[int, int]:
    """PEFT's split of a dimension into two factors, the smaller first, the smaller at most `factor` (-1: any)."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    if factor == -1:
        factor = dimension
    low, high = 1, dimension
    total = low + high
    while low < high:
        candidate = low + 1
        while dimension % candidate:
            candidate += 1
        other = dimension // candidate
        if candidate + other > total or candidate > factor:
            break
        low, high = candidate, other
    return min(low, high), max(low, high)


def _lokr(settings: Settings, place: Place) -> Expected:
    rank = _rank(settings, place)
    factor = settings.integer("decompose_factor", -1, least=-1)
    in_low, in_high = factorization(place.in_features, factor)
    out_low, out_high = factorization(place.out_features, factor)
    found: dict[str, Tensor] = {}
    if settings.flag("decompose_both") and rank < max(out_low, in_low) / 2:
        found |= shapes(lokr_w1_a=(out_low, rank), lokr_w1_b=(rank, in_low))
    else:
        found |= shapes(lokr_w1=(out_low, in_low))
    if rank < max(out_high, in_high) / 2:
        found |= shapes(lokr_w2_a=(out_high, rank), lokr_w2_b=(rank, in_high))
    else:
        found |= shapes(lokr_w2=(out_high, in_high))
    return found


LOKR: Final = Method(
    "LOKR",
    "LoKr",
    {
        **_SHARED,
        **training("rank_dropout_scale"),
        **obeyed(
            decompose_both="whether the first factor is a product, too",
            decompose_factor="how the dimensions are split",
        ),
    },
    LINEAR,
    (r"lokr_w[12](?:_[ab])?",),
    tensors=_lokr,
    still=(("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),),
    rank=_rank,
    factors=False,
    scaling=_scaling,
)
