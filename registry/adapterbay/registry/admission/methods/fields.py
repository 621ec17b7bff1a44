"""The fields of PEFT's configs (0.21), and what each means for serving.

- SUPPORTED: read and obeyed.
- HARMLESS: does not change what the adapter computes once its tensors are given.
- REFUSED: served at its default only; any other value is UnsupportedMethod.

A key that is in no table of its method, with any value but null, is Rejected with UNKNOWN_CONFIG_KEY: it is never
dropped.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, Final


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


def supported(why: str, *kinds: type) -> Field:
    """A field that is obeyed."""
    return Field(Treatment.SUPPORTED, why, kinds=kinds)


def harmless(why: str, *kinds: type) -> Field:
    """A field that changes nothing."""
    return Field(Treatment.HARMLESS, why, kinds=kinds)


def refused(why: str, *off: Any) -> Field:
    """A field that is served at `off` and null only."""
    return Field(Treatment.REFUSED, why, off)


Fields = Mapping[str, Field]

COMMON: Final[Fields] = {
    "peft_type": supported("the method"),
    "task_type": supported("the task, unless training.json or the caller says it", str, NoneType),
    "base_model_name_or_path": supported("the base, unless training.json or the caller says it", str, NoneType),
    "revision": supported("the revision of a base on the Hub", str, NoneType),
    "auto_mapping": supported(
        "may say the task; AutoPeftModel imports the module it names, so only of transformers", dict, NoneType
    ),
    "peft_version": harmless("recorded in the manifest", str, NoneType),
    "inference_mode": harmless("only says whether tensors want gradients", bool, NoneType),
}
"""Of every method."""

SAVED: Final[Fields] = {"modules_to_save": supported("heads and other modules, whole")}
INIT: Final[Fields] = {"init_weights": harmless("how it was initialised; the tensors are given")}
TARGETED: Final[Fields] = {"target_modules": supported("the adapted modules; must agree with the tensors")}
EXCLUDED: Final[Fields] = {"exclude_modules": supported("modules left out; must agree with the tensors")}
LAYERS: Final[Fields] = {
    "layers_to_transform": supported("the adapted layers; must agree with the tensors"),
    "layers_pattern": supported("how layers are counted"),
}
BIASED: Final[Fields] = {"bias": supported("biases of the base that were trained as well")}
FAN: Final[Fields] = {"fan_in_fan_out": harmless("the layout of a weight is read from the base itself", bool, NoneType)}


def dropout(*names: str) -> Fields:
    """Dropout is off outside training."""
    return {name: harmless("dropout is off outside training", int, float) for name in names}


def training(*names: str) -> Fields:
    """Settings of the training or of an initialisation."""
    return {name: harmless("concerns training only") for name in names}


def obeyed(**why: str) -> Fields:
    """Settings that say what is computed."""
    return {name: supported(text) for name, text in why.items()}


def fields(*tables: Fields) -> Fields:
    """The tables together with COMMON. A later one wins."""
    merged = dict(COMMON)
    for table in tables:
        merged.update(table)
    return merged
