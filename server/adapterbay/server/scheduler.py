"""Which rows run in the next step. Composes the block ledger and the adapters' slots; computes nothing itself.

A step takes, in this order: one token of every decoding row; chunks of rows whose prompt is under way; new groups, one
adapter after the other in turn, so that no adapter's burst keeps the others out.

A row takes the blocks of its prompt when it starts, those that others have computed already as they are, and one more
whenever it has grown into it. When there is none, the youngest group that runs gives way, whole, since its rows must
run together: it waits at the head of its queue, with the first turn, and computes its tokens again later. So the
oldest group never gives way to anybody, and every group becomes the oldest. A group starts only if a block is left for
every row that will grow, so that nobody starts to be preempted at once.

A row whose next block is being computed by a running row waits until it is there; meanwhile others may start.
"""

from __future__ import annotations

import enum
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import Protocol

from adapterbay.server.batch import Group, Phase, Row, Share
from adapterbay.server.blocks import BLOCK_TOKENS, BlockLedger, blocks_for

KEPT_TOKENS = 64
"""A prompt that one step computes whole leaves its blocks to others if it is at least so long. What can be saved on
shorter ones is less than what they push out of the cache."""


class Seat(enum.Enum):
    """Whether a group's adapters are on the device."""

    TAKEN = "taken"
    FULL = "full"  # there is no room now
    LATER = "later"  # they have their room, and not all of them fitted into what one step places


class Slots(Protocol):
    """What the scheduler needs of the adapters' device memory."""

    def renew(self) -> None:
        """A step begins, in which so much may be placed again."""
        ...

    def seat(self, group: Group, *, alone: bool) -> Seat:
        """Places every adapter of the group on the device and holds it there. Part by part over several steps if need
        be, unless the group is `alone`: then nobody waits for the copying."""
        ...

    def leave(self, row: Row) -> None:
        """Lets go of one row's adapters."""
        ...


class Scheduler:
    """Waiting groups by turn, running rows in order of arrival."""

    def __init__(self, blocks: BlockLedger, slots: Slots, *, max_rows: int, step_tokens: int, chunked: bool) -> None:
        self._blocks = blocks
        self._slots = slots
        self._max_rows = max_rows
        self._step_tokens = step_tokens
        self._chunked = chunked  # False for encoders: a row goes whole or not at all
        self._queues: OrderedDict[tuple[str, ...], deque[Group]] = OrderedDict()
        self._serial = 0
        self._group_of: dict[Row, Group] = {}
        self._under_way: dict[bytes, Row] = {}  # names of blocks that a running row will have computed
        self._unseated: list[tuple[Group, Exception]] = []
        self.running: list[Row] = []
        self.preemptions = 0  # rows
        self.reusable_tokens = 0  # tokens of rows that looked for blocks of others
        self.reused_tokens = 0  # tokens that they found

    @property
    def empty(self) -> bool:
        """Whether nobody waits or runs and every block is back."""
        known = self.running or self._queues or self._group_of or self._under_way
        return not known and self._blocks.free_blocks == self._blocks.blocks

    @property
    def waiting_rows(self) -> int:
        """Rows that have not entered the batch, or have had to leave it."""
        return sum(len(group.rows) for queue in self._queues.values() for group in queue)

    def waiting_groups(self) -> Iterator[Group]:
        """All waiting groups, in no particular order."""
        for queue in self._queues.values():
            yield from queue

    def add(self, group: Group) -> None:
        """Queues a group behind those of its own key."""
        self._serial += 1
        group.serial = self._serial
        self._queues.setdefault(group.fair_key, deque()).append(group)

    def drop(self, group: Group) -> None:
        """Takes a waiting group out."""
        queue = self._queues.get(group.fair_key)
        if queue is not None and group in queue:
            queue.remove(group)
            if not queue:
                del self._queues[group.fair_key]
        for row in group.rows:
            self._group_of.pop(row, None)

    def finish(self, row: Row) -> None:
        """Frees everything that a running row holds, or takes one that was preempted out of its group."""
        group = self._group_of.pop(row)
        if row.phase is Phase.WAITING:
            group.rows.remove(row)
            if not group.rows:
                self.drop(group)
        else:
            self.running.remove(row)
            self._release(row)
        row.phase = Phase.DONE

    def advance(self, share: Share) -> None:
        """A share was computed: its row's full blocks can be found from now on."""
        row = share.row
        row.computed += share.count
        full = row.computed // BLOCK_TOKENS
        if row.names is None or not row.blocks or full <= row.named:
            return
        for index, name in enumerate(row.names.first(row.tokens, full)[row.named :], row.named):
            self._blocks.name(row.blocks[index], name)
            self._under_way.pop(name, None)
        row.named = full

    def take_unseated(self) -> list[tuple[Group, Exception]]:
        """Groups whose adapters could not be placed, and why. They still wait, and do not try again."""
        unseated, self._unseated = self._unseated, []
        return unseated

    def schedule(self) -> list[Share]:
        """The next step, decoding rows first; empty when nothing can run."""
        self._slots.renew()
        grown = [row for row in list(self.running) if row.phase is Phase.DECODE and self._grow(row)]
        # A row that gave way to its own group's next one is in `grown` and does not run.
        shares = [Share(row, row.computed, 1) for row in grown if row.phase is Phase.DECODE]
        budget = max(self._step_tokens - len(shares), 0)
        for row in self.running:
            if row.phase is Phase.PREFILL and budget > 0:
                count = min(row.left, budget)
                shares.append(Share(row, row.computed, count))
                budget -= count
        while budget > 0 and (admitted := self._admit(budget, bool(shares))) is not None:
            shares.extend(admitted)
            budget -= sum(share.cost for share in admitted)
        return shares

    def _grow(self, row: Row) -> bool:
        """Sees to it that a decoding row has a block for its next token; False when it has given way itself."""
        while row.phase is Phase.DECODE and blocks_for(row.computed + 1) > len(row.blocks):
            if self._blocks.free_blocks:
                row.blocks.extend(self._blocks.take(1))
            else:
                self._preempt(self._group_of[self.running[-1]])
        return row.phase is Phase.DECODE

    def _preempt(self, group: Group) -> None:
        """Takes a running group out of the batch; it keeps its tokens and loses everything else."""
        group.rows = [row for row in group.rows if row.phase is not Phase.DONE]
        group.begun = True
        for row in group.rows:
            self.running.remove(row)
            self._release(row)
            row.phase, row.computed, row.named, row.prefix_due = Phase.WAITING, 0, 0, None
        self.preemptions += len(group.rows)
        self._queues.setdefault(group.fair_key, deque()).appendleft(group)
        self._queues.move_to_end(group.fair_key, last=False)

    def _release(self, row: Row) -> None:
        if row.names is not None and row.phase is not Phase.DECODE:
            for name in [name for name, owner in self._under_way.items() if owner is row]:
                del self._under_way[name]
        self._blocks.give_back([*row.source_blocks, *row.blocks])
        row.blocks, row.source_blocks = [], []
        self._slots.leave(row)

    def _admit(self, budget: int, busy: bool) -> list[Share] | None:
        """Starts the first group in turn, with its blocks and slots taken; None when none can start."""
        if len(self.running) >= self._max_rows:
            return None
        later = 0
        for key, queue in list(self._queues.items()):
            group = next((g for g in queue if g.ready and not self._must_wait(g)), None)
            if group is None:
                continue
            found = [self._blocks.find(self._reusable(row)) for row in group.rows]
            shares = self._split(group, found, budget, busy)
            # Whoever is in turn waits for room; letting smaller ones pass would starve it.
            if shares is None or not self._fits(shares, found):
                return None
            seat = self._seat(group, busy)
            if seat is Seat.FULL:
                return None
            if seat is not Seat.TAKEN:  # the others need not wait for the copying; its room and its turn are kept
                later += 1
                if later == self._max_rows:
                    return None
                continue
            queue.remove(group)
            if queue:
                self._queues.move_to_end(key)
            else:
                del self._queues[key]
            self._start(group, shares, found)
            return shares
        return None

    def _seat(self, group: Group, busy: bool) -> Seat | None:
        """None when its adapters cannot be placed at all, which harms nobody else."""
        try:
            return self._slots.seat(group, alone=not (busy or self.running))
        except Exception as error:  # noqa: BLE001 - whatever it is, the group's callers hear of it
            group.ready = False
            self._unseated.append((group, error))
            return None

    def _reusable(self, row: Row) -> list[bytes]:
        """The names of the blocks that a row could take from others: at least its last token it computes itself."""
        if row.names is None or not row.reuses:
            return []
        return row.names.first(row.tokens, (len(row.tokens) - 1) // BLOCK_TOKENS)

    def _must_wait(self, group: Group) -> bool:
        """Whether a running row is about to compute a block that one of the group would have to compute, too."""
        for row in group.rows if self._under_way else ():
            names = self._reusable(row)
            found = len(self._blocks.find(names))
            if found < len(names) and names[found] in self._under_way:
                return True
        return False

    def _split(self, group: Group, found: Sequence[Sequence[int]], budget: int, busy: bool) -> list[Share] | None:
        """The group's first shares; None if they do not fit. All rows of a group begin in one step."""
        if len(self.running) + len(group.rows) > self._max_rows:
            return None
        starts = [max(len(blocks) * BLOCK_TOKENS, row.placed) for row, blocks in zip(group.rows, found, strict=True)]
        left = [len(row.tokens) - start for row, start in zip(group.rows, starts, strict=True)]
        whole = sum(left) + sum(len(row.source) for row in group.rows)
        if busy and (len(group.rows) if self._chunked else whole) > budget:
            return None
        shares = []
        for index, row in enumerate(group.rows):
            count = left[index]
            if self._chunked:  # a token at least for each row that follows
                count = max(min(count, budget - (len(group.rows) - index - 1)), 1)
            budget -= count
            shares.append(Share(row, starts[index], count))
        return shares

    def _fits(self, shares: Sequence[Share], found: Sequence[Sequence[int]]) -> bool:
        """Whether there are blocks for the prompts and, unless nobody else runs, one more for each row that grows."""
        held = {share.row: blocks_for(len(share.row.tokens)) for share in shares if self._keeps(share)}
        reused = [block for blocks in found for block in blocks]
        needed = sum(blocks_for(len(share.row.source)) for share in shares)
        needed += sum(held.values()) - len(reused) + self._blocks.unheld(reused)
        if self.running:
            held |= {row: len(row.blocks) for row in self.running if row.blocks}
            needed += sum(blocks_for(row.most_tokens) > blocks for row, blocks in held.items())
        return needed <= self._blocks.free_blocks

    def _start(self, group: Group, shares: Sequence[Share], found: Sequence[Sequence[int]]) -> None:
        """Gives a group's rows what they were found to have room for."""
        for blocks in found:  # all of them, before taking a new block can push one out
            self._blocks.hold(blocks)
        for share, blocks in zip(shares, found, strict=True):
            row = share.row
            row.phase, row.computed, row.named = Phase.PREFILL, share.start, len(blocks)
            row.blocks = list(blocks)
            row.source_blocks = self._blocks.take(blocks_for(len(row.source)))
            if row.names is not None and row.reuses and not group.begun:
                self.reusable_tokens += len(row.tokens)
                self.reused_tokens += len(blocks) * BLOCK_TOKENS
            if self._keeps(share):
                row.blocks += self._blocks.take(blocks_for(len(row.tokens)) - len(blocks))
                if len(blocks) * BLOCK_TOKENS < row.placed:
                    row.prefix_due = len(blocks) * BLOCK_TOKENS
                if row.names is not None:
                    full = row.names.first(row.tokens, len(row.tokens) // BLOCK_TOKENS)
                    self._under_way |= {name: row for name in full[len(blocks) :] if name not in self._under_way}
            self._group_of[row] = group
            self.running.append(row)
        self.running.sort(key=lambda row: self._group_of[row].serial)

    def _keeps(self, share: Share) -> bool:
        """Whether a row keeps keys and values. One whose whole work is one step does for others' sake only."""
        row = share.row
        if row.source:
            return row.max_new_tokens > 1 or row.placed > 0
        if not self._chunked:
            return False
        if row.max_new_tokens > 1 or share.start or not share.finishes_prompt:
            return True
        return row.names is not None and row.reuses and len(row.tokens) >= KEPT_TOKENS
