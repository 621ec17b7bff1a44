"""Holds the table of methods to what forms are."""

from __future__ import annotations

from typing import Final

from adapterbay.registry.errors import AdapterbayError
from adapterbay.registry.fusing import FusionSettings
from adapterbay.server.adapters.forms import ServingForm
from adapterbay.server.adapters.fusing import check_fusable
from adapterbay.server.convert.methods import METHODS
from adapterbay.server.requests import ArmSpec, Part

PARTS: Final = {
    "low rank": {"low_rank"},
    "dense delta": {"dense"},
    "low rank where the delta has one, else dense delta": {"low_rank", "dense"},
    "dense delta and bias": {"dense", "bias"},
    "rotation of the input": {"rotation"},
    "rotation of pairs of outputs": {"turn", "out_scale"},
    "scale of the input or the output": {"in_scale", "out_scale"},
    "bias": {"bias"},
    "own normalization layers": {"norms"},
    "own rows of the embedding": {"tables", "low_rank"},  # a head that shares them has them as a delta
    "virtual tokens": {"Prompt"},
    "key/value prefix": {"Prefix"},
    "gated attention to learned prompts": {"attention"},
    "modules behind layers": {"bottlenecks"},
}
"""What a form may hold, by what the table calls it."""

GROUPED: Final = {"dense", "rotation", "turn", "norms", "tables", "attention", "bottlenecks"}
"""What a step computes for each adapter on its own rows."""


def against_the_table(form: ServingForm) -> str | None:
    """In what a form is not as the table says of its method; None: in nothing."""
    row, held = METHODS[form.manifest.peft_type], _held(form)
    ways = {"any": (True, True), "linear": (True, False), "no": (False, False)}
    fusable = _fusable(form)
    if row.peft_type == "LORA":  # whose variants have other parts: the note says so
        return None if fusable == ways["any" if held == {"low_rank"} else "linear"] or "tables" in held else "fusable"
    if not held <= PARTS[row.form]:
        return f"holds {held}"
    if (row.execution == "grouped") is not bool(held & GROUPED) and row.execution != "by form":
        return f"is not {row.execution}, with {held}"
    expected = ways[row.fusable] if row.fusable != "by form" else ways["any" if held == {"low_rank"} else "linear"]
    return None if fusable == expected else f"fusable is {fusable}, with {held}"


def _held(form: ServingForm) -> set[str]:
    held = {name for layer in form.layers.values() for name in layer.__slots__ if getattr(layer, name) is not None}
    held |= {name for name in ("norms", "tables", "attention", "bottlenecks") if getattr(form, name)}
    return held | ({type(form.virtual).__name__} if form.virtual is not None else set())


def _fusable(form: ServingForm) -> tuple[bool, bool]:
    """By weighted sums, and by another method."""
    found = []
    for settings in (None, FusionSettings("svd")):
        part = Part("r", "n", 1, form.digest, 0.5)
        try:
            check_fusable(ArmSpec((part,), settings), [form])
            found.append(True)
        except AdapterbayError:
            found.append(False)
    return found[0], found[1]
