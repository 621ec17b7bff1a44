"""Methods that scale, shift or replace: IA³, LN tuning, BEFT, trainable tokens, SHiRA, SuperTuning."""

from __future__ import annotations

from typing import Final

from adapterbay.registry.admission.methods.fields import (
    EXCLUDED,
    FAN,
    INIT,
    SAVED,
    TARGETED,
    dropout,
    fields,
    harmless,
    obeyed,
)
from adapterbay.registry.admission.methods.low_rank import RANK
from adapterbay.registry.admission.methods.method import (
    LINEAR,
    MATRICES,
    TABLES,
    Expected,
    Method,
    Tensor,
    dotted,
    shapes,
)
from adapterbay.registry.admission.methods.settings import Settings, refuse
from adapterbay.registry.admission.patterns import compile_pattern
from adapterbay.registry.admission.places import Place
from adapterbay.registry.errors import Rejected


def is_feedforward(settings: Settings, name: str) -> bool:
    """Whether IA³ scales the input of a module, and not its output (PEFT's own matching)."""
    names = settings.names("feedforward_modules")
    if isinstance(names, str):
        return compile_pattern(names).fullmatch(name)
    return any(name.endswith(end) for end in names)


def _ia3(settings: Settings, place: Place) -> Expected:
    if is_feedforward(settings, place.name):
        return shapes(ia3_l=(1, place.in_features))
    return shapes(ia3_l=(place.out_features, 1))


IA3: Final = Method(
    "IA3",
    "IA3",
    fields(
        TARGETED,
        EXCLUDED,
        SAVED,
        FAN,
        obeyed(feedforward_modules="the modules whose input is scaled"),
        {"init_ia3_weights": harmless("how it was initialised; the tensors are given")},
    ),
    MATRICES,
    ("ia3_l",),
    tensors=_ia3,
    still=(("ia3_l",),),
    neutral={"ia3_l": 1.0},
)

LN_TUNING: Final = Method(
    "LN_TUNING",
    "LN tuning",
    fields(TARGETED, EXCLUDED, SAVED),
    frozenset({"norm"}),
    (r"ln_tuning_layers\.(?:weight|bias)",),
    tensors=lambda _, place: dotted(
        {f"ln_tuning_layers.{part}": (place.out_features,) for part in ("weight", "bias")[: 1 + place.bias]}
    ),
)

BEFT: Final = Method(
    "BEFT",
    "BEFT",
    fields(TARGETED, SAVED, INIT),
    LINEAR,
    ("beft_bias",),
    tensors=lambda _, place: shapes(beft_bias=(1, place.out_features)),
    still=(("beft_bias",),),
)


def _trainable_tokens(settings: Settings, place: Place) -> Expected:
    rows, width = place.in_features, place.out_features
    if place.kind == "output":
        rows, width = width, rows
    count = len(settings.integers("token_indices", below=rows))
    return shapes(trainable_tokens_delta=(count, width))


TRAINABLE_TOKENS: Final = Method(
    "TRAINABLE_TOKENS",
    "trainable tokens",
    fields(TARGETED, INIT, obeyed(token_indices="the tokens whose embeddings are replaced")),
    TABLES | {"output"},
    ("trainable_tokens_delta",),
    tensors=_trainable_tokens,
)


def _shira(settings: Settings, place: Place) -> Expected:
    rank = settings.integer("r", 32)
    count = rank * (place.in_features + place.out_features)
    if count > place.in_features * place.out_features:
        raise Rejected(
            f"SHIRA on {place.name}: r={rank} is more than its weight has entries.",
            reason="SHAPE_MISMATCH",
            metadata={"module": place.name},
        )
    return {
        "shira_weight": Tensor((count,)),
        "shira_indices": Tensor((2, count), below=(place.out_features, place.in_features)),
    }


SHIRA: Final = Method(
    "SHIRA",
    "SHiRA",
    fields(
        TARGETED,
        SAVED,
        FAN,
        INIT,
        RANK,
        {
            "mask_type": harmless("how the places were chosen; they are among the tensors"),
            "random_seed": harmless("how the places were chosen; they are among the tensors"),
        },
    ),
    LINEAR,
    ("shira_weight", "shira_indices"),
    tensors=_shira,
    still=(("shira_weight",),),
    rank=lambda settings, _: settings.integer("r", 32),
)


def _supertuning_rank(settings: Settings, _: Place | None) -> int:
    return 0 if settings.config.get("r") is None else settings.integer("r", 1)


def _supertuning(settings: Settings, place: Place) -> Expected:
    sparsity = settings.number("sparsity", 0.99)
    if not 0 <= sparsity < 1:
        refuse("sparsity", sparsity, "at least 0 and below 1")
    entries = place.in_features * place.out_features
    count = int(entries * (1 - sparsity))
    needed = settings.flag("save_precomputed_indices", True)
    found: dict[str, Tensor] = {
        "supertuning_values": Tensor((count,)),
        "supertuning_indices": Tensor((count,), needed, below=(entries,)),
    }
    if rank := _supertuning_rank(settings, place):
        found |= dotted(
            {
                "supertuning_lora_A.weight": (rank, place.in_features),
                "supertuning_lora_B.weight": (place.out_features, rank),
            }
        )
    return found


SUPERTUNING: Final = Method(
    "SUPERTUNING",
    "SuperTuning",
    fields(
        TARGETED,
        SAVED,
        INIT,
        RANK,
        dropout("lora_dropout"),
        obeyed(
            sparsity="the share of the entries that stay as they are",
            select_top="which entries are trained",
            lora_alpha="the scaling of the low-rank part is alpha / r",
            save_precomputed_indices="whether their places are among the tensors",
        ),
    ),
    LINEAR,
    ("supertuning_values", "supertuning_indices", r"supertuning_lora_[AB]\.weight"),
    tensors=_supertuning,
    still=(("supertuning_values",), ("supertuning_lora_A.weight", "supertuning_lora_B.weight")),
    rank=_supertuning_rank,
)
