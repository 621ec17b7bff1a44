"""Logits to tokens, row by row settings in one call. Knows nothing of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterbay.server.requests import SamplingSpec

NUCLEUS_GUESS = 1024
"""top-p looks at this many likeliest tokens first, and sorts the whole vocabulary only if they do not suffice."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """One row's choice. `log_probability` and `top` are there when the row asked for them."""

    token_id: int
    finite: bool
    log_probability: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def draw(logits: Tensor, specs: Sequence[SamplingSpec], generators: Sequence[torch.Generator | None]) -> list[Drawn]:
    """Chooses one token for each row of `logits` [rows, vocabulary].

    A row with a temperature uses its own generator (on the CPU), one uniform number for each token, so that what else
    is in the batch cannot shift its random numbers.
    """
    logits = logits.float()
    best, greedy = logits.max(-1)
    finite = best.isfinite().tolist()  # max hands NaN on, and an overflow shows as Inf
    chosen: list[int] = greedy.tolist()
    for row, (spec, generator) in enumerate(zip(specs, generators, strict=True)):
        if spec.temperature > 0 and finite[row]:
            chosen[row] = sample_row(logits[row], spec, generator)
    drawn = []
    for row, spec in enumerate(specs):
        if spec.top_log_probabilities is None or not finite[row]:
            drawn.append(Drawn(chosen[row], finite[row]))
            continue
        chances = logits[row].log_softmax(-1)
        values, ids = chances.topk(spec.top_log_probabilities)
        drawn.append(
            Drawn(
                chosen[row],
                True,
                float(chances[chosen[row]]),
                tuple(zip(ids.tolist(), values.tolist(), strict=True)),
            )
        )
    return drawn


def sample_row(logits: Tensor, spec: SamplingSpec, generator: torch.Generator | None) -> int:
    """One token from softmax(logits / temperature), cut to top_k and then to top_p (Holtzman et al. 2020,
    arXiv:1904.09751: the smallest set of likeliest tokens whose probabilities add up to top_p or more).

    logits [vocabulary]. Inverse transform: the first token at which the cumulative probability exceeds u.
    """
    probabilities = (logits / spec.temperature).softmax(-1)
    size = probabilities.shape[0]
    keep = min(spec.top_k, size) if spec.top_k else size
    if spec.top_p < 1.0:
        keep_first = min(keep, NUCLEUS_GUESS)
        values, ids = probabilities.topk(keep_first)
        total = probabilities.topk(keep).values.sum() if spec.top_k else probabilities.sum()
        if keep_first < keep and values.sum() < spec.top_p * total:
            values, ids = probabilities.topk(keep)
        cumulative = values.cumsum(-1) / total
        values = values[: int((cumulative < spec.top_p).sum()) + 1]
    elif spec.top_k:
        values, ids = probabilities.topk(keep)
    else:
        values, ids = probabilities, None
    cumulative = values.double().cumsum(-1)
    uniform = torch.rand(1, generator=generator, dtype=torch.float64).to(cumulative.device)
    at = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    at = min(at, cumulative.shape[0] - 1)
    return at if ids is None else int(ids[at])
