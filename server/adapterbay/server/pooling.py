"""Rows that end with their prompt: labels and embeddings from last hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from adapterbay.registry.errors import Rejected, TaskMismatch
from adapterbay.server.adapters.forms import Head, ServingForm
from adapterbay.server.requests import Pooling


def blend_heads(forms: Sequence[ServingForm], weights: Sequence[float]) -> Head:
    """The head of an arm: the only one, or the average by weight of those that its adapters bring.

    Heads are whole layers and no deltas, so a sum would not stay on their scale: Σ w_i·head_i / Σ w_i. Raises
    TaskMismatch when no adapter has a head, when labels differ, or when the weights of the heads do not add up to
    something positive.
    """
    pairs = [(form.head, weight) for form, weight in zip(forms, weights, strict=True) if form.head is not None]
    if not pairs:
        who = "The base has" if not forms else "This adapter has" if len(forms) == 1 else "These adapters have"
        raise TaskMismatch(f"{who} no classification head; ask an adapter trained for sequence-classification.")
    if len(pairs) == 1:
        return pairs[0][0]
    labels = pairs[0][0].labels
    for head, _ in pairs[1:]:
        if head.labels != labels:
            raise TaskMismatch(
                f"The fused heads have different labels, {list(labels)} and {list(head.labels)}; "
                "only heads with the same labels in the same order can be fused."
            )
    total = sum(weight for _, weight in pairs)
    if total <= 0:
        raise TaskMismatch(f"The weights of the fused heads add up to {total}; they must add up to more than 0.")
    weight = sum((head.weight * (w / total) for head, w in pairs), torch.zeros(()))
    biases = [head.bias * (w / total) for head, w in pairs if head.bias is not None]
    return Head(weight=weight, bias=sum(biases, torch.zeros(())) if biases else None, labels=labels)


def label_logits(state: Tensor, head: Head) -> tuple[list[float], list[float]]:
    """Logits and probabilities of one pooled state [hidden]. Raises Rejected when they are not finite."""
    weight = head.weight.to(state.device)
    bias = head.bias.to(state.device) if head.bias is not None else None
    logits = F.linear(state.float(), weight, bias)
    if not logits.isfinite().all():
        raise Rejected(
            "The logits of this row are not finite: the adapter overflows on this text. Other rows are unharmed.",
            reason="NOT_FINITE",
        )
    return logits.tolist(), logits.softmax(-1).tolist()


class StatePooler:
    """Collects one row's hidden states, chunk by chunk, into one vector."""

    def __init__(self, pooling: Pooling) -> None:
        self._pooling = pooling
        self._state: Tensor | None = None
        self._count = 0

    def push(self, hidden: Tensor) -> None:
        """Takes the states [tokens, hidden] of the row's next tokens."""
        self._count += hidden.shape[0]
        if self._pooling is Pooling.MEAN:
            total = hidden.float().sum(0)
            self._state = total if self._state is None else self._state + total
        elif self._pooling is Pooling.LAST or self._state is None:
            self._state = (hidden[-1] if self._pooling is Pooling.LAST else hidden[0]).clone()

    def value(self) -> Tensor:
        """The pooled state [hidden]."""
        if self._state is None:
            raise RuntimeError("no states were pooled")
        return self._state / self._count if self._pooling is Pooling.MEAN else self._state
