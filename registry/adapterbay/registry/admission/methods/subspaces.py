"""Methods that train a part of the weight's own decomposition: OSF and AdaMSS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from adapterbay.registry.admission.methods.fields import INIT, LAYERS, SAVED, TARGETED, fields, obeyed, training
from adapterbay.registry.admission.methods.low_rank import RANK
from adapterbay.registry.admission.methods.method import LINEAR, Expected, Method, dotted, shapes
from adapterbay.registry.admission.methods.settings import Settings, as_number, refuse
from adapterbay.registry.admission.places import Place
from adapterbay.registry.errors import Rejected


def _effective_rank(value: object, smaller: int) -> int:
    """PEFT's `_resolve_rank`: null is half, a number up to 1 that is no whole one is a share."""
    if value is None:
        return smaller // 2
    number = as_number("effective_rank", value)
    rank = int(smaller * number) if isinstance(value, float) and 0 < number <= 1 else int(number)
    return max(min(smaller, rank), 0)


def _osf(settings: Settings, place: Place) -> Expected:
    smaller = min(place.in_features, place.out_features)
    value = settings.searched("rank_pattern", place.name, settings.config.get("effective_rank"))
    kept = _effective_rank(value, smaller)
    low = smaller - kept
    if kept < 1:
        refuse("effective_rank", value, "above 0")
    return dotted(
        {
            "osf_svd_params.U_low": (place.out_features, low),
            "osf_svd_params.S_low": (low,),
            "osf_svd_params.V_low": (low, place.in_features),
        }
    )


OSF: Final = Method(
    "OSF",
    "OSF",
    fields(
        TARGETED,
        SAVED,
        INIT,
        training("target_svd_config"),
        obeyed(
            effective_rank="how many singular directions stay as they are",
            rank_pattern="the same for single modules",
        ),
    ),
    LINEAR,
    (r"osf_svd_params\.[USV]_low",),
    tensors=_osf,
)


def _adamss(settings: Settings, place: Place) -> Expected:
    width = place.in_features + place.bias
    rank = min(settings.integer("r", 100), place.out_features, width)
    most = min(settings.integer("num_subspaces", 5), place.out_features)
    found = shapes(adamss_newB=(rank, width))
    for index in range(most):
        found |= dotted({f"adamss_A.{index}": (None, rank), f"adamss_B.{index}": (None, None)})
    return found


def _verify_adamss(_: Settings, place: Place, found: Mapping[str, tuple[int, ...]]) -> None:
    """Every row of the weight is in one subspace; A [rank, r] and B [rows, rank] of a subspace fit each other."""
    rows = sum(shape[0] for suffix, shape in found.items() if suffix.startswith("adamss_B."))
    ranks = {suffix[9:]: shape[0] for suffix, shape in found.items() if suffix.startswith("adamss_A.")}
    unfit = [index for index, rank in ranks.items() if found[f"adamss_B.{index}"][1] != rank]
    if rows != place.out_features or unfit:
        raise Rejected(
            f"The subspaces of {place.name} do not fit together: they have {rows} rows of {place.out_features}.",
            reason="SHAPE_MISMATCH",
            metadata={"module": place.name},
        )


ADAMSS: Final = Method(
    "ADAMSS",
    "AdaMSS",
    fields(
        TARGETED,
        SAVED,
        LAYERS,
        INIT,
        RANK,
        training(
            "use_asa",
            "asa_target_subspaces",
            "init_warmup",
            "final_warmup",
            "mask_interval",
            "asa_importance_beta",
            "asa_uncertainty_beta",
            "asa_schedule_exponent",
        ),
        obeyed(
            num_subspaces="the number of subspaces",
            subspace_rank="the largest rank of a subspace",
            use_dynamic_rank="whether ranks are smaller where less is needed",
            svd_threshold="how ranks are chosen",
            random_seed="the seed of the decomposition",
        ),
    ),
    LINEAR,
    (r"adamss_[AB]\.\d+", "adamss_newB"),
    tensors=_adamss,
    rank=lambda settings, _: settings.integer("r", 100),
    verify=_verify_adamss,
)
