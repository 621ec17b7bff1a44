"""A row: one request while it is in the engine. Pure state; who fills what is noted. Knows nothing of torch."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adapterbay.server.requests import ClassifyTask, EmbedTask, GenerateTask, Request

if TYPE_CHECKING:
    from adapterbay.server.adapters.residency import Resident


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
    tokens: list[int]  # [engine] the prompt; [loop] appends what is generated
    prompt_tokens: int  # [engine]
    max_new_tokens: int  # [engine] 0 for pooled tasks
    residents: tuple[Resident, ...] = ()  # [engine] its adapters, one for each part of the arm, in that order
    phase: Phase = Phase.WAITING  # [scheduler]
    computed: int = 0  # [loop] tokens that went through the base
    blocks: list[int] = field(default_factory=list)  # [scheduler] this row's blocks, in order
    output: Any = None  # [loop] `generation.Generating` or `pooling.Pooling`: what the row's task needs to remember
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
        return isinstance(self.request.task, ClassifyTask | EmbedTask)

    @property
    def most_tokens(self) -> int:
        """The most positions of the cache that the row will ever write; the last new token is never fed back."""
        return self.prompt_tokens + max(self.max_new_tokens - 1, 0)

    @property
    def left(self) -> int:
        """Prompt (and, once decoding, generated) tokens that have not been through the base."""
        return len(self.tokens) - self.computed


@dataclass(slots=True, eq=False)
class Group:
    """Rows that enter the batch in the same step: one request, or one input of a comparison with all its arms."""

    rows: list[Row]
    ready: bool = False  # [engine] its adapters are in host memory

    @property
    def fair_key(self) -> tuple[str, ...]:
        """Groups with one key take turns with groups of other keys."""
        return tuple(part.name for row in self.rows for part in row.request.arm.parts)


@dataclass(frozen=True, slots=True)
class Share:
    """What a step computes of one row: its tokens [start, start + count)."""

    row: Row
    start: int
    count: int

    @property
    def finishes_prompt(self) -> bool:
        """Whether the row's last known token goes through the base in this step."""
        return self.start + self.count == len(self.row.tokens)
