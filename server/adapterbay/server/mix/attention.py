"""Prompts that only some tokens attend to, beside the keys and values of their row (LLaMA-Adapter)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adapterbay.server.adapters.forms import AttentionPrompt
from adapterbay.server.mix.context import step_context
from adapterbay.server.mix.plan import AdapterMix


class PromptStore:
    """Resident attention prompts, by layer and adapter."""

    def __init__(self, device: torch.device, backbone: nn.Module) -> None:
        self._device = device
        self._backbone = backbone
        self._layers: dict[int, dict[str, AttentionPrompt]] = {}
        self._hooks: dict[int, RemovableHandle] = {}  # of modules behind which something is added

    @property
    def used(self) -> bool:
        """Whether any adapter has one."""
        return any(self._layers.values())

    def changes(self, layer: int, keys: Collection[str]) -> bool:
        """Whether any of these adapters has a prompt at this layer."""
        return any(key in self._layers.get(layer, ()) for key in keys)

    def place(self, key: str, layer: int, prompt: AttentionPrompt) -> None:
        """Keeps one adapter's prompt at one attention layer, in float32."""
        there = replace(prompt, keys=prompt.keys.to(self._device), values=prompt.values.to(self._device))
        self._layers.setdefault(layer, {})[key] = there
        if prompt.behind is not None and layer not in self._hooks:
            module = self._backbone.get_submodule(prompt.behind)
            self._hooks[layer] = module.register_forward_hook(_add_behind)

    def remove(self, key: str) -> None:
        """Lets go of all that one adapter has."""
        for layer, prompts in self._layers.items():
            prompts.pop(key, None)
            if not prompts and layer in self._hooks:
                self._hooks.pop(layer).remove()

    def add_to(self, out: Tensor, q: Tensor, mix: AdapterMix, layer: int, path: str) -> None:
        """Adds gate · softmax(q Kᵀ / √size) V to the rows of `out` [tokens, heads, size] whose adapter has a prompt
        here; the output projection, which is linear, follows. For a prompt with `behind` it goes to
        `step_context.behind` instead. q [heads, tokens, size], as the base rotates it."""
        step_context.behind = None
        prompts = self._layers.get(layer)
        if not prompts:
            return
        for piece in mix.pieces(prompts, path):
            prompt = prompts[piece.key]
            rows = slice(piece.start, piece.stop)
            groups = q.shape[0] // prompt.keys.shape[1]
            keys = prompt.keys.repeat_interleave(groups, 1)
            values = prompt.values.repeat_interleave(groups, 1)
            scores = torch.einsum("htd,lhd->htl", q[:, rows].float(), keys) * q.shape[-1] ** -0.5
            added = torch.einsum("htl,lhd->thd", scores.softmax(-1), values) * (prompt.gate * piece.weight)
            if prompt.behind is None:
                out[rows] += added.to(out.dtype)
                continue
            if step_context.behind is None:
                step_context.behind = added.new_zeros(out.shape[0], out.shape[1] * out.shape[2])
            step_context.behind[rows] += added.flatten(1)


def _add_behind(_module: nn.Module, _inputs: tuple[Any, ...], output: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward hook of an attention module, whose first output is [1, tokens, hidden]."""
    behind, step_context.behind = step_context.behind, None
    if behind is None:
        return output
    states: Tensor = output[0]
    return ((states + behind.to(states.dtype)).view_as(states), *output[1:])
