"""Methods that are known and not served, each with its reason."""

from __future__ import annotations

from typing import Final

from adapterbay.registry.admission.methods.fields import (
    EXCLUDED,
    INIT,
    LAYERS,
    SAVED,
    TARGETED,
    Fields,
    fields,
    obeyed,
)
from adapterbay.registry.admission.methods.method import Method


def _read(*names: str) -> Fields:
    return obeyed(**dict.fromkeys(names, "not read: the method is refused"))


POLY: Final = Method(
    "POLY",
    "Poly",
    fields(TARGETED, EXCLUDED, SAVED, INIT, _read("r", "poly_type", "n_tasks", "n_skills", "n_splits")),
    refused="a request would have to say which of its tasks it means. Train with LORA",
)

XLORA: Final = Method(
    "XLORA",
    "X-LoRA",
    fields(
        _read(
            *("hidden_size", "adapters", "enable_softmax", "enable_softmax_topk", "layerwise_scalings", "xlora_depth"),
            *("xlora_size", "xlora_dropout_p", "use_trainable_adapters", "softmax_temperature", "top_k_lora"),
            *("scaling_pass_value", "global_scaling_weight"),
        )
    ),
    refused="it mixes other adapters, which it loads from paths, by a forward pass of its own. Push the adapters one "
    "by one and fuse them",
)

LILY: Final = Method(
    "LILY",
    "Lily",
    fields(TARGETED, EXCLUDED, SAVED, INIT, LAYERS, _read("r", "stride_A", "num_B", "scaling")),
    refused="its router takes the mean over the whole batch, so that one request would change another's answer. Train "
    "with LORA",
)

SHADOW: Final = Method(
    "SHADOW",
    "Shadow",
    fields(
        TARGETED,
        EXCLUDED,
        SAVED,
        INIT,
        LAYERS,
        _read(
            *("r", "shadow_alpha", "shadow_dropout", "shadow_model", "shadow_num_hidden_layers", "shadow_hidden_size"),
            *("shadow_num_attention_heads", "shadow_intermediate_size", "share_embeddings", "update_hidden_size"),
            "auxiliary_loss_weight",
        ),
    ),
    refused="it runs a second model beside the base and carries its state from layer to layer. Train with LORA",
)
