"""Prompts that only some tokens attend to, beside the keys and values of their row (LLaMA-Adapter)."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from adapterbay.server.adapters.forms import AttentionPrompt
from adapterbay.server.mix.plan import AdapterMix


class PromptStore:
    """Resident attention prompts, by layer and adapter."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._layers: dict[int, dict[str, AttentionPrompt]] = {}

    @property
    def used(self) -> bool:
        """Whether any adapter has one."""
        return any(self._layers.values())

    def changes(self, layer: int, keys: Collection[str]) -> bool:
        """Whether any of these adapters has a prompt at this layer."""
        return any(key in self._layers.get(layer, ()) for key in keys)

    def place(self, key: str, layer: int, prompt: AttentionPrompt) -> None:
        """Keeps one adapter's prompt at one attention layer, in float32."""
        there = AttentionPrompt(prompt.gate, prompt.keys.to(self._device), prompt.values.to(self._device))
        self._layers.setdefault(layer, {})[key] = there

    def remove(self, key: str) -> None:
        """Lets go of all that one adapter has."""
        for prompts in self._layers.values():
            prompts.pop(key, None)

    def add_to(self, out: Tensor, q: Tensor, mix: AdapterMix, layer: int, path: str) -> None:
        """Adds gate · softmax(q Kᵀ / √size) V to the rows of `out` [tokens, heads, size] whose adapter has a prompt
        here; the output projection, which is linear, follows. q [heads, tokens, size], as the base rotates it."""
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
            out[rows] += added.to(out.dtype)
