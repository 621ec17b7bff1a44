"""What adapters do to the embedding and to a language-model head that shares its table."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adapterbay.registry.errors import Rejected
from adapterbay.server.adapters.forms import LowRank, TableForm


def replaced_rows(tokens: Sequence[int], rows: Tensor, vocabulary: int) -> TableForm:
    """Trainable tokens: rows [count, hidden] in the place of the table's own for `tokens`.

    Raises Rejected for tokens that the base does not have, or that are named twice.
    """
    if any(not 0 <= token < vocabulary for token in tokens) or len(set(tokens)) != len(tokens):
        raise Rejected(
            f"The trained tokens must be different numbers from 0 to {vocabulary - 1}.", reason="SHAPE_MISMATCH"
        )
    if len(tokens) != rows.shape[0]:
        raise Rejected(f"{len(tokens)} tokens have {rows.shape[0]} rows.", reason="SHAPE_MISMATCH")
    return TableForm(tokens=torch.tensor(tokens, dtype=torch.long), rows=rows.float())


def tied_head(table: TableForm, weight: Tensor) -> LowRank:
    """The same rows in a head that shares the embedding's weight [vocabulary, hidden]: a delta of rank `count`."""
    assert table.tokens is not None
    assert table.rows is not None
    change = table.rows - weight[table.tokens].float()
    picks = torch.zeros(len(table.tokens), weight.shape[0])
    picks[torch.arange(len(table.tokens)), table.tokens] = 1
    return LowRank(a=change, b=picks, scaling=1.0)


def joined(first: LowRank | None, second: LowRank) -> LowRank:
    """The sum of two low-rank deltas: their ranks, one below the other."""
    if first is None:
        return second
    parts = (first, second)
    return LowRank(
        a=torch.cat([part.a.float() for part in parts]),
        b=torch.cat([part.scaling * part.b.float() for part in parts]),
        scaling=1.0,
    )


def whole_table(rows: Tensor) -> TableForm:
    """A whole embedding of an adapter's own [vocabulary, hidden] (`modules_to_save`)."""
    return TableForm(tokens=torch.arange(rows.shape[0]), rows=rows.float())
