"""Rows of token ids into padded batches. Knows nothing about text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from adapterbay.registry.errors import InvalidArgument

IGNORED = -100
"""The label torch's cross entropy skips."""

Example = Mapping[str, Any]
"""`input_ids`: list of ids; `labels`: one class index, or one label for each id (IGNORED where none is learned)."""


class PadRight:
    """Collates examples of different lengths: ids padded on the right to the longest row of the batch.

    input_ids and attention_mask are (batch, longest); labels are (batch,) for classes, (batch, longest) for tokens.
    """

    def __init__(self, padding_id: int) -> None:
        self.padding_id = padding_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        longest = max(len(example["input_ids"]) for example in examples)
        input_ids = torch.full((len(examples), longest), self.padding_id, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for index, example in enumerate(examples):
            length = len(example["input_ids"])
            input_ids[index, :length] = torch.tensor(example["input_ids"])
            attention_mask[index, :length] = 1
        if isinstance(examples[0]["labels"], int):
            labels = torch.tensor([example["labels"] for example in examples])
        else:
            labels = torch.full_like(input_ids, IGNORED)
            for index, example in enumerate(examples):
                labels[index, : len(example["labels"])] = torch.tensor(example["labels"])
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def padding_id_for_classes(examples: Sequence[Example], preferred: int | None, vocabulary: int) -> int:
    """A padding id with which a causal model reads every row's class at the row's real last token.

    transformers' `*ForSequenceClassification` takes the rightmost id that is not `config.pad_token_id`
    (modeling_layers.GenericForSequenceClassification), so with padding on the right the place is the last real token
    if and only if no row ends in the padding id. Bases that pad with their end token (SmolLM2) break that for a text
    that ends in it; then another id is taken, which changes nothing else since padding is masked.
    """
    endings = {example["input_ids"][-1] for example in examples}
    if preferred is not None and preferred not in endings:
        return preferred
    for candidate in range(vocabulary):
        if candidate not in endings:
            return candidate
    raise InvalidArgument(
        "Every token of the base's vocabulary ends some row, so no padding token is left; set optimization.batch_size "
        "and eval_batch_size to 1.",
        field="optimization.batch_size",
    )
