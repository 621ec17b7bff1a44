"""One step: shares to tensors, through the base, back to rows. Knows nothing of queues, text or gRPC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterbay.server.attention import AttentionPlan, Segment
from adapterbay.server.batch import Phase, Row, Share
from adapterbay.server.kv import BLOCK_TOKENS, BlockPool, blocks_for
from adapterbay.server.layers import AdapterMix, Run
from adapterbay.server.model import ServingModel

Parts = tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave: logits for rows whose next token is due, states for rows that are pooled."""

    order: tuple[Share, ...]  # the shares in the order they were computed
    logits: Tensor | None  # [len(drawing), vocabulary]
    drawing: tuple[Row, ...]
    states: dict[Row, Tensor]  # [tokens of the share, hidden]


class Runner:
    """Builds each step's inputs. Between steps with the same rows, what does not change is kept."""

    def __init__(self, model: ServingModel, blocks: BlockPool) -> None:
        self._model = model
        self._blocks = blocks
        self._mix: AdapterMix | None = None
        self._mix_key: tuple[tuple[int, Parts], ...] = ()

    def run(self, shares: Sequence[Share]) -> StepResult:
        """Computes one step of `shares`: decoding rows first, then prefilling ones, as the scheduler gives them."""
        order = sorted(shares, key=lambda share: (share.row.phase is not Phase.DECODE, _parts(share.row)))
        self._blocks.zero_fresh()
        ids: list[int] = []
        positions: list[int] = []
        for share in order:
            ids.extend(share.row.tokens[share.start : share.start + share.count])
            positions.extend(range(share.start, share.start + share.count))
        drawing = tuple(share.row for share in order if share.row.generates and share.finishes_prompt)
        device = self._model.device
        logits_at = None
        if drawing:
            ends = {share.row: end for share, (_, end) in zip(order, _bounds(order), strict=True)}
            logits_at = torch.tensor([ends[row] - 1 for row in drawing], device=device)
        pooled = [share for share in order if share.row.pools]
        with torch.inference_mode():
            hidden, logits = self._model.forward(
                torch.tensor(ids, device=device),
                torch.tensor(positions, device=device),
                self._mix_of([(share.count, _parts(share.row)) for share in order]),
                self._attention(order),
                logits_at=logits_at,
                want_hidden=bool(pooled),
            )
        states = {}
        if pooled:
            assert hidden is not None
            states = {
                share.row: hidden[start:stop]
                for share, (start, stop) in zip(order, _bounds(order), strict=True)
                if share.row.pools
            }
        return StepResult(tuple(order), logits, drawing, states)

    def pool_first(self, rows: Sequence[Row], first: Tensor) -> Tensor:
        """The base's pooler over rows' first states [rows, hidden], each under its own adapters."""
        mix = self._new_mix([(1, _parts(row)) for row in rows])
        with torch.inference_mode():
            return self._model.pool(first, mix)

    def _mix_of(self, counts: list[tuple[int, Parts]]) -> AdapterMix | None:
        """Which token uses what. A mix stays valid while rows, order and counts do; plans look at pool layouts."""
        key = tuple(counts)
        if key != self._mix_key:
            self._mix, self._mix_key = self._new_mix(counts), key
        return self._mix

    def _new_mix(self, counts: Sequence[tuple[int, Parts]]) -> AdapterMix | None:
        runs: list[Run] = []
        at = 0
        for count, parts in counts:
            if runs and runs[-1].parts == parts and runs[-1].stop == at:
                runs[-1] = Run(runs[-1].start, at + count, parts)
            elif parts:
                runs.append(Run(at, at + count, parts))
            at += count
        return AdapterMix(at, runs, self._model.dtype, self._model.device) if runs else None

    def _attention(self, order: Sequence[Share]) -> AttentionPlan:
        if not self._model.causal:
            segments = tuple(Segment(start, stop, None) for start, stop in _bounds(order))
            return AttentionPlan(causal=False, segments=segments)
        device = self._model.device
        decoding = [share for share in order if share.row.phase is Phase.DECODE]
        tokens: list[int] = []
        slots: list[int] = []
        segments_list: list[Segment] = []
        for share, (start, stop) in zip(order, _bounds(order), strict=True):
            row = share.row
            if row.blocks:
                tokens.extend(range(start, stop))
                slots.extend(_slot(row, position) for position in range(share.start, share.start + share.count))
            if row.phase is not Phase.DECODE:
                earlier = (
                    [_slot(row, position) for position in range(share.start + share.count)] if share.start else None
                )
                segments_list.append(
                    Segment(start, stop, None if earlier is None else torch.tensor(earlier, device=device))
                )
        plan = AttentionPlan(causal=True, decode_rows=len(decoding), segments=tuple(segments_list), pool=self._blocks)
        if slots:
            plan.write_slots = torch.tensor(slots, device=device)
            if len(tokens) != sum(share.count for share in order):
                plan.write_tokens = torch.tensor(tokens, device=device)
        if decoding:
            lengths = [share.start + 1 for share in decoding]
            width = blocks_for(max(lengths))
            table = [(share.row.blocks[:width] + [0] * width)[:width] for share in decoding]
            plan.lengths = torch.tensor(lengths, device=device)
            plan.block_table = torch.tensor(table, device=device)
        return plan


def _parts(row: Row) -> Parts:
    weights = row.request.arm.parts
    return tuple((resident.key, part.weight) for resident, part in zip(row.residents, weights, strict=True))


def _slot(row: Row, position: int) -> int:
    return row.blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS


def _bounds(order: Sequence[Share]) -> list[tuple[int, int]]:
    """Where each share's tokens lie in the step."""
    bounds, at = [], 0
    for share in order:
        bounds.append((at, at + share.count))
        at += share.count
    return bounds
