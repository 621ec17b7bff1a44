"""Whether every setting of a config is known and served. The tables are in `methods`."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any, Final

from adapterbay.registry.admission.methods import METHODS, Method, Settings
from adapterbay.registry.admission.methods.fields import Field, Treatment
from adapterbay.registry.admission.methods.lora import LORA_FIELDS, OLD_FIELDS
from adapterbay.registry.admission.methods.settings import is_int, refuse
from adapterbay.registry.errors import Rejected, UnsupportedMethod
from adapterbay.registry.nearest import nearest_words

__all__ = ["LORA_FIELDS", "OLD_FIELDS", "Treatment", "check_fields", "read_method"]

_KINDS: Final = {
    NoneType: "null",
    bool: "true or false",
    dict: "an object",
    float: "a number",
    int: "a whole number",
    str: "text",
}

AUTO_MAPPING_PACKAGES: Final = frozenset({"__main__", "peft", "sentence_transformers", "transformers", "trl"})
"""`__main__`, a class of the training script, cannot be imported by anybody else, and does no harm."""

TASK_TYPES: Final = frozenset(
    {"CAUSAL_LM", "FEATURE_EXTRACTION", "QUESTION_ANS", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS"}
)
"""PEFT's own; those that are served are `origins.PEFT_TASKS`."""


def read_method(config: Mapping[str, Any]) -> Method:
    """The method of a config that is complete. Raises as `check_fields` does."""
    method = check_fields(config)
    _check_places(config, method)
    return method


def check_fields(config: Mapping[str, Any]) -> Method:
    """Refuses settings that are not known or not served; returns the method.

    Raises UnsupportedMethod, or Rejected: UNKNOWN_CONFIG_KEY, BAD_CONFIG, BAD_PATTERN.
    """
    method = _method(config)
    unknown = sorted(
        key if key.isidentifier() else repr(key)
        for key, value in config.items()
        if key not in method.fields and value is not None
    )
    if unknown:
        raise Rejected(
            f"adapter_config.json has settings that this version does not know: {', '.join(unknown)[:200]}. "
            "They might change the result, so they are not dropped: update adapterbay, or save with an older PEFT.",
            reason="UNKNOWN_CONFIG_KEY",
            metadata={"keys": ", ".join(unknown)[:200]},
        )
    for key, value in config.items():
        if key in method.fields:
            _check_field(method, key, value, method.fields[key])
    task = config.get("task_type")
    if task is not None and task not in TASK_TYPES:
        raise Rejected(
            f"adapter_config.json has task_type={task[:60]!r}; PEFT knows {', '.join(sorted(TASK_TYPES))}.",
            reason="BAD_CONFIG",
            metadata={"field": "task_type"},
        )
    _check_auto_mapping(config.get("auto_mapping"))
    method.check(Settings(config))
    return method


def _method(config: Mapping[str, Any]) -> Method:
    name = config.get("peft_type")
    if not isinstance(name, str):
        raise Rejected("adapter_config.json has no peft_type: it is not a PEFT adapter.", reason="BAD_CONFIG")
    method = METHODS.get(name)
    if method is None:
        near = nearest_words(name[:60].upper(), METHODS)
        meant = f" Did you mean {', '.join(near)}?" if near else ""
        raise UnsupportedMethod(
            f"The PEFT method {name[:60]!r} is not served: this version does not know it.{meant} `adapterbay server "
            "methods` lists those that it knows.",
            metadata={"peft_type": name[:60]},
        )
    if method.refused is not None:
        raise UnsupportedMethod(
            f"The PEFT method {name} is not served: {method.refused}.", metadata={"peft_type": name}
        )
    return method


def _check_field(method: Method, key: str, value: Any, field: Field) -> None:
    if field.kinds and type(value) not in field.kinds:
        wanted = " or ".join(_KINDS[kind] for kind in field.kinds)
        raise Rejected(
            f"adapter_config.json has {key}={repr(value)[:80]}, but PEFT loads {wanted} only.",
            reason="BAD_CONFIG",
            metadata={"field": key},
        )
    if field.treatment is not Treatment.REFUSED or value is None:
        return
    # True == 1 in Python: compare the types as well.
    if not any(type(value) is type(off) and value == off for off in field.off):
        raise UnsupportedMethod(
            f"{key}={repr(value)[:80]} is not served: it {field.why}. Train without it.",
            metadata={"peft_type": method.peft_type, "field": key},
        )


def _check_auto_mapping(value: Mapping[str, Any] | None) -> None:
    """Older PEFT imports whatever module is named here, from any place that Python looks at."""
    if value is None:
        return
    library = value.get("parent_library")
    if library is None:
        return
    if not isinstance(library, str) or library.partition(".")[0] not in AUTO_MAPPING_PACKAGES:
        raise Rejected(
            f"adapter_config.json has auto_mapping.parent_library={str(library)[:80]!r}, which AutoPeftModel imports: "
            f"it must be of {', '.join(sorted(AUTO_MAPPING_PACKAGES))}. Remove auto_mapping.",
            reason="BAD_CONFIG",
            metadata={"field": "auto_mapping"},
        )


def _check_places(config: Mapping[str, Any], method: Method) -> None:
    """What says where the adapter sits, and what PEFT would take from its own defaults or not load at all."""
    settings = Settings(config)
    for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        settings.names(key)
    if isinstance(config.get("modules_to_save"), str):
        refuse("modules_to_save", config["modules_to_save"], "a list of names")
    layers = config.get("layers_to_transform")
    if layers is not None and not (is_int(layers) or (isinstance(layers, list) and all(map(is_int, layers)))):
        refuse("layers_to_transform", layers, "a number or a list of numbers")
    _check_bias(config, method)
    if "target_modules" not in method.fields:
        return
    target = config.get("target_modules")
    if target is None:
        refuse("target_modules", None, "a list of names or a pattern, as save_pretrained writes it")
    for key in ("layers_to_transform", "layers_pattern"):
        if isinstance(target, str) and config.get(key) is not None:
            refuse(key, config[key], "null, since target_modules is a pattern")
    if config.get("layers_pattern") and layers is None:
        refuse("layers_pattern", config["layers_pattern"], "null, since there is no layers_to_transform")
    for key in method.fields:
        value = config.get(key)
        if key.endswith("dropout") and value is not None and not 0 <= value <= 1:
            refuse(key, value, "a number between 0 and 1")


def _check_bias(config: Mapping[str, Any], method: Method) -> None:
    if "bias" not in method.fields or "bias" not in config:
        return
    bias = config["bias"]
    if not isinstance(bias, str) or not (bias in ("none", "all") or bias.endswith("_only")):
        refuse("bias", bias, "'none', 'all' or one such as 'lora_only'")
