"""LLaMA-Adapter (Zhang et al. 2023, arXiv:2303.16199): learned prompts that upper layers attend to through a gate."""

from __future__ import annotations

from torch import Tensor

from adapterbay.server.adapters.forms import AttentionPrompt
from adapterbay.server.convert.tree import dense_weight
from adapterbay.server.mix.linear import MixedLinear


def attention_prompt(prompt: Tensor, gate: Tensor, key: MixedLinear, value: MixedLinear, size: int) -> AttentionPrompt:
    """The prompt [1, length, hidden] through the base's own key and value projections, once, without positions."""
    hidden = prompt[0].float()

    def projected(layer: MixedLinear) -> Tensor:
        y = hidden @ dense_weight(layer).t()
        if layer.bias is not None:
            y = y + layer.bias.float()
        return y.view(y.shape[0], -1, size)

    return AttentionPrompt(gate=float(gate), keys=projected(key), values=projected(value))
