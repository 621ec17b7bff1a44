"""The base made ready to serve mixed batches: its linear layers wrapped, its attention replaced, its shapes probed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapterbay.base.load import LoadedBase, load_base, position_offset
from adapterbay.registry.errors import UnsupportedMethod
from adapterbay.server import attention
from adapterbay.server.attention import AttentionPlan, Segment
from adapterbay.server.config import ServerConfig
from adapterbay.server.kv import LayerShape
from adapterbay.server.layers import AdapterMix, MixedLinear, step_context
from adapterbay.server.packed import PackedLinear, can_pack

UNSTABLE_ROPE = ("dynamic", "longrope")
"""Rotary scalings whose frequencies depend on the longest row of the batch: one row would change another."""


@dataclass(slots=True)
class ServingModel:
    """A base whose forward takes a flattened step: ids [1, tokens], positions [1, tokens], no padding."""

    base: LoadedBase
    layers: dict[str, MixedLinear]  # by backbone-relative path
    cache_shapes: list[LayerShape]  # by layer index; empty for an encoder
    pooler: nn.Module | None  # an encoder's pooler, taken out so that it can run on the first tokens only
    offset: int  # what the base adds to a position

    @classmethod
    def load(cls, config: ServerConfig) -> ServingModel:
        """Loads, wraps and probes. Raises UnsupportedMethod for a base that this cannot serve exactly."""
        attention.register()
        base = load_base(
            config.base,
            quantize=config.quantize,
            dtype=config.dtype,
            device=config.device,
            max_length=config.max_length,
            attention=attention.NAME,
        )
        return cls.prepare(base)

    @classmethod
    def prepare(cls, base: LoadedBase) -> ServingModel:
        """Makes a loaded base ready. Its attention implementation must be `attention.NAME`."""
        rope = getattr(base.model.config, "rope_parameters", None) or {}
        if isinstance(rope, dict) and rope.get("rope_type") in UNSTABLE_ROPE:
            raise UnsupportedMethod(f"Rotary scaling {rope['rope_type']!r} is not served: it would mix rows.")
        backbone = base.backbone
        packs = base.info.quantization == "none" and can_pack(
            getattr(torch, base.info.dtype), torch.device(base.info.device)
        )
        layers = wrap_linears(backbone, packs=packs)
        if packs and base.info.kind == "causal-lm":
            pack_head(base)
        pooler = None
        if base.info.kind == "encoder" and getattr(backbone, "pooler", None) is not None:
            pooler = backbone.get_submodule("pooler") if base.has_pooler else None
            backbone.pooler = None  # type: ignore[assignment]
        model = cls(base, layers, [], pooler, position_offset(base.model.config))
        shapes = model._probe()
        model.cache_shapes = shapes if base.info.kind == "causal-lm" else []
        return model

    @property
    def dtype(self) -> torch.dtype:
        """What hidden states are computed in."""
        chosen: torch.dtype = getattr(torch, self.base.info.dtype)
        return chosen

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return torch.device(self.base.info.device)

    @property
    def causal(self) -> bool:
        """Whether the base generates."""
        return self.base.info.kind == "causal-lm"

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        mix: AdapterMix | None,
        plan: AttentionPlan,
        *,
        logits_at: Tensor | None,
        want_hidden: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Last hidden states [tokens, hidden] if wanted, and logits [len(logits_at), vocabulary] at those tokens."""
        arguments: dict[str, Any] = {
            "input_ids": ids[None],
            "position_ids": positions[None] + self.offset,
            "use_cache": False,
        }
        with self._step(mix, plan):
            if logits_at is None:
                return self.base.backbone(**arguments).last_hidden_state[0], None
            captured: list[Tensor] = []
            hook = (
                self.base.backbone.register_forward_hook(lambda _m, _a, out: captured.append(out.last_hidden_state))
                if want_hidden
                else None
            )
            try:
                logits = self.base.model(**arguments, logits_to_keep=logits_at).logits[0]
            finally:
                if hook is not None:
                    hook.remove()
        return (captured[0][0] if captured else None), logits

    def pool(self, first: Tensor, mix: AdapterMix | None) -> Tensor:
        """An encoder's pooler on the first tokens' states [rows, hidden]; `mix` has one token for each row."""
        if self.pooler is None:
            raise RuntimeError("this base has no pooler")
        step_context.mix = mix
        try:
            pooled: Tensor = self.pooler(first[:, None])
        finally:
            step_context.mix = None
        return pooled

    @contextmanager
    def _step(self, mix: AdapterMix | None, plan: AttentionPlan) -> Iterator[None]:
        step_context.mix, attention.current.plan = mix, plan
        try:
            yield
        finally:
            step_context.mix, attention.current.plan = None, None

    def _probe(self) -> list[LayerShape]:
        """Runs three tokens and notes what each attention layer caches."""
        found: list[tuple[int, LayerShape]] = []
        plan = AttentionPlan(causal=self.causal, segments=(Segment(0, 3, None),), probe=found)
        ids = torch.zeros(3, dtype=torch.long, device=self.device)
        with torch.inference_mode():
            self.forward(ids, torch.arange(3, device=self.device), None, plan, logits_at=None, want_hidden=True)
        shapes = dict(found)
        if not found:
            raise UnsupportedMethod(
                f"{type(self.base.model).__name__} does not use transformers' attention interface, so its rows cannot "
                "be kept apart in a mixed batch."
            )
        if self.causal and (len(shapes) != len(found) or sorted(shapes) != list(range(len(shapes)))):
            raise UnsupportedMethod(f"{type(self.base.model).__name__} does not number its attention layers.")
        return [shapes[layer] for layer in sorted(shapes)]


def pack_head(base: LoadedBase) -> None:
    """Packs the language-model head. A head that shares its weight with the embeddings is held twice from then on."""
    head = base.model.get_output_embeddings()  # type: ignore[operator]
    if type(head) is not nn.Linear:
        return
    base.model.set_output_embeddings(PackedLinear(head))  # type: ignore[operator]
    if base.model.config.tie_word_embeddings:  # type: ignore[union-attr]
        base.info = replace(base.info, bytes=base.info.bytes + head.weight.nbytes)


def wrap_linears(backbone: nn.Module, *, packs: bool) -> dict[str, MixedLinear]:
    """Puts a MixedLinear in the place of every linear layer (bitsandbytes' and GPT-2's Conv1D too); by path.

    `packs`: plain layers' weights go into oneDNN's layout, and out of their own.
    """
    wrapped: dict[str, MixedLinear] = {}
    for path, module in list(backbone.named_modules()):
        if isinstance(module, Conv1D):
            size = (module.nx, module.nf)
        elif isinstance(module, nn.Linear):
            size = (module.in_features, module.out_features)
        else:
            continue
        parent_path, _, name = path.rpartition(".")
        wrapped[path] = MixedLinear(PackedLinear(module) if packs and type(module) is nn.Linear else module, *size)
        setattr(backbone.get_submodule(parent_path), name, wrapped[path])
    return wrapped
