"""Text after a prompt: loss on the completion and its end token only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from adapterbay.base.text import Tokenizer
from adapterbay.registry.errors import InvalidArgument
from adapterbay.trainer.batches import IGNORED, Example, PadRight
from adapterbay.trainer.data import CleaningReport, Conversation, PromptCompletion, Row
from adapterbay.trainer.tasks.base import Encoded, LoadedModel, load
from adapterbay.trainer.tasks.completion import encode_messages, encode_pair


class CausalLanguageModelling:
    """`AutoModelForCausalLM`; perplexity of the completions, of the adapter and of the base without it."""

    peft_task_type: ClassVar[str] = "CAUSAL_LM"
    compares_with_base: ClassVar[bool] = True

    def __init__(self, tokenizer: Tokenizer, max_length: int, end_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._end_ids = end_ids

    def encode(self, rows: Sequence[Row], report: CleaningReport) -> Encoded:
        """Ids and labels of each row; rows whose completion is wholly behind `max_length` are dropped and counted."""
        examples: list[Example] = []
        kept: list[Row] = []
        for row in rows:
            if isinstance(row, PromptCompletion):
                learned = encode_pair(self._tokenizer, row, self._end_ids)
            elif isinstance(row, Conversation):
                learned = encode_messages(self._tokenizer, row, self._end_ids)
            else:
                raise TypeError(f"causal language modelling cannot learn from {type(row).__name__}")
            labels = learned.labels[: self._max_length]
            if all(label == IGNORED for label in labels):
                report.completion_cut += 1
                continue
            report.truncated += len(learned.input_ids) > self._max_length
            examples.append({"input_ids": learned.input_ids[: self._max_length], "labels": labels})
            kept.append(row)
        if rows and not kept:
            raise InvalidArgument(
                f"max_length {self._max_length} cuts off the completion of all {len(rows)} rows; raise max_length or "
                "shorten the prompts.",
                field="max_length",
            )
        return Encoded(examples, tuple(kept))

    def load_model(self, folder: Path, device: torch.device) -> LoadedModel:
        """The base with its own language-model head. Raises InvalidArgument if it has none."""
        from transformers import AutoModelForCausalLM

        loaded = load(AutoModelForCausalLM, folder, device)
        if loaded.new_modules:
            raise InvalidArgument(
                f"base: it is no language model for task causal-lm: it has no weights for "
                f"{', '.join(loaded.new_modules[:5])}.",
                field="base",
            )
        return loaded

    def collator(self, model: Any, examples: Sequence[Example]) -> PadRight:  # noqa: ARG002 - other tasks need them
        """Labels are masked by position, so which id pads does not matter."""
        return PadRight(self._tokenizer.pad_token_id or 0)

    def reduce_logits(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(batch, 2): the summed negative log-likelihood of the learned tokens in nats, and their number."""
        following = labels[:, 1:]
        losses = F.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), following, ignore_index=IGNORED, reduction="none"
        )
        return torch.stack([losses.sum(dim=1), (following != IGNORED).sum(dim=1).float()], dim=1)

    def metrics(self, reduced: Any) -> dict[str, float]:
        """`perplexity`: exp of the mean negative log-likelihood over all learned tokens."""
        total, tokens = reduced.sum(axis=0)
        return {"perplexity": math.exp(min(float(total) / float(tokens), 700.0)), "completion_tokens": float(tokens)}
