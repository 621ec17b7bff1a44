"""Who holds which block of the key/value cache, and what blocks that nobody holds still contain. Without torch.

A full block has a name, the hash of everything that its keys and values depend on (`prefix`). Rows with equal
beginnings hold the same blocks. A block that nobody holds keeps its name and its content until it is given out again,
blocks without a name first, then the least recently used; from that moment on nobody finds it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

BLOCK_TOKENS = 16


def blocks_for(tokens: int) -> int:
    """How many blocks hold `tokens` tokens."""
    return -(-tokens // BLOCK_TOKENS)


class BlockLedger:
    """Blocks 1 to `blocks`; block 0 is never given out."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._empty = list(range(blocks, 0, -1))  # held by nobody, without a name
        self._kept: OrderedDict[int, None] = OrderedDict()  # held by nobody, with one; the least recently used first
        self._holders = [0] * (blocks + 1)
        self._name_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._used = bytearray(blocks + 1)
        self._dirty: list[int] = []

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody holds, those with a name included."""
        return len(self._empty) + len(self._kept)

    def find(self, names: Sequence[bytes]) -> list[int]:
        """The blocks of the longest beginning of `names` that is there. They are not held yet."""
        found = []
        for name in names:
            block = self._block_of.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def unheld(self, blocks: Sequence[int]) -> int:
        """How many different ones of `blocks` nobody holds: so many free ones less there will be once they are held."""
        return sum(not self._holders[block] for block in set(blocks))

    def hold(self, blocks: Sequence[int]) -> None:
        """One more row reads these blocks, which were found."""
        for block in blocks:
            if not self._holders[block]:
                del self._kept[block]
            self._holders[block] += 1

    def take(self, count: int) -> list[int]:
        """Gives out `count` blocks to write to. The caller has checked that there are as many."""
        if count > self.free_blocks:
            raise RuntimeError(f"{count} blocks asked of {self.free_blocks} free ones")
        taken = []
        for _ in range(count):
            block = self._empty.pop() if self._empty else self._kept.popitem(last=False)[0]
            name = self._name_of.pop(block, None)
            if name is not None:
                del self._block_of[name]
            if self._used[block]:
                self._dirty.append(block)
            self._used[block] = 1
            self._holders[block] = 1
            taken.append(block)
        return taken

    def give_back(self, blocks: Sequence[int]) -> None:
        """One row less holds these blocks. Of a row's blocks the last ones will go first."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._name_of:
                self._kept[block] = None
            else:
                self._empty.append(block)

    def name(self, block: int, name: bytes) -> None:
        """A held block is full from now on and can be found; unless another one has that name already."""
        if name not in self._block_of:
            self._block_of[name] = block
            self._name_of[block] = name

    def drain_dirty(self) -> list[int]:
        """What was given out since the last call and had been used before."""
        dirty, self._dirty = self._dirty, []
        return dirty
