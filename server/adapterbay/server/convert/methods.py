"""Every method of PEFT 0.21, and our own: what it becomes in memory, how a batch runs it, whether it can be fused.

batched   one computation serves all rows, whatever adapters they use
grouped   one computation for each adapter of the batch, on its own rows
by form   batched where the delta has low rank, grouped where it is dense
refused   not served; the reason is what a user gets at the push or at the load
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

Execution = Literal["batched", "grouped", "by form", "refused"]
Fusable = Literal["any", "linear", "by form", "no"]


@dataclass(frozen=True, slots=True)
class MethodRow:
    """A row of the table.

    `fusable`: by `any` method of fusion (what is low-rank deltas and nothing else), by `linear` sums only, `by form`
    the one or the other, or `no`. `note` says what is particular, or why it is refused. `tested`: the architectures
    on which the parity test has the method.
    """

    peft_type: str
    title: str
    form: str
    execution: Execution
    fusable: Fusable
    note: str = ""
    tested: tuple[str, ...] = ()


_RANKS: Final = "low rank"
_DENSE: Final = "dense delta"
_BY_RANK: Final = "low rank where the delta has one, else dense delta"


def _row(
    peft_type: str, title: str, form: str, execution: Execution = "batched", fusable: Fusable = "linear", note: str = ""
) -> MethodRow:
    return MethodRow(peft_type, title, form, execution, fusable, note)


def _refused(peft_type: str, title: str, reason: str) -> MethodRow:
    return MethodRow(peft_type, title, "-", "refused", "no", reason)


_ROWS: Final = (
    _row(
        "LORA",
        "LoRA",
        _RANKS,
        fusable="any",
        note="and its variants: docs/methods.md; with more than low-rank deltas (DoRA, biases, …) linear",
    ),
    _row("ADALORA", "AdaLoRA", _RANKS, fusable="any"),
    _row("VERA", "VeRA", _RANKS, fusable="any"),
    _row("PVERA", "PVeRA", _BY_RANK, "by form", "by form", note="its mean, as PEFT computes at inference"),
    _row("VBLORA", "VB-LoRA", _RANKS, fusable="any"),
    _row("TINYLORA", "TinyLoRA", _RANKS, fusable="any"),
    _row("UNILORA", "Uni-LoRA", _RANKS, fusable="any"),
    _row("DELORA", "DeLoRA", _RANKS, fusable="any"),
    _row("DEFT", "DEFT", _RANKS, fusable="any"),
    _row("HRA", "HRA", _RANKS, fusable="any"),
    _row("PSOFT", "PSOFT", _RANKS, fusable="any"),
    _row("MISS", "MiSS", _BY_RANK, "by form", "by form"),
    _row("OSF", "OSF", _BY_RANK, "by form", "by form"),
    _row("GRALORA", "GraLoRA", _BY_RANK, "by form", "by form"),
    _row("PEANUT", "PEANuT", _BY_RANK, "by form", "by form"),
    _row("ADAMSS", "AdaMSS", _BY_RANK, "by form", "by form"),
    _row("RANDLORA", "RandLoRA", _BY_RANK, "by form", "by form"),
    _row("SUPERTUNING", "Super-Tuning", _DENSE, "grouped"),
    _row("FROD", "FRoD", _DENSE, "grouped"),
    _row("LOHA", "LoHa", _DENSE, "grouped"),
    _row("LOKR", "LoKr", _DENSE, "grouped"),
    _row("FOURIERFT", "FourierFT", _DENSE, "grouped"),
    _row("WAVEFT", "WaveFT", _DENSE, "grouped"),
    _row("C3A", "C3A", _DENSE, "grouped"),
    _row("SHIRA", "SHiRA", _DENSE, "grouped"),
    _row("HIRA", "HiRA", _DENSE, "grouped"),
    _row("GLORA", "GLoRA", "dense delta and bias", "grouped"),
    _row("BOFT", "BOFT", _DENSE, "grouped"),
    _row("OFT", "OFT", "rotation of the input", "grouped"),
    _row("ROAD", "RoAd", "rotation of pairs of outputs", "grouped"),
    _row("IA3", "IA³", "scale of the input or the output"),
    _row("BEFT", "BEFT", "bias"),
    _row("LN_TUNING", "LN tuning", "own normalization layers", "grouped"),
    _row("TRAINABLE_TOKENS", "trainable tokens", "own rows of the embedding", "grouped"),
    _row("PROMPT_TUNING", "prompt tuning", "virtual tokens", fusable="no"),
    _row("P_TUNING", "P-tuning", "virtual tokens", fusable="no"),
    _row("MULTITASK_PROMPT_TUNING", "multitask prompt tuning", "virtual tokens", fusable="no", note="of one task"),
    _row("CPT", "CPT", "virtual tokens", fusable="no"),
    _row("PREFIX_TUNING", "prefix tuning", "key/value prefix", fusable="no", note="decoders; of T5 its decoder"),
    _row("CARTRIDGE", "cartridges", "key/value prefix", fusable="no", note="decoders; of T5 its decoder"),
    _row(
        "ADAPTION_PROMPT",
        "LLaMA-Adapter",
        "gated attention to learned prompts",
        "grouped",
        note="Llama, Mistral and GPT-2",
    ),
    _row(
        "BOTTLENECK",
        "bottleneck adapters",
        "modules behind layers",
        "grouped",
        note="Houlsby's, Pfeiffer's, AdapterHub's; no two at one place",
    ),
    _refused(
        "LILY", "Lily", "its router averages over all tokens of the batch, so one row would change another's answer"
    ),
    _refused("POLY", "Poly", "every input needs a task id, which a request does not have"),
    _refused("SHADOW", "ShadowPEFT", "its second network runs through the layers beside the base's own hidden states"),
    _refused("XLORA", "X-LoRA", "it needs a second pass of the base for each step, over adapters of other folders"),
)

_NOT_ON_CONV1D: Final = frozenset(
    {"ADAMSS", "BEFT", "BOFT", "C3A", "DELORA", "GLORA", "HRA", "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT", "PSOFT"}
) | {"ROAD", "SHIRA", "SUPERTUNING"}
"""PEFT does not put these on GPT-2's layers, or we do not serve them there."""

_DECODERS_ONLY: Final = frozenset({"MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "CARTRIDGE", "CPT", "ADAPTION_PROMPT"})
"""PEFT does not put these on BERT, or transformers does not run them there."""


def _tested(row: MethodRow) -> MethodRow:
    if row.execution == "refused":
        return row
    on = ["llama"]
    if row.peft_type not in _NOT_ON_CONV1D:
        on.append("gpt2")
    if row.peft_type not in _DECODERS_ONLY:
        on.append("bert")
    return dataclasses.replace(row, tested=tuple(on))


METHODS: Final[Mapping[str, MethodRow]] = {row.peft_type: _tested(row) for row in _ROWS}

COLUMNS: Final = ("method", "form", "batched or grouped", "fusable", "tested", "note")


def cells(row: MethodRow) -> tuple[str, ...]:
    """A row of the table, as COLUMNS says."""
    name = row.title if row.title.upper() == row.peft_type else f"{row.title} ({row.peft_type})"
    return (name, row.form, row.execution, row.fusable, ", ".join(row.tested) or "-", row.note)


def markdown() -> str:
    """The whole table for docs/methods.md."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *(cells(row) for row in METHODS.values())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
