"""The key/value cache in blocks of one pool. Knows nothing of requests: callers hold block numbers.

Block 0 is never given out; it stays zero and pads block tables. A block is zeroed when it is given out, so nothing
of an earlier row, not even a NaN in its unused tail, can reach a later one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One attention layer's cache: key/value heads, and the sizes of a key and of a value."""

    heads: int
    key_size: int
    value_size: int

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that one token takes in this layer."""
        return self.heads * (self.key_size + self.value_size) * dtype.itemsize


class BlockPool:
    """Free list and storage. `keys[layer]` is [blocks · BLOCK_TOKENS, heads, key size], values likewise."""

    def __init__(
        self, layers: Sequence[LayerShape], budget_bytes: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        block_bytes = BLOCK_TOKENS * sum(layer.token_bytes(dtype) for layer in layers)
        self.blocks = budget_bytes // block_bytes if block_bytes else 0
        slots = (self.blocks + 1) * BLOCK_TOKENS
        # On a CPU untouched zero pages take no memory, so the budget is a limit and not a cost.
        self.keys = [torch.zeros(slots, s.heads, s.key_size, dtype=dtype, device=device) for s in layers]
        self.values = [torch.zeros(slots, s.heads, s.value_size, dtype=dtype, device=device) for s in layers]
        self._free = list(range(self.blocks, 0, -1))
        self._fresh: list[int] = []

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Gives out `count` blocks. The caller has checked that there are as many."""
        if count > len(self._free):
            raise RuntimeError(f"{count} blocks asked of {len(self._free)} free ones")
        taken = [self._free.pop() for _ in range(count)]
        self._fresh.extend(taken)
        return taken

    def give_back(self, blocks: Sequence[int]) -> None:
        """Takes blocks back."""
        self._free.extend(blocks)

    def zero_fresh(self) -> None:
        """Zeroes what was given out since the last call; run before the step that writes to it."""
        if not self._fresh:
            return
        fresh, self._fresh = torch.tensor(self._fresh), []
        for store in (*self.keys, *self.values):
            store.view(-1, BLOCK_TOKENS, *store.shape[1:]).index_fill_(0, fresh.to(store.device), 0)


def blocks_for(tokens: int) -> int:
    """How many blocks hold `tokens` tokens."""
    return -(-tokens // BLOCK_TOKENS)
