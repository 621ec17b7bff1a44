"""Classification heads: what an adapter brings for labels, read from its tensors, blended and applied.

A head is a short chain of linear layers. The architectures differ in what lies between the layers and in which states
they label; transformers' own classes are the source:

    score                                   *ForSequenceClassification of decoders: the last token
    classifier                              BERT and others with a pooler: the first token behind the base's pooler
    classifier.dense, classifier.out_proj   RoBERTa and its kin (tanh), ELECTRA (gelu): the first token
    pre_classifier, classifier              DistilBERT (relu): the first token
    classification_head.dense, .out_proj    T5 (tanh): the decoder's state at the text's end token
    score or classifier                     *ForTokenClassification: every token
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from adapterbay.registry.errors import Rejected, TaskMismatch, UnsupportedMethod
from adapterbay.registry.manifest import TaskName


class HeadPooling(enum.Enum):
    """Which states a head labels: the first token's, the first one's behind the base's pooler, the last token's, or
    every token's."""

    FIRST = "first"
    POOLER = "pooler"
    LAST = "last"
    EVERY = "every"


Activation = Literal["none", "tanh", "relu", "gelu"]


@dataclass(frozen=True, slots=True)
class HeadLayer:
    """A linear layer and what follows it. weight [out, in], bias [out] or None."""

    weight: Tensor
    bias: Tensor | None = None
    activation: Activation = "none"


@dataclass(frozen=True, slots=True)
class Head:
    """A classification head: a chain of layers in float32, the last of which has a row for each label."""

    layers: tuple[HeadLayer, ...]
    labels: tuple[str, ...]
    pooling: HeadPooling

    @property
    def task(self) -> TaskName:
        """What it was trained for."""
        return "token-classification" if self.pooling is HeadPooling.EVERY else "sequence-classification"

    def tensors(self) -> Iterator[Tensor]:
        """Everything that takes memory."""
        for layer in self.layers:
            yield layer.weight
            if layer.bias is not None:
                yield layer.bias

    def to(self, device: torch.device) -> Head:
        """The same on a device."""
        layers = (
            HeadLayer(
                layer.weight.to(device),
                layer.bias.to(device) if layer.bias is not None else None,
                layer.activation,
            )
            for layer in self.layers
        )
        return dataclasses.replace(self, layers=tuple(layers))

    def logits(self, states: Tensor) -> Tensor:
        """States [count, hidden] of any dtype to logits [count, labels] in float32."""
        for layer in self.layers:
            states = F.linear(states.float(), layer.weight, layer.bias)
            if layer.activation != "none":
                states = _ACTIVATIONS[layer.activation](states)
        return states


_ACTIVATIONS: Final = {"tanh": torch.tanh, "relu": torch.relu, "gelu": F.gelu}

_BETWEEN: Final[Mapping[str, Activation]] = {
    "camembert": "tanh",
    "data2vec-text": "tanh",
    "electra": "gelu",
    "esm": "tanh",
    "roberta": "tanh",
    "roberta-prelayernorm": "tanh",
    "xlm-roberta": "tanh",
    "xlm-roberta-xl": "tanh",
    "xmod": "tanh",
}
"""By model type: what lies between classifier.dense and classifier.out_proj."""


def head_from(
    parts: Mapping[str, Tensor], base_config: Mapping[str, Any], task: TaskName, labels: Sequence[str]
) -> Head:
    """The head in an adapter's tensors, by their names in the model (`classifier.dense.weight`).

    `base_config` is the base's config.json. No labels are as many numbers. Raises Rejected (MISSING_TENSOR,
    SHAPE_MISMATCH) and UnsupportedMethod for a chain that is not known for this architecture.
    """
    names = frozenset(name.rpartition(".")[0] for name in parts)
    model_type = str(base_config.get("model_type"))
    if task == "token-classification" and names in ({"score"}, {"classifier"}):
        chain: tuple[tuple[str, Activation], ...] = ((next(iter(names)), "none"),)
        pooling = HeadPooling.EVERY
    elif task != "sequence-classification":
        raise UnsupportedMethod(f"A head of {_listed(names)} is not known for the task {task}.")
    elif names == {"score"}:
        chain, pooling = (("score", "none"),), HeadPooling.LAST
    elif names == {"classifier"} and model_type == "distilbert":
        raise Rejected(
            "The head has classifier but not pre_classifier, which the base does not have either: train with "
            'modules_to_save=["pre_classifier", "classifier"].',
            reason="MISSING_TENSOR",
        )
    elif names == {"classifier"}:
        chain, pooling = (("classifier", "none"),), HeadPooling.POOLER
    elif names == {"pre_classifier", "classifier"} and model_type == "distilbert":
        chain, pooling = (("pre_classifier", "relu"), ("classifier", "none")), HeadPooling.FIRST
    elif names == {"classifier.dense", "classifier.out_proj"} and model_type in _BETWEEN:
        chain = (("classifier.dense", _BETWEEN[model_type]), ("classifier.out_proj", "none"))
        pooling = HeadPooling.FIRST
    elif names == {"classification_head.dense", "classification_head.out_proj"} and model_type == "t5":
        chain = (("classification_head.dense", "tanh"), ("classification_head.out_proj", "none"))
        pooling = HeadPooling.LAST
    else:
        raise UnsupportedMethod(f"A head of {_listed(names)} is not known for the architecture {model_type!r}.")
    layers = tuple(_layer(parts, name, activation) for name, activation in chain)
    for before, after in itertools.pairwise(layers):
        if after.weight.shape[1] != before.weight.shape[0]:
            raise Rejected(
                f"The head's layers do not follow each other: one gives {before.weight.shape[0]} values and the next "
                f"takes {after.weight.shape[1]}.",
                reason="SHAPE_MISMATCH",
            )
    rows = layers[-1].weight.shape[0]
    if labels and len(labels) != rows:
        raise Rejected(f"The head has {rows} rows, but there are {len(labels)} labels.", reason="SHAPE_MISMATCH")
    return Head(layers, tuple(labels) or tuple(str(row) for row in range(rows)), pooling)


def _layer(parts: Mapping[str, Tensor], name: str, activation: Activation) -> HeadLayer:
    weight, bias = parts.get(f"{name}.weight"), parts.get(f"{name}.bias")
    if weight is None:
        raise Rejected(f"The head's {name} has a bias but no weight.", reason="MISSING_TENSOR")
    return HeadLayer(weight.float(), bias.float() if bias is not None else None, activation)


def _listed(names: frozenset[str]) -> str:
    return " and ".join(sorted(names))


def average_heads(heads: Sequence[Head], weights: Sequence[float]) -> Head:
    """The head whose logits are the average by weight of these heads' logits: Σ w_i·head_i(x) / Σ w_i, as one chain.

    One layer: the average of the parameters. More: the first layers stand one below the other, the last ones, scaled,
    side by side, and what lies between is block-diagonal. Averaging the parameters would mean nothing there: the
    hidden units of heads that were trained apart do not match. Raises TaskMismatch when labels, tasks or the layers in
    between differ, or when the weights do not add up to something positive.
    """
    first = heads[0]
    if len(heads) == 1:
        return first
    for head in heads[1:]:
        if head.task != first.task:
            raise TaskMismatch(f"The fused heads have different tasks, {first.task} and {head.task}.")
        if head.labels != first.labels:
            raise TaskMismatch(
                f"The fused heads have different labels, {list(first.labels)} and {list(head.labels)}; "
                "only heads with the same labels in the same order can be fused."
            )
        if head.pooling != first.pooling or _shape(head) != _shape(first):
            raise TaskMismatch("The fused heads are built differently; only heads of one architecture can be fused.")
    total = sum(weights)
    if total <= 0:
        raise TaskMismatch(f"The weights of the fused heads add up to {total}; they must add up to more than 0.")
    shares = [weight / total for weight in weights]
    layers: list[HeadLayer] = []
    last = len(first.layers) - 1
    for index, activation in enumerate(_shape(first)):
        stack = [head.layers[index] for head in heads]
        if index < last:
            together = [layer.weight for layer in stack]
            weight = torch.cat(together) if index == 0 else _diagonal(together)
            biases = [_bias(layer) for layer in stack]
            bias = torch.cat(biases) if any(layer.bias is not None for layer in stack) else None
        else:
            scaled = [layer.weight * share for layer, share in zip(stack, shares, strict=True)]
            weight = torch.stack(scaled).sum(0) if index == 0 else torch.cat(scaled, 1)
            shared = [_bias(layer) * share for layer, share in zip(stack, shares, strict=True)]
            bias = torch.stack(shared).sum(0) if any(layer.bias is not None for layer in stack) else None
        layers.append(HeadLayer(weight, bias, activation))
    return Head(tuple(layers), first.labels, first.pooling)


def _shape(head: Head) -> tuple[Activation, ...]:
    return tuple(layer.activation for layer in head.layers)


def _diagonal(blocks: Sequence[Tensor]) -> Tensor:
    made: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return made


def _bias(layer: HeadLayer) -> Tensor:
    return layer.bias if layer.bias is not None else layer.weight.new_zeros(layer.weight.shape[0])
