"""One label for a text: the base with a new linear head, which is trained and saved whole beside the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from adapterbay.base.text import Tokenizer, encode_text
from adapterbay.trainer.batches import Example, PadRight, padding_id_for_classes
from adapterbay.trainer.data import CleaningReport, Labelled, Row, TrainingData
from adapterbay.trainer.tasks.base import Encoded, LoadedModel, load


class SequenceClassification:
    """`AutoModelForSequenceClassification`; accuracy and macro F1 against always answering the commonest class."""

    peft_task_type: ClassVar[str] = "SEQ_CLS"
    compares_with_base: ClassVar[bool] = False

    def __init__(self, tokenizer: Tokenizer, max_length: int, data: TrainingData) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._labels = data.labels
        counts = data.class_counts(data.train)
        self._commonest = data.labels.index(max(counts, key=lambda name: counts[name]))

    def encode(self, rows: Sequence[Row], report: CleaningReport) -> Encoded:
        """Each text by `encode_text`, as the server does."""
        examples: list[Example] = []
        for row in rows:
            if not isinstance(row, Labelled):
                raise TypeError(f"a classifier learns from labelled rows, not {type(row).__name__}")
            input_ids = encode_text(self._tokenizer, row.text)
            if len(input_ids) > self._max_length:
                input_ids = encode_text(self._tokenizer, row.text, max_length=self._max_length)
                report.truncated += 1
            examples.append({"input_ids": input_ids, "labels": row.label})
        return Encoded(examples, tuple(rows))

    def load_model(self, folder: Path, device: torch.device) -> LoadedModel:
        """The base with a randomly initialised head of one output per class."""
        from transformers import AutoModelForSequenceClassification

        names = dict(enumerate(self._labels))
        numbers = {name: index for index, name in names.items()}
        return load(
            AutoModelForSequenceClassification,
            folder,
            device,
            num_labels=len(names),
            id2label=names,
            label2id=numbers,
        )

    def collator(self, model: Any, examples: Sequence[Example]) -> PadRight:
        """Pads with an id that cannot be taken for a text's last token, and tells the model so."""
        configuration = model.config.get_text_config()
        padding_id = padding_id_for_classes(examples, self._tokenizer.pad_token_id, configuration.vocab_size)
        configuration.pad_token_id = padding_id
        return PadRight(padding_id)

    def reduce_logits(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(batch, 2): the answered class and the true one."""
        return torch.stack([logits.argmax(dim=-1), labels], dim=1)

    def metrics(self, reduced: Any) -> dict[str, float]:
        """`accuracy`, `macro_f1` and `majority_accuracy`, what the commonest training class alone would reach."""
        answers, labels = reduced[:, 0], reduced[:, 1]
        return {
            "accuracy": float(np.mean(answers == labels)),
            "macro_f1": macro_f1(answers, labels, len(self._labels)),
            "majority_accuracy": float(np.mean(labels == self._commonest)),
        }


def macro_f1(answers: Any, labels: Any, classes: int) -> float:
    """The mean over classes of 2·TP / (2·TP + FP + FN); classes that neither occur nor are answered are left out."""
    scores = []
    for index in range(classes):
        answered, present = answers == index, labels == index
        total = int(answered.sum() + present.sum())  # = 2·TP + FP + FN
        if total:
            scores.append(2 * int((answered & present).sum()) / total)
    return float(np.mean(scores))
