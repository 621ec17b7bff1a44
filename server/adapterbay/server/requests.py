"""Pure request state: what was asked, how far it is, what came of it. Knows nothing of torch, gRPC or the registry.

Who fills what is noted beside each field: [service] before submission, [engine] at submission, [loop] while it runs.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

from adapterbay.registry.errors import AdapterbayError


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
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class ArmSpec:
    """What computes a row: no part is the base alone, one part an adapter, several a fusion."""

    parts: tuple[Part, ...] = ()

    @property
    def key(self) -> tuple[tuple[str, float], ...]:
        """The identity of the computation: digests with weights. Rows with one key may share anything."""
        return tuple((part.digest, part.weight) for part in self.parts)


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
class EmbedTask:
    """Pool the last hidden states of `token_ids`."""

    token_ids: tuple[int, ...]
    pooling: Pooling = Pooling.MEAN
    normalize: bool = False
    truncated: bool = False


Task = GenerateTask | ClassifyTask | EmbedTask


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
class EmbedResult:
    """One vector of the base's hidden size."""

    values: tuple[float, ...]
    tokens: int
    truncated: bool
    timings: Timings


Result = GenerateResult | ClassifyResult | EmbedResult
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
