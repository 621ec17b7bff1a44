"""Methods whose delta is made of small factors: HiRA, DeLoRA, GraLoRA, MiSS, DEFT, GLoRA, PEANuT."""

from __future__ import annotations

from collections.abc import Callable
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
    training,
)
from adapterbay.registry.admission.methods.method import (
    LINEAR,
    MATRICES,
    TABLES,
    Expected,
    Method,
    Shape,
    Tensor,
    dotted,
    shapes,
)
from adapterbay.registry.admission.methods.settings import Settings, refuse
from adapterbay.registry.admission.places import Place
from adapterbay.registry.errors import Rejected

PLACED: Final[Fields] = {**TARGETED, **EXCLUDED, **LAYERS, **SAVED}
RANK: Final[Fields] = obeyed(r="the rank; must agree with the tensors")
RANKS: Final[Fields] = {**RANK, **obeyed(rank_pattern="the ranks of single modules; must agree with the tensors")}


def divided(settings: Settings, place: Place, size: int, by: int, what: str) -> int:
    """`size` // `by`. Raises Rejected with reason SHAPE_MISMATCH unless it is whole."""
    if size % by:
        raise Rejected(
            f"{settings.method} on {place.name}: {what}={by} does not divide {size}, so PEFT would not load it.",
            reason="SHAPE_MISMATCH",
            metadata={"module": place.name},
        )
    return size // by


def rank_of(default: int) -> Callable[[Settings, Place | None], int]:
    """The rank is `r`, or what rank_pattern says of the module."""

    def rank(settings: Settings, place: Place | None) -> int:
        return settings.integer("r", default) if place is None else settings.rank(place.name, default)

    return rank


def _hira(settings: Settings, place: Place) -> Expected:
    rank = settings.integer("r", 32)
    if place.kind == "embedding":
        return shapes(hira_embedding_A=(rank, place.in_features), hira_embedding_B=(place.out_features, rank))
    return shapes(hira_A=(rank, place.in_features), hira_B=(place.out_features, rank))


HIRA: Final = Method(
    "HIRA",
    "HiRA",
    fields(
        PLACED,
        RANK,
        {"rank_pattern": harmless("PEFT looks a rank up in it, and makes every layer of r", dict)},
        FAN,
        INIT,
        dropout("hira_dropout"),
    ),
    MATRICES | TABLES,
    ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
    tensors=_hira,
    still=(("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),),
    rank=lambda settings, _: settings.integer("r", 32),
    factors=False,
)

_delora_rank = rank_of(8)


def _delora(settings: Settings, place: Place) -> Expected:
    rank = _delora_rank(settings, place)
    return shapes(
        delora_A=(rank, place.in_features),
        delora_B=(place.out_features, rank),
        delora_lambda=(1,),
        delora_w_norm=(place.in_features,),
    )


DELORA: Final = Method(
    "DELORA",
    "DeLoRA",
    fields(PLACED, RANKS, BIASED, INIT, dropout("module_dropout"), training("delora_lambda", "lambda_pattern")),
    LINEAR,
    ("delora_A", "delora_B", "delora_lambda", "delora_w_norm"),
    tensors=_delora,
    # The factors are divided by their norms, so that only the sum of the product's parts can vanish.
    still=(("delora_A", "delora_B", "delora_lambda", "delora_w_norm"),),
    rank=_delora_rank,
)


def _gralora(settings: Settings, place: Place) -> Expected:
    rank, blocks = settings.integer("r", 32), settings.integer("gralora_k", 2)
    hybrid = settings.integer("hybrid_r", 0, least=0)
    if rank % blocks:
        refuse("r", rank, f"divisible by gralora_k={blocks}")
    rows = divided(settings, place, place.in_features, blocks, "gralora_k")
    columns = divided(settings, place, place.out_features, blocks, "gralora_k")
    found = shapes(gralora_A=(blocks, rows, rank), gralora_B=(blocks, rank, columns))
    if hybrid:
        found |= dotted(
            {
                "gralora_A_general.weight": (hybrid, place.in_features),
                "gralora_B_general.weight": (place.out_features, hybrid),
            }
        )
    return found


def _gralora_rank(settings: Settings, _: Place | None) -> int:
    return settings.integer("r", 32) + settings.integer("hybrid_r", 0, least=0)


GRALORA: Final = Method(
    "GRALORA",
    "GraLoRA",
    fields(
        TARGETED,
        LAYERS,
        SAVED,
        RANK,
        BIASED,
        FAN,
        INIT,
        dropout("gralora_dropout"),
        obeyed(
            hybrid_r="the rank of the part that is not split into blocks",
            alpha="the scaling is alpha / (r + hybrid_r)",
            gralora_k="the number of blocks",
        ),
    ),
    MATRICES,
    ("gralora_A", "gralora_B", r"gralora_A_general\.weight", r"gralora_B_general\.weight"),
    tensors=_gralora,
    still=(("gralora_A", "gralora_B"), ("gralora_A_general.weight", "gralora_B_general.weight")),
    rank=_gralora_rank,
    scaling=lambda settings, _: settings.number("alpha", 64) / _gralora_rank(settings, None),
)


def _miss_kind(settings: Settings) -> str:
    value = settings.config.get("init_weights", True)
    if value is not None and not isinstance(value, bool) and value not in ("bat", "mini"):
        refuse("init_weights", value, "true, false, 'bat' or 'mini'")
    return value if isinstance(value, str) else "plain"


def _miss(settings: Settings, place: Place) -> Expected:
    rank = settings.integer("r", 64)
    kind = _miss_kind(settings)
    if kind == "bat":
        divided(settings, place, place.in_features, rank, "r")
        return shapes(miss_block=(divided(settings, place, place.out_features, rank, "r"), rank, rank))
    if kind == "mini":
        mini = settings.integer("mini_r", 1)
        divided(settings, place, place.out_features, mini, "mini_r")
        return shapes(miss_block=(rank, mini))
    return shapes(miss_block=(rank, place.out_features))


MISS: Final = Method(
    "MISS",
    "MiSS",
    fields(
        PLACED,
        RANK,
        BIASED,
        dropout("miss_dropout"),
        obeyed(init_weights="which of its kinds it is (plain, bat, mini)", mini_r="the width of a mini block"),
    ),
    LINEAR,
    ("miss_block",),
    tensors=_miss,
    still=(("miss_block",),),
    rank=lambda settings, _: settings.integer("r", 64),
    check=lambda settings: (None, _miss_kind(settings))[0],
)


def _deft(settings: Settings, place: Place) -> Expected:
    rank = min(settings.integer("r", 8), place.out_features)
    found = shapes(deft_P=(place.out_features, rank))
    if not settings.flag("para"):
        found |= shapes(deft_R=(rank, place.in_features))
    return found


DEFT: Final = Method(
    "DEFT",
    "DEFT",
    fields(
        PLACED,
        RANK,
        BIASED,
        FAN,
        INIT,
        dropout("deft_dropout"),
        training("init_scale"),
        obeyed(
            decomposition_method="how the projection is made of its factor",
            alpha="the scaling is alpha / r, or 1",
            para="only takes away (PaRa)",
        ),
    ),
    MATRICES,
    ("deft_P", "deft_R"),
    tensors=_deft,
    rank=lambda settings, _: settings.integer("r", 8),
    check=lambda settings: (None, settings.choice("decomposition_method", "relu", ("relu", "qr")))[0],
)


def _glora(settings: Settings, place: Place) -> Expected:
    rank = settings.integer("r", 8)
    out, width = place.out_features, place.in_features
    on_weight = settings.choice("config_A_B", "lora", ("lora", "vector", "constant", "none"))
    inner = settings.choice("config_C", "lora", ("lora", "vector", "none")) if place.bias else "none"
    on_bias = settings.choice("config_D_E", "constant", ("vector", "constant", "none")) if place.bias else "none"
    weights: dict[str, dict[str, Shape]] = {
        "lora": {"Xd": (out, rank), "Xu": (rank, width)},
        "vector": {"X": (out, 1)},
        "constant": {"X": (1,)},
        "none": {"zeros": (out, width)},
    }
    inners: dict[str, dict[str, Shape]] = {
        "lora": {"Xd": (width, rank), "Xu": (rank, 1)},
        "vector": {"X": (width, 1)},
        "none": {"zeros": (width, 1)},
    }
    biases: dict[str, dict[str, Shape]] = {"vector": {"X": (out,)}, "constant": {"X": (1,)}, "none": {"zeros": (out,)}}
    parts = {"A": weights[on_weight], "B": weights[on_weight], "C": inners[inner]}
    parts |= {"D": biases[on_bias], "E": biases[on_bias]}
    return {f"glora_{name}.{part}": Tensor(shape) for name, own in parts.items() for part, shape in own.items()}


def _check_glora(settings: Settings) -> None:
    settings.choice("config_A_B", "lora", ("lora", "vector", "constant", "none"))
    settings.choice("config_C", "lora", ("lora", "vector", "none"))
    settings.choice("config_D_E", "constant", ("vector", "constant", "none"))


GLORA: Final = Method(
    "GLORA",
    "GLoRA",
    fields(
        TARGETED,
        SAVED,
        RANK,
        BIASED,
        INIT,
        obeyed(
            config_A_B="how the weight is scaled and shifted",
            config_C="how the weight enters the bias",
            config_D_E="how the bias is scaled and shifted",
        ),
    ),
    frozenset({"linear", "output"}),
    (r"glora_[ABCDE]\.(?:Xd|Xu|X|zeros)",),
    tensors=_glora,
    still=tuple((f"glora_{name}.Xd", f"glora_{name}.Xu", f"glora_{name}.X", f"glora_{name}.zeros") for name in "ABCDE"),
    rank=lambda settings, _: settings.integer("r", 8),
    check=_check_glora,
)

_ACTIVATIONS: Final = (
    *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "laplace"),
    *("leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu", "swish", "tanh"),
)


def _peanut(settings: Settings, place: Place) -> Expected:
    rank, depth = settings.integer("r", 32), settings.integer("depth", 0, least=0, most=1000)
    found = {"peanut_A.weight": (rank, place.out_features), "peanut_B.weight": (place.out_features, rank)}
    for index in range(depth):
        found |= {f"peanut_{kind}.{index}.weight": (rank, rank) for kind in ("encoders", "decoders")}
    return dotted(found)


PEANUT: Final = Method(
    "PEANUT",
    "PEANuT",
    fields(
        PLACED,
        RANK,
        INIT,
        obeyed(depth="the number of hidden layers", act_fn="the activation", scaling="the factor of the delta"),
    ),
    LINEAR,
    (r"peanut_[AB]\.weight", r"peanut_(?:encoders|decoders)\.\d+\.weight"),
    tensors=_peanut,
    still=(("peanut_B.weight",),),
    rank=lambda settings, _: settings.integer("r", 32),
    check=lambda settings: (None, settings.choice("act_fn", "relu", _ACTIVATIONS))[0],
)
