"""The whole base by fused layers: built once at load, checked against the base's own modules, then used for every step.

A base is taken for what its modules are, not for its name, and every layer's output is compared with that of the
modules it stands for. What does not agree is computed by the modules.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from adapterbay.server import attention
from adapterbay.server.adapters.forms import LM_HEAD
from adapterbay.server.attention import AttentionPlan, Scoring, Segment
from adapterbay.server.fast.layer import FastLayer, Step, differs, generic
from adapterbay.server.fast.ranks import Operands, RankPlans
from adapterbay.server.kernels import ops, weights
from adapterbay.server.mix.linear import MixedLinear
from adapterbay.server.mix.plan import AdapterMix
from adapterbay.server.packed import PackedLinear

if TYPE_CHECKING:
    from adapterbay.server.model import ServingModel

PARTS = {"embed_tokens", "layers", "norm", "rotary_emb"}
WATCHED = "adapterbay-watched"
CHECK_TOKENS = 5
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""How far a fused layer may be from its modules: the norm of the difference over the norm of the layer's change."""
INT8_TOLERANCE = 6e-2
"""With int8 inputs: another rounding before a product can move an input by a step."""
AROUND_TOLERANCE = 1e-3
"""Of the norm of the logits. Both sides run the same modules, so what is the same is equal to the last bit."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Unfit:
    """Why a base has no fused path."""

    reason: str


class FastPath:
    """Stands behind `ServingModel.forward` for a causal base that is built like Llama."""

    def __init__(self, model: ServingModel, layers: list[FastLayer | nn.Module]) -> None:
        self._model = model
        self._backbone: Any = model.base.backbone
        self.layers = layers
        self._norm = self._backbone.norm
        self._plans: RankPlans | None = None
        self._version = -1
        self._operands: list[Operands | None] = []

    @property
    def fused(self) -> int:
        """How many layers are fused."""
        return sum(isinstance(layer, FastLayer) for layer in self.layers)

    @classmethod
    @torch.inference_mode()
    def build(cls, model: ServingModel) -> FastPath | Unfit:
        """Takes over the weights of a base's layers; the kernels are loaded. A base that does not fit is unchanged."""
        unfit = _unfit(model) or _around_layers(model)
        if unfit:
            return Unfit(unfit)
        backbone: Any = model.base.backbone
        layers: list[FastLayer | nn.Module] = []
        for index, module in enumerate(backbone.layers):
            layers.append(_fuse(model, module, index) or module)
        path = cls(model, layers)
        if not path.fused:
            return Unfit("no layer could be fused")
        _pack_head(model)
        return path

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
        """As `ServingModel.forward`, within its context of the step."""
        hidden: Tensor = self._backbone.embed_tokens(ids[None])[0].contiguous()
        step = _step(self._backbone, hidden, positions, plan)
        for layer, operands in zip(self.layers, self._operands_of(mix), strict=True):
            if isinstance(layer, FastLayer):
                layer.forward(hidden, step, operands)
            else:
                hidden = generic(layer, hidden, step)
        if logits_at is None:
            return self._normed(hidden), None
        if want_hidden:
            hidden = self._normed(hidden)
            chosen = hidden[logits_at]
        elif self._backbone.norm is self._norm:
            chosen = self._normed(hidden[logits_at])
        else:
            chosen = self._normed(hidden)[logits_at]
        logits: Tensor = self._model.base.model.get_output_embeddings()(chosen[None])[0]  # type: ignore[operator]
        return (hidden if want_hidden else None), logits

    def _normed(self, hidden: Tensor) -> Tensor:
        if self._backbone.norm is self._norm:
            return ops.add_rms_norm(hidden, None, self._norm.weight, self._norm.variance_epsilon)
        return cast(Tensor, self._backbone.norm(hidden[None])[0])

    def forget(self) -> None:
        """Lets go of what is kept between steps: it refers to the pools."""
        self._plans, self._operands = None, []

    def _operands_of(self, mix: AdapterMix | None) -> list[Operands | None]:
        """By layer; kept while the mix and what is resident stay the same. A mix says what all layers use together."""
        plans = self._plans
        sites = self._model.sites
        if not self._operands or self._version != sites.version or (plans and plans.mix) is not mix:
            plans = self._plans = None if mix is None else RankPlans(mix)
            self._operands = [
                layer.operands(plans, sites.prompts) if isinstance(layer, FastLayer) else None for layer in self.layers
            ]
            self._version = sites.version
        return self._operands


def _unfit(model: ServingModel) -> str:
    backbone = model.base.backbone
    if model.base.info.kind != "causal-lm" or model.device.type != "cpu":
        return "only causal bases on a CPU have one"
    if model.dtype not in TOLERANCE:
        return f"the kernels do not compute in {model.base.info.dtype}"
    if set(backbone._modules) != PARTS or model.offset:
        return f"the base consists of {', '.join(sorted(backbone._modules))}"
    if len(model.base.model._modules) != 2:
        return "there is more than a backbone and a head"
    norm = backbone.get_submodule("norm")
    if set(norm._parameters) != {"weight"} or not hasattr(norm, "variance_epsilon"):
        return "the last norm is no RMS norm"
    layers = backbone.get_submodule("layers")
    if len(layers) != len(model.attention_shapes):  # type: ignore[arg-type]
        return "its layers are not all attention layers"
    return next((reason for layer in layers.children() if (reason := differs(layer))), "")


def _around_layers(model: ServingModel) -> str:
    """Why a base is more than its parts one after another, "" when it is not: Granite multiplies its embeddings and
    divides its logits, which stands in no module. Judged by the logits of random tokens."""
    backbone: Any = model.base.backbone
    generator = torch.Generator().manual_seed(CHECK_TOKENS)
    ids = torch.randint(model.base.info.vocabulary_size, (CHECK_TOKENS,), generator=generator)
    positions = torch.arange(CHECK_TOKENS)
    plan = AttentionPlan(causal=True, segments=(Segment(0, CHECK_TOKENS, None),))
    _, whole = model.forward(ids, positions, None, plan, logits_at=positions, want_hidden=False)
    attention.current.plan = plan
    try:
        hidden: Tensor = backbone.embed_tokens(ids[None])[0]
        step = _step(backbone, hidden, positions, plan)
        for module in backbone.layers:
            hidden = generic(module, hidden, step)
        parts = model.base.model.get_output_embeddings()(backbone.norm(hidden[None]))[0]  # type: ignore[operator]
    finally:
        attention.current.plan = None
    assert whole is not None
    distance = float((parts.float() - whole.float()).norm() / whole.float().norm())
    if distance <= AROUND_TOLERANCE:
        return ""
    return f"it computes something around its layers: by them alone its logits would differ by {distance:.3g}"


def _fuse(model: ServingModel, module: nn.Module, index: int) -> FastLayer | None:
    """One layer fused and checked; None, and the layer as it was, when it does not compute the same."""
    backbone = model.base.backbone
    generator = torch.Generator().manual_seed(index)
    hidden = torch.randn(CHECK_TOKENS, model.base.info.hidden_size, generator=generator).to(model.dtype)
    plan = AttentionPlan(causal=True, segments=(Segment(0, CHECK_TOKENS, None),))
    step = _step(backbone, hidden, torch.arange(CHECK_TOKENS), plan)
    size = int(module.get_submodule("self_attn").head_dim)  # type: ignore[arg-type]
    if step.cos.dtype is not model.dtype or step.cos.shape[1] != size:
        what = f"{str(step.cos.dtype).removeprefix('torch.')} over {step.cos.shape[1]} of {size} features of a head"
        log.info("layer %d is not fused: its rotation is %s", index, what)
        return None
    attention.current.plan = plan
    try:
        with _watched(model.base.model.config) as seen:
            expected = generic(module, hidden, step).float()
        if len(seen) != 1 or seen[0].relative is not None:
            return None
        try:
            layer = FastLayer(module, index, seen[0], model.dtype)
        except ValueError as reason:
            log.info("layer %d is not fused: %s", index, reason)
            return None
        got = hidden.clone()
        plan.kernels = True
        layer.forward(got, step, layer.operands(None, None))
    finally:
        attention.current.plan = None
    distance = float((got.float() - expected).norm() / (expected - hidden.float()).norm())
    limit = INT8_TOLERANCE if layer.int8 else TOLERANCE[model.dtype]
    if not distance <= limit:
        layer.undo()
        log.warning("layer %d is not fused: it would differ by %.3g of what it changes", index, distance)
        return None
    layer.keep()
    return layer


def _step(backbone: Any, hidden: Tensor, positions: Tensor, plan: AttentionPlan) -> Step:
    cos, sin = backbone.rotary_emb(hidden[None], position_ids=positions[None])
    return Step(positions, cos[0].contiguous(), sin[0].contiguous(), plan)


@contextmanager
def _watched(config: Any) -> Iterator[list[Scoring]]:
    """A context in which it is noted how attention is called."""
    from transformers import AttentionInterface

    seen: list[Scoring] = []

    def watch(module: nn.Module, query: Tensor, *arguments: Any, **settings: Any) -> tuple[Tensor, None]:
        scale = settings.get("scaling")
        seen.append(
            Scoring(
                query.shape[-1] ** -0.5 if scale is None else float(scale),
                settings.get("sliding_window"),
                settings.get("softcap"),
                settings.get("relative"),
            )
        )
        return attention.attend(module, query, *arguments, **settings)

    AttentionInterface.register(WATCHED, watch)
    was, config._attn_implementation = config._attn_implementation, WATCHED
    try:
        yield seen
    finally:
        config._attn_implementation = was


def _pack_head(model: ServingModel) -> None:
    """The language-model head in the kernels' layout, out of oneDNN's."""
    head: MixedLinear | None = model.sites.linears.get(LM_HEAD)
    if head is None or type(head.base_layer) is not PackedLinear:
        return
    stored = head.base_layer.dense()
    if weights.can_pack(stored):
        head.base_layer = weights.KernelLinear(weights.pack(stored), head.base_layer.bias)
