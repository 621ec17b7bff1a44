"""The key/value cache in blocks of one pool. Knows nothing of requests: callers hold block numbers.

Block 0 is never given out; it stays zero and pads block tables. A block that was used before is zeroed when it is given
out again, so nothing of an earlier row, not even a NaN in its unused tail, can reach a later one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterbay.server.blocks import BLOCK_TOKENS, BlockLedger


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
    """Storage. `keys[layer]` is [blocks · BLOCK_TOKENS, heads, key size], values likewise; `ledger` says whose they
    are."""

    def __init__(
        self, layers: Sequence[LayerShape], budget_bytes: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        block_bytes = BLOCK_TOKENS * sum(layer.token_bytes(dtype) for layer in layers)
        self.ledger = BlockLedger(budget_bytes // block_bytes if block_bytes else 0)
        slots = (self.ledger.blocks + 1) * BLOCK_TOKENS
        # On a CPU untouched zero pages take no memory, so the budget is a limit and not a cost.
        self.keys = [torch.zeros(slots, s.heads, s.key_size, dtype=dtype, device=device) for s in layers]
        self.values = [torch.zeros(slots, s.heads, s.value_size, dtype=dtype, device=device) for s in layers]

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return self.ledger.blocks

    @property
    def free_blocks(self) -> int:
        """Blocks that no row holds."""
        return self.ledger.free_blocks

    def zero_dirty(self) -> None:
        """Zeroes what was given out a second time since the last call; run before the step that writes to it."""
        dirty = self.ledger.drain_dirty()
        if not dirty:
            return
        blocks = torch.tensor(dirty)
        for store in (*self.keys, *self.values):
            store.view(-1, BLOCK_TOKENS, *store.shape[1:]).index_fill_(0, blocks.to(store.device), 0)

    def write(self, slots: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Writes keys and values that nobody computed: `keys[layer]` [len(slots), heads, size], values likewise."""
        for stores, given in ((self.keys, keys), (self.values, values)):
            for store, new in zip(stores, given, strict=True):
                store.index_copy_(0, slots, new.to(store.device, store.dtype))
