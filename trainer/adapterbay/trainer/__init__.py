"""PEFT adapters from real text: one frozen config, transformers' Trainer, a plain PEFT folder with its record.

    from adapterbay.trainer import load_config, run
    result = run(load_config(Path("sentiment.yaml"), {"data.train_samples": 64}))

Importing this imports no torch; `run` does.
"""

from __future__ import annotations

from adapterbay.trainer.config import TrainingConfig
from adapterbay.trainer.progress import ProgressListener, StepReport
from adapterbay.trainer.result import TrainingResult
from adapterbay.trainer.settings import load_config, parse_config, parse_flags

__all__ = [
    "ProgressListener",
    "StepReport",
    "TrainingConfig",
    "TrainingResult",
    "load_config",
    "parse_config",
    "parse_flags",
    "run",
]


def run(config: TrainingConfig, *, progress: ProgressListener | None = None) -> TrainingResult:
    """Trains an adapter and writes it to `config.output`, whole or not at all.

    Raises InvalidArgument or NotFound for what is wrong with settings, data or base, StorageFull when the disk fills,
    MissingExtra without `adapterbay[trainer]`, and Cancelled on a keyboard interrupt; in all these cases
    `config.output` is as it was.
    """
    from adapterbay.registry.errors import MissingExtra

    try:
        from adapterbay.trainer.session import run as run_session
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("adapterbay"):
            raise
        raise MissingExtra(
            f"Training needs {error.name}; install it with `pip install 'adapterbay[trainer]'`."
        ) from error
    return run_session(config, progress=progress)
