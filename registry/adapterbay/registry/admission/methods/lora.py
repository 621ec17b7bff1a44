"""LoRA (arXiv:2106.09685) with its variants, and AdaLoRA (arXiv:2303.10512)."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any, Final

from adapterbay.registry.admission.methods.fields import (
    BIASED,
    COMMON,
    EXCLUDED,
    FAN,
    LAYERS,
    SAVED,
    TARGETED,
    Field,
    dropout,
    fields,
    harmless,
    obeyed,
    refused,
    supported,
    training,
)
from adapterbay.registry.admission.methods.low_rank import divided
from adapterbay.registry.admission.methods.method import MATRICES, TABLES, Expected, Method, Tensor, dotted
from adapterbay.registry.admission.methods.settings import Settings, as_integer, as_number, refuse
from adapterbay.registry.admission.places import Place
from adapterbay.registry.errors import UnsupportedMethod

LORA_FIELDS: Final[Mapping[str, Field]] = {
    **COMMON,
    # the low-rank delta
    "r": supported("the rank; must agree with the tensors"),
    "lora_alpha": supported("the scaling is alpha / r"),
    "use_rslora": supported("the scaling is alpha / sqrt(r)"),
    "rank_pattern": supported("the ranks of single modules; must agree with the tensors"),
    "alpha_pattern": supported("the alphas of single modules"),
    **dropout("lora_dropout"),
    **FAN,
    # where it applies
    **TARGETED,
    **EXCLUDED,
    **LAYERS,
    **SAVED,
    "ensure_weight_tying": supported("whether what is done to the embedding is done to a tied head"),
    "target_parameters": refused("adapts bare parameters (experts), not linear layers", []),
    "trainable_token_indices": supported("the tokens whose embeddings are replaced"),
    "layer_replication": refused("builds another stack of layers out of the base", []),
    # how it was initialised
    "init_lora_weights": supported("only the ways that leave the base as it is, or that PEFT repeats when it loads"),
    "eva_config": harmless("settings of an initialisation that leaves the base as it is", dict, NoneType),
    "loftq_config": supported("how the base was quantized with init_lora_weights='loftq'", dict, NoneType),
    "corda_config": harmless("settings of an initialisation; init_lora_weights decides", dict, NoneType),
    "lora_ga_config": harmless("settings of an initialisation; init_lora_weights decides", dict, NoneType),
    "megatron_core": harmless("only used together with megatron_config", str, NoneType),
    "use_qalora": harmless("PEFT looks at it on a GPTQ base only", bool, NoneType),
    "qalora_group_size": harmless("only used together with use_qalora"),
    "runtime_config": harmless("where an initialisation runs; PEFT does not save it"),
    # variants; an empty object is a config with its defaults, and turns them on
    "use_dora": supported("scales the sum of the base and the delta (DoRA)"),
    **BIASED,
    "lora_bias": supported("adds a bias to B"),
    "megatron_config": refused("replaces the linear layers by Megatron's", {}),
    "velora_config": refused("keeps buffers of its own for the training"),
    "alora_invocation_tokens": supported("is on from these tokens on (aLoRA)"),
    "monteclora_config": refused("keeps a sampler of its own for the training"),
    "use_bdlora": supported("makes A or B block-diagonal"),
    "arrow_config": refused("routes tokens between several adapters"),
    "kasa_config": supported("truncates the base and puts a diagonal between A and B"),
}

OLD_FIELDS: Final[Mapping[str, Field]] = {
    "merge_weights": harmless("whether PEFT 0.2 merged the weights on eval()", bool, NoneType),
    "enable_lora": refused("PEFT 0.2 adapted parts of a fused layer"),
}
"""Fields that PEFT does not write any more."""

KEEP_THE_BASE: Final = frozenset({"gaussian", "eva", "orthogonal", "mica"})
"""Initialisations that leave the base as it is."""
REPEATED: Final = frozenset({"pissa", "olora", "loftq"})
"""Initialisations that change the base, in a way that follows from the base alone: PEFT repeats them when it loads."""

MAX_LOFTQ_STEPS: Final = 16
"""Each is a decomposition of every adapted layer, which a server repeats while others wait; PEFT's default is 1."""

_VARIANTS: Final = (
    "use_dora",
    "alora_invocation_tokens",
    "use_bdlora",
    "kasa_config",
)


def initialisation(settings: Settings) -> str | None:
    """One of REPEATED, or None: the tensors mean what they say on the plain base.

    Raises UnsupportedMethod for initialisations that cannot be repeated.
    """
    value: Any = settings.config.get("init_lora_weights", True)
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, str):
        if value in KEEP_THE_BASE:
            return None
        if value.lower() == "olora":
            return "olora"
        if value in REPEATED:
            return value
    raise UnsupportedMethod(
        f"init_lora_weights={str(value)[:60]!r} is not served: it changes the base's own weights, so the tensors "
        "do not fit the plain base. Save with save_pretrained(…, path_initial_model_for_weight_conversion=…), which "
        "converts the adapter to plain LoRA.",
        metadata={"peft_type": "LORA", "field": "init_lora_weights"},
    )


def variant(settings: Settings) -> str | None:
    """Which field turns on a variant; None: none does. Raises UnsupportedMethod for two, as PEFT does."""
    return settings.once(_variant)


def _variant(settings: Settings) -> str | None:
    on = [key for key in _VARIANTS if _is_on(settings, key)]
    if settings.config.get("init_lora_weights") == "mica":
        on.append("init_lora_weights")
    if len(on) > 1:
        raise UnsupportedMethod(
            f"{' and '.join(on)} together are not served: PEFT does not combine them.",
            metadata={"peft_type": settings.method, "field": on[0]},
        )
    return on[0] if on else None


def _is_on(settings: Settings, key: str) -> bool:
    if key == "use_dora":
        return settings.flag(key)
    if key == "alora_invocation_tokens":
        return bool(settings.integers(key))
    value = settings.config.get(key)
    if value is not None and not isinstance(value, dict):
        refuse(key, value, "an object or null")
    return value is not None


def block_diagonal(settings: Settings, place: Place) -> tuple[int, int]:
    """How many blocks A and B have on a module; 0 is a full matrix."""
    if variant(settings) != "use_bdlora":
        return 0, 0
    own = Settings(settings.mapping("use_bdlora"))
    count = own.integer("nblocks", 1)
    on_a, on_b = (
        any(part in place.last for part in _list(own, key)) for key in ("target_modules_bd_a", "target_modules_bd_b")
    )
    if on_a and on_b:
        refuse("use_bdlora", settings.config["use_bdlora"], f"of A or of B for {place.last}, not of both")
    if not (on_a or on_b) and own.flag("match_strict", True):
        refuse("use_bdlora", settings.config["use_bdlora"], f"of A or of B for {place.last}")
    return (count if on_a else 0), (count if on_b else 0)


def _list(settings: Settings, key: str) -> tuple[str, ...]:
    names = settings.names(key)
    return (names,) if isinstance(names, str) else names


def _tensors(settings: Settings, place: Place) -> Expected:
    rank = settings.rank(place.name, 8)
    kind, start = variant(settings), initialisation(settings)
    if place.kind == "embedding":
        _check_embedding(settings, place, kind, start)
        found = dotted({"lora_embedding_A": (rank, place.in_features), "lora_embedding_B": (place.out_features, rank)})
    else:
        _check_conv1d(settings, place, kind, start)
        a, b = block_diagonal(settings, place)
        width = divided(settings, place, place.in_features, a, "nblocks") if a else place.in_features
        if a:
            divided(settings, place, rank, a, "nblocks")
        height = divided(settings, place, rank, b, "nblocks") if b else rank
        found = dotted({"lora_A.weight": (rank, width), "lora_B.weight": (place.out_features, height)})
        if settings.flag("lora_bias"):
            found["lora_B.bias"] = Tensor((place.out_features,))
    if kind == "use_dora":
        found["lora_magnitude_vector"] = Tensor((place.out_features,))
    elif kind == "kasa_config":
        found["lora_diag"] = Tensor((rank,))
    return found


def _check_embedding(settings: Settings, place: Place, kind: str | None, start: str | None) -> None:
    others = [start] if start else []
    others += [kind] if kind not in (None, "use_dora", "init_lora_weights", "alora_invocation_tokens") else []
    others += ["lora_bias"] if settings.flag("lora_bias") else []
    others += ["alora_invocation_tokens"] if kind == "alora_invocation_tokens" else []
    if others:
        raise UnsupportedMethod(
            f"{others[0]} on the embedding {place.name} is not served: PEFT does not know it there.",
            metadata={"peft_type": "LORA", "module": place.name},
        )


def _check_conv1d(settings: Settings, place: Place, kind: str | None, start: str | None) -> None:
    if place.kind == "conv1d" and (start == "olora" or kind == "kasa_config"):
        raise UnsupportedMethod(
            f"{start or kind} on {place.name} is not served: PEFT does not know it on a Conv1D.",
            metadata={"peft_type": settings.method, "module": place.name},
        )


def _check(settings: Settings) -> None:
    for key in ("r", "lora_alpha", "bias", "rank_pattern", "alpha_pattern"):
        if key in settings.config and settings.config[key] is None:
            refuse(key, None, "what save_pretrained writes there")
    for key in ("rank_pattern", "alpha_pattern"):
        settings.of(key, "", None)  # compiles its expressions
    settings.rank("", 8)
    settings.number("lora_alpha", 8)
    settings.flag("use_rslora")
    for value in settings.mapping("rank_pattern").values():
        as_integer("rank_pattern", value)
    for value in settings.mapping("alpha_pattern").values():
        as_number("alpha_pattern", value)
    start = initialisation(settings)
    kind = variant(settings)
    if start == "loftq":
        _check_loftq(settings)
    if kind == "alora_invocation_tokens" and settings.config.get("task_type") not in (None, "CAUSAL_LM"):
        settings.unserved("alora_invocation_tokens", "PEFT knows it for CAUSAL_LM only")
    if start and kind:
        raise UnsupportedMethod(
            f"init_lora_weights={start!r} together with {kind} is not served. Train without one of them.",
            metadata={"peft_type": "LORA", "field": "init_lora_weights"},
        )
    settings.flag("lora_bias")
    settings.flag("ensure_weight_tying")
    tokens = settings.config.get("trainable_token_indices")
    if tokens is not None and not isinstance(tokens, list | dict):
        refuse("trainable_token_indices", tokens, "a list of tokens, or an object of such lists")


def _check_loftq(settings: Settings) -> None:
    own = Settings(settings.mapping("loftq_config"))
    if own.integer("loftq_bits", 4) not in (4, 8):
        refuse("loftq_config", settings.config["loftq_config"], "of 4 or 8 bits")
    own.integer("loftq_iter", 1, most=MAX_LOFTQ_STEPS)


LORA: Final = Method(
    "LORA",
    "LoRA",
    {**LORA_FIELDS, **OLD_FIELDS},
    MATRICES | TABLES,
    (
        r"lora_[AB]\.weight",
        r"lora_B\.bias",
        r"lora_embedding_[AB]",
        "lora_magnitude_vector",
        "lora_diag",
    ),
    tensors=_tensors,
    rank=lambda settings, place: settings.integer("r", 8) if place is None else settings.rank(place.name, 8),
    check=_check,
)


def _adalora_rank(settings: Settings, place: Place | None) -> int:
    """The rank after pruning: rank_pattern maps the name of E to which of its values are left."""
    first = settings.integer("init_r", 12)
    if place is None:
        return first
    kept = settings.mapping("rank_pattern").get(f"{place.name}.lora_E")
    if kept is None:
        return first
    if not isinstance(kept, list) or not all(isinstance(item, bool) for item in kept):
        refuse("rank_pattern", kept, "a list of true and false for each module")
    return as_integer("rank_pattern", sum(kept), least=0)


def _adalora(settings: Settings, place: Place) -> Expected:
    rank = _adalora_rank(settings, place)
    return dotted({"lora_A": (rank, place.in_features), "lora_B": (place.out_features, rank), "lora_E": (rank, 1)})


ADALORA: Final = Method(
    "ADALORA",
    "AdaLoRA",
    fields(
        LORA_FIELDS,
        {
            "r": harmless("not used: init_r is the rank before pruning"),
            "lora_alpha": supported("the scaling is alpha / rank"),
            "rank_pattern": supported("which singular values are left in each module"),
            "alpha_pattern": harmless("not used by AdaLoRA"),
            "use_rslora": harmless("not used by AdaLoRA", bool, NoneType),
            "init_lora_weights": harmless("how it was initialised; the tensors are given"),
            "loftq_config": harmless("not used by AdaLoRA", dict, NoneType),
            "ensure_weight_tying": refused("ties the head to the embedding", False),
            "trainable_token_indices": refused("replaces rows of the embedding"),
            "use_dora": refused("rescales the output of the base layer (DoRA)", False),
            "lora_bias": refused("adds a bias to B", False),
            "alora_invocation_tokens": refused("is on for a part of the tokens only", []),
            "use_bdlora": refused("makes A or B block-diagonal"),
            "kasa_config": refused("truncates the base and puts a diagonal between A and B"),
        },
        training("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
        obeyed(init_r="the rank before pruning"),
    ),
    MATRICES,
    ("lora_A", "lora_B", "lora_E"),
    tensors=_adalora,
    still=(("lora_A", "lora_B", "lora_E"),),
    rank=_adalora_rank,
    scaling=lambda settings, place: settings.number("lora_alpha", 8) / max(_adalora_rank(settings, place), 1),
)
