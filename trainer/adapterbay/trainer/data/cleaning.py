"""What is removed from rows before training, step by step, each step counted."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

from adapterbay.trainer.data.rows import Labelled, Row

_HTML_BREAK = re.compile(r"\s*(?:<br\s*/?>\s*)+", re.IGNORECASE)
RowT = TypeVar("RowT", bound=Row)


@dataclass
class CleaningReport:
    """How many rows each step touched. Counts add up over the training source and the evaluation source."""

    read: int = 0
    filtered_out: int = 0
    html_breaks: int = 0
    """Rows changed, not removed."""
    empty: int = 0
    missing_label: int = 0
    duplicates: int = 0
    conflicting_duplicates: int = 0
    """Of `duplicates`: the same text with another label; the first one's label stays."""
    overlap: int = 0
    """Training rows removed because they are in the evaluation data."""
    truncated: int = 0
    """Rows longer than `max_length`, cut at the end."""
    completion_cut: int = 0
    """Rows removed because `max_length` left nothing of the completion."""

    def as_dict(self) -> dict[str, int]:
        """All counts by name."""
        return asdict(self)


def is_missing(value: object) -> bool:
    """None, NaN, or text without a visible character."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip()


def without_html_breaks(text: str) -> str:
    """Each run of `<br>`, `<br/>` or `<br />`, with the spacing around it, as one space."""
    return _HTML_BREAK.sub(" ", text)


def without_duplicates(rows: Iterable[RowT], report: CleaningReport) -> list[RowT]:
    """The first of each set of equal rows; the others are counted."""
    first: dict[str, RowT] = {}
    for row in rows:
        kept = first.setdefault(row.key, row)
        if kept is not row:
            report.duplicates += 1
            if isinstance(kept, Labelled) and isinstance(row, Labelled) and kept.label != row.label:
                report.conflicting_duplicates += 1
    return list(first.values())


def without_overlap(train: Sequence[RowT], evaluation: Sequence[RowT], report: CleaningReport) -> list[RowT]:
    """The training rows that are not in the evaluation data."""
    held_out = {row.key for row in evaluation}
    kept = [row for row in train if row.key not in held_out]
    report.overlap += len(train) - len(kept)
    return kept
