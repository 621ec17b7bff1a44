"""Whether PEFT (0.21) does to a tied language-model head what an adapter does to the embedding (`ensure_weight_tying`).

PEFT looks at the names `embed_tokens` and `lm_head` alone, in what adapter_config.json holds: GPT-2's `wte` is not
tied, whatever the flag says. It does so again when it loads a folder, and that is what is served.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Final, Literal

from adapterbay.registry.admission.methods import Settings
from adapterbay.registry.admission.patterns import compile_pattern
from adapterbay.registry.admission.places import Base
from adapterbay.registry.errors import UnsupportedMethod

Tying = Literal["saved", "adapted"]
"""The embedding is saved whole (`modules_to_save`), or adapted (`target_modules`), and the head with it."""

HEAD: Final = "lm_head"
_NAMES: Final = frozenset({"embed_tokens", HEAD})
"""PEFT's EMBEDDING_LAYER_NAMES."""


def tying(settings: Settings, base: Base, named: Container[str]) -> Tying | None:
    """How the head is tied; None: it is left as it is. `named` are the modules that the adapter has tensors for.

    Raises UnsupportedMethod for an encoder-decoder, which PEFT ties so that its own model cannot run.
    """
    if settings.method != "LORA" or not settings.flag("ensure_weight_tying"):
        return None
    task = settings.config.get("task_type")
    if not (task == "CAUSAL_LM" or (task is None and HEAD in named) or base.config.get("is_encoder_decoder")):
        return None
    head = base.place(HEAD)
    how = _how(settings)
    if how is None or head is None or not base.is_tied(head):
        return None
    if base.config.get("is_encoder_decoder"):
        raise UnsupportedMethod(
            "ensure_weight_tying=True is not served on an encoder-decoder: PEFT ties the embedding and the head so "
            "that its own model cannot run. Train without it.",
            metadata={"peft_type": settings.method, "field": "ensure_weight_tying"},
        )
    return how


def _how(settings: Settings) -> Tying | None:
    if _among(settings.names("modules_to_save")):
        return "saved"
    targets = settings.names("target_modules")
    if isinstance(targets, str):
        means = compile_pattern(targets).fullmatch if targets != "all-linear" else lambda _: False
        return "adapted" if any(map(means, sorted(_NAMES))) else None
    return "adapted" if _among(targets) else None


def _among(names: str | tuple[str, ...]) -> bool:
    return any(name.rpartition(".")[2] in _NAMES for name in names)
