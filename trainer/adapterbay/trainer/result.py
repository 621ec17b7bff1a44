"""What a run returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TrainingResult:
    """A finished run. `output` is the adapter's folder, `training_record` the content of its `training.json`."""

    output: Path
    metrics: Mapping[str, float]
    training_record: Mapping[str, Any]
