"""Pure request state: what was asked, how far it is, what came of it. Knows nothing of torch, gRPC or any store.

Who fills what is noted beside each field: [service] before submission, [engine] at submission, [loop] while it runs.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

from adapterbay.registry.errors import AdapterbayError, Cancelled, DeadlineExceeded, Rejected
from adapterbay.registry.fusing import FusionSettings
from adapterbay.server.weights import LayerWeights, Weight, fusion_digest


class FinishReason(enum.Enum):
    """Why a generation ended."""

    END = "end"
    STOP = "stop"
    LENGTH = "length"


class Pooling(enum.Enum):
    """How hidden states become one vector."""

    MEAN = "mean"
    FIRST = "first"
    LAST = "last"


@dataclass(frozen=True, slots=True)
class Part:
    """One adapter of an arm, resolved: the version is fixed from here on, whatever happens to aliases."""

    reference: str  # as the request gave it
    name: str
    version: int
    digest: str
    weight: float = 1.0  # on its delta, and on its head
    layer_weights: LayerWeights | None = None  # with `weight` in it; None: `weight` at every layer

    @property
    def applied(self) -> Weight:
        """The weight on its delta, layer by layer where that makes a difference."""
        return self.weight if self.layer_weights is None else self.layer_weights

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class ArmSpec:
    """What computes a row: no part is the base alone, one part an adapter, several a fusion.

    `fusion` is how they are fused where that is not the weighted sum; then an adapter derived from them computes it.
    `key` is the identity of the computation: (digest, weight) of everything that is applied, which are the parts, or
    the derived adapter alone; a row holds one resident for each, in this order. Rows with one key may share anything.
    """

    parts: tuple[Part, ...] = ()
    fusion: FusionSettings | None = None
    key: tuple[tuple[str, Weight], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        applied = tuple((part.digest, part.applied) for part in self.parts)
        if self.fusion is not None:
            applied = ((fusion_digest(applied, self.fusion), 1.0),)
        object.__setattr__(self, "key", applied)

    @property
    def head_weights(self) -> tuple[float, ...]:
        """The weights of the heads that the row's residents bring."""
        return (1.0,) if self.fusion is not None else tuple(part.weight for part in self.parts)


def not_finite(arm: ArmSpec, what: str = "logits") -> Rejected:
    """The error for a row whose logits, or `what`, are NaN or Inf; it names what computed them."""
    who = " + ".join(f"{part.name}@{part.version}" for part in arm.parts) or "the base"
    return Rejected(
        f"The {what} of this row are not finite: {who} overflows on this text. Other rows are unharmed.",
        reason="NOT_FINITE",
    )


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """Validated sampling settings. Temperature 0 is greedy."""

    max_tokens: int | None = None  # None: 256, or what the context leaves
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_end: bool = False
    top_log_probabilities: int | None = None  # None: no log-probabilities at all


@dataclass(frozen=True, slots=True)
class GenerateTask:
    """Continue `prompt_ids`."""

    prompt_ids: tuple[int, ...]
    sampling: SamplingSpec


@dataclass(frozen=True, slots=True)
class ClassifyTask:
    """Label `token_ids` with the arm's head."""

    token_ids: tuple[int, ...]
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class ClassifyTokensTask:
    """Label each of `token_ids` with the arm's head."""

    token_ids: tuple[int, ...]
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class EmbedTask:
    """Pool the last hidden states of `token_ids`."""

    token_ids: tuple[int, ...]
    pooling: Pooling = Pooling.MEAN
    normalize: bool = False
    truncated: bool = False


Task = GenerateTask | ClassifyTask | ClassifyTokensTask | EmbedTask


@dataclass(frozen=True, slots=True)
class TokenChance:
    """A token with its natural-log probability under the model, before temperature and truncation."""

    token_id: int
    token: str
    log_probability: float


@dataclass(frozen=True, slots=True)
class PositionChances:
    """One generated position: the chosen token, and the likeliest ones."""

    chosen: TokenChance
    top: tuple[TokenChance, ...] = ()


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds; see `adapterbay.v1.Timings`."""

    queue: float = 0.0
    load: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to a generation. `text` may be empty while a stop string or a half character is pending."""

    text: str
    token_ids: tuple[int, ...]
    chances: tuple[PositionChances, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """A finished generation; `text` is the deltas joined."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop: str
    prompt_tokens: int
    chances: tuple[PositionChances, ...]
    timings: Timings


@dataclass(frozen=True, slots=True)
class ClassifyResult:
    """The head's output over its labels."""

    labels: tuple[str, ...]
    logits: tuple[float, ...]
    probabilities: tuple[float, ...]
    tokens: int
    truncated: bool
    timings: Timings


@dataclass(frozen=True, slots=True)
class ClassifyTokensResult:
    """The head's output over its labels for each token, special tokens included."""

    labels: tuple[str, ...]
    logits: tuple[tuple[float, ...], ...]
    probabilities: tuple[tuple[float, ...], ...]
    tokens: int
    truncated: bool
    timings: Timings


@dataclass(frozen=True, slots=True)
class EmbedResult:
    """One vector of the base's hidden size."""

    values: tuple[float, ...]
    tokens: int
    truncated: bool
    timings: Timings


Result = GenerateResult | ClassifyResult | ClassifyTokensResult | EmbedResult
Event = Delta | Result | AdapterbayError
"""What a listener hears, in order: Deltas (generation only), then one Result or one error, then nothing."""


@dataclass(slots=True)
class Request:
    """One row to be. Rows that must run in the same batch (the arms of a comparison) are submitted together."""

    arm: ArmSpec  # [service]
    task: Task  # [service]
    listener: Callable[[Event], None]  # [service] called on the engine's thread; must not block
    deadline: float | None = None  # [service] time.monotonic() at which the row is freed
    id: int = 0  # [engine]
    submitted_at: float = 0.0  # [engine] time.monotonic()
    cancelled: bool = field(default=False)  # [service] through Engine.cancel

    def over(self, now: float) -> AdapterbayError | None:
        """Why nobody waits for it any more at `now`, a time.monotonic(); None if somebody does."""
        if self.cancelled:
            return Cancelled("The call was cancelled.")
        if self.deadline is not None and now >= self.deadline:
            return DeadlineExceeded("The call's deadline passed.")
        return None
