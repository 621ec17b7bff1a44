"""One training run from settings to an adapter folder: prepare, encode, load, train, measure, write."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import set_seed

from adapterbay.base.text import Tokenizer, load_tokenizer
from adapterbay.registry.base import BaseFiles, locate
from adapterbay.registry.errors import Cancelled, InvalidArgument
from adapterbay.trainer import hardware, methods, output
from adapterbay.trainer.config import Precision, TrainingConfig
from adapterbay.trainer.data import TrainingData, prepare
from adapterbay.trainer.data.prepare import digest
from adapterbay.trainer.loop import BASE_PREFIX, loss_history, make_trainer, plain_metrics, quiet_transformers
from adapterbay.trainer.progress import ProgressListener, Silent
from adapterbay.trainer.record import (
    RECORD_SCHEMA,
    portable_adapter_config,
    versions,
    write_card,
    write_loss_curve,
    write_record,
)
from adapterbay.trainer.result import TrainingResult
from adapterbay.trainer.tasks import Encoded, TrainingTask, task_for
from adapterbay.trainer.tasks.base import LoadedModel, end_token_ids

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Inputs:
    """All that a run starts from, before a model is loaded."""

    base: BaseFiles
    tokenizer: Tokenizer
    data: TrainingData
    task: TrainingTask
    train: Encoded
    evaluation: Encoded


def run(config: TrainingConfig, *, progress: ProgressListener | None = None) -> TrainingResult:
    """Trains an adapter and writes it to `config.output`, whole or not at all.

    Raises InvalidArgument or NotFound for what is wrong with settings, data or base, StorageFull when the disk fills,
    and Cancelled on a keyboard interrupt; in all these cases `config.output` is as it was.
    """
    try:
        with quiet_transformers(), hardware.threads(config.threads):
            return _run(config, progress or Silent())
    except KeyboardInterrupt:
        raise Cancelled(
            f"Training was interrupted; nothing was written to {config.output}. Run it again to start over."
        ) from None


def _run(config: TrainingConfig, progress: ProgressListener) -> TrainingResult:
    began = time.monotonic()
    output.check(config.output, overwrite=config.overwrite)
    inputs = _inputs(config, progress)
    precision = hardware.precision(config.precision)
    with output.staged(config.output) as staging:
        model, metrics, history = _train(config, inputs, precision, staging, progress)
        progress.stage(f"writing {config.output}")
        record = _record(config, inputs, model, metrics, history, precision, time.monotonic() - began)
        _write(staging, model, record, inputs.base)
    return TrainingResult(config.output, metrics, record)


def _inputs(config: TrainingConfig, progress: ProgressListener) -> _Inputs:
    progress.stage("looking for the base")
    base = locate(config.base)
    tokenizer = load_tokenizer(base.folder)
    progress.stage(f"reading {config.data.source}")
    data = prepare(config)
    task = task_for(config, data, tokenizer, end_token_ids(tokenizer, base.config, _generation_config(base.folder)))
    train = task.encode(data.train, data.cleaning)
    evaluation = task.encode(data.evaluation, data.cleaning)
    log.info("cleaning: %s", data.cleaning.as_dict())
    return _Inputs(base, tokenizer, data, task, train, evaluation)


def _train(
    config: TrainingConfig, inputs: _Inputs, precision: Precision, staging: Path, progress: ProgressListener
) -> tuple[Any, dict[str, float], list[dict[str, float]]]:
    """The trained model, its metrics on held-out data, and the losses on the way."""
    train, evaluation, task = inputs.train, inputs.evaluation, inputs.task
    progress.stage(f"loading {inputs.base.reference}")
    set_seed(config.seed)
    loaded = _load(task, inputs.base)
    _check_length(config, loaded.model)
    collator = task.collator(loaded.model, [*train.examples, *evaluation.examples])
    model = methods.adapted(loaded, config, task.peft_task_type)
    scratch = staging / "scratch"
    trainer = make_trainer(
        methods.in_trainer(model),
        task,
        train,
        evaluation,
        collator,
        config=config,
        precision=precision,
        scratch=scratch,
        progress=progress,
    )
    metrics: dict[str, float] = {}
    if evaluation.examples and task.compares_with_base:
        progress.stage(f"measuring the base without an adapter on {len(evaluation.rows)} held-out rows")
        with model.disable_adapter():
            metrics |= plain_metrics(trainer.evaluate(metric_key_prefix=BASE_PREFIX))
    before = list(trainer.state.log_history)  # train() starts a new one
    progress.stage(f"training on {len(train.rows)} rows")
    metrics["train_loss"] = float(trainer.train().training_loss)
    if evaluation.examples:
        last = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), None)
        if last is None or last["step"] != trainer.state.global_step:
            progress.stage(f"measuring the adapter on {len(evaluation.rows)} held-out rows")
            last = trainer.evaluate()
        metrics |= plain_metrics({key: value for key, value in last.items() if key.startswith("eval_")})
    _check_finite(model)
    scratch.rmdir()
    return model, metrics, loss_history([*before, *trainer.state.log_history])


def _load(task: TrainingTask, base: BaseFiles) -> LoadedModel:
    try:
        return task.load_model(base.folder, hardware.device())
    except (ValueError, OSError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise InvalidArgument(
            f"base: transformers cannot load {base.reference} for {task.peft_task_type}: {reason}", field="base"
        ) from error


def _check_length(config: TrainingConfig, model: Any) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and config.max_length > positions:
        raise InvalidArgument(
            f"max_length: {config.max_length} is more than the {positions} positions of this base.", field="max_length"
        )


def _check_finite(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise InvalidArgument(
                f"Training ended with NaN or Inf in {name}; lower optimization.learning_rate.",
                field="optimization.learning_rate",
            )


def _generation_config(folder: Path) -> Mapping[str, Any]:
    path = folder / "generation_config.json"
    loaded: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return loaded


def _record(
    config: TrainingConfig,
    inputs: _Inputs,
    model: Any,
    metrics: Mapping[str, float],
    history: list[dict[str, float]],
    precision: Precision,
    seconds: float,
) -> dict[str, Any]:
    data, train, held_out = inputs.data, inputs.train.rows, inputs.evaluation.rows
    classes = {"train": data.class_counts(train), "eval": data.class_counts(held_out)} if data.labels else {}
    return {
        "schema": RECORD_SCHEMA,
        "base": {"reference": str(inputs.base.reference), "fingerprint": inputs.base.fingerprint},
        "task": config.task,
        "labels": list(data.labels),
        "chat_template_digest": inputs.base.chat_template_digest,
        "max_length": config.max_length,
        "settings": config.model_dump(mode="json") | {"precision": precision},
        "data": {
            "source": data.source,
            "digest": digest(train, held_out),
            "train_rows": len(train),
            "eval_rows": len(held_out),
            "classes": classes,
            "cleaning": data.cleaning.as_dict(),
        },
        "metrics": dict(metrics),
        "trainable_parameters": sum(part.numel() for part in model.parameters() if part.requires_grad),
        "versions": versions(),
        "seed": config.seed,
        "duration_seconds": round(seconds, 3),
        "loss_history": history,
    }


def _write(staging: Path, model: Any, record: Mapping[str, Any], base: BaseFiles) -> None:
    try:
        methods.save(model, staging)
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" in str(error):  # safetensors has no error of its own for a full disk
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
    is_hub = base.reference.scheme == "hub"
    name = base.reference.target if is_hub else str(base.reference)
    portable_adapter_config(staging, base=name, revision=base.reference.revision if is_hub else None)
    write_loss_curve(staging / "loss.png", record["loss_history"])
    write_record(staging, record)
    write_card(staging, record, base.reference.target if is_hub else None)
