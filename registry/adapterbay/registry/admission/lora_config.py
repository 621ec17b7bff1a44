"""The settings of a LoRA adapter that say what it computes, checked for type and range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from adapterbay.registry.admission.patterns import ModulePatterns
from adapterbay.registry.admission.peft_fields import check_fields
from adapterbay.registry.errors import Rejected, UnsupportedMethod

HEAD_MODULES: Final = ("score", "classifier")
"""The heads of transformers' *ForSequenceClassification that are one linear layer."""


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
    """Reads adapter_config.json. Raises UnsupportedMethod, or Rejected: UNKNOWN_CONFIG_KEY, BAD_CONFIG, BAD_PATTERN."""
    check_fields(config)
    for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        _names(config, key)
    _check_targets(config)
    if config.get("bias", "none") is None:
        _refuse("bias", None, "'none'")
    if not 0 <= config.get("lora_dropout", 0) <= 1:
        _refuse("lora_dropout", config["lora_dropout"], "a number between 0 and 1")
    layers = config.get("layers_to_transform")
    if layers is not None and not (_is_int(layers) or (isinstance(layers, list) and all(map(_is_int, layers)))):
        _refuse("layers_to_transform", layers, "a number or a list of numbers")
    use_rslora = config.get("use_rslora")
    if use_rslora is not None and not isinstance(use_rslora, bool):
        _refuse("use_rslora", use_rslora, "true or false")
    _check_heads(config)
    ranks = {key: _rank("rank_pattern", value) for key, value in _pattern(config, "rank_pattern").items()}
    alphas = {key: _alpha("alpha_pattern", value) for key, value in _pattern(config, "alpha_pattern").items()}
    return LoraSettings(
        r=_rank("r", config.get("r", 8)),
        alpha=_alpha("lora_alpha", config.get("lora_alpha", 8)),
        use_rslora=bool(use_rslora),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        rank_keys=ModulePatterns(ranks),
        alpha_keys=ModulePatterns(alphas),
    )


def _check_targets(config: Mapping[str, Any]) -> None:
    """What PEFT would take from its own defaults, or not load at all."""
    target = config.get("target_modules")
    if target is None:
        _refuse("target_modules", None, "a list of names or a pattern, as save_pretrained writes it")
    for key in ("layers_to_transform", "layers_pattern"):
        if isinstance(target, str) and config.get(key) is not None:
            _refuse(key, config[key], "null, since target_modules is a pattern")
    if config.get("layers_pattern") and config.get("layers_to_transform") is None:
        _refuse("layers_pattern", config["layers_pattern"], "null, since there is no layers_to_transform")
    if isinstance(config.get("modules_to_save"), str):
        _refuse("modules_to_save", config["modules_to_save"], "a list of names")


def _check_heads(config: Mapping[str, Any]) -> None:
    others = sorted(set(config.get("modules_to_save") or []) - set(HEAD_MODULES))
    if others:
        raise UnsupportedMethod(
            f"modules_to_save={', '.join(map(repr, others))[:100]} is not served yet: only a head of one linear layer "
            f"({' or '.join(HEAD_MODULES)}) is.",
            metadata={"peft_type": "LORA", "field": "modules_to_save"},
        )


def _names(config: Mapping[str, Any], key: str) -> None:
    value = config.get(key)
    if value is None or isinstance(value, str):
        return
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        _refuse(key, value, "text or a list of names")


def _pattern(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key, {})
    if not isinstance(value, dict):
        _refuse(key, value, "a mapping of modules to numbers")
    return value


def _rank(key: str, value: Any) -> int:
    if not _is_int(value) or value <= 0:
        _refuse(key, value, "a whole number above 0")
    return int(value)


def _alpha(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e9:
        _refuse(key, value, "a finite number")
    return float(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refuse(key: str, value: Any, wanted: str) -> NoReturn:
    raise Rejected(
        f"adapter_config.json has {key}={repr(value)[:80]}, but it must be {wanted}.",
        reason="BAD_CONFIG",
        metadata={"field": key},
    )
