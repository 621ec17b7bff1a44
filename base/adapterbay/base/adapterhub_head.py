"""Heads of the AdapterHub library: under which names transformers' own classes have the same layers.

The library has flexible heads (`heads.NAME.1.weight`, a chain of dropouts, linear layers and activations: heads/base.py
in adapters 1.3.0) and saves those of transformers' classes as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from torch import Tensor

from adapterbay.registry.admission.heads import ROOTS
from adapterbay.registry.errors import Rejected, UnsupportedMethod

TASKS: Final = {
    "SEQ_CLS": "sequence-classification",
    "TOKEN_CLS": "token-classification",
    "FEATURE_EXTRACTION": "feature-extraction",
    "CAUSAL_LM": "causal-lm",
}
"""PEFT's names, and ours."""


@dataclass(frozen=True, slots=True)
class HubHead:
    """`tensors` by name in transformers' class for `task` (PEFT's name), `modules` for modules_to_save."""

    task: str
    tensors: dict[str, Tensor]
    modules: tuple[str, ...]
    labels: tuple[str, ...]


_TWO_LAYERS: Final = {
    ("bert", "tanh"): ("bert.pooler.dense", "classifier"),  # the first token, dense, tanh: what BERT's pooler computes
    ("distilbert", "relu"): ("pre_classifier", "classifier"),
    ("electra", "gelu"): ("classifier.dense", "classifier.out_proj"),
    ("roberta", "tanh"): ("classifier.dense", "classifier.out_proj"),
    ("xlm-roberta", "tanh"): ("classifier.dense", "classifier.out_proj"),
}
"""By model type and activation: the layers of a head on the first token that has two of them."""
_POOLED: Final = frozenset({"bert", "roberta", "xlm-roberta"})


def convert_head(document: Mapping[str, Any], weights: Mapping[str, Tensor], model_type: str) -> HubHead:
    """The head that head_config.json and its tensors mean. Raises UnsupportedMethod or Rejected."""
    config = document.get("config")
    if config is None:
        return _static(document, weights)
    if not isinstance(config, Mapping):
        raise Rejected("head_config.json has a config that is no object.", reason="BAD_CONFIG")
    kind, layers, between = config.get("head_type"), config.get("layers", 1), config.get("activation_function")
    names: tuple[str, ...]
    if kind == "tagging" and layers == 1:
        task, names = "TOKEN_CLS", ("classifier",)
    elif kind == "classification" and layers == 1 and config.get("use_pooler") and model_type in _POOLED:
        task, names = "SEQ_CLS", ("classifier",)
    elif (
        kind == "classification"
        and layers == 2
        and not config.get("use_pooler")
        and (model_type, str(between)) in _TWO_LAYERS
    ):
        task, names = "SEQ_CLS", _TWO_LAYERS[model_type, str(between)]
    else:
        shown = f"{kind} of {layers} layers ({between}, use_pooler={bool(config.get('use_pooler'))}) on {model_type}"
        _refuse(shown)
    step = 3 if between else 2  # dropout, linear, activation
    start = f"heads.{document.get('name')}."
    places = {f"{start}{1 + step * index}": name for index, name in enumerate(names)}
    tensors = {}
    for key, tensor in weights.items():
        owner, _, part = key.rpartition(".")
        if owner not in places or part not in ("weight", "bias"):
            raise Rejected(f"The tensor {key[:200]!r} belongs to no layer of the head.", reason="UNKNOWN_TENSOR")
        tensors[f"{places[owner]}.{part}"] = tensor
    return HubHead(task, tensors, _modules(names), _labels(config.get("label2id")))


def _static(document: Mapping[str, Any], weights: Mapping[str, Tensor]) -> HubHead:
    """The head of a class of transformers."""
    model_class = str(document.get("model_class"))
    task = next(
        (
            task
            for end, task in (("ForSequenceClassification", "SEQ_CLS"), ("ForTokenClassification", "TOKEN_CLS"))
            if model_class.endswith(end)
        ),
        None,
    )
    if task is None:
        _refuse(model_class)
    if odd := sorted(key for key in weights if key.partition(".")[0] not in ROOTS):
        raise Rejected(f"The tensor {odd[0][:200]!r} belongs to no layer of the head.", reason="UNKNOWN_TENSOR")
    names = tuple(sorted({key.rpartition(".")[0] for key in weights}))
    return HubHead(task, dict(weights), _modules(names), _labels(document.get("label2id")))


def _modules(names: tuple[str, ...]) -> tuple[str, ...]:
    """What goes into modules_to_save: a head whole, by its first name."""
    return tuple(sorted({name.partition(".")[0] if name.startswith("classifier") else name for name in names}))


def _labels(label2id: object) -> tuple[str, ...]:
    """Names in the order of the head's rows; none if they are not all there."""
    if not isinstance(label2id, Mapping) or sorted(label2id.values()) != list(range(len(label2id))):
        return ()
    return tuple(str(name) for name, _ in sorted(label2id.items(), key=lambda item: item[1]))


def _refuse(what: str) -> NoReturn:
    raise UnsupportedMethod(
        f"A head of the kind {what} is not served: import the adapter without its head (--no-head)."
    )
