"""One decoder layer of the Llama family: norm, attention, norm, gated MLP, with rotary positions."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from adapterbay.server import attention
from adapterbay.server.attention import AttentionPlan, Scoring
from adapterbay.server.fast.ranks import Operands, RankGroups, RankPlans
from adapterbay.server.kernels import weights
from adapterbay.server.mix.attention import PromptStore
from adapterbay.server.mix.linear import MixedLinear
from adapterbay.server.mix.norm import MixedNorm

BLOCKS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}

_ops: Any = torch.ops.adapterbay


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of a step share. cos and sin are [tokens, head size]."""

    positions: Tensor
    cos: Tensor
    sin: Tensor
    plan: AttentionPlan


def differs(module: nn.Module) -> str:
    """Why a decoder layer is not one that this computes, judged by what it consists of; "" when it is."""
    if set(module._modules) != BLOCKS:
        return f"it consists of {', '.join(sorted(module._modules))}"
    attend, mlp = module.get_submodule("self_attn"), module.get_submodule("mlp")
    if set(attend._modules) not in (ATTENTION, ATTENTION | HEAD_NORMS):
        return f"its attention consists of {', '.join(sorted(attend._modules))}"
    if set(mlp._modules) != MLP or type(mlp.act_fn) is not type(ACT2FN["silu"]):
        return "its MLP is not gated by SiLU"
    linears = [attend.get_submodule(name) for name in sorted(ATTENTION)]
    linears += [mlp.get_submodule(name) for name in sorted(MLP - {"act_fn"})]
    if not all(isinstance(layer, MixedLinear) for layer in linears):
        return "its linear layers are not wrapped"
    norms = [module.get_submodule(name) for name in sorted(BLOCKS - {"self_attn", "mlp"})]
    norms += [attend.get_submodule(name) for name in sorted(HEAD_NORMS & set(attend._modules))]
    if not all(set(norm._parameters) == {"weight"} and hasattr(norm, "variance_epsilon") for norm in norms):
        return "its norms are no RMS norms"
    if len({norm.variance_epsilon for norm in norms}) != 1:
        return "its norms differ in their epsilon"
    if "position_ids" in inspect.signature(type(attend).forward).parameters:
        return "its attention takes positions beside the rotation"
    size = int(attend.head_dim)  # type: ignore[arg-type]
    if any(cast(MixedLinear, attend.get_submodule(name)).out_features % size for name in ("q_proj", "k_proj")):
        return "its heads are of another size"
    return ""


class FastLayer:
    """The fused computation of one decoder layer. Takes over the weights of the layer's linear layers, which become
    pieces of the fused ones, so that nothing is held twice."""

    def __init__(self, module: nn.Module, index: int, scoring: Scoring, dtype: torch.dtype) -> None:
        """Raises ValueError, and then nothing was changed, for weights of a kind that cannot be joined."""
        self.module = module
        self.index = index
        self._scoring = scoring
        attend, mlp = module.get_submodule("self_attn"), module.get_submodule("mlp")

        def wrapped(owner: nn.Module, *names: str) -> list[MixedLinear]:
            return [cast(MixedLinear, owner.get_submodule(name)) for name in names]

        groups = (
            wrapped(attend, "q_proj", "k_proj", "v_proj"),
            wrapped(attend, "o_proj"),
            wrapped(mlp, "gate_proj", "up_proj"),
            wrapped(mlp, "down_proj"),
        )
        joined = [weights.together([layer.base_layer for layer in group]) for group in groups]
        self._was = [layer.base_layer for group in groups for layer in group]
        self._layers = [layer for group in groups for layer in group]
        for group, (_, _, pieces) in zip(groups, joined, strict=True):
            for layer, piece in zip(group, pieces, strict=True):
                layer.base_layer = piece
        self._qkv, self._o, self._gate_up, self._down = [(weight, bias) for weight, bias, _ in joined]
        self._ranks = RankGroups(groups, dtype)
        self._heads, self._kv_heads = (
            groups[0][0].out_features // int(attend.head_dim),  # type: ignore[arg-type]
            groups[0][1].out_features // int(attend.head_dim),  # type: ignore[arg-type]
        )
        self._size = int(attend.head_dim)  # type: ignore[arg-type]
        self._norm_places = [(module, "input_layernorm"), (module, "post_attention_layernorm")]
        self._norm_places += [(attend, name) for name in sorted(HEAD_NORMS) if name in attend._modules]
        self._norms = [owner.get_submodule(name) for owner, name in self._norm_places]
        self._eps = float(self._norms[0].variance_epsilon)  # type: ignore[arg-type]
        head_norms = {name: owner.get_submodule(name).weight for owner, name in self._norm_places[2:]}
        self._q_norm, self._k_norm = cast(Any, head_norms.get("q_norm")), cast(Any, head_norms.get("k_norm"))
        self._weights = [cast(Tensor, norm.weight) for norm in self._norms[:2]]

    @property
    def int8(self) -> bool:
        """Whether any of its products has inputs of eight bits."""
        return any(weight.dtype is torch.uint8 for weight, _ in (self._qkv, self._o, self._gate_up, self._down))

    def keep(self) -> None:
        """The weights as they were are let go of."""
        self._was = []

    def undo(self) -> None:
        """The layer is as it was before."""
        for layer, was in zip(self._layers, self._was, strict=True):
            layer.base_layer = was

    def operands(self, ranks: RankPlans | None, prompts: PromptStore | None) -> Operands | None:
        """What the tokens of a step use of the adapters; None when the base's own modules must compute this layer.

        Valid for as long as nothing is placed or removed.
        """
        if ranks is not None:
            for (owner, name), norm in zip(self._norm_places, self._norms, strict=True):
                there = owner._modules[name]
                if there is not norm and not (isinstance(there, MixedNorm) and not there.changes(ranks.keys)):
                    return None
            if prompts is not None and prompts.changes(self.index, ranks.keys):
                return None
        return self._ranks.operands(ranks)

    def forward(self, hidden: Tensor, step: Step, operands: Operands | None) -> None:
        """Changes `hidden` [tokens, hidden] in place."""
        if operands is None:
            hidden.copy_(generic(self.module, hidden, step))
            return
        qkv_ranks, o_ranks, gate_up_ranks, down_ranks = operands
        plan = step.plan
        keys = values = None
        if plan.pool is not None:
            keys, values = plan.pool.keys[self.index], plan.pool.values[self.index]
        writes = (keys, values) if plan.write_slots is not None else (None, None)
        qkv = _ops.llama_in(
            hidden, self._weights[0], self._eps, *self._qkv, qkv_ranks, step.cos, step.sin, self._heads,
            self._kv_heads, self._q_norm, self._k_norm, *writes, plan.write_slots, plan.write_tokens,
        )  # fmt: skip
        context = self._attend(qkv, plan, keys, values)
        _ops.llama_out(
            hidden, context, *self._o, o_ranks, self._weights[1], self._eps, *self._gate_up, gate_up_ranks,
            *self._down, down_ranks,
        )  # fmt: skip

    def _attend(self, qkv: Tensor, plan: AttentionPlan, keys: Tensor | None, values: Tensor | None) -> Tensor:
        """[tokens, heads · size]."""
        context: Tensor | None = None
        scoring = self._scoring
        if plan.decode_rows:
            context = _ops.decode_context(
                qkv, self._heads, keys, values, plan.block_table, plan.lengths, scoring.scale, scoring.window or 0,
                scoring.softcap or 0.0,
            )  # fmt: skip
            if not plan.segments:
                return cast(Tensor, context)
        tokens = qkv.shape[0]
        whole = qkv.new_empty(tokens, self._heads, self._size)
        if context is not None:
            whole[: plan.decode_rows] = context.view(-1, self._heads, self._size)
        split = [self._heads, self._kv_heads, self._kv_heads]
        q, k, v = qkv.view(tokens, -1, self._size).transpose(0, 1).split(split)  # type: ignore[no-untyped-call]
        attention.prefill(plan, self.index, q, k, v, scoring, whole)
        return whole.view(tokens, -1)


def generic(module: nn.Module, hidden: Tensor, step: Step) -> Tensor:
    """The layer by the base's own modules: `hidden` [tokens, hidden] to the same shape, a new tensor."""
    out = module(
        hidden[None].clone(),
        attention_mask=None,
        position_ids=step.positions[None],
        position_embeddings=(step.cos[None], step.sin[None]),
        use_cache=False,
    )
    return cast(Tensor, (out[0] if isinstance(out, tuple) else out)[0])
