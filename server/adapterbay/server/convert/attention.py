"""LLaMA-Adapter (Zhang et al. 2023, arXiv:2303.16199): learned prompts that upper layers attend to through a gate.

PEFT puts what they give through the output projection of Llama's and Mistral's attention, and adds it behind that of
GPT-2's.
"""

from __future__ import annotations

from torch import Tensor

from adapterbay.server.adapters.forms import AttentionPrompt
from adapterbay.server.convert.tree import dense_weight
from adapterbay.server.mix.linear import MixedLinear


def attention_prompt(prompt: Tensor, gate: Tensor, key: MixedLinear, value: MixedLinear, size: int) -> AttentionPrompt:
    """The prompt [1, length, hidden] through the base's own key and value projections, once, without positions."""
    return AttentionPrompt(float(gate), _projected(prompt, key, size), _projected(prompt, value, size))


def attention_prompt_behind(
    prompt: Tensor, gate: Tensor, query_key_value: MixedLinear, size: int, path: str
) -> AttentionPrompt:
    """The same where one layer projects to queries, keys and values, one third each, for the module at `path`."""
    _, keys, values = _projected(prompt, query_key_value, size).chunk(3, 1)
    return AttentionPrompt(float(gate), keys.contiguous(), values.contiguous(), behind=path)


def _projected(prompt: Tensor, layer: MixedLinear, size: int) -> Tensor:
    """[length, heads, size]"""
    y = prompt[0].float() @ dense_weight(layer).t()
    if layer.bias is not None:
        y = y + layer.bias.float()
    return y.view(y.shape[0], -1, size)
