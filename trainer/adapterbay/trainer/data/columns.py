"""Which column holds what: as mapped in the settings, or found by its usual names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Literal

from adapterbay.registry.errors import InvalidArgument
from adapterbay.trainer.config import ColumnSettings
from adapterbay.trainer.data.sources import Table

Part = Literal["text", "label", "prompt", "completion", "messages"]

USUAL_NAMES: Mapping[Part, tuple[str, ...]] = {
    "text": ("text", "sentence", "review", "content", "comment", "document", "body", "tweet"),
    "label": ("label", "labels", "sentiment", "class", "category", "target", "polarity", "rating"),
    "prompt": ("prompt", "instruction", "question", "query", "input"),
    "completion": ("completion", "response", "answer", "output", "chosen"),
    "messages": ("messages", "conversation", "conversations"),
}
"""The likeliest first; compared without regard to case."""


def find(table: Table, part: Part, mapped: ColumnSettings) -> str | None:
    """The column that holds `part`, or None. Raises InvalidArgument if the settings map it to a missing column."""
    wanted: str | None = getattr(mapped, part)
    if wanted is not None:
        if wanted not in table.columns:
            raise missing(table, wanted, f"data.columns.{part}")
        return wanted
    by_name = {column.casefold(): column for column in reversed(table.columns)}
    return next((by_name[name] for name in USUAL_NAMES[part] if name in by_name), None)


def require(table: Table, part: Part, mapped: ColumnSettings) -> str:
    """The column that holds `part`. Raises InvalidArgument naming the columns there are."""
    column = find(table, part, mapped)
    if column is None:
        raise InvalidArgument(
            f"{table.source} has no {part} column (looked for {', '.join(USUAL_NAMES[part])}); it has "
            f"{', '.join(table.columns)}. Name the one to use with data.columns.{part}.",
            field=f"data.columns.{part}",
        )
    return column


def missing(table: Table, wanted: str, field: str) -> InvalidArgument:
    """The error for a column that is not there."""
    near = difflib.get_close_matches(wanted, table.columns, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return InvalidArgument(
        f"{field}: {table.source} has no column '{wanted}'; it has {', '.join(table.columns)}.{hint}", field=field
    )
