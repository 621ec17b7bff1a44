"""The base made ready to serve mixed batches: its linear layers wrapped, its attention replaced, its shapes probed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from adapterbay.base.load import (
    LoadedBase,
    Quantization,
    by_kernels,
    load_base,
    pick_device,
    pick_dtype,
    pick_quantization,
    position_offset,
)
from adapterbay.registry import Admission
from adapterbay.registry.errors import UnsupportedMethod
from adapterbay.server import attention
from adapterbay.server.adapters.forms import LM_HEAD
from adapterbay.server.attention import AttentionPlan
from adapterbay.server.config import ServerConfig
from adapterbay.server.fast.path import FastPath
from adapterbay.server.fewer_bits import by_our_kernels, quantize, quantize_head
from adapterbay.server.kernels.loader import OFF, Compile, Kernels
from adapterbay.server.kernels.loader import load as load_kernels
from adapterbay.server.kv import LayerShape
from adapterbay.server.mix.context import step_context
from adapterbay.server.mix.plan import AdapterMix
from adapterbay.server.mix.sites import Sites
from adapterbay.server.packed import PackedLinear, can_pack
from adapterbay.server.probe import probe
from adapterbay.server.seq2seq import Seq2Seq

log = logging.getLogger(__name__)

UNSTABLE_ROPE = ("dynamic", "longrope")
"""Rotary scalings whose frequencies depend on the longest row of the batch: one row would change another."""


@dataclass(slots=True)
class ServingModel:
    """A base whose forward takes a flattened step: ids [1, tokens], positions [1, tokens], no padding."""

    base: LoadedBase
    sites: Sites  # every place that an adapter can change
    attention_shapes: list[LayerShape]  # by layer index
    pooler: nn.Module | None  # an encoder's pooler, taken out so that it can run on the first tokens only
    offset: int  # what the base adds to a position
    padding: int | None = None  # the base's padding token, which may stand in a text
    seq2seq: Seq2Seq | None = None  # an encoder-decoder's two stacks
    admission: Admission = field(init=False)
    kernels: Kernels = OFF
    fast: FastPath | None = None  # where the kernels serve the whole base

    def __post_init__(self) -> None:
        self.admission = Admission(self.base.files.tensor_shapes(), self.base.files.config)

    @classmethod
    def load(cls, config: ServerConfig) -> ServingModel:
        """Loads, wraps and probes. Raises UnsupportedMethod for a base that this cannot serve exactly, and what
        `by_our_kernels` raises."""
        attention.register()
        device = pick_device(config.device)
        quantization = pick_quantization(config.quantize, device)
        own = quantization if by_kernels(quantization, device) else None
        dtype = pick_dtype(config.dtype, device)
        compiled = own is not None and by_our_kernels(own, dtype, config.compile)
        base = load_base(
            config.base,
            quantize="none" if own else quantization,
            dtype=config.dtype,
            device=config.device,
            max_length=config.max_length,
            attention=attention.NAME,
        )
        model = cls.prepare(base, own, compiled=compiled)
        model.accelerate(config.compile)
        return model

    @classmethod
    def prepare(cls, base: LoadedBase, own: Quantization | None = None, *, compiled: bool = False) -> ServingModel:
        """Makes a loaded base ready. Its attention implementation must be `attention.NAME`. `own`: in how many
        bits of our own it is to be held, if it is; `compiled`: the kernels compute that."""
        _refuse_unstable_rope(base.model.config)
        backbone = base.backbone
        packs = base.info.quantization == "none" and can_pack(
            getattr(torch, base.info.dtype), torch.device(base.info.device)
        )
        wrap = Seq2Seq.wrap if base.info.kind == "encoder-decoder" else Sites.wrap
        sites = wrap(backbone, getattr(torch, base.info.dtype), torch.device(base.info.device), packs=packs and not own)
        if own is not None:
            quantize(base, sites, own, compiled=compiled)
        if base.info.kind != "encoder":
            wrap_head(base, sites, packs=packs)
            if own is not None:
                quantize_head(base, sites.linears[LM_HEAD], compiled=compiled)
        pooler = None
        if base.info.kind == "encoder" and getattr(backbone, "pooler", None) is not None:
            pooler = backbone.get_submodule("pooler") if base.has_pooler else None
            backbone.pooler = None  # type: ignore[assignment]
        config = base.model.config
        model = cls(base, sites, [], pooler, position_offset(config), _padding(config))
        if base.info.kind == "encoder-decoder":
            model.seq2seq = Seq2Seq(base)
            model.attention_shapes = model.seq2seq.shapes
        else:
            model.attention_shapes = probe(model)
        return model

    def accelerate(self, mode: Compile) -> None:
        """Loads the kernels, and fuses the base if it is of a kind that they compute. Raises Unavailable if `mode` is
        on and there are none."""
        if self.device.type != "cpu" and mode == "auto":
            return
        self.kernels = load_kernels(mode)
        if self.kernels.loaded:
            built = FastPath.build(self)
            if isinstance(built, FastPath):
                self.fast = built
            else:
                log.info("the base is computed by its own modules: %s", built.reason)

    @property
    def cache_shapes(self) -> list[LayerShape]:
        """What each layer caches, by layer index; empty for an encoder."""
        return self.attention_shapes if self.causal else []

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
        return self.base.info.kind != "encoder"

    @property
    def _called(self) -> nn.Module:
        """What the whole model calls for its hidden states: its backbone. OPT's calls what is in there."""
        inside = "decoder" if getattr(self.base.model.config, "model_type", None) == "opt" else ""
        return self.base.backbone.get_submodule(inside)

    @property
    def head_used(self) -> bool:
        """Whether a resident adapter changes the language-model head."""
        head = self.sites.linears.get(LM_HEAD)
        return head is not None and head.site is not None and head.site.used

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
        if self.seq2seq is not None:
            return self.seq2seq.decode(ids, mix, plan, logits_at, head_used=self.head_used)
        arguments: dict[str, Any] = {
            "input_ids": ids[None],
            "position_ids": positions[None] + self.offset,
            "use_cache": False,
        }
        with self._step(mix, plan):
            if self.fast is not None:
                step_context.kept = self._kept(mix, logits_at)
                return self.fast.forward(ids, positions, mix, plan, logits_at=logits_at, want_hidden=want_hidden)
            if logits_at is None:
                return self.base.backbone(**arguments).last_hidden_state[0], None
            captured: list[Tensor] = []
            hook = (
                self._called.register_forward_hook(lambda _m, _a, out: captured.append(out.last_hidden_state))
                if want_hidden
                else None
            )
            step_context.kept = self._kept(mix, logits_at)
            try:
                logits = self.base.model(**arguments, logits_to_keep=logits_at).logits[0]
            finally:
                if hook is not None:
                    hook.remove()
        return (captured[0][0] if captured else None), logits

    def _kept(self, mix: AdapterMix | None, logits_at: Tensor | None) -> tuple[int, ...] | None:
        return tuple(logits_at.tolist()) if logits_at is not None and mix is not None and self.head_used else None

    def pool(self, first: Tensor, mix: AdapterMix | None) -> Tensor:
        """An encoder's pooler on the first tokens' states [rows, hidden]; `mix` has one token for each row."""
        if self.pooler is None:
            raise RuntimeError("this base has no pooler")
        step_context.mix = mix
        try:
            pooled: Tensor = self.pooler(first[:, None])
            if pooled.dim() == 3:  # ALBERT's is one linear layer, with the activation beside it
                pooled = self.base.backbone.pooler_activation(pooled[:, 0])  # type: ignore[operator]
        finally:
            step_context.mix = None
        return pooled

    @contextmanager
    def _step(self, mix: AdapterMix | None, plan: AttentionPlan) -> Iterator[None]:
        step_context.mix, attention.current.plan = mix, plan
        step_context.prompts = self.sites.prompts
        try:
            yield
        finally:
            step_context.mix, attention.current.plan = None, None
            step_context.kept = step_context.prompts = step_context.behind = None


def _padding(config: Any) -> int | None:
    """As transformers' heads find it."""
    found: int | None = getattr(config.get_text_config(), "pad_token_id", None)
    return found


def _refuse_unstable_rope(config: Any) -> None:
    """Models whose layers differ (Gemma 3) have one dictionary for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):
        if isinstance(parameters, dict) and parameters.get("rope_type") in UNSTABLE_ROPE:
            raise UnsupportedMethod(f"Rotary scaling {parameters['rope_type']!r} is not served: it would mix rows.")


def wrap_head(base: LoadedBase, sites: Sites, *, packs: bool) -> None:
    """Wraps the language-model head, in oneDNN's layout if `packs`. A head that shares its weight with the embeddings
    is then held twice."""
    head = base.model.get_output_embeddings()  # type: ignore[operator]
    name = next(path for path, module in base.model.named_modules() if module is head)
    if packs and type(head) is nn.Linear:
        if base.model.config.tie_word_embeddings:  # type: ignore[union-attr]
            base.info = replace(base.info, bytes=base.info.bytes + head.weight.nbytes)
        head = PackedLinear(head)
    base.model.set_output_embeddings(sites.wrap_head(head, name))  # type: ignore[operator]
