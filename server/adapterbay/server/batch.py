"""A row: one request while it is in the engine. Pure state; who fills what is noted. Knows nothing of torch."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adapterbay.server.adapters.claims import Claim
from adapterbay.server.requests import ClassifyTask, ClassifyTokensTask, EmbedTask, GenerateTask, Request

if TYPE_CHECKING:
    from adapterbay.server.adapters.forms import Prefix, Prompt
    from adapterbay.server.adapters.residency import Resident
    from adapterbay.server.prefix import BlockNames


class Phase(enum.Enum):
    """How far a row is."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    DONE = "done"


@dataclass(slots=True, eq=False)
class Row:
    """One row of the batch to be, the batch, or the batch that was."""

    request: Request  # [engine]
    tokens: list[int]  # [engine] the prompt, behind a 0 for each virtual token; [loop] appends what is generated
    prompt_tokens: int  # [engine] without virtual tokens
    max_new_tokens: int  # [engine] 0 for pooled tasks
    residents: tuple[Resident, ...] = ()  # [engine] its adapters, one for each part of the arm, in that order
    claim: Claim = field(default_factory=Claim)  # [group] its request's, by which it holds them
    prompt: Prompt | None = None  # [engine] what its adapter puts before the text: tokens to compute,
    prefix: Prefix | None = None  # [engine] or keys and values
    active_from: int = 0  # [engine] the first position at which its adapters are on
    source: tuple[
        int, ...
    ] = ()  # [engine] the text that an encoder-decoder's encoder reads; `tokens` are the decoder's
    source_prompt: Prompt | None = None  # [engine] what its adapter puts before `source`, which has zeros there
    encoded_only: bool = False  # [engine] an encoder-decoder's row that ends with its encoder, which reads `tokens`
    names: BlockNames | None = None  # [engine] what its full blocks are called; None: it shares none
    reuses: bool = False  # [engine] whether blocks that others computed will do: nobody needs their tokens' states
    phase: Phase = Phase.WAITING  # [scheduler]
    computed: int = 0  # [scheduler] positions whose keys and values are there
    blocks: list[int] = field(default_factory=list)  # [scheduler] this row's blocks, in order
    source_blocks: list[int] = field(default_factory=list)  # [scheduler] what the decoder sees of `source`
    named: int = 0  # [scheduler] so many of them can be found by others
    prefix_due: int | None = None  # [scheduler] from which position on the prefix must be written; [runner] None then
    output: Any = None  # [engine] Generating, StatePooler or TokenLabels: what the row's task remembers
    head: Any = None  # [engine] `heads.Head`: what labels the row, once its adapters are in host memory
    loaded_at: float = 0.0  # [engine] when its adapters were in host memory
    started_at: float = 0.0  # [loop] when its first step began
    first_at: float = 0.0  # [loop] when its prompt was processed

    @property
    def generates(self) -> bool:
        """Whether the row produces tokens."""
        return isinstance(self.request.task, GenerateTask)

    @property
    def pools(self) -> bool:
        """Whether the row ends with its prompt."""
        return isinstance(self.request.task, ClassifyTask | ClassifyTokensTask | EmbedTask)

    @property
    def virtual_tokens(self) -> int:
        """How many positions come before the text's first token."""
        virtual = self.prompt or self.prefix
        return virtual.count if virtual is not None else 0

    @property
    def placed(self) -> int:
        """How many positions at its beginning get keys and values that nobody computes: those of a prefix."""
        return self.prefix.count if self.prefix is not None else 0

    @property
    def most_tokens(self) -> int:
        """The most positions of the cache that the row will ever write; the last new token is never fed back. Those of
        `source` do not count."""
        if self.source:
            return self.placed + max(self.max_new_tokens, 1)
        return self.virtual_tokens + self.prompt_tokens + max(self.max_new_tokens - 1, 0)

    @property
    def left(self) -> int:
        """Prompt (and, once decoding, generated) tokens that have not been through the base."""
        return len(self.tokens) - self.computed


@dataclass(slots=True, eq=False)
class Group:
    """Rows that enter the batch in the same step: one request, or one input of a comparison with all its arms."""

    rows: list[Row]  # [engine]; [scheduler] those that are not over, when the group is preempted
    ready: bool = False  # [engine] its adapters are in host memory
    serial: int = 0  # [scheduler] in order of arrival
    begun: bool = False  # [scheduler] it was preempted: what it waits for is to go on
    waited_for: set[str] = field(default_factory=set)  # [tally] keys of adapters that were not whole when it asked
    fair_key: tuple[str, ...] = field(init=False)
    """Groups with one key take turns with groups of other keys."""

    def __post_init__(self) -> None:
        claim = Claim()
        for row in self.rows:
            row.claim = claim
        self.fair_key = tuple(part.name for row in self.rows for part in row.request.arm.parts)


@dataclass(frozen=True, slots=True)
class Share:
    """What a step computes of one row: its tokens [start, start + count)."""

    row: Row
    start: int
    count: int

    @property
    def cost(self) -> int:
        """How many tokens that are."""
        return self.count + (len(self.row.source) if self.begins else 0)

    @property
    def begins(self) -> bool:
        """Whether an encoder-decoder's row has its text read in this step."""
        return bool(self.row.source) and self.start == self.row.placed

    @property
    def finishes_prompt(self) -> bool:
        """Whether the row's last known token goes through the base in this step."""
        return self.start + self.count == len(self.row.tokens)
