"""What a generating row remembers between steps, and how one drawn token becomes a delta or the end."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from adapterbay.server.batch import Row
from adapterbay.server.requests import (
    Delta,
    FinishReason,
    GenerateTask,
    PositionChances,
    SamplingSpec,
    TokenChance,
    not_finite,
)
from adapterbay.server.sampling import Drawn
from adapterbay.server.tokens import StopWatch, StreamDecoder


class Generating:
    """One generation under way."""

    def __init__(self, row: Row, tokenizer: Any, end_ids: Collection[int]) -> None:
        task = row.request.task
        assert isinstance(task, GenerateTask)
        self.sampling: SamplingSpec = task.sampling
        self._arm = row.request.arm
        self.generator: torch.Generator | None = None
        if self.sampling.temperature > 0:
            self.generator = torch.Generator()
            if self.sampling.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(self.sampling.seed % (1 << 63))
        self.text = ""
        self.token_ids: list[int] = []
        self.chances: list[PositionChances] = []
        self.finish: FinishReason | None = None
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._row = row  # its adapters may leave room for fewer tokens than it was made with
        self._decoder = StreamDecoder(tokenizer, () if row.source else task.prompt_ids)
        self._stops = StopWatch(self.sampling.stop)

    @property
    def stop(self) -> str:
        """The stop string that ended it, or nothing."""
        return self._stops.hit or ""

    def push(self, drawn: Drawn) -> Delta:
        """Takes one token; sets `finish` when it was the last.

        Raises Rejected when the logits held NaN or Inf: the adapter, on this text, computes nothing.
        """
        if not drawn.finite:
            raise not_finite(self._arm)
        self.token_ids.append(drawn.token_id)
        chances = self._chances(drawn)
        self.chances.extend(chances)
        ended = drawn.token_id in self._end_ids and not self.sampling.ignore_end
        text = self._stops.push("" if ended else self._decoder.push(drawn.token_id))
        if self._stops.hit is not None:
            self.finish = FinishReason.STOP
        elif ended or len(self.token_ids) >= self._row.max_new_tokens:
            self.finish = FinishReason.END if ended else FinishReason.LENGTH
            text += self._last_words()
        self.text += text
        return Delta(text=text, token_ids=(drawn.token_id,), chances=chances)

    def _last_words(self) -> str:
        text = self._stops.push(self._decoder.flush())
        if self._stops.hit is not None:
            self.finish = FinishReason.STOP
            return text
        return text + self._stops.flush()

    def _chances(self, drawn: Drawn) -> tuple[PositionChances, ...]:
        if drawn.log_probability is None:
            return ()
        return (
            PositionChances(
                chosen=self._chance(drawn.token_id, drawn.log_probability),
                top=tuple(self._chance(token_id, value) for token_id, value in drawn.top),
            ),
        )

    def _chance(self, token_id: int, value: float) -> TokenChance:
        return TokenChance(token_id, self._tokenizer.decode([token_id]), value)


def end_token_ids(base: Any) -> set[int]:
    """Every token that ends a generation: the generation config's, else the config's, and the tokenizer's."""
    found: set[int] = set()
    for source in (getattr(base.model, "generation_config", None), base.model.config):
        value = getattr(source, "eos_token_id", None)
        found.update(value if isinstance(value, list) else [value] if value is not None else [])
    if base.tokenizer.eos_token_id is not None:
        found.add(base.tokenizer.eos_token_id)
    return found
