"""Bases beside the usual ones: a sliding window, RoBERTa's positions, and those that are refused at load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_tools import Harness, reference_greedy, reference_logits
from tiny import SPECIAL, VOCABULARY, byte_tokenizer, load_reference
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from adapterbay.registry.errors import UnsupportedMethod

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


def test_a_sliding_window_is_kept_in_prompts_chunks_and_decoding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = save(MistralForCausalLM(MistralConfig(**DECODER, sliding_window=8)), tmp_path / "base")
    prompts = [[10 + i] * 3 + list(range(20, 20 + length)) for i, length in enumerate((1, 6, 20, 60))]
    with Harness(base, tmp_path / "registry", step_tokens=16) as harness:
        answers = [harness.generate(None, prompt, 24) for prompt in prompts]
        for answer in answers:
            answer.wait()
    model = load_reference(base, attn_implementation="eager")
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = answer.generated().token_ids
        got = torch.stack(harness.logits[answer.request.id])  # type: ignore[union-attr]
        torch.testing.assert_close(got, reference_logits(model, prompt, tokens), rtol=0, atol=1e-4)
        assert tokens == reference_greedy(model, prompt, 24)


def test_roberta_counts_its_positions_from_its_padding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=66,
        initializer_range=0.1,
        pad_token_id=1,
    )
    base = save(RobertaModel(config), tmp_path / "base", encoder=True)
    texts = [list(range(10, 14)), list(range(40, 99))]
    with Harness(base, tmp_path / "registry") as harness:
        assert harness.engine.base.max_length == 64
        answers = [harness.embed(None, text) for text in texts]
        for answer in answers:
            answer.wait()
    model = load_reference(base, "FEATURE_EXTRACTION")
    for text, answer in zip(texts, answers, strict=True):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([text])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(torch.tensor(answer.wait().values), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ["t5", "gemma2", "dynamic rope"])
def test_what_cannot_be_served_exactly_is_refused_at_load(architecture: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if architecture == "t5":
        t5 = T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
        base, reason = save(T5ForConditionalGeneration(t5), tmp_path / "base"), "encoder-decoder"
    elif architecture == "gemma2":
        base = save(Gemma2ForCausalLM(Gemma2Config(**DECODER, head_dim=16)), tmp_path / "base")
        reason = "softcap"
    else:
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        base = save(LlamaForCausalLM(LlamaConfig(**DECODER, rope_parameters=rope)), tmp_path / "base")
        reason = "dynamic"
    with pytest.raises(UnsupportedMethod, match=reason):
        Harness(base, tmp_path / "registry")
