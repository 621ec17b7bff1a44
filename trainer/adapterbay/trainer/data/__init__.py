"""Rows from files, packages and the hub into clean, split, digestible training data. Knows nothing about tokens."""

from __future__ import annotations

from adapterbay.trainer.data.cleaning import CleaningReport
from adapterbay.trainer.data.prepare import TrainingData, prepare
from adapterbay.trainer.data.rows import Conversation, Labelled, PromptCompletion, Row

__all__ = ["CleaningReport", "Conversation", "Labelled", "PromptCompletion", "Row", "TrainingData", "prepare"]
