"""Bottleneck adapters, of which PEFT has none: our own type in a folder of PEFT's shape.

Houlsby et al. 2019 (arXiv:1902.00751) put one behind the attention and one behind the feed-forward part of a layer,
Pfeiffer et al. 2021 (arXiv:2005.00247) one behind the feed-forward part. Behind a module with the output h [hidden]:

    h + scaling · up(f(down(norm(h))))

`target_modules` are the modules behind which one sits, such as `self_attn.o_proj` and `mlp.down_proj`, or
`attention.output.dense` and `output.dense`. With `through_norm` they are normalization layers N of the base, such as
`output.LayerNorm`, before which one sits and looks through (what the AdapterHub library computes by default):

    N(x + scaling · up(f(down(norm(N(x))))))
"""

from __future__ import annotations

from typing import Final

from adapterbay.registry.admission.methods.fields import (
    EXCLUDED,
    LAYERS,
    SAVED,
    TARGETED,
    dropout,
    fields,
    obeyed,
    training,
)
from adapterbay.registry.admission.methods.method import MATRICES, Expected, Method, Tensor, optional
from adapterbay.registry.admission.methods.settings import Settings, refuse
from adapterbay.registry.admission.places import Place
from adapterbay.registry.errors import Rejected

ACTIVATIONS: Final = ("relu", "gelu", "gelu_new", "leaky_relu", "swish", "silu", "tanh")


def bottleneck_size(settings: Settings, hidden: int) -> int:
    """The width of the bottleneck: `bottleneck_size`, or hidden // `reduction_factor`."""
    if settings.config.get("bottleneck_size") is not None:
        return settings.integer("bottleneck_size", 0)
    factor = settings.number("reduction_factor", 16)
    size = int(hidden // factor) if factor > 0 else 0
    if size < 1:
        refuse("reduction_factor", settings.config.get("reduction_factor"), f"above 0 and at most {hidden}")
    return size


def _bottleneck(settings: Settings, place: Place) -> Expected:
    through = settings.flag("through_norm")
    if through != (place.kind == "norm"):
        raise Rejected(
            f"The adapter has a bottleneck at {place.name}, but with through_norm={str(through).lower()} it can only "
            f"sit at {'normalization' if through else 'linear'} layers.",
            reason="UNKNOWN_MODULE",
            metadata={"module": place.name},
        )
    hidden = place.out_features
    size = bottleneck_size(settings, hidden)
    found = {
        "adapter_down.weight": (size, hidden),
        "adapter_down.bias": (size,),
        "adapter_up.weight": (hidden, size),
        "adapter_up.bias": (hidden,),
    }
    tensors = {suffix: Tensor(shape) for suffix, shape in found.items()}
    if settings.flag("layer_norm_before"):
        tensors |= {"adapter_norm.weight": Tensor((hidden,)), "adapter_norm.bias": optional(hidden)}
    return tensors


def _rank(settings: Settings, place: Place | None) -> int:
    return 0 if place is None else bottleneck_size(settings, place.out_features)


def _check(settings: Settings) -> None:
    settings.choice("non_linearity", "relu", ACTIVATIONS)
    settings.number("scaling", 1.0)
    settings.flag("layer_norm_before")
    settings.flag("through_norm")
    if settings.config.get("bottleneck_size") is not None and settings.config.get("reduction_factor") is not None:
        refuse("reduction_factor", settings.config["reduction_factor"], "null, since bottleneck_size is given")


BOTTLENECK: Final = Method(
    "BOTTLENECK",
    "bottleneck",
    fields(
        TARGETED,
        EXCLUDED,
        LAYERS,
        SAVED,
        dropout("adapter_dropout"),
        training("init_weights"),
        obeyed(
            bottleneck_size="the width of the bottleneck",
            reduction_factor="the width of the bottleneck is hidden / this",
            non_linearity="the activation",
            scaling="the factor on what is added",
            layer_norm_before="whether a normalization comes first",
            through_norm="whether it sits before the base's normalization layers and looks through them",
        ),
    ),
    MATRICES | {"norm"},
    (r"adapter_(?:down|up|norm)\.(?:weight|bias)",),
    tensors=_bottleneck,
    still=(("adapter_up.weight",), ("adapter_up.bias",)),
    rank=_rank,
    check=_check,
)
