"""Encoder-decoders (T5): a row's text goes through the encoder once, its answer grows in the decoder.

transformers' T5 keeps no rows apart: it makes one bias for the whole flattened step and computes the keys of the
encoder's states anew at every step. So each of its attention modules gets another `forward`, over the same weights. The
decoder's keys and values of a row's text lie in blocks of the same pool as those of its answer, `Row.source_blocks`:
both have the same shape, so a block is as good for the one as for the other.

The bias on scores is T5's (Raffel et al. 2020, arXiv:1910.10683, section 2.1): a table over buckets of distances, the
same for all layers of a stack.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adapterbay.base.load import LoadedBase
from adapterbay.registry.errors import UnsupportedMethod
from adapterbay.server import attention
from adapterbay.server.attention import AttentionPlan
from adapterbay.server.kv import BlockPool, LayerShape
from adapterbay.server.mix.axes import FLAT
from adapterbay.server.mix.context import step_context
from adapterbay.server.mix.plan import AdapterMix
from adapterbay.server.mix.sites import Sites


class RelativeBias:
    """The bias of one stack, read from the first layer's table."""

    def __init__(self, first: Any) -> None:
        self._table: nn.Embedding = first.relative_attention_bias
        self._bucket = type(first)._relative_position_bucket
        self._both_ways = not first.is_decoder
        self._buckets: int = first.relative_attention_num_buckets
        self._far: int = first.relative_attention_max_distance

    def __call__(self, key_at: Tensor, query_at: Tensor) -> Tensor:
        """For positions that broadcast to [..., queries, keys]: [..., heads, queries, keys]."""
        buckets = self._bucket(
            key_at - query_at, bidirectional=self._both_ways, num_buckets=self._buckets, max_distance=self._far
        )
        bias: Tensor = self._table(buckets)
        return bias.movedim(-1, -3)


class Seq2Seq:
    """The two stacks of a T5 whose linear layers are wrapped. Inputs are flattened, as everywhere."""

    def __init__(self, base: LoadedBase) -> None:
        model: Any = base.model
        self._encoder, self._decoder, self._model = model.encoder, model.decoder, model
        for stack in (self._encoder, self._decoder):
            relative = RelativeBias(stack.block[0].layer[0].SelfAttention)
            for block in stack.block:
                _replace(block.layer[0].SelfAttention, _attend_to_own, relative)
        self._cross = [block.layer[1].EncDecAttention for block in self._decoder.block]
        for module in self._cross:
            _replace(module, _attend_to_source, None)
        self.start_token: int = _start_token(base)
        heads, size = self._cross[0].n_heads, self._cross[0].key_value_proj_dim
        self.shapes = [LayerShape(heads, size, size) for _ in self._cross]

    @staticmethod
    def wrap(backbone: nn.Module, dtype: torch.dtype, device: torch.device, *, packs: bool) -> Sites:
        """The places that adapters can change. The head is none of the backbone's layers, though it lies there; the
        input embedding lies in three places."""
        model: Any = backbone
        head, model.lm_head = model.lm_head, None
        sites = Sites.wrap(model, dtype, device, packs=packs)
        model.lm_head = head
        model.set_input_embeddings(model.shared)
        sites.token_axes = dict.fromkeys(sites.norms, FLAT)
        return sites

    def encode(
        self, ids: Tensor, mix: AdapterMix | None, plan: AttentionPlan, virtual: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """The encoder's states [tokens, hidden] of texts. `virtual`: see `StepContext`."""
        with _step(mix, plan):
            step_context.virtual = virtual
            states: Tensor = self._encoder(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        return states

    def remember(self, states: Tensor, mix: AdapterMix | None, slots: Tensor, pool: BlockPool) -> None:
        """Writes what the decoder's layers will look at. `states` [tokens, hidden] to `slots` [tokens]."""
        with _step(mix, None):
            for layer, module in enumerate(self._cross):
                shape = (states.shape[0], module.n_heads, module.key_value_proj_dim)
                pool.keys[layer].index_copy_(0, slots, module.k(states).view(shape))
                pool.values[layer].index_copy_(0, slots, module.v(states).view(shape))

    def decode(
        self, ids: Tensor, mix: AdapterMix | None, plan: AttentionPlan, logits_at: Tensor | None, *, head_used: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The decoder's states [tokens, hidden], and logits [len(logits_at), vocabulary] at those tokens."""
        config, logits = self._model.config, None
        with _step(mix, plan):
            # That there are encoder states makes T5 call its cross-attention; ours reads them from the cache.
            nothing = self._model.shared.weight.new_empty(1, 0, config.d_model)
            output = self._decoder(input_ids=ids[None], encoder_hidden_states=nothing, use_cache=False)
            states: Tensor = output.last_hidden_state[0]
            if logits_at is not None:
                drawn = states[logits_at]
                if config.scale_decoder_outputs:
                    drawn = drawn * config.d_model**-0.5
                step_context.kept = tuple(logits_at.tolist()) if mix is not None and head_used else None
                logits = self._model.lm_head(drawn)
        return states, logits


@contextmanager
def _step(mix: AdapterMix | None, plan: AttentionPlan | None) -> Iterator[None]:
    step_context.mix, attention.current.plan = mix, plan
    try:
        yield
    finally:
        step_context.mix, step_context.kept, attention.current.plan = None, None, None
        step_context.virtual = None


def _start_token(base: LoadedBase) -> int:
    for source in (base.model.config, getattr(base.model, "generation_config", None)):
        found = getattr(source, "decoder_start_token_id", None)
        if isinstance(found, int):
            return found
    raise UnsupportedMethod("The base's config has no decoder_start_token_id, with which every answer begins.")


def _replace(module: Any, forward: Any, relative: RelativeBias | None) -> None:
    module.relative = relative
    module.forward = types.MethodType(forward, module)


def _heads(module: Any, states: Tensor) -> Tensor:
    """[1, tokens, heads · size] to [1, heads, tokens, size]."""
    return states.view(1, states.shape[1], module.n_heads, module.key_value_proj_dim).transpose(1, 2)


def _attend_to_own(module: Any, hidden_states: Tensor, **_others: Any) -> tuple[Tensor, None, None]:
    """Self-attention of either stack, in the place of T5Attention.forward; T5 does not scale its scores."""
    q, k, v = (_heads(module, layer(hidden_states)) for layer in (module.q, module.k, module.v))
    attended, _ = attention.attend(module, q, k, v, None, scaling=1.0, relative=module.relative)
    return module.o(attended.flatten(2)), None, None


def _attend_to_source(module: Any, hidden_states: Tensor, **_others: Any) -> tuple[Tensor, None, None]:
    """Cross-attention: keys and values lie in the cache."""
    plan: AttentionPlan | None = attention.current.plan
    assert plan is not None
    q = _heads(module, module.q(hidden_states))
    attention.current.plan = plan.sources
    try:
        attended, _ = attention.attend(module, q, q, q, None, scaling=1.0)
    finally:
        attention.current.plan = plan
    return module.o(attended.flatten(2)), None, None
