"""When PEFT does to a tied head what an adapter does to the embedding: by two names, and only where it is asked to."""

from __future__ import annotations

from typing import Any

import pytest

from adapterbay.registry.admission.methods import Settings
from adapterbay.registry.admission.places import Base
from adapterbay.registry.admission.tying import tying
from adapterbay.registry.errors import UnsupportedMethod

LLAMA: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True}
TIED = Base({"model.embed_tokens.weight": (96, 32), "model.layers.0.self_attn.q_proj.weight": (32, 32)}, LLAMA)
UNTIED = Base(
    {"model.embed_tokens.weight": (96, 32), "lm_head.weight": (96, 32)}, {**LLAMA, "tie_word_embeddings": False}
)


def lora(**more: Any) -> Settings:
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "ensure_weight_tying": True}
    return Settings({**config, **more})


@pytest.mark.parametrize(
    ("settings", "how"),
    [
        (lora(modules_to_save=["embed_tokens"]), "saved"),
        (lora(modules_to_save=["lm_head"]), "saved"),
        (lora(target_modules=["q_proj", "embed_tokens"]), "adapted"),
        (lora(target_modules=["model.embed_tokens"]), "adapted"),
        (lora(target_modules=".*embed_tokens|embed_tokens"), "adapted"),
        (lora(modules_to_save=["lm_head"], target_modules=["embed_tokens"]), "saved"),
        (lora(), None),
        (lora(target_modules="all-linear"), None),
        (lora(target_modules=["wte"]), None),
        (lora(modules_to_save=["embed_tokens"], ensure_weight_tying=False), None),
        (lora(modules_to_save=["embed_tokens"], peft_type="IA3"), None),
        (lora(modules_to_save=["embed_tokens"], task_type="SEQ_CLS"), None),
    ],
)
def test_what_ties(settings: Settings, how: str | None) -> None:
    assert tying(settings, TIED, ()) == how
    assert tying(settings, UNTIED, ()) is None


def test_without_a_task_the_tensors_tell() -> None:
    settings = lora(task_type=None, modules_to_save=["lm_head"])
    assert tying(settings, TIED, ()) is None
    assert tying(settings, TIED, ("lm_head",)) == "saved"


def test_an_encoder_decoder_is_refused() -> None:
    base = Base({"shared.weight": (96, 32)}, {**LLAMA, "is_encoder_decoder": True, "model_type": "t5"})
    settings = lora(task_type="SEQ_2_SEQ_LM", modules_to_save=["lm_head"])
    assert base.place("lm_head") is not None, "the case does not reach the rule"
    with pytest.raises(UnsupportedMethod, match="ensure_weight_tying"):
        tying(settings, base, ())
