"""What may have been meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_SUGGESTIONS = 3


def nearest_words(word: str, there: Iterable[str]) -> list[str]:
    """The words of `there` that look like `word`, the likeliest first. The last part of a path counts by itself too."""
    candidates = list(there)
    found = difflib.get_close_matches(word, candidates, n=MAX_SUGGESTIONS, cutoff=0.6)
    last = word.rpartition("/")[2]
    for candidate in candidates:
        if len(found) >= MAX_SUGGESTIONS:
            break
        if candidate not in found and candidate.rpartition("/")[2] == last:
            found.append(candidate)
    return found


def nearest_numbers(number: int, there: Iterable[int]) -> list[int]:
    """The numbers of `there` closest to `number`."""
    return sorted(there, key=lambda candidate: (abs(candidate - number), candidate))[:MAX_SUGGESTIONS]
