"""What calls return: frozen dataclasses. The meaning of every field is in `adapterbay/v1/*.proto`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import overload


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a request's time went, in seconds."""

    queue: float
    load: float
    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """One adapter that took part in an answer."""

    reference: str
    name: str
    version: int
    digest: str
    weight: float
    layer_weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FusionUse:
    """How the adapters of an answer were fused, by another method than the weighted sum."""

    digest: str
    method: str
    density: float | None
    majority_sign: str | None
    rank: int | None
    seed: int | None


@dataclass(frozen=True, slots=True)
class Provenance:
    """What answered, exactly. No adapters means the base alone."""

    base_fingerprint: str
    adapters: tuple[AdapterUse, ...]
    quantization: str
    timings: Timings
    fusion: FusionUse | None = None


@dataclass(frozen=True, slots=True)
class TokenLogProbability:
    """A token with its natural-log probability."""

    token_id: int
    token: str
    log_probability: float


@dataclass(frozen=True, slots=True)
class PositionLogProbabilities:
    """One generated position."""

    chosen: TokenLogProbability
    top: tuple[TokenLogProbability, ...]


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished generation. `finish_reason` is "end", "stop" or "length"."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stop: str
    prompt_tokens: int
    log_probabilities: tuple[PositionLogProbabilities, ...]
    provenance: Provenance


@dataclass(frozen=True, slots=True)
class GenerationPiece:
    """A piece of a streamed generation. The last one, and only it, has `finish_reason` and `provenance`."""

    text: str
    token_ids: tuple[int, ...]
    log_probabilities: tuple[PositionLogProbabilities, ...]
    finish_reason: str | None
    stop: str
    prompt_tokens: int
    provenance: Provenance | None


@dataclass(frozen=True, slots=True)
class LabelScore:
    """One label and how likely it is."""

    label: str
    probability: float
    logit: float


@dataclass(frozen=True, slots=True)
class Classification:
    """A text's label, with all labels in the head's order."""

    label: str
    index: int
    scores: tuple[LabelScore, ...]
    tokens: int
    truncated: bool

    @property
    def probability(self) -> float:
        """Of the label."""
        return self.scores[self.index].probability


@dataclass(frozen=True, slots=True)
class Classifications(Sequence[Classification]):
    """One classification for each text, in order: a sequence, with the provenance beside it."""

    items: tuple[Classification, ...]
    provenance: Provenance

    @overload
    def __getitem__(self, index: int) -> Classification: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Classification, ...]: ...
    def __getitem__(self, index: int | slice) -> Classification | tuple[Classification, ...]:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True, slots=True)
class TokenLabel:
    """One token of a text, [begin, end) in code points, and its likeliest label. `scores` only if asked for."""

    begin: int
    end: int
    token: str
    label: str
    index: int
    probability: float
    scores: tuple[LabelScore, ...]


@dataclass(frozen=True, slots=True)
class TokenClassification:
    """A text's tokens in their order, special tokens left out; `tokens` counts those, too."""

    labels: tuple[TokenLabel, ...]
    tokens: int
    truncated: bool

    def __iter__(self) -> Iterator[TokenLabel]:
        return iter(self.labels)


@dataclass(frozen=True, slots=True)
class TokenClassifications(Sequence[TokenClassification]):
    """One entry for each text, in order: a sequence, with the provenance beside it."""

    items: tuple[TokenClassification, ...]
    provenance: Provenance

    @overload
    def __getitem__(self, index: int) -> TokenClassification: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[TokenClassification, ...]: ...
    def __getitem__(self, index: int | slice) -> TokenClassification | tuple[TokenClassification, ...]:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True, slots=True)
class EmbeddingVector:
    """One text's vector, of the base's hidden size."""

    values: tuple[float, ...]
    tokens: int
    truncated: bool


@dataclass(frozen=True, slots=True)
class Embeddings(Sequence[EmbeddingVector]):
    """One vector for each text, in order: a sequence, with the provenance beside it."""

    items: tuple[EmbeddingVector, ...]
    provenance: Provenance

    @overload
    def __getitem__(self, index: int) -> EmbeddingVector: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[EmbeddingVector, ...]: ...
    def __getitem__(self, index: int | slice) -> EmbeddingVector | tuple[EmbeddingVector, ...]:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True, slots=True)
class ComparisonAnswer:
    """One arm's answer to one input: a generation or a classification. `seed` is 0 for a greedy answer."""

    arm_index: int
    input_index: int
    generation: Generation | None
    classification: Classification | None
    provenance: Provenance
    seed: int


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """One version of an adapter. `residency` is "registry", "loading", "host" or "device"."""

    name: str
    version: int
    digest: str
    aliases: tuple[str, ...]
    task: str
    method: str
    rank: int
    labels: tuple[str, ...]
    base_reference: str
    base_fingerprint: str
    size_bytes: int
    created_at: datetime
    servable: bool
    residency: str
    resident_bytes: int
    pinned: bool
    active_rows: int
    manifest_json: str | None = None


@dataclass(frozen=True, slots=True)
class AdapterPage:
    """One page of adapters; iterating gives its entries."""

    adapters: tuple[AdapterInfo, ...]
    next_page_token: str

    def __iter__(self) -> Iterator[AdapterInfo]:
        return iter(self.adapters)


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """A version that is in memory now, and how long that took; zero if it was there already."""

    adapter: AdapterInfo
    load_seconds: float


@dataclass(frozen=True, slots=True)
class UnloadedAdapter:
    """A version after unloading, and the bytes that it gave back."""

    adapter: AdapterInfo
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class AliasInfo:
    """An alias and the version it points at."""

    name: str
    version: int


@dataclass(frozen=True, slots=True)
class AdapterChange:
    """One change. `kind` is snapshot, pushed, alias_set, alias_removed, loaded, unloaded or load_failed."""

    kind: str
    adapter: AdapterInfo
    alias: AliasInfo | None
    previous_version: int
    message: str
    at: datetime
