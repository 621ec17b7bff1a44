"""What admission finds in an adapter: data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from adapterbay.registry.admission.places import Kind, Place
from adapterbay.registry.admission.safetensors_file import TensorInfo
from adapterbay.registry.admission.tying import Tying

PREFIX: Final = "base_model.model."
"""Before the names of modules, except with virtual tokens, where it is `base_model.`."""


@dataclass(frozen=True, slots=True)
class AdaptedSite:
    """A module of the base that an adapter changes or replaces.

    `name` is the module as the adapter calls it, `base_name` as the checkpoint of the base does. A matrix maps
    `in_features` to `out_features`; an embedding has `in_features` rows of `out_features`. `tensors` maps what follows
    the module's name in a tensor's (`lora_A.weight`, or `weight` where it is replaced) to the tensor's whole key.
    """

    name: str
    base_name: str
    kind: Kind
    in_features: int
    out_features: int
    tensors: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def at(cls, place: Place, tensors: Mapping[str, str]) -> AdaptedSite:
        """A site at a module."""
        return cls(place.name, place.base_name, place.kind, place.in_features, place.out_features, dict(tensors))


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """One module with LoRA: y = W x + scaling · B (A x), A [rank, in_features], B [out_features, rank].

    `transposed`: the base stores W as [in, out] (Conv1D). On an embedding A has a column for each row of the table.
    The keys of what variants add are None where there is nothing. `blocks_a` and `blocks_b` are the blocks of a
    block-diagonal A or B, which are stored one above the other; 0 is a full matrix.
    """

    name: str
    base_name: str
    rank: int
    scaling: float
    in_features: int
    out_features: int
    transposed: bool
    kind: Kind = "linear"
    magnitude_key: str | None = None
    bias_key: str | None = None
    diagonal_key: str | None = None
    blocks_a: int = 0
    blocks_b: int = 0

    @property
    def a_key(self) -> str:
        """The key of A in the checkpoint."""
        return f"{PREFIX}{self.name}.{'lora_embedding_A' if self.kind == 'embedding' else 'lora_A.weight'}"

    @property
    def b_key(self) -> str:
        """The key of B in the checkpoint."""
        return f"{PREFIX}{self.name}.{'lora_embedding_B' if self.kind == 'embedding' else 'lora_B.weight'}"

    @property
    def plain(self) -> bool:
        """Whether scaling · B A on a matrix is all that it does."""
        extras = (self.magnitude_key, self.bias_key, self.diagonal_key)
        return self.kind != "embedding" and not any(extras) and not self.blocks_a and not self.blocks_b


@dataclass(frozen=True, slots=True)
class Head:
    """A classification head: one linear layer, or two with an activation between them.

    `parts` maps a tensor's name in the model (`classifier.dense.weight`) to its key, the first layer first. `name` is
    the layer with a row for each label, weight [labels, hidden], and a bias [labels] or none.
    """

    name: str
    labels: int
    hidden: int
    has_bias: bool
    parts: Mapping[str, str]

    @property
    def weight_key(self) -> str:
        """The key of the weight in the checkpoint."""
        return self.parts[f"{self.name}.weight"]

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of its tensors in the checkpoint."""
        return tuple(self.parts.values())


@dataclass(frozen=True, slots=True)
class TrainedTokens:
    """Rows of an embedding, or of the language-model head, that are replaced: tensor [count, hidden]."""

    name: str
    base_name: str
    tokens: tuple[int, ...]
    key: str


@dataclass(frozen=True, slots=True)
class Matched:
    """All tensors of a checkpoint, each in its place. Lists are sorted by name.

    `sites` are the modules that the method changes, `shared` its tensors that belong to no single module, by name.
    `saved` are modules whose parameters are replaced (norms, embeddings, biases); `copies` claim to be the base's own.
    `ignored` are keys that PEFT writes and does not use. `tying`: how the head is tied to an embedding that is saved or
    adapted.
    """

    sites: tuple[AdaptedSite, ...]
    shared: Mapping[str, str]
    tokens: tuple[TrainedTokens, ...]
    head: Head | None
    saved: tuple[AdaptedSite, ...]
    copies: tuple[AdaptedSite, ...]
    ignored: tuple[str, ...]
    tying: Tying | None = None


@dataclass(frozen=True, slots=True)
class AdmissionReport:
    """What the files are.

    `modules` are those with LoRA, empty for other methods; `sites`, `shared` and the rest are as in `Matched`, for
    every method. `rank` is the largest over the modules, 0 where there is none; `parameters` counts every value, head
    included. `virtual_tokens` are positions before the text. `initialisation` is pissa, olora or loftq where the
    tensors belong to a base that was changed so; `invocation` are the tokens from which on an aLoRA is on. `entries`
    says where each tensor lies in the weights file. `tying`: the head does as the embedding.
    """

    peft_type: str
    config: dict[str, Any]
    modules: tuple[AdaptedModule, ...]
    head: Head | None
    rank: int
    parameters: int
    findings: tuple[str, ...]
    sites: tuple[AdaptedSite, ...] = ()
    shared: Mapping[str, str] = field(default_factory=dict)
    tokens: tuple[TrainedTokens, ...] = ()
    saved: tuple[AdaptedSite, ...] = ()
    copies: tuple[AdaptedSite, ...] = ()
    virtual_tokens: int = 0
    initialisation: str | None = None
    invocation: tuple[int, ...] = ()
    entries: Mapping[str, TensorInfo] = field(default_factory=dict, repr=False)
    tying: Tying | None = None

    @property
    def plain(self) -> bool:
        """Whether it is scaling · B A on matrices and, at most, a head."""
        return (
            self.peft_type == "LORA"
            and not (self.tokens or self.saved or self.initialisation or self.invocation)
            and all(module.plain for module in self.modules)
        )

    @property
    def method_keys(self) -> tuple[str, ...]:
        """The keys that are the method's own: without head, saved modules, trained tokens and copies."""
        own = [key for site in self.sites for key in site.tensors.values()]
        return (*own, *self.shared.values())
