"""What an adapter becomes in memory so that it can run beside others in one batch. Data only; `build` makes it.

Nearly every method of PEFT changes a linear layer into another linear layer, so that one formula serves them all:

    y = T(s_out ⊙ W(R(s_in ⊙ x))) + scaling · B(A x) + D x + b

LoRA and its kin fill A and B; DoRA adds s_out; IA³ is s_in or s_out; OFT is R, RoAd is T; what is neither low-rank
nor a rotation is D; BitFit is b. What is not a linear layer is replaced whole (norms, embeddings) or added
to the tokens (virtual tokens). Paths are relative to the backbone, `layers.0.self_attn.q_proj`, whatever model class
the adapter was trained in; the language-model head, which is no part of the backbone, is LM_HEAD.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from adapterbay.registry import Manifest
from adapterbay.server.heads import Head

LM_HEAD: Final = "lm_head"
"""The path of the language-model head, however the architecture calls it."""


def lasting_key(key: str) -> str:
    """Under which key the part of an activated adapter lies that is on from the first token."""
    return f"{key}/lasting"


@dataclass(frozen=True, slots=True)
class LowRank:
    """scaling · B A, as stored: a [rank, in], b [rank, out] (Bᵀ). Placing it on the device casts and copies."""

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """How many rank rows it has."""
        return int(self.a.shape[0])

    @property
    def has_effect(self) -> bool:
        """Whether neither factor is zero."""
        return bool(self.scaling) and bool(self.a.any()) and bool(self.b.any())


@dataclass(frozen=True, slots=True)
class Turn:
    """A rotation of pairs of outputs: output i gains values[i] · y[partner[i]]. values [out], partner [out] long."""

    values: Tensor
    partner: Tensor


@dataclass(frozen=True, slots=True)
class LinearForm:
    """What an adapter does to one linear layer; None is "nothing".

    `in_scale` [in] and `out_scale` [out] multiply the base layer's input and its output, the base's own bias included:
    who makes a form puts what is wrong with that into `bias` [out]. `rotation` [blocks, size, size] turns the scaled
    input block by block, x' = R x. `turn` mixes the base's outputs in pairs. `dense` [out, in] is added to W.
    """

    low_rank: LowRank | None = None
    in_scale: Tensor | None = None
    out_scale: Tensor | None = None
    bias: Tensor | None = None
    rotation: Tensor | None = None
    turn: Turn | None = None
    dense: Tensor | None = None

    def plus_bias(self, bias: Tensor) -> LinearForm:
        """The same with `bias` [out] added."""
        return dataclasses.replace(self, bias=bias if self.bias is None else self.bias + bias)

    def with_dense(self, dense: Tensor) -> LinearForm:
        """The same with another whole delta [out, in]."""
        return dataclasses.replace(self, dense=dense)

    def with_low_rank(self, low_rank: LowRank) -> LinearForm:
        """The same with another low-rank delta."""
        return dataclasses.replace(self, low_rank=low_rank)

    @property
    def turns_input(self) -> bool:
        """Whether it changes what the base's layer gets."""
        return self.in_scale is not None or self.rotation is not None

    @property
    def turns_output(self) -> bool:
        """Whether it changes what the base's layer gives, other than by adding to it."""
        return self.out_scale is not None or self.turn is not None

    @property
    def additive(self) -> bool:
        """Whether it only adds to the base's output, so that any weighted sum of such forms is one, too."""
        return not self.turns_input and not self.turns_output

    @property
    def only_ranks(self) -> bool:
        """Whether a low-rank delta is all there is."""
        return not any((self.turns_input, self.turns_output, self.bias is not None, self.dense is not None))

    def tensors(self) -> Iterator[Tensor]:
        """Everything that takes memory."""
        if self.low_rank is not None:
            yield self.low_rank.a
            yield self.low_rank.b
        if self.turn is not None:
            yield self.turn.values
            yield self.turn.partner
        for tensor in (self.in_scale, self.out_scale, self.bias, self.rotation, self.dense):
            if tensor is not None:
                yield tensor


@dataclass(frozen=True, slots=True)
class TableForm:
    """What an adapter does to an embedding: one of these, or the first two.

    `tokens` [count] long and `rows` [count, hidden] replace; `low_rank.a` [rank, vocabulary] and `.b` [rank, hidden]:
    row t gains scaling · aᵀ[t] b (LoRA). `gain`, shaped alike: row w_t gains w_t ⊙ (scaling · aᵀ[t] b), which a table
    that multiplies its rows does not multiply (HiRA). `rotation` [blocks, size, size] turns what the table gives, block
    by block (OFT).
    """

    tokens: Tensor | None = None
    rows: Tensor | None = None
    low_rank: LowRank | None = None
    gain: LowRank | None = None
    rotation: Tensor | None = None

    @property
    def only_ranks(self) -> bool:
        """Whether a low-rank delta is all there is."""
        return self.low_rank is not None and all(t is None for t in (self.tokens, self.gain, self.rotation))

    def equals(self, other: TableForm) -> bool:
        """Whether both replace the same rows by the same."""
        pairs = ((self.tokens, other.tokens), (self.rows, other.rows))
        return all(one is not None and two is not None and torch.equal(one, two) for one, two in pairs)

    def tensors(self) -> Iterator[Tensor]:
        """Everything that takes memory."""
        for tensor in (self.tokens, self.rows, self.rotation):
            if tensor is not None:
                yield tensor
        for factors in (self.low_rank, self.gain):
            if factors is not None:
                yield factors.a
                yield factors.b


@dataclass(frozen=True, slots=True)
class NormForm:
    """A normalization layer's own parameters for this adapter's rows, by name (`weight`, `bias`), each [hidden]."""

    parameters: Mapping[str, Tensor]

    def tensors(self) -> Iterator[Tensor]:
        """Everything that takes memory."""
        yield from self.parameters.values()


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """A bottleneck adapter behind a module (Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2021,
    arXiv:2005.00247): h + scaling · up(activation(down(norm(h)))). down [size, hidden], up [hidden, size].

    At a normalization layer N it sits before it and looks through it: N(x + scaling · up(activation(down(norm(N x))))).
    """

    down: Tensor
    down_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    activation: str
    scaling: float = 1.0
    norm: Mapping[str, Tensor] | None = None

    def tensors(self) -> Iterator[Tensor]:
        """Everything that takes memory."""
        for tensor in (self.down, self.down_bias, self.up, self.up_bias, *(self.norm or {}).values()):
            if tensor is not None:
                yield tensor


@dataclass(frozen=True, slots=True)
class AttentionPrompt:
    """Keys and values [length, key/value heads, size] that one attention layer looks at through a gate.

    What it sees there goes through the output projection; or, with the path of the attention module in `behind`,
    is added to what the module gives (GPT-2).
    """

    gate: float
    keys: Tensor
    values: Tensor
    behind: str | None = None

    def tensors(self) -> Iterator[Tensor]:
        """Everything that takes memory."""
        yield self.keys
        yield self.values


@dataclass(frozen=True, slots=True)
class Prompt:
    """Virtual tokens before the text, as input embeddings [count, hidden] (Lester et al. 2021, arXiv:2104.08691)."""

    embeddings: Tensor

    @property
    def count(self) -> int:
        """How many positions it takes."""
        return int(self.embeddings.shape[0])

    def tensors(self) -> Iterator[Tensor]:
        """Everything that takes memory."""
        yield self.embeddings


@dataclass(frozen=True, slots=True)
class Prefix:
    """Keys and values before the text's own in every layer (Li and Liang 2021, arXiv:2101.00190).

    `keys[layer]` and `values[layer]` are [count, key/value heads, size], in the layers' order.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def count(self) -> int:
        """How many positions it takes."""
        return int(self.keys[0].shape[0])

    def tensors(self) -> Iterator[Tensor]:
        """Everything that takes memory."""
        yield from self.keys
        yield from self.values


@dataclass(frozen=True, slots=True)
class ServingForm:
    """An adapter, ready to be placed. `invocation` are the tokens from which on an activated LoRA is on (aLoRA,
    arXiv:2504.12397); None is from the first token. Of an activated one only `layers` wait for them, as in PEFT; what
    it has trained besides, `norms`, `tables` and what `lasting` adds to linear layers, is on from the first token."""

    digest: str
    manifest: Manifest
    layers: Mapping[str, LinearForm] = field(default_factory=dict)
    norms: Mapping[str, NormForm] = field(default_factory=dict)
    tables: Mapping[str, TableForm] = field(default_factory=dict)
    bottlenecks: Mapping[str, Bottleneck] = field(default_factory=dict)
    attention: Mapping[int, AttentionPrompt] = field(default_factory=dict)
    head: Head | None = None
    virtual: Prompt | Prefix | None = None
    invocation: tuple[int, ...] | None = None
    lasting: Mapping[str, LinearForm] = field(default_factory=dict)

    @property
    def lasts(self) -> bool:
        """Whether a part of an activated adapter is on from the first token."""
        return self.invocation is not None and bool(self.lasting or self.norms or self.tables)

    @property
    def lasting_part(self) -> ServingForm:
        """That part, as an adapter of its own."""
        return dataclasses.replace(self, layers=self.lasting, lasting={}, invocation=None)

    @property
    def activated_part(self) -> ServingForm:
        """The other part."""
        return dataclasses.replace(self, norms={}, tables={}, lasting={})

    @property
    def virtual_tokens(self) -> int:
        """How many positions come before the text's first token."""
        return self.virtual.count if self.virtual is not None else 0

    @property
    def bytes(self) -> int:
        """What the form takes in host memory."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def low_ranks(self) -> Iterator[tuple[str, LowRank]]:
        """All low-rank deltas of layers and embeddings, by path."""
        for kind in (self.layers, self.tables):
            for path, form in kind.items():
                if form.low_rank is not None:
                    yield path, form.low_rank

    def tensors(self) -> Iterator[Tensor]:
        """Everything that takes memory."""
        for kind in (self.layers, self.lasting, self.norms, self.tables, self.bottlenecks, self.attention):
            for form in kind.values():
                yield from form.tensors()
        if self.virtual is not None:
            yield from self.virtual.tensors()
        if self.head is not None:
            yield from self.head.tensors()
