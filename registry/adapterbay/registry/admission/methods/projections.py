"""Methods with tensors that all modules share: VeRA, PVeRA, RandLoRA, FRoD, TinyLoRA, Uni-LoRA, VB-LoRA."""

from __future__ import annotations

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
    harmless,
    obeyed,
    refused,
    training,
)
from adapterbay.registry.admission.methods.low_rank import RANK, divided
from adapterbay.registry.admission.methods.method import (
    MATRICES,
    TABLES,
    Expected,
    Method,
    Tensor,
    dotted,
    optional,
    shapes,
)
from adapterbay.registry.admission.methods.settings import Settings, refuse
from adapterbay.registry.admission.places import Base, Place

PLACED: Final[Fields] = {**TARGETED, **LAYERS, **SAVED, **BIASED, **FAN, **INIT}
PROJECTION: Final[Fields] = obeyed(
    projection_prng_key="the seed of the shared projections", save_projection="whether they are among the tensors"
)


def _widest(places: Sequence[Place]) -> tuple[int, int]:
    """The largest output and the largest input."""
    return max((p.out_features for p in places), default=0), max((p.in_features for p in places), default=0)


def _drawn(settings: Settings, places: Sequence[Place]) -> int:
    """The values of both projections, which all layers share: r is 1024 in VeRA's paper, whatever the layers' sizes."""
    return settings.integer("r", 256) * sum(_widest(places))


def _vera(settings: Settings, place: Place) -> Expected:
    return shapes(vera_lambda_b=(place.out_features,), vera_lambda_d=(settings.integer("r", 256),))


def _vera_shared(settings: Settings, _: Base, places: Sequence[Place]) -> Expected:
    (out, width), rank = _widest(places), settings.integer("r", 256)
    needed = settings.flag("save_projection", True)
    return {"vera_A": Tensor((rank, width), needed), "vera_B": Tensor((out, rank), needed)}


VERA: Final = Method(
    "VERA",
    "VeRA",
    fields(PLACED, RANK, PROJECTION, dropout("vera_dropout"), training("d_initial")),
    MATRICES,
    (r"vera_lambda_[bd]",),
    ("vera_A", "vera_B"),
    tensors=_vera,
    shared_tensors=_vera_shared,
    still=(("vera_lambda_b", "vera_lambda_d"),),
    still_shared=("vera_A", "vera_B"),
    rank=lambda settings, _: settings.integer("r", 256),
    factors=False,
    drawn=_drawn,
)


def _pvera(settings: Settings, place: Place) -> Expected:
    return shapes(pvera_lambda_b=(place.out_features,), pvera_lambda_d=(2 * settings.integer("r", 256),))


def _pvera_shared(settings: Settings, _: Base, places: Sequence[Place]) -> Expected:
    (out, width), rank = _widest(places), settings.integer("r", 256)
    needed = settings.flag("save_projection", True)
    return {"pvera_A": Tensor((2 * rank, width), needed), "pvera_B": Tensor((out, rank), needed)}


PVERA: Final = Method(
    "PVERA",
    "PVeRA",
    fields(
        PLACED,
        RANK,
        PROJECTION,
        dropout("pvera_dropout"),
        training("d_initial"),
        {
            "sample_at_inference": refused("samples around the delta for every answer", False),
            "generator_seed": harmless("the seed of the samples, which are drawn in training only"),
        },
    ),
    MATRICES,
    (r"pvera_lambda_[bd]",),
    ("pvera_A", "pvera_B"),
    tensors=_pvera,
    shared_tensors=_pvera_shared,
    still=(("pvera_lambda_b", "pvera_lambda_d"),),
    still_shared=("pvera_A", "pvera_B"),
    rank=lambda settings, _: settings.integer("r", 256),
    factors=False,
    drawn=_drawn,
)


def _bases(size: int, rank: int) -> int:
    return -(-size // rank)


def _randlora(settings: Settings, place: Place) -> Expected:
    rank = settings.integer("r", 32)
    smaller = min(place.in_features, place.out_features)
    count = _bases(smaller, rank)
    # PEFT saves the shared projections once more for every module.
    return {
        **shapes(randlora_lambda=(rank, count), randlora_gamma=(count, smaller)),
        "randlora_A": optional(rank, 1, None),
        "randlora_B": optional(None, None, rank),
    }


def _randlora_shared(settings: Settings, _: Base, places: Sequence[Place]) -> Expected:
    (out, width), rank = _widest(places), settings.integer("r", 32)
    larger, smaller = max(out, width), min(out, width)
    needed = settings.flag("save_projection", True)
    return {
        "randlora_A": Tensor((rank, 1, smaller), needed),
        "randlora_B": Tensor((larger, _bases(smaller, rank), rank), needed),
    }


RANDLORA: Final = Method(
    "RANDLORA",
    "RandLoRA",
    fields(
        PLACED,
        RANK,
        PROJECTION,
        dropout("randlora_dropout"),
        obeyed(
            randlora_alpha="the scaling is alpha / r",
            sparse="how the projections are drawn",
            very_sparse="how the projections are drawn",
        ),
    ),
    MATRICES,
    ("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"),
    ("randlora_A", "randlora_B"),
    tensors=_randlora,
    shared_tensors=_randlora_shared,
    still=(("randlora_lambda", "randlora_gamma"),),
    still_shared=("randlora_A", "randlora_B"),
    rank=lambda settings, _: settings.integer("r", 32),
    scaling=lambda settings, _: settings.number("randlora_alpha", 640) / settings.integer("r", 32),
)


def frod_category(name: str) -> str:
    """Which modules share projections (PEFT's `_category_from_key`)."""
    parts = name.split(".")
    if len(parts) == 1:
        return parts[0]
    if parts[-2].isdigit():
        return parts[-1]
    if parts[-2:] == ["output", "dense"] and len(parts) >= 3 and parts[-3] == "attention":
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"


def _frod_count(settings: Settings, width: int) -> int:
    rate = settings.number("sparse_rate", 0.01)
    if not 0 <= rate <= 1:
        refuse("sparse_rate", rate, "from 0 to 1")
    others = width * width - width
    count = min(int(width * width * rate), others)
    return max(1, count) if rate > 0 and others else count


def _frod(settings: Settings, place: Place) -> Expected:
    count = _frod_count(settings, place.in_features)
    return shapes(frod_lambda_l=(place.in_features,), frod_lambda_s_values=(count,))


def _frod_shared(settings: Settings, _: Base, places: Sequence[Place]) -> Expected:
    needed = settings.flag("save_projection", True)
    found: dict[str, Tensor] = {}
    for place in places:
        category, width = frod_category(place.name), place.in_features
        count = _frod_count(settings, width)
        found[f"frod_V.{category}"] = Tensor((width, width), needed)
        found[f"frod_s_indices.{category}"] = Tensor((2, count), needed, below=(width,))
        found[f"frod_s_size.{category}"] = Tensor((2,), needed, below=(width + 1,))
    return found


FROD: Final = Method(
    "FROD",
    "FRoD",
    fields(
        PLACED,
        PROJECTION,
        dropout("frod_dropout"),
        obeyed(
            sparse_rate="how many entries of the core are trained",
            regularization_alpha="how the shared projection is found",
        ),
        {
            "progressbar": harmless("whether PEFT shows its progress"),
            "runtime_offload_base_weight": harmless("where PEFT keeps the base's weight"),
        },
    ),
    MATRICES,
    ("frod_lambda_l", "frod_lambda_s_values"),
    (r"frod_V\.\w+", r"frod_s_indices\.\w+", r"frod_s_size\.\w+"),
    tensors=_frod,
    shared_tensors=_frod_shared,
)


def _tinylora(settings: Settings, place: Place) -> Expected:
    rows, columns = place.out_features, place.in_features
    if place.kind == "embedding":
        rows, columns = place.in_features, place.out_features
    rank = min(settings.integer("r", 2), rows, columns)
    wide = settings.integer("u", 64)
    return {
        **shapes(tinylora_A=(rank, columns), tinylora_B=(rows, rank)),
        "tinylora_P": Tensor((wide, rank, rank), settings.flag("save_projection", True)),
    }


def _tinylora_shared(settings: Settings, _: Base, places: Sequence[Place]) -> Expected:
    tying = settings.number("weight_tying", 0.0)
    if not 0 <= tying <= 1:
        refuse("weight_tying", tying, "from 0 to 1")
    groups = max(1, round(len(places) * (1.0 - tying)))
    size = max(1, len(places) // groups)
    used = {min(index // size, groups - 1) for index in range(len(places))}
    return dotted({f"tinylora_v.{group}": (settings.integer("u", 64),) for group in sorted(used)})


TINYLORA: Final = Method(
    "TINYLORA",
    "TinyLoRA",
    fields(
        PLACED,
        RANK,
        dropout("tinylora_dropout"),
        training("init_v_bound"),
        obeyed(
            u="the length of a trained vector",
            weight_tying="how many modules share a vector",
            projection_seed="the seed of the projections",
            save_projection="whether they are among the tensors",
        ),
    ),
    MATRICES | TABLES,
    (r"tinylora_[ABP]",),
    (r"tinylora_v\.\d+",),
    tensors=_tinylora,
    shared_tensors=_tinylora_shared,
    still=(("tinylora_A", "tinylora_B"),),
    still_shared=("tinylora_v",),
    rank=lambda settings, _: settings.integer("r", 2),
)


def _unilora(settings: Settings, place: Place) -> Expected:
    rank, length = settings.integer("r", 4), settings.integer("theta_d_length", 256)
    needed = settings.flag("save_indices")
    a, b = (rank, place.in_features), (place.out_features, rank)
    return {
        "unilora_indices_A": Tensor(a, needed, below=(length,)),
        "unilora_indices_B": Tensor(b, needed, below=(length,)),
        "unilora_scales_A": Tensor(a, needed),
        "unilora_scales_B": Tensor(b, needed),
    }


UNILORA: Final = Method(
    "UNILORA",
    "Uni-LoRA",
    fields(
        PLACED,
        RANK,
        dropout("unilora_dropout"),
        training("init_theta_d_bound"),
        obeyed(
            proj_seed="the seed of the projection",
            theta_d_length="the length of the trained vector",
            save_indices="whether the projection is among the tensors",
        ),
    ),
    MATRICES,
    (r"unilora_(?:indices|scales)_[AB]",),
    ("unilora_theta_d",),
    tensors=_unilora,
    shared_tensors=lambda settings, _, __: shapes(unilora_theta_d=(settings.integer("theta_d_length", 256),)),
    still_shared=("unilora_theta_d",),
    rank=lambda settings, _: settings.integer("r", 4),
)


def _vblora(settings: Settings, place: Place) -> Expected:
    rank, vectors, length = (
        settings.integer(key, default) for key, default in (("r", 4), ("num_vectors", 256), ("vector_length", 256))
    )
    top = settings.integer("topk", 2)
    if top > vectors:
        refuse("topk", top, f"at most num_vectors={vectors}")
    grids = {
        "A": (rank, divided(settings, place, place.in_features, length, "vector_length")),
        "B": (divided(settings, place, place.out_features, length, "vector_length"), rank),
    }
    found: dict[str, Tensor] = {}
    for side, grid in grids.items():
        if settings.flag("save_only_topk_weights"):
            found[f"vblora_logits_{side}_topk_indices"] = Tensor((*grid, top), below=(vectors,))
            found[f"vblora_logits_{side}_topk_weights"] = Tensor((*grid, top - 1))
        else:
            found[f"vblora_logits_{side}"] = Tensor((*grid, vectors))
    return found


def _vblora_shared(settings: Settings, _: Base, __: Sequence[Place]) -> Expected:
    return shapes(vblora_vector_bank=(settings.integer("num_vectors", 256), settings.integer("vector_length", 256)))


VBLORA: Final = Method(
    "VBLORA",
    "VB-LoRA",
    fields(
        {key: field for key, field in PLACED.items() if key != "init_weights"},
        EXCLUDED,
        RANK,
        dropout("vblora_dropout"),
        training("init_vector_bank_bound", "init_logits_std"),
        obeyed(
            num_vectors="the size of the bank",
            vector_length="the length of its vectors",
            topk="how many of them are mixed",
            save_only_topk_weights="how the mixture is stored",
        ),
    ),
    MATRICES,
    (r"vblora_logits_[AB](?:_topk_indices|_topk_weights)?",),
    ("vblora_vector_bank",),
    tensors=_vblora,
    shared_tensors=_vblora_shared,
    still_shared=("vblora_vector_bank",),
    rank=lambda settings, _: settings.integer("r", 4),
)
