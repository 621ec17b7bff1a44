"""One step: shares to tensors, through the base, back to rows. Knows nothing of queues, text or gRPC."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterbay.server.adapters.forms import Prompt, lasting_key
from adapterbay.server.attention import AttentionPlan, Segment
from adapterbay.server.batch import Phase, Row, Share
from adapterbay.server.blocks import BLOCK_TOKENS, blocks_for
from adapterbay.server.kv import BlockPool
from adapterbay.server.mix.context import step_context
from adapterbay.server.mix.plan import AdapterMix, Run
from adapterbay.server.model import ServingModel
from adapterbay.server.weights import Weight

Parts = tuple[tuple[str, Weight], ...]
Stretch = tuple[Share, int, int]
"""A share and which of the step's tokens are its own, [start, stop)."""


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
        parts = {share.row: _parts(share.row) for share in shares}
        order = sorted(shares, key=lambda share: (share.row.phase is not Phase.DECODE, parts[share.row]))
        self._blocks.zero_dirty()
        self._write_prefixes(order)
        states = self._encode(order)
        computed, order = order, [share for share in order if not share.row.encoded_only]
        if not order:
            return StepResult(tuple(computed), None, (), states)
        ids: list[int] = []
        positions: list[int] = []
        for share in order:
            ids.extend(share.row.tokens[share.start : share.start + share.count])
            positions.extend(self._positions(share))
        drawing = tuple(share.row for share in order if share.row.generates and share.finishes_prompt)
        device = self._model.device
        logits_at = None
        stretches = _stretches_of(order)
        if drawing:
            ends = {share.row: end for share, _, end in stretches}
            logits_at = torch.tensor([ends[row] - 1 for row in drawing], device=device)
        pooled = [share for share in order if share.row.pools]
        with torch.inference_mode(), self._virtual(stretches):
            hidden, logits = self._model.forward(
                torch.tensor(ids, device=device),
                torch.tensor(positions, device=device),
                self._mix_of([run for share in order for run in _runs(share, parts[share.row])]),
                self._attention(stretches),
                logits_at=logits_at,
                want_hidden=bool(pooled),
            )
        if pooled:
            assert hidden is not None
            states |= {share.row: hidden[start:stop] for share, start, stop in stretches if share.row.pools}
        return StepResult(tuple(computed), logits, drawing, states)

    def forget(self) -> None:
        """Lets go of what is kept between steps: it refers to what is resident."""
        self._mix, self._mix_key = None, ()
        if self._model.fast is not None:
            self._model.fast.forget()

    def pool_first(self, rows: Sequence[Row], first: Tensor) -> Tensor:
        """The base's pooler over rows' first states [rows, hidden], each under its own adapters."""
        mix = self._new_mix([(1, _parts(row)) for row in rows])
        with torch.inference_mode():
            return self._model.pool(first, mix)

    def _encode(self, order: Sequence[Share]) -> dict[Row, Tensor]:
        """Has an encoder-decoder's encoder read the texts of rows that begin. Returns the states of those that end
        with that; for the others, what their decoder will look at goes to the cache."""
        if self._model.seq2seq is None:
            return {}
        begun = [share.row for share in order if share.begins]
        texts = [(row, row.source) for row in begun]
        texts += [(share.row, tuple(share.row.tokens)) for share in order if share.row.encoded_only]
        if not texts:
            return {}
        ends = list(itertools.accumulate(len(text) for _, text in texts))
        segments = tuple(Segment(end - len(text), end, None) for (_, text), end in zip(texts, ends, strict=True))
        device = self._model.device
        ids = torch.tensor([token for _, text in texts for token in text], device=device)
        mix = self._new_mix([(len(text), _parts(row)) for row, text in texts])
        with torch.inference_mode():
            virtual = self._virtual_tokens(
                (segment.start, row.source_prompt or row.prompt, 0, len(text))
                for (row, text), segment in zip(texts, segments, strict=True)
            )
            plan = AttentionPlan(causal=False, segments=segments, kernels=self._model.kernels.loaded)
            encoded = self._model.seq2seq.encode(ids, mix, plan, virtual)
            if begun:
                slots = torch.tensor([slot for row in begun for slot in _source_slots(row)], device=device)
                mix = self._new_mix([(len(row.source), _parts(row)) for row in begun])
                self._model.seq2seq.remember(encoded[: len(slots)], mix, slots, self._blocks)
        return {
            row: encoded[segment.start : segment.stop]
            for (row, _), segment in zip(texts, segments, strict=True)
            if row.encoded_only
        }

    def _sources(self, stretches: Sequence[Stretch]) -> AttentionPlan:
        """What an encoder-decoder's decoder looks at beside its own tokens: each row at all of its text."""
        device = self._model.device
        decoding = [share.row for share, _, _ in stretches if share.row.phase is Phase.DECODE]
        segments = tuple(
            Segment(start, stop, torch.tensor(_source_slots(share.row), device=device))
            for share, start, stop in stretches
            if share.row.phase is not Phase.DECODE
        )
        plan = AttentionPlan(causal=False, decode_rows=len(decoding), segments=segments, pool=self._blocks)
        if decoding:
            width = max(len(row.source_blocks) for row in decoding)
            table = [(row.source_blocks + [0] * width)[:width] for row in decoding]
            plan.block_table = torch.tensor(table, device=device)
            plan.lengths = torch.tensor([len(row.source) for row in decoding], device=device)
        return plan

    def _write_prefixes(self, order: Sequence[Share]) -> None:
        """Puts into the cache what rows that start bring with them."""
        for row in (share.row for share in order if share.row.prefix_due is not None):
            prefix, due = row.prefix, row.prefix_due
            assert prefix is not None
            assert due is not None
            slots = torch.tensor([_slot(row, at) for at in range(due, prefix.count)], device=self._model.device)
            self._blocks.write(slots, [keys[due:] for keys in prefix.keys], [values[due:] for values in prefix.values])
            row.prefix_due = None

    @contextmanager
    def _virtual(self, stretches: Sequence[Stretch]) -> Iterator[None]:
        """A context in which the input embedding gives virtual tokens what their adapters say."""
        step_context.virtual = self._virtual_tokens(
            (start, share.row.prompt, share.start, share.count) for share, start, _ in stretches
        )
        try:
            yield
        finally:
            step_context.virtual = None

    def _virtual_tokens(self, stretches: Iterable[tuple[int, Prompt | None, int, int]]) -> tuple[Tensor, Tensor] | None:
        """What `StepContext.virtual` says, of (where in the step, a row's prompt, from which position, how many)."""
        indices: list[int] = []
        embeddings: list[Tensor] = []
        for at, prompt, start, count in stretches:
            if prompt is not None and start < prompt.count:
                part = prompt.embeddings[start : start + count]
                indices.extend(range(at, at + len(part)))
                embeddings.append(part)
        if not embeddings:
            return None
        device = self._model.device
        return torch.tensor(indices, device=device), torch.cat(embeddings).to(device, self._model.dtype)

    def _positions(self, share: Share) -> Sequence[int]:
        """Of the share's tokens, counted from 0. RoBERTa and its kin count no padding tokens, which all have the place
        before the first (`create_position_ids_from_input_ids`); behind a prompt they see none."""
        row, padding = share.row, self._model.padding
        plain = range(share.start, share.start + share.count)
        if not self._model.offset or row.prompt is not None or padding not in row.tokens[share.start : plain.stop]:
            return plain
        skipped = 0
        positions = []
        for at in plain:  # an encoder's text goes whole
            is_padding = row.tokens[at] == padding
            positions.append(-1 if is_padding else at - skipped)
            skipped += is_padding
        return positions

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
        if not runs:
            return None
        return AdapterMix(at, runs, self._model.dtype, self._model.device, kernels=self._model.kernels.loaded)

    def _attention(self, stretches: Sequence[Stretch]) -> AttentionPlan:
        if not self._model.causal:
            segments = tuple(Segment(start, stop, None, share.row.prefix) for share, start, stop in stretches)
            return AttentionPlan(causal=False, segments=segments, kernels=self._model.kernels.loaded)
        device = self._model.device
        decoding = [share for share, _, _ in stretches if share.row.phase is Phase.DECODE]
        tokens: list[int] = []
        slots: list[int] = []
        segments_list: list[Segment] = []
        for share, start, stop in stretches:
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
        plan = AttentionPlan(
            causal=True,
            decode_rows=len(decoding),
            segments=tuple(segments_list),
            pool=self._blocks,
            kernels=self._model.kernels.loaded,
        )
        if slots:
            plan.write_slots = torch.tensor(slots, device=device)
            if len(tokens) != stretches[-1][2]:
                plan.write_tokens = torch.tensor(tokens, device=device)
        if decoding:
            lengths = [share.start + 1 for share in decoding]
            width = blocks_for(max(lengths))
            table = [(share.row.blocks[:width] + [0] * width)[:width] for share in decoding]
            plan.lengths = torch.tensor(lengths, device=device)
            plan.block_table = torch.tensor(table, device=device)
        if self._model.seq2seq is not None:
            plan.sources = self._sources(stretches)
        return plan


def _parts(row: Row) -> Parts:
    applied = row.request.arm.key
    parts = tuple((resident.key, weight) for resident, (_, weight) in zip(row.residents, applied, strict=True))
    return parts + _lasting(row)


def _lasting(row: Row) -> Parts:
    """What of an activated row is on from its first token."""
    applied = zip(row.residents, row.request.arm.key, strict=True)
    return tuple((lasting_key(resident.key), weight) for resident, (_, weight) in applied if resident.ready.lasts)


def _runs(share: Share, parts: Parts) -> list[tuple[int, Parts]]:
    """How many of the share's tokens are computed with what, in order: with all `parts` of its row from its activation
    on. Before that a row is the base, but for what lasts."""
    row = share.row
    before = min(max(row.active_from - share.start, 0), share.count)
    runs: list[tuple[int, Parts]] = [(before, _lasting(row) if before else ()), (share.count - before, parts)]
    return [run for run in runs if run[0]]


def _slot(row: Row, position: int) -> int:
    return row.blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS


def _source_slots(row: Row) -> list[int]:
    """Where what the decoder sees of a row's text lies in the cache."""
    return [row.source_blocks[at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS for at in range(len(row.source))]


def _stretches_of(order: Sequence[Share]) -> list[Stretch]:
    """Where each share's tokens lie in the step."""
    stretches, at = [], 0
    for share in order:
        stretches.append((share, at, at + share.count))
        at += share.count
    return stretches
