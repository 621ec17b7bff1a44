"""A method onto a loaded base: which modules the settings mean, checked before anything is put there.

Each method is a function from model and settings to a model of which only the adapter is trainable: a PEFT model, or
for bottlenecks, which PEFT does not have, our own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from adapterbay.base.bottleneck import PRESETS, BottleneckConfig, BottleneckModel, Placement, attach, placement
from adapterbay.registry.errors import InvalidArgument, Rejected
from adapterbay.trainer.config import LoraSettings, MethodSettings, TrainingConfig
from adapterbay.trainer.tasks.base import HEADS, LoadedModel

_LAYER_INDEX = re.compile(r"(?:^|.*?\.)(\d+)\.")


def adapted(loaded: LoadedModel, config: TrainingConfig, peft_task_type: str) -> Any:
    """The model with a fresh adapter of the method that the settings name; only it, and new modules, are trainable.

    Raises InvalidArgument if a name in the settings matches nothing.
    """
    if config.method.name == "bottleneck":
        return bottleneck(loaded, config.method, peft_task_type)
    return lora(loaded, config.lora, peft_task_type)


def in_trainer(model: Any) -> Any:
    """What transformers' Trainer is given: it knows PEFT's models, and beside those only its own."""
    return model.model if isinstance(model, BottleneckModel) else model


def save(model: Any, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors, without copies of the base's embeddings."""
    if isinstance(model, BottleneckModel):
        model.save_pretrained(folder)
    else:
        model.save_pretrained(folder, save_embedding_layers=False)


def bottleneck(loaded: LoadedModel, settings: MethodSettings, peft_task_type: str) -> BottleneckModel:
    """The model with fresh bottleneck adapters. Raises InvalidArgument if a name in `behind` matches nothing."""
    linear = linear_modules(loaded.model, loaded.new_modules)
    if settings.behind is not None:
        _check_named("method.behind", linear, settings.behind, "leave it out for those of the preset")
        where = Placement(tuple(sorted(set(settings.behind))))
    else:
        try:
            where = placement(settings.preset, loaded.model.config.get_text_config().model_type)
        except InvalidArgument as error:
            raise InvalidArgument(f"method.behind: {error.message}", field="method.behind") from error
    heads = [name for name in HEADS if peft_task_type == "SEQ_CLS"]  # as PEFT has it
    try:
        config = BottleneckConfig(
            target_modules=where.target_modules,
            exclude_modules=where.exclude_modules,
            reduction_factor=settings.reduction_factor,
            non_linearity=settings.non_linearity or PRESETS[settings.preset],
            scaling=settings.scaling,
            layer_norm_before=settings.layer_norm_before,
            adapter_dropout=settings.adapter_dropout,
            modules_to_save=tuple(sorted({*loaded.new_modules, *heads})),
            task_type=peft_task_type,
        )
        return attach(loaded.model, config)
    except Rejected as error:
        raise InvalidArgument(f"method: {error.message}", field="method") from error


def lora(loaded: LoadedModel, settings: LoraSettings, peft_task_type: str) -> Any:
    """The model with fresh LoRA weights as a `peft.PeftModel`; only they, and its new modules, are trainable.

    Raises InvalidArgument if a name in `target_modules`, `layers`, `rank_pattern` or `alpha_pattern` matches nothing.
    """
    from peft import LoraConfig, get_peft_model

    model = loaded.model
    linear = linear_modules(model, loaded.new_modules)
    targets = _targets(linear, settings)
    _check_layers(linear, targets, settings)
    adapted = [name for name in linear if _is_one_of(name, targets)]
    _check_patterns(adapted, settings)
    config = LoraConfig(
        task_type=peft_task_type,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        layers_to_transform=settings.layers,
        use_rslora=settings.use_rslora,
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern=dict(settings.alpha_pattern),
        fan_in_fan_out=any(not isinstance(linear[name], nn.Linear) for name in adapted),  # GPT-2's Conv1D
        bias="none",
        # Heads PEFT adds by itself; all of these it leaves out of target_modules.
        modules_to_save=[name for name in loaded.new_modules if name not in HEADS] or None,
    )
    return get_peft_model(model, config)


def linear_modules(model: Any, new_modules: Sequence[str]) -> dict[str, nn.Module]:
    """Every linear layer that can be adapted, by its full name: not the output embedding, not what is new."""
    from transformers.pytorch_utils import Conv1D

    heads = [model.get_output_embeddings(), *(getattr(model, name, None) for name in HEADS)]
    heads += [model.get_submodule(name) for name in new_modules]
    excluded = {id(part) for head in heads if head is not None for part in head.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) not in excluded
    }


def _targets(linear: dict[str, nn.Module], settings: LoraSettings) -> list[str]:
    """Name endings, sorted, so that equal settings write equal files. `all-linear` as the shortest list of them."""
    endings = sorted({name.rpartition(".")[2] for name in linear})
    if settings.target_modules == "all-linear":
        return endings
    _check_named("lora.target_modules", linear, settings.target_modules, "use all-linear")
    return sorted(set(settings.target_modules))


def _check_named(field: str, linear: dict[str, nn.Module], names: Sequence[str], otherwise: str) -> None:
    unknown = [name for name in names if not any(_is_one_of(module, [name]) for module in linear)]
    if unknown:
        endings = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise InvalidArgument(
            f"{field}: {', '.join(unknown)} matches no linear module of this base; it has {endings}. Name some of "
            f"them, or {otherwise}.",
            field=field,
        )


def _check_layers(linear: dict[str, nn.Module], targets: list[str], settings: LoraSettings) -> None:
    if settings.layers is None:
        return
    indices = {int(match[1]) for name in linear if _is_one_of(name, targets) and (match := _LAYER_INDEX.match(name))}
    if missing := sorted(set(settings.layers) - indices):
        there = f"0 to {max(indices)}" if indices else "none"
        raise InvalidArgument(
            f"lora.layers: {', '.join(map(str, missing))} is no layer of this base; it has {there}.",
            field="lora.layers",
        )


def _check_patterns(adapted: list[str], settings: LoraSettings) -> None:
    for field, pattern in (("rank_pattern", settings.rank_pattern), ("alpha_pattern", settings.alpha_pattern)):
        for key in pattern:
            try:
                # as peft.utils.get_pattern_key matches
                expression = re.compile(rf"(.*\.)?({key})$")
            except re.error as error:
                raise InvalidArgument(f"lora.{field}: '{key}' is no pattern: {error}", field=f"lora.{field}") from None
            if not any(expression.match(name) for name in adapted):
                endings = ", ".join(sorted({name.rpartition(".")[2] for name in adapted}))
                raise InvalidArgument(
                    f"lora.{field}: '{key}' matches no adapted module; adapted are {endings}.", field=f"lora.{field}"
                )


def _is_one_of(name: str, endings: list[str]) -> bool:
    """PEFT's rule for a list of target modules: the whole name, or its end after a dot."""
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)
