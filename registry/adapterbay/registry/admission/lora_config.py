"""The settings of a LoRA adapter that say what it computes, checked for type and range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from adapterbay.registry.admission.heads import ROOTS
from adapterbay.registry.admission.methods import Settings
from adapterbay.registry.admission.methods.lora import initialisation, variant
from adapterbay.registry.admission.methods.settings import as_integer, as_number
from adapterbay.registry.admission.patterns import ModulePatterns
from adapterbay.registry.admission.peft_fields import read_method
from adapterbay.registry.errors import UnsupportedMethod

_IN_TRAINING_ONLY: Final = frozenset({"init_lora_weights"})
"""MiCA, a variant that computes nothing else once it is trained."""


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """`scaling` of a module is alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732)."""

    r: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_keys: ModulePatterns = field(repr=False, compare=False)
    alpha_keys: ModulePatterns = field(repr=False, compare=False)

    def rank_of(self, module: str) -> int:
        """The rank that PEFT gives to `module`."""
        key = self.rank_keys.first(module)
        return self.r if key is None else self.rank_pattern[key]

    def scaling_of(self, module: str, rank: int) -> float:
        """The factor of B A on `module`."""
        key = self.alpha_keys.first(module)
        alpha = self.alpha if key is None else self.alpha_pattern[key]
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def read_settings(config: Mapping[str, Any]) -> LoraSettings:
    """Reads adapter_config.json. Raises UnsupportedMethod, also for a method that is not LoRA, or Rejected:
    UNKNOWN_CONFIG_KEY, BAD_CONFIG, BAD_PATTERN.
    """
    method = read_method(config)
    if method.peft_type != "LORA":
        raise UnsupportedMethod(
            f"The adapter's method is {method.title}, and only LoRA has factors that can be taken apart.",
            metadata={"peft_type": method.peft_type},
        )
    return lora_settings(Settings(config))


def plain_settings(config: Mapping[str, Any]) -> LoraSettings:
    """As `read_settings`, for an adapter that is scaling · B A and at most a head.

    Raises UnsupportedMethod for what does more.
    """
    numbers, settings = read_settings(config), Settings(config)
    more = variant(settings)
    more = None if more in _IN_TRAINING_ONLY else more
    if more is None and initialisation(settings) is not None:
        more = "init_lora_weights"
    if more is None and settings.flag("lora_bias"):
        more = "lora_bias"
    if more is None and settings.config.get("bias") not in (None, "none"):
        more = "bias"
    if more is None and settings.config.get("trainable_token_indices"):
        more = "trainable_token_indices"
    if more is None and any(name.partition(".")[0] not in ROOTS for name in settings.names("modules_to_save")):
        more = "modules_to_save"
    if more is not None:
        raise UnsupportedMethod(
            f"The adapter has {more}={repr(config.get(more))[:80]}, so that its A and B are not all that it changes.",
            metadata={"peft_type": "LORA", "field": more},
        )
    return numbers


def lora_settings(settings: Settings) -> LoraSettings:
    """The numbers of a config whose fields are known. Raises Rejected: BAD_CONFIG or BAD_PATTERN."""
    ranks = {key: as_integer("rank_pattern", value) for key, value in settings.mapping("rank_pattern").items()}
    alphas = {key: as_number("alpha_pattern", value) for key, value in settings.mapping("alpha_pattern").items()}
    return LoraSettings(
        r=settings.integer("r", 8),
        alpha=settings.number("lora_alpha", 8),
        use_rslora=settings.flag("use_rslora"),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        rank_keys=ModulePatterns(ranks),
        alpha_keys=ModulePatterns(alphas),
    )
