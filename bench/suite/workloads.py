"""What is asked: the field's workload and those of the papers. Knows no system; numpy and the standard library only.

A workload is a list of requests, each a plain dictionary, so that it can be sent to another process:
`prompt` (text, or token ids), `tokens` (how many to produce, greedy, the end token ignored), `adapter` (a name, None
for the base, or {name: weight} for a fusion) and `at` (seconds after the beginning at which it arrives).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

TOPICS = (
    "the sea", "old trains", "a quiet library", "winter", "bread", "mountains", "the moon", "jazz",
    "gardens", "chess", "bicycles", "rain", "lighthouses", "maps", "coffee", "clocks",
)  # fmt: skip
NEW_TOKENS = 64
RANK, ALPHA = 8, 16
LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION = LLAMA_LINEARS[:4]
"""What S-LoRA adapts (arXiv:2311.03285, section 7)."""
BERT_LINEARS = ["query", "key", "value", "intermediate.dense", "output.dense"]

Request = dict[str, Any]
Selection = str | dict[str, float] | None

FIRST_WORD, LAST_WORD = 1_000, 30_000
"""Token ids of random prompts: ordinary words in every vocabulary that is measured here."""


def request(prompt: str | list[int], tokens: int, adapter: Selection = None, at: float = 0.0) -> Request:
    """One request."""
    return {"prompt": prompt, "tokens": tokens, "adapter": adapter, "at": at}


def prompt(index: int) -> str:
    """The field workload's prompt, about 14 tokens."""
    return f"Write three friendly sentences about {TOPICS[index % len(TOPICS)]} for a young reader, please."


def field(selections: Sequence[Selection], tokens: int = NEW_TOKENS) -> list[Request]:
    """One request for each selection, all at once."""
    return [request(prompt(index), tokens, chosen) for index, chosen in enumerate(selections)]


def distinct(count: int, adapters: Sequence[str]) -> list[Selection]:
    """`count` selections over all of `adapters` in turn."""
    return [adapters[index % len(adapters)] for index in range(count)]


def punica(batch: int, popularity: str) -> list[int]:
    """How many requests of a batch each adapter gets, by Punica's four popularities (arXiv:2310.18547, section 7).

    `distinct`: one each. `identical`: one adapter for all. `uniform`: ⌈√batch⌉ adapters, equal shares. `skewed`:
    Zipf-1.5 as Punica reads it, an adapter being 1.5 times as popular as the next; the last takes what is left.
    """
    if popularity == "distinct":
        return [1] * batch
    if popularity == "identical":
        return [batch]
    if popularity == "uniform":
        adapters = int(np.ceil(np.sqrt(batch)))
        each, more = divmod(batch, adapters)
        return [each + (index < more) for index in range(adapters)]
    if popularity == "skewed":
        shares: list[int] = []
        share = 1.0
        while sum(shares) + int(share) < batch:
            shares.append(int(share))
            share *= 1.5
        return sorted([*shares, batch - sum(shares)], reverse=True)
    raise ValueError(popularity)


def punica_batch(batch: int, popularity: str, adapters: Sequence[str], tokens: int) -> list[Request]:
    """A batch of field prompts under one of Punica's popularities, shuffled."""
    shares = punica(batch, popularity)
    chosen = [adapters[index] for index, share in enumerate(shares) for _ in range(share)]
    np.random.default_rng(0).shuffle(chosen)
    return field(chosen, tokens)


def zipf(count: int, adapters: int, exponent: float, seed: int) -> list[int]:
    """`count` indices below `adapters`, index i with a probability proportional to (i + 1) ** -exponent."""
    weights = np.arange(1, adapters + 1, dtype=np.float64) ** -exponent
    found: list[int] = np.random.default_rng(seed).choice(adapters, size=count, p=weights / weights.sum()).tolist()
    return found


def slora_trace(
    adapters: Sequence[str],
    *,
    alpha: float,
    rate: float,
    cv: float,
    duration: float,
    lengths: tuple[int, int],
    seed: int,
) -> list[Request]:
    """S-LoRA's synthetic trace (arXiv:2311.03285, section 7.1): rate · duration requests, the adapter of each
    ⌊power(alpha) · n⌋, Gamma arrivals with coefficient of variation `cv`, input and output U[low, high).

    `alpha` 1 is uniform. Prompts are random words instead of one repeated word, so that no prefix cache can help.
    """
    rng = np.random.default_rng(seed)
    count = int(rate * duration)
    chosen = (rng.power(alpha, count) * len(adapters)).astype(int)
    inputs, outputs = (rng.integers(*lengths, count) for _ in range(2))
    arrivals = rng.gamma(1 / cv**2, cv**2 / rate, count).cumsum()
    return [
        request(random_words(int(inputs[i]), rng), int(outputs[i]), adapters[chosen[i]], float(arrivals[i]))
        for i in range(count)
    ]


def zipf_requests(names: Sequence[str], count: int, exponent: float, tokens: int, seed: int) -> list[Request]:
    """`count` field prompts, all at once, over `names` by Zipf's law."""
    return field([names[index] for index in zipf(count, len(names), exponent, seed)], tokens)


def random_words(count: int, rng: np.random.Generator) -> list[int]:
    """Random token ids [count]."""
    ids: list[int] = rng.integers(FIRST_WORD, LAST_WORD, count).tolist()
    return ids
