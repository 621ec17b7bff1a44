"""Methods that turn the input or the output of a layer: OFT, BOFT, HRA, PSOFT, RoAd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from adapterbay.registry.admission.methods.fields import (
    BIASED,
    EXCLUDED,
    FAN,
    INIT,
    LAYERS,
    SAVED,
    TARGETED,
    Fields,
    dropout,
    fields,
    obeyed,
)
from adapterbay.registry.admission.methods.low_rank import RANK, divided
from adapterbay.registry.admission.methods.method import LINEAR, TABLES, Expected, Method, dotted, shapes
from adapterbay.registry.admission.methods.settings import Settings, refuse
from adapterbay.registry.admission.places import Place
from adapterbay.registry.errors import Rejected

PLACED: Final[Fields] = {**TARGETED, **EXCLUDED, **LAYERS, **SAVED, **INIT}


def adjusted(size: int, wanted: int) -> int:
    """The divisor of `size` that is nearest to `wanted` (PEFT's `adjust_oft_parameters`)."""
    if wanted >= size:
        return size
    higher, lower = wanted, wanted
    while higher <= size and size % higher:
        higher += 1
    while lower > 1 and size % lower:
        lower -= 1
    return lower if wanted - lower <= higher - wanted else higher


def _either(settings: Settings, keys: Sequence[str], defaults: Sequence[int]) -> tuple[int, int]:
    """Two settings of which one is 0."""
    first, second = (settings.integer(key, default, least=0) for key, default in zip(keys, defaults, strict=True))
    if (first == 0) == (second == 0):
        refuse(keys[0], first, f"0 if {keys[1]} is given, and above 0 if it is not")
    return first, second


def _oft(settings: Settings, place: Place) -> Expected:
    rank, size = _either(settings, ("r", "oft_block_size"), (0, 32))
    width = place.out_features if place.kind == "embedding" else place.in_features
    if rank == 0:
        size = adjusted(width, size)
        rank = width // size
    else:
        rank = adjusted(width, rank)
        size = width // rank
    blocks = 1 if settings.flag("block_share") else rank
    name = "oft_embedding_R.weight" if place.kind == "embedding" else "oft_R.weight"
    return dotted({name: (blocks, size * (size - 1) // 2)})


def _check_oft(settings: Settings) -> None:
    _either(settings, ("r", "oft_block_size"), (0, 32))
    settings.number("eps", 6e-5)
    settings.integer("num_cayley_neumann_terms", 5, least=0)


OFT: Final = Method(
    "OFT",
    "OFT",
    fields(
        PLACED,
        BIASED,
        FAN,
        dropout("module_dropout"),
        obeyed(
            r="the number of blocks",
            oft_block_size="the size of a block",
            coft="whether the rotation is bounded",
            eps="the bound",
            block_share="whether all blocks are one",
            use_cayley_neumann="how the rotation is made of its parameters",
            num_cayley_neumann_terms="how exactly",
        ),
    ),
    LINEAR | TABLES,
    (r"oft_R\.weight", r"oft_embedding_R\.weight"),
    tensors=_oft,
    still=(("oft_R.weight", "oft_embedding_R.weight"),),
    check=_check_oft,
)


def _boft(settings: Settings, place: Place) -> Expected:
    size, blocks = _either(settings, ("boft_block_size", "boft_block_num"), (4, 0))
    if size:
        blocks = divided(settings, place, place.in_features, size, "boft_block_size")
    else:
        size = divided(settings, place, place.in_features, blocks, "boft_block_num")
    # Without PEFT's CUDA kernel there is one factor, whatever boft_n_butterfly_factor says.
    return shapes(boft_R=(None, blocks, size, size), boft_s=(place.out_features, 1))


def _check_boft(settings: Settings) -> None:
    _either(settings, ("boft_block_size", "boft_block_num"), (4, 0))
    settings.integer("boft_n_butterfly_factor", 1)


BOFT: Final = Method(
    "BOFT",
    "BOFT",
    fields(
        PLACED,
        BIASED,
        FAN,
        dropout("boft_dropout"),
        obeyed(
            boft_block_size="the size of a block",
            boft_block_num="the number of blocks",
            boft_n_butterfly_factor="the number of factors",
        ),
    ),
    LINEAR,
    ("boft_R", "boft_s"),
    tensors=_boft,
    still=(("boft_R",), ("boft_s",)),
    neutral={"boft_s": 1.0},
    check=_check_boft,
)

HRA: Final = Method(
    "HRA",
    "HRA",
    fields(PLACED, BIASED, RANK, obeyed(apply_GS="whether the reflections are made orthogonal")),
    LINEAR,
    ("hra_u",),
    tensors=lambda settings, place: shapes(hra_u=(place.in_features, settings.integer("r", 8))),
    rank=lambda settings, _: settings.integer("r", 8),
)


def _psoft(settings: Settings, place: Place) -> Expected:
    rank = settings.integer("r", 32)
    if rank > min(place.in_features, place.out_features):
        raise Rejected(
            f"PSOFT on {place.name}: r={rank} is more than the smaller side of its weight.",
            reason="SHAPE_MISMATCH",
            metadata={"module": place.name},
        )
    found: dict[str, tuple[int | None, ...]] = {
        "psoft_R.weight": (rank * (rank - 1) // 2,) if settings.flag("psoft_orth", True) else (rank, rank)
    }
    for name in "ab":
        if settings.flag(f"psoft_mag_{name}", True):
            found[f"psoft_R.vector_{name}"] = (rank,)
    return dotted(found)


def _check_psoft(settings: Settings) -> None:
    settings.choice("ab_svd_init", "psoft_init", ("psoft_init", "pissa_init"))
    settings.choice("psoft_svd", "full", ("full", "lowrank"))
    settings.integer("r", 32)


PSOFT: Final = Method(
    "PSOFT",
    "PSOFT",
    fields(
        PLACED,
        RANK,
        FAN,
        dropout("psoft_dropout"),
        obeyed(
            psoft_alpha="the scaling is alpha / r",
            ab_svd_init="how the fixed factors are taken from the base",
            psoft_svd="by which decomposition",
            psoft_svd_lowrank_niter="how exactly",
            random_seed="with which seed",
            psoft_orth="whether the core is a rotation",
            psoft_mag_a="whether it has a scale before it",
            psoft_mag_b="whether it has a scale behind it",
            use_cayley_neumann="how the rotation is made of its parameters",
            num_cayley_neumann_terms="how exactly",
            cayley_neumann_eps="within which bound",
        ),
    ),
    LINEAR,
    (r"psoft_R\.(?:weight|vector_[ab])",),
    tensors=_psoft,
    rank=lambda settings, _: settings.integer("r", 32),
    check=_check_psoft,
)

_ROAD_SIZES: Final = {"road_1": 0.5, "road_2": 1.0, "road_4": 2.0}


def _road(settings: Settings, place: Place) -> Expected:
    variant = settings.choice("variant", "road_1", tuple(_ROAD_SIZES))
    divided(settings, place, place.out_features, settings.integer("group_size", 64), "group_size")
    size = math.floor(place.out_features * _ROAD_SIZES[variant])
    return shapes(road_theta=(size,), road_alpha=(size,))


def _check_road(settings: Settings) -> None:
    settings.choice("variant", "road_1", tuple(_ROAD_SIZES))
    size = settings.integer("group_size", 64)
    if size % 2:
        refuse("group_size", size, "even")


ROAD: Final = Method(
    "ROAD",
    "RoAd",
    fields(
        TARGETED,
        SAVED,
        INIT,
        obeyed(variant="how many angles there are", group_size="which outputs turn together"),
    ),
    LINEAR,
    ("road_theta", "road_alpha"),
    tensors=_road,
    still=(("road_theta",), ("road_alpha",)),
    neutral={"road_alpha": 1.0},
    check=_check_road,
)
