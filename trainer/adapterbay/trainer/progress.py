"""What a run tells whoever watches it. The library prints nothing: the command line listens here, and so can you."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. `loss` is its mean loss, `seconds` the time since training began."""

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    seconds: float


class ProgressListener(Protocol):
    """Called in the thread that trains; an exception raised here ends the run."""

    def stage(self, text: str) -> None:
        """A new part of the run begins, in plain words."""

    def step(self, report: StepReport) -> None:
        """An optimizer step is done."""

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Held-out data was evaluated after `step` steps."""


class Silent:
    """Listens and does nothing."""

    def stage(self, text: str) -> None:
        """Ignored."""

    def step(self, report: StepReport) -> None:
        """Ignored."""

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Ignored."""
