"""Classification heads among an adapter's tensors: which layers they have, and whether these fit together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from adapterbay.registry.admission.module_names import hidden_size
from adapterbay.registry.admission.report import Head
from adapterbay.registry.admission.safetensors_file import TensorInfo
from adapterbay.registry.errors import Rejected, UnsupportedMethod

CHAINS: Final = (
    ("score",),
    ("classifier",),
    ("classifier.dense", "classifier.out_proj"),
    ("pre_classifier", "classifier"),
    ("classification_head.dense", "classification_head.out_proj"),
)
"""The layers of the heads of transformers' *ForSequenceClassification and *ForTokenClassification, in their order."""

LAYERS: Final = tuple(sorted({layer for chain in CHAINS for layer in chain}))
ROOTS: Final = frozenset(layer.partition(".")[0] for layer in LAYERS)

_PART = re.compile(rf"(?P<layer>{'|'.join(map(re.escape, LAYERS))})\.(?P<part>weight|bias)")


def head_part(name: str) -> tuple[str, str] | None:
    """The layer and its part (`weight` or `bias`) that a tensor's name means; None: it is no part of a known head."""
    found = _PART.fullmatch(name)
    return (found["layer"], found["part"]) if found else None


def find_head(
    layers: Mapping[str, Mapping[str, TensorInfo]], config: Mapping[str, Any], base_config: Mapping[str, Any]
) -> Head | None:
    """The head that is made of `layers`; None if there are none. Raises Rejected or UnsupportedMethod."""
    if not layers:
        return None
    chain = next((chain for chain in CHAINS if set(chain) == set(layers)), None)
    if chain is None:
        _no_chain(set(layers))
        raise UnsupportedMethod(f"An adapter with two heads ({', '.join(sorted(layers))}) is not served.")
    if config.get("task_type") == "SEQ_CLS" and base_config.get("model_type") == "distilbert" and len(chain) == 1:
        raise Rejected(
            "The head has a classifier and no pre_classifier, which would be random: train with "
            "modules_to_save=['pre_classifier', 'classifier'].",
            reason="MISSING_TENSOR",
        )
    width = hidden_size(base_config)
    for layer in chain:
        width = _check_layer(layer, layers[layer], width)
    last = layers[chain[-1]]
    shape = last["weight"].shape
    parts = {
        f"{layer}.{part}": layers[layer][part].name
        for layer in chain
        for part in ("weight", "bias")
        if part in layers[layer]
    }
    return Head(chain[-1], shape[0], shape[1], "bias" in last, parts)


def _no_chain(layers: set[str]) -> None:
    """Raises Rejected with reason MISSING_TENSOR if layers of one known head are missing."""
    for chain in CHAINS:
        if layers < set(chain):
            raise Rejected(
                f"The head has {' and '.join(sorted(layers))} and no {' and '.join(sorted(set(chain) - layers))}.",
                reason="MISSING_TENSOR",
            )


def _check_layer(layer: str, parts: Mapping[str, TensorInfo], width: int | None) -> int:
    if "weight" not in parts:
        raise Rejected(f"The head {layer} has a bias but no weight.", reason="MISSING_TENSOR")
    shape = parts["weight"].shape
    if len(shape) != 2 or shape[0] < 1 or shape[1] != width:
        raise Rejected(
            f"{parts['weight'].name} has the shape {list(shape)}, but the base needs [labels, {width}].",
            reason="SHAPE_MISMATCH",
        )
    bias = parts.get("bias")
    if bias is not None and bias.shape != (shape[0],):
        raise Rejected(
            f"{bias.name} has the shape {list(bias.shape)}, but the weight needs [{shape[0]}].",
            reason="SHAPE_MISMATCH",
        )
    return shape[0]
