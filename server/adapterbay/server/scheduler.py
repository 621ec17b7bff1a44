"""Which rows run in the next step. Composes the block pool and the adapters' slots; computes nothing itself.

A step takes, in this order: one token of every decoding row; chunks of rows whose prompt is under way; new groups, one
adapter after the other in turn, so that no adapter's burst keeps the others out. Blocks for the longest outcome are
taken at admission, so that a row that has started never has to give way.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import Protocol

from adapterbay.server.batch import Group, Phase, Row, Share
from adapterbay.server.kv import blocks_for


class Blocks(Protocol):
    """What the scheduler needs of the block pool."""

    @property
    def free_blocks(self) -> int: ...
    def take(self, count: int) -> list[int]: ...
    def give_back(self, blocks: Sequence[int]) -> None: ...


class Slots(Protocol):
    """What the scheduler needs of the adapters' device memory."""

    def seat(self, group: Group) -> bool:
        """Places every adapter of the group on the device and holds it there; False when there is no room now."""
        ...

    def leave(self, row: Row) -> None:
        """Lets go of one row's adapters."""
        ...


class Scheduler:
    """Waiting groups by turn, running rows in order of arrival."""

    def __init__(self, blocks: Blocks, slots: Slots, *, max_rows: int, step_tokens: int, chunked: bool) -> None:
        self._blocks = blocks
        self._slots = slots
        self._max_rows = max_rows
        self._step_tokens = step_tokens
        self._chunked = chunked  # False for encoders: a row goes whole or not at all
        self._queues: OrderedDict[tuple[str, ...], deque[Group]] = OrderedDict()
        self.running: list[Row] = []

    @property
    def waiting_rows(self) -> int:
        """Rows that have not entered the batch."""
        return sum(len(group.rows) for queue in self._queues.values() for group in queue)

    def waiting_groups(self) -> Iterator[Group]:
        """All waiting groups, in no particular order."""
        for queue in self._queues.values():
            yield from queue

    def add(self, group: Group) -> None:
        """Queues a group behind those of its own key."""
        self._queues.setdefault(group.fair_key, deque()).append(group)

    def drop(self, group: Group) -> None:
        """Takes a waiting group out."""
        queue = self._queues.get(group.fair_key)
        if queue is not None and group in queue:
            queue.remove(group)
            if not queue:
                del self._queues[group.fair_key]

    def finish(self, row: Row) -> None:
        """Frees everything that a running row holds."""
        self.running.remove(row)
        row.phase = Phase.DONE
        self._blocks.give_back(row.blocks)
        row.blocks = []
        self._slots.leave(row)

    def schedule(self) -> list[Share]:
        """The next step, decoding rows first; empty when nothing can run."""
        shares = [Share(row, row.computed, 1) for row in self.running if row.phase is Phase.DECODE]
        budget = max(self._step_tokens - len(shares), 0)
        for row in self.running:
            if row.phase is Phase.PREFILL and budget > 0:
                count = min(row.left, budget)
                shares.append(Share(row, row.computed, count))
                budget -= count
        while budget > 0 and (admitted := self._admit(budget, bool(shares))) is not None:
            shares.extend(admitted)
            budget -= sum(share.count for share in admitted)
        return shares

    def _admit(self, budget: int, busy: bool) -> list[Share] | None:
        """Starts the first group in turn, with its blocks and slots taken; None when none can start."""
        for key, queue in list(self._queues.items()):
            group = next((g for g in queue if g.ready), None)
            if group is None:
                continue
            shares = self._split(group, budget, busy)
            # Whoever is in turn waits for room; letting smaller ones pass would starve it.
            if shares is None:
                return None
            needed = {share.row: blocks_for(share.row.most_tokens) for share in shares if self._keeps(share)}
            if sum(needed.values()) > self._blocks.free_blocks or not self._slots.seat(group):
                return None
            for row in group.rows:
                row.phase = Phase.PREFILL
                row.blocks = self._blocks.take(needed.get(row, 0))
                self.running.append(row)
            queue.remove(group)
            if queue:
                self._queues.move_to_end(key)
            else:
                del self._queues[key]
            return shares
        return None

    def _split(self, group: Group, budget: int, busy: bool) -> list[Share] | None:
        """The group's first shares; None if they do not fit. All rows of a group begin in one step."""
        if len(self.running) + len(group.rows) > self._max_rows:
            return None
        if not self._chunked:
            if busy and sum(row.left for row in group.rows) > budget:
                return None
            return [Share(row, 0, row.left) for row in group.rows]
        if busy and len(group.rows) > budget:
            return None
        shares, rows_left = [], len(group.rows)
        for row in group.rows:
            rows_left -= 1
            count = max(min(row.left, budget - rows_left), 1)  # a token at least for each row that follows
            budget -= count
            shares.append(Share(row, 0, count))
        return shares

    def _keeps(self, share: Share) -> bool:
        """Whether a row must keep keys and values: not if its whole work is this one step."""
        return self._chunked and (share.row.max_new_tokens > 1 or not share.finishes_prompt)
