"""What a task is to the rest of the trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from adapterbay.base.text import Tokenizer
from adapterbay.trainer.batches import Example, PadRight
from adapterbay.trainer.config import TrainingConfig
from adapterbay.trainer.data import CleaningReport, Row, TrainingData

HEADS = ("score", "classifier")
"""What transformers calls a classification head; PEFT trains and saves these by itself for SEQ_CLS."""


@dataclass(frozen=True)
class Encoded:
    """Examples and the rows they came from, in the same order; rows that cannot be learned from are left out."""

    examples: list[Example]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class LoadedModel:
    """`model` in float32, and the modules with weights that the base does not have, so that were made at random.

    They must be trained and saved whole with the adapter, or nobody could compute what was trained.
    """

    model: Any
    new_modules: tuple[str, ...]


class TrainingTask(Protocol):
    """A task, made for one run's settings, data and tokenizer."""

    peft_task_type: ClassVar[str]
    """`peft.TaskType` by name."""
    compares_with_base: ClassVar[bool]
    """Whether the base without the adapter can be measured too (a new head cannot)."""

    def encode(self, rows: Sequence[Row], report: CleaningReport) -> Encoded:
        """Token ids and labels of `rows`, at most `max_length` long; what is cut is counted in `report`."""

    def load_model(self, folder: Path, device: torch.device) -> LoadedModel:
        """The base as transformers' model class for this task."""

    def collator(self, model: Any, examples: Sequence[Example]) -> PadRight:
        """Batches for `model`; `examples` are all that will ever be batched."""

    def reduce_logits(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """What `metrics` needs of a batch's logits, one row per example, so that evaluation keeps no logits."""

    def metrics(self, reduced: Any) -> dict[str, float]:
        """Figures over the whole held-out data; `reduced` is a numpy array with one row per example."""


def task_for(config: TrainingConfig, data: TrainingData, tokenizer: Tokenizer, end_ids: frozenset[int]) -> TrainingTask:
    """The task that the settings name. `end_ids` are the tokens that end a turn or a text for this base."""
    from adapterbay.trainer.tasks.causal_lm import CausalLanguageModelling
    from adapterbay.trainer.tasks.classification import SequenceClassification

    if config.task == "sequence-classification":
        return SequenceClassification(tokenizer, config.max_length, data)
    return CausalLanguageModelling(tokenizer, config.max_length, end_ids)


def end_token_ids(tokenizer: Tokenizer, *configs: Mapping[str, Any]) -> frozenset[int]:
    """Every end token that the tokenizer, config.json or generation_config.json names."""
    found: set[int] = set()
    for value in (tokenizer.eos_token_id, *(config.get("eos_token_id") for config in configs)):
        if value is not None:
            found.update(value if isinstance(value, list) else [value])
    return frozenset(found)


def load(model_class: Any, folder: Path, device: torch.device, **settings: Any) -> LoadedModel:
    """`model_class.from_pretrained` without running code of the folder; a head that was made new counts as one."""
    model, information = model_class.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True, **settings
    )
    owners = {name.rpartition(".")[0] for name in information["missing_keys"]}
    heads = {head for head in HEADS if getattr(model, head, None) is not None}
    within = {owner for owner in owners if owner.partition(".")[0] in heads}
    return LoadedModel(model.to(device), tuple(sorted((owners - within) | {o.partition(".")[0] for o in within})))
