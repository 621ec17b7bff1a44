"""Every field of PEFT's LoraConfig (0.21), and what it means for serving.

- SUPPORTED: read and obeyed.
- HARMLESS: does not change what the adapter computes once its tensors are given.
- REFUSED: served at its default only; any other value is UnsupportedMethod.

A key that is not in the table, with any value but null, is Rejected with UNKNOWN_CONFIG_KEY: it is never dropped.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, Final

from adapterbay.registry.errors import Rejected, UnsupportedMethod


class Treatment(enum.Enum):
    """What becomes of a field."""

    SUPPORTED = "supported"
    HARMLESS = "harmless"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Field:
    """`why` is one line for people; `off` are the values, besides null, at which a REFUSED field changes nothing.

    `kinds` are the types that PEFT can load, if they are not checked elsewhere; null is one if it is named.
    """

    treatment: Treatment
    why: str
    off: tuple[Any, ...] = ()
    kinds: tuple[type, ...] = ()


def _supported(why: str, *kinds: type) -> Field:
    return Field(Treatment.SUPPORTED, why, kinds=kinds)


def _harmless(why: str, *kinds: type) -> Field:
    return Field(Treatment.HARMLESS, why, kinds=kinds)


def _refused(why: str, *off: Any) -> Field:
    return Field(Treatment.REFUSED, why, off)


_KINDS: Final = {
    NoneType: "null",
    bool: "true or false",
    dict: "an object",
    float: "a number",
    int: "a whole number",
    str: "text",
}

LORA_FIELDS: Final[Mapping[str, Field]] = {
    # every method
    "peft_type": _supported("the method"),
    "task_type": _supported("the task, unless training.json or the caller says it", str, NoneType),
    "base_model_name_or_path": _supported("the base, unless training.json or the caller says it", str, NoneType),
    "revision": _supported("the revision of a base on the Hub", str, NoneType),
    "auto_mapping": _supported(
        "may say the task; AutoPeftModel imports the module it names, so only of transformers", dict, NoneType
    ),
    "peft_version": _harmless("recorded in the manifest", str, NoneType),
    "inference_mode": _harmless("only says whether tensors want gradients", bool, NoneType),
    # the low-rank delta
    "r": _supported("the rank; must agree with the tensors"),
    "lora_alpha": _supported("the scaling is alpha / r"),
    "use_rslora": _supported("the scaling is alpha / sqrt(r)"),
    "rank_pattern": _supported("the ranks of single modules; must agree with the tensors"),
    "alpha_pattern": _supported("the alphas of single modules"),
    "lora_dropout": _harmless("dropout is off outside training", int, float),
    "fan_in_fan_out": _harmless("the layout of a weight is read from the base itself", bool, NoneType),
    # where it applies
    "target_modules": _supported("the adapted modules; must agree with the tensors"),
    "exclude_modules": _supported("modules left out; must agree with the tensors"),
    "layers_to_transform": _supported("the adapted layers; must agree with the tensors"),
    "layers_pattern": _supported("how layers are counted"),
    "modules_to_save": _supported("a task's head, whole"),
    "ensure_weight_tying": _harmless("concerns embeddings and lm_head, which are refused as targets", bool, NoneType),
    "target_parameters": _refused("adapts bare parameters (experts), not linear layers", []),
    "trainable_token_indices": _refused("replaces rows of the embedding"),
    "layer_replication": _refused("builds another stack of layers out of the base", []),
    # how it was initialised
    "init_lora_weights": _supported("only the ways that leave the base as it is"),
    "eva_config": _harmless("settings of an initialisation that leaves the base as it is", dict, NoneType),
    "loftq_config": _harmless("settings of an initialisation; init_lora_weights decides", dict, NoneType),
    "corda_config": _harmless("settings of an initialisation; init_lora_weights decides", dict, NoneType),
    "lora_ga_config": _harmless("settings of an initialisation; init_lora_weights decides", dict, NoneType),
    "megatron_core": _harmless("only used together with megatron_config", str, NoneType),
    "qalora_group_size": _harmless("only used together with use_qalora"),
    "runtime_config": _harmless("where an initialisation runs; PEFT does not save it"),
    # variants that compute something else; an empty object is a config with its defaults, and turns them on
    "use_dora": _refused("rescales the output of the base layer (DoRA)", False),
    "bias": _refused("trains biases of the base as well", "none"),
    "lora_bias": _refused("adds a bias to B", False),
    "use_qalora": _refused("pools the input before A", False),
    "megatron_config": _refused("replaces the linear layers by Megatron's", {}),
    "velora_config": _refused("keeps buffers of its own"),
    "alora_invocation_tokens": _refused("is on for a part of the tokens only", []),
    "monteclora_config": _refused("samples around the delta"),
    "use_bdlora": _refused("makes A or B block-diagonal"),
    "arrow_config": _refused("routes tokens between adapters"),
    "kasa_config": _refused("truncates the base and puts a diagonal between A and B"),
}

AUTO_MAPPING_PACKAGES: Final = frozenset({"__main__", "peft", "sentence_transformers", "transformers", "trl"})
"""`__main__`, a class of the training script, cannot be imported by anybody else, and does no harm."""

OLD_FIELDS: Final[Mapping[str, Field]] = {
    "merge_weights": _harmless("whether PEFT 0.2 merged the weights on eval()", bool, NoneType),
    "enable_lora": _refused("PEFT 0.2 adapted parts of a fused layer"),
}
"""Fields that PEFT does not write any more."""

TASK_TYPES: Final = frozenset(
    {"CAUSAL_LM", "FEATURE_EXTRACTION", "QUESTION_ANS", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS"}
)
"""PEFT's own; those that are served are `origins.PEFT_TASKS`."""

INITIALISATIONS_THAT_KEEP_THE_BASE: Final = frozenset({"gaussian", "eva", "orthogonal", "mica"})


_FIELDS: Final = {**LORA_FIELDS, **OLD_FIELDS}


def check_fields(config: Mapping[str, Any]) -> None:
    """Refuses what is not served. Raises UnsupportedMethod, or Rejected with reason UNKNOWN_CONFIG_KEY."""
    method = config.get("peft_type")
    if not isinstance(method, str):
        raise Rejected("adapter_config.json has no peft_type: it is not a PEFT adapter.", reason="BAD_CONFIG")
    if method != "LORA":
        raise UnsupportedMethod(
            f"The PEFT method {method[:60]!r} is not served: train with LORA.", metadata={"peft_type": method[:60]}
        )
    unknown = sorted(
        key if key.isidentifier() else repr(key)
        for key, value in config.items()
        if key not in _FIELDS and value is not None
    )
    if unknown:
        raise Rejected(
            f"adapter_config.json has settings that this version does not know: {', '.join(unknown)[:200]}. "
            "They might change the result, so they are not dropped: update adapterbay, or save with an older PEFT.",
            reason="UNKNOWN_CONFIG_KEY",
            metadata={"keys": ", ".join(unknown)[:200]},
        )
    for key, value in config.items():
        field = _FIELDS.get(key)
        if field is not None and field.kinds and type(value) not in field.kinds:
            wanted = " or ".join(_KINDS[kind] for kind in field.kinds)
            raise Rejected(
                f"adapter_config.json has {key}={repr(value)[:80]}, but PEFT loads {wanted} only.",
                reason="BAD_CONFIG",
                metadata={"field": key},
            )
        if field is None or field.treatment is not Treatment.REFUSED or value is None:
            continue
        # True == 1 in Python: compare the types as well.
        if not any(type(value) is type(off) and value == off for off in field.off):
            raise UnsupportedMethod(
                f"{key}={repr(value)[:80]} is not served: it {field.why}. Train without it.",
                metadata={"peft_type": method, "field": key},
            )
    task = config.get("task_type")
    if task is not None and task not in TASK_TYPES:
        raise Rejected(
            f"adapter_config.json has task_type={task[:60]!r}; PEFT knows {', '.join(sorted(TASK_TYPES))}.",
            reason="BAD_CONFIG",
            metadata={"field": "task_type"},
        )
    _check_auto_mapping(config.get("auto_mapping"))
    _check_initialisation(config.get("init_lora_weights", True))


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


def _check_initialisation(value: Any) -> None:
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, str) and value in INITIALISATIONS_THAT_KEEP_THE_BASE:
        return
    raise UnsupportedMethod(
        f"init_lora_weights={str(value)[:60]!r} is not served: it changes the base's own weights, so the tensors "
        "do not fit the plain base. Save with save_pretrained(…, path_initial_model_for_weight_conversion=…), which "
        "converts the adapter to plain LoRA.",
        metadata={"peft_type": "LORA", "field": "init_lora_weights"},
    )
