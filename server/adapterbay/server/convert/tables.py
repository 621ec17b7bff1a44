"""What adapters do to the embedding and to a language-model head that shares its table."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from adapterbay.registry import AdmissionReport
from adapterbay.registry.errors import Rejected
from adapterbay.server.adapters.forms import LowRank, TableForm
from adapterbay.server.convert.direct import ADAPTER, rotation_of
from adapterbay.server.mix.table import table_factor

_SAVED_TWICE: Final = (("weight", "weight", False),)
_ADAPTED_TWICE: Final = (("lora_embedding_A", "lora_B.weight", True), ("lora_embedding_B", "lora_A.weight", True))
"""The embedding's tensor, the head's, and whether the one is the other, transposed."""


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


def check_tied(report: AdmissionReport, tensors: Mapping[str, Tensor], tables: Iterable[str]) -> None:
    """PEFT holds tied tensors once and saves them twice, at the embedding and at the head. Raises Rejected (with reason
    UNKNOWN_TENSOR) for two that differ. `tables`: the paths of input embeddings."""
    if report.tying is None:
        return
    sites = report.saved if report.tying == "saved" else report.sites
    pairs = _SAVED_TWICE if report.tying == "saved" else _ADAPTED_TWICE
    kept = [site for site in sites if site.kind == "embedding" and site.base_name.endswith(tuple(tables))]
    for table, head in itertools.product(kept, (site for site in sites if site.kind == "output")):
        for mine, other, turned in pairs:
            ours, theirs = tensors[table.tensors[mine]], tensors[head.tensors[other]]
            if not torch.equal(ours, theirs.t() if turned else theirs):
                raise Rejected(
                    f"{head.name} is tied to {table.name} (ensure_weight_tying), and their tensors differ.",
                    reason="UNKNOWN_TENSOR",
                    metadata={"module": head.name},
                )


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


def read_table(method: str, layer: Any) -> TableForm | None:
    """PEFT's layer over an embedding, which it does not change; None for a method that is not read here.

    PEFT multiplies what HiRA and TinyLoRA add to a row with no factor of the table's own (Gemma's), as it does with
    LoRA's.
    """
    if method == "OFT":
        return TableForm(rotation=rotation_of(layer.oft_embedding_R[ADAPTER].float()))
    if method == "HIRA":
        a, b = layer.hira_embedding_A[ADAPTER], layer.hira_embedding_B[ADAPTER]
        return TableForm(gain=LowRank(a.detach().float(), b.detach().float().t().contiguous(), 1.0))
    if method == "TINYLORA":
        inner = layer._compute_R(ADAPTER).detach().float()
        a, b = layer.tinylora_B[ADAPTER].float(), inner @ layer.tinylora_A[ADAPTER].float()
        factor = table_factor(layer.get_base_layer())
        return TableForm(low_rank=LowRank(a.t().contiguous(), b.contiguous(), 1.0 / factor))
    return None


def whole_table(rows: Tensor) -> TableForm:
    """A whole embedding of an adapter's own [vocabulary, hidden] (`modules_to_save`)."""
    return TableForm(tokens=torch.arange(rows.shape[0]), rows=rows.float())
