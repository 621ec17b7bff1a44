"""One module per task: rows to examples, the model to load, what held-out data is measured by."""

from __future__ import annotations

from adapterbay.trainer.tasks.base import Encoded, TrainingTask, task_for

__all__ = ["Encoded", "TrainingTask", "task_for"]
