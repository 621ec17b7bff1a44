"""Bases beside the usual ones: windows, capped scores, RoBERTa's positions, and those that are refused at load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_tools import Harness, reference_logits
from tiny import ENCODERS, SPECIAL, VOCABULARY, byte_tokenizer, greedy, load_reference, make_base
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from adapterbay.registry.errors import UnsupportedMethod
from adapterbay.server import model

END = SPECIAL.index("<|im_end|>")
DECODER = {
    "vocab_size": VOCABULARY,
    "initializer_range": 0.1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": END,
    "pad_token_id": END,
}


def save(model: PreTrainedModel, folder: Path, *, encoder: bool = False) -> Path:
    model.eval().save_pretrained(folder)
    byte_tokenizer(encoder=encoder).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("mistral", {"sliding_window": 8}),
        ("gemma2", {"sliding_window": 8, "head_dim": 16, "attn_logit_softcapping": 1.0}),
        ("gemma3_text", {"sliding_window": 8, "head_dim": 16, "sliding_window_pattern": 2}),
        ("qwen3", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}),
    ],
)
def test_windows_and_caps_are_kept_in_prompts_chunks_and_decoding(
    model_type: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **DECODER, **settings)
    base = save(AutoModelForCausalLM.from_config(config), tmp_path / "base")
    prompts = [[10 + i] * 3 + list(range(20, 20 + length)) for i, length in enumerate((1, 6, 20, 60))]
    with Harness(base, tmp_path / "registry", step_tokens=16) as harness:
        answers = [harness.generate(None, prompt, 24) for prompt in prompts]
        for answer in answers:
            answer.wait()
    alone = load_reference(base, attn_implementation="eager")
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = answer.generated().token_ids
        got = torch.stack(harness.logits[answer.request.id])  # type: ignore[union-attr]
        torch.testing.assert_close(got, reference_logits(alone, prompt, tokens), rtol=0, atol=1e-4)
        assert tokens == greedy(alone, prompt, 24).tokens


@pytest.mark.parametrize("architecture", ENCODERS)
def test_an_encoder_embeds_as_it_does_alone(architecture: str, tmp_path: Path) -> None:
    """RoBERTa counts its positions from its padding's index; ELECTRA's and DistilBERT's checkpoints have no pooler."""
    base = make_base(tmp_path / "base", architecture)
    texts = [list(range(10, 14)), list(range(40, 99))]
    with Harness(base, tmp_path / "registry") as harness:
        padding = SPECIAL.index("[PAD]") + 1 if architecture == "roberta" else 0
        assert harness.engine.base.max_length == 128 - padding
        answers = [harness.embed(None, text) for text in texts]
        for answer in answers:
            answer.wait()
    alone = load_reference(base, "FEATURE_EXTRACTION")
    for text, answer in zip(texts, answers, strict=True):
        with torch.no_grad():
            expected = alone(input_ids=torch.tensor([text])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(torch.tensor(answer.wait().values), expected, rtol=0, atol=1e-4)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "an encoder-decoder": (
        "bart",
        {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2},
        "encoder-decoder",
    ),
    "its own attention": (
        "codegen",
        {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 8, "bos_token_id": 1, "eos_token_id": END},
        "attention interface",
    ),
    "no positions": ("bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 2}, "positions"),
    "no other attention": (
        "falcon",
        {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": END},
        "no other attention",
    ),
    "states that go from text to text": (
        "falcon_h1",
        {**DECODER, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
        "see those of other texts",
    ),
    "both directions": (
        "gemma3_text",
        {**DECODER, "head_dim": 16, "use_bidirectional_attention": True},
        "both directions",
    ),
    "a rope that follows the batch": (
        "llama",
        {**DECODER, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
        "dynamic",
    ),
    "such a rope in some layers": (
        "gemma3_text",
        {
            **DECODER,
            "head_dim": 16,
            "rope_parameters": {
                "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        "dynamic",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_exactly_is_refused_at_load(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model_type, settings, reason = REFUSED[case]
    config = AutoConfig.for_model(model_type, **{"vocab_size": VOCABULARY, **settings})
    made = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    base = save(made.from_config(config), tmp_path / "base")
    with pytest.raises(UnsupportedMethod, match=reason):
        Harness(base, tmp_path / "registry")


def test_positions_that_are_not_known_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if RoBERTa were not among those whose positions begin elsewhere."""
    base = make_base(tmp_path / "base", "roberta", layers=1)
    monkeypatch.setattr(model, "position_offset", lambda _: 0)
    with pytest.raises(UnsupportedMethod, match="positions"):
        Harness(base, tmp_path / "registry")


def test_a_model_of_more_than_text_is_refused(tmp_path: Path) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = AutoConfig.for_model("gemma3", text_config={**DECODER, "head_dim": 16}, vision_config=vision)
    base = save(AutoModel.from_config(config), tmp_path / "base")
    with pytest.raises(UnsupportedMethod, match="more than text"):
        Harness(base, tmp_path / "registry")
