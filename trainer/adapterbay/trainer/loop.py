"""transformers' Trainer, set up for one run. The loop, the optimizer and the schedule are its own."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from adapterbay.registry.errors import InvalidArgument
from adapterbay.trainer.batches import PadRight
from adapterbay.trainer.config import Precision, TrainingConfig
from adapterbay.trainer.progress import ProgressListener, StepReport
from adapterbay.trainer.tasks import Encoded, TrainingTask

BASE_PREFIX = "base"
_TIMINGS = ("runtime", "_per_second", "preparation_time")


def make_trainer(
    model: Any,
    task: TrainingTask,
    train: Encoded,
    evaluation: Encoded,
    collator: PadRight,
    *,
    config: TrainingConfig,
    precision: Precision,
    scratch: Path,
    progress: ProgressListener,
) -> Any:
    """A `transformers.Trainer` that reports to `progress` only. `scratch` is a folder it may create and leave empty."""
    settings = config.optimization
    warm_constant = settings.scheduler == "constant" and settings.warmup_ratio > 0
    arguments = TrainingArguments(
        output_dir=str(scratch),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps if settings.max_steps is not None else -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.eval_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup" if warm_constant else settings.scheduler,
        warmup_steps=settings.warmup_ratio,  # below 1: a share of all steps
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch",
        bf16=precision == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
        data_seed=config.seed,
        # Rows of like length together: hardly any padding.
        train_sampling_strategy="group_by_length",
        eval_strategy="epoch" if settings.evaluate == "epoch" and evaluation.examples else "no",
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=collator,
        train_dataset=train.examples,
        eval_dataset=evaluation.examples or None,
        preprocess_logits_for_metrics=lambda logits, labels: task.reduce_logits(_first(logits), labels),
        compute_metrics=lambda prediction: task.metrics(prediction.predictions),
        callbacks=[_Reporter(progress)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Reporter(TrainerCallback):  # type: ignore[misc]
    """Passes what the Trainer logs on to the listener, and stops a run whose loss is no number."""

    def __init__(self, progress: ProgressListener) -> None:
        self._progress = progress
        self._began = time.monotonic()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.monotonic()

    def on_log(self, args: Any, state: Any, *_: Any, logs: Mapping[str, float] | None = None, **__: Any) -> None:
        if not logs or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise InvalidArgument(
                f"The loss became {logs['loss']} at step {state.global_step}; lower optimization.learning_rate "
                f"({args.learning_rate:g}) or raise optimization.warmup_ratio.",
                field="optimization.learning_rate",
            )
        seconds = time.monotonic() - self._began
        self._progress.step(
            StepReport(state.global_step, state.max_steps, logs["loss"], logs.get("learning_rate", 0.0), seconds)
        )

    def on_evaluate(self, _: Any, state: Any, *__: Any, metrics: Mapping[str, float], **___: Any) -> None:
        self._progress.evaluated(state.global_step, plain_metrics(metrics))


def plain_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """The Trainer's `eval_accuracy`, `base_perplexity`, … without timings and without the `eval_` prefix."""
    kept: dict[str, float] = {}
    for name, value in metrics.items():
        short = "eval_loss" if name == "eval_loss" else name.removeprefix("eval_")
        if not short.endswith(_TIMINGS) and short not in ("epoch", "step"):
            kept[short] = float(value)
    return kept


def loss_history(log: list[Mapping[str, float]]) -> list[dict[str, float]]:
    """`{step, loss, learning_rate}` for each step, and `{step, eval_loss}` for each evaluation, in order."""
    history = []
    for entry in log:
        step = int(entry.get("step", 0))
        if "loss" in entry:
            history.append({"step": step, "loss": entry["loss"], "learning_rate": entry.get("learning_rate", 0.0)})
        held_out = [entry[name] for name in ("eval_loss", f"{BASE_PREFIX}_loss") if name in entry]
        history += [{"step": step, "eval_loss": loss} for loss in held_out]
    return history


def _first(logits: Any) -> torch.Tensor:
    """The logits of a model that returns a tuple of logits and other states."""
    first: torch.Tensor = logits[0] if isinstance(logits, tuple | list) else logits
    return first


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, load reports and deprecations of transformers' inside; as it was afterwards."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\b")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
