"""Rows that end with their prompt: labels and embeddings from last hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapterbay.registry.errors import TaskMismatch
from adapterbay.server.adapters.forms import Prompt, ServingForm
from adapterbay.server.adapters.residency import Resident
from adapterbay.server.heads import Head, HeadPooling, average_heads
from adapterbay.server.requests import ArmSpec, ClassifyTask, ClassifyTokensTask, Pooling, not_finite

if TYPE_CHECKING:
    from adapterbay.server.batch import Row

NO_HEAD = "{} no classification head; ask an adapter trained for sequence-classification or token-classification."
"""What is said of who has none."""

MOST_HEADS = 1024
"""How many arms' heads are kept for rows to come."""


def blend_heads(forms: Sequence[ServingForm], weights: Sequence[float]) -> Head:
    """The head of an arm: the only one, or the average by weight of those that its adapters bring.

    Heads are whole layers and no deltas, so a sum would not stay on their scale; see `average_heads`. Raises
    TaskMismatch when no adapter has a head, and what `average_heads` raises.
    """
    pairs = [(form.head, weight) for form, weight in zip(forms, weights, strict=True) if form.head is not None]
    if not pairs:
        raise TaskMismatch(NO_HEAD.format("This adapter has" if len(forms) == 1 else "These adapters have"))
    return average_heads([head for head, _ in pairs], [weight for _, weight in pairs])


class Heads:
    """The heads of arms on the device, blended once. Used on the engine's thread only.

    Rows of one arm get one object, so that a step labels them in one product.
    """

    def __init__(self, device: torch.device, *, pooler: bool) -> None:
        self._device = device
        self._pooler = pooler
        self._known: dict[tuple[tuple[str, float], ...], Head] = {}

    def of(self, residents: Sequence[Resident], arm: ArmSpec, task: ClassifyTask | ClassifyTokensTask) -> Head:
        """The head that labels a row. Raises TaskMismatch when the arm has none, or none for this task."""
        weights = arm.head_weights
        key = tuple((resident.key, weight) for resident, weight in zip(residents, weights, strict=True))
        head = self._known.pop(key, None)
        if head is None:
            head = blend_heads([resident.ready for resident in residents], weights).to(self._device)
            while len(self._known) >= MOST_HEADS:
                del self._known[next(iter(self._known))]
        self._known[key] = head
        if isinstance(task, ClassifyTask) and head.pooling is HeadPooling.EVERY:
            raise TaskMismatch("This head labels tokens, not texts; call ClassifyTokens (predict --tokens).")
        if isinstance(task, ClassifyTokensTask) and head.pooling is not HeadPooling.EVERY:
            raise TaskMismatch("This head labels texts, not tokens; call Classify (predict without --tokens).")
        if head.pooling is HeadPooling.POOLER and not self._pooler:
            raise TaskMismatch("This head needs a pooler, and the base's checkpoint has none.")
        return head

    def drop(self, resident: Resident) -> None:
        """Forgets what was made from an adapter that leaves memory."""
        for key in [key for key in self._known if any(name == resident.key for name, _ in key)]:
            del self._known[key]


def pooling_of(head: Head) -> Pooling:
    """Which state of a text a head labels."""
    return Pooling.LAST if head.pooling is HeadPooling.LAST else Pooling.FIRST


def label(pairs: Sequence[tuple[Head, Tensor]]) -> list[Tensor]:
    """Logits [count, labels] for each pair's states [count, hidden]; one product for all that share a head."""
    sharing: dict[int, list[int]] = {}
    for index, (head, _) in enumerate(pairs):
        sharing.setdefault(id(head), []).append(index)
    logits: list[Tensor] = [torch.empty(0)] * len(pairs)
    for indices in sharing.values():
        states = [pairs[index][1] for index in indices]
        together = pairs[indices[0]][0].logits(torch.cat(states) if len(states) > 1 else states[0])
        for index, part in zip(indices, torch.split(together, [len(state) for state in states]), strict=True):
            logits[index] = part
    return logits


def require_finite(result: Tensor, arm: ArmSpec, what: str = "logits") -> None:
    """Raises Rejected (NOT_FINITE) for a row of `arm` whose logits, or whatever it is, are not numbers."""
    if not result.isfinite().all():
        raise not_finite(arm, what)


def collector(row: Row, padding: int | None) -> StatePooler | TokenLabels:
    """What collects what a row's head labels, before virtual tokens stand in `row.tokens`.

    Of a decoder's text that is the state of the last token that is not `padding`, of the first one if all are, as in
    transformers' `GenericForSequenceClassification`. It sees no padding behind a prompt, where it gets embeddings.
    """
    if isinstance(row.request.task, ClassifyTokensTask):
        return TokenLabels()
    pooling, tokens = pooling_of(row.head), row.tokens
    blind = bool(row.source) or any(isinstance(resident.ready.virtual, Prompt) for resident in row.residents)
    if pooling is not Pooling.LAST or blind or padding is None or tokens[-1] != padding:
        return StatePooler(pooling)
    return StatePooler(pooling, at=next((at for at in reversed(range(len(tokens))) if tokens[at] != padding), 0))


class StatePooler:
    """Collects one row's hidden states, chunk by chunk, into one vector.

    `at`: with LAST, the token that counts as the last one, from the first that is pushed; None is the very last.
    """

    def __init__(self, pooling: Pooling, *, at: int | None = None) -> None:
        self._pooling = pooling
        self.at = at
        self._state: Tensor | None = None
        self._count = 0
        self._next = 0

    def push(self, hidden: Tensor, start: int) -> None:
        """Takes the states [tokens, hidden] of the row's tokens from `start` on. What does not follow the states
        before it begins anew: the row had to leave the batch."""
        if start != self._next:
            self._state, self._count = None, 0
        self._next = start + hidden.shape[0]
        self._count += hidden.shape[0]
        if self.at is not None:
            if start <= self.at < self._next:
                self._state = hidden[self.at - start].clone()
        elif self._pooling is Pooling.MEAN:
            total = hidden.float().sum(0)
            self._state = total if self._state is None else self._state + total
        elif self._pooling is Pooling.LAST or self._state is None:
            self._state = (hidden[-1] if self._pooling is Pooling.LAST else hidden[0]).clone()

    def value(self) -> Tensor:
        """The pooled state [hidden]."""
        if self._state is None:
            raise RuntimeError("no states were pooled")
        return self._state / self._count if self._pooling is Pooling.MEAN else self._state


class TokenLabels:
    """Collects the logits of one row's tokens, chunk by chunk."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._next = 0

    def push(self, logits: Tensor, start: int) -> None:
        """Takes the logits [tokens, labels] of the row's tokens from `start` on, like `StatePooler.push`."""
        if start != self._next:
            self._chunks = []
        self._next = start + logits.shape[0]
        self._chunks.append(logits)

    def value(self) -> Tensor:
        """All of them, [tokens, labels]."""
        return torch.cat(self._chunks)
