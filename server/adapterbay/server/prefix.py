"""Names of full blocks of the key/value cache: equal names, equal keys and values.

What lies in a block depends on the computation (digests with weights, never names of adapters: a name can get other
weights), on the block's tokens and on all tokens before. So a block's name is a chained hash,

    name_i = SHA-256(name_{i-1} ‖ tokens_i ‖ what is on from where in the block)        name_{-1} = seed

as in vLLM's automatic prefix caching, with a hash that nobody can make collide.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from array import array
from collections.abc import Sequence

from adapterbay.server.blocks import BLOCK_TOKENS


def seed(identity: object, virtual_tokens: int = 0) -> bytes:
    """Where the names of one computation begin. `identity` consists of tuples, texts, numbers, None and dataclasses of
    these; which virtual tokens stand at the first positions follows from it. Raises TypeError for anything else."""
    text = json.dumps([identity, virtual_tokens], default=_plain)
    return hashlib.sha256(text.encode()).digest()


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {type(value).__name__: [getattr(value, field.name) for field in dataclasses.fields(value)]}
    raise TypeError(f"{type(value).__name__} is no identity")


class BlockNames:
    """One row's names, each made once.

    `activation` is (position, seed): from that position on the row is another computation than before (aLoRA). Blocks
    that end before it are those of the computation before.
    """

    def __init__(self, seed: bytes, activation: tuple[int, bytes] | None = None) -> None:
        self._last = seed
        self._activation = activation
        self._names: list[bytes] = []

    def first(self, tokens: Sequence[int], count: int) -> list[bytes]:
        """The names of the first `count` blocks of `tokens`, which may only have grown since the last call."""
        for index in range(len(self._names), count):
            start = index * BLOCK_TOKENS
            content = array("q", tokens[start : start + BLOCK_TOKENS]).tobytes()
            self._last = hashlib.sha256(self._last + content + self._mark(start)).digest()
            self._names.append(self._last)
        return self._names[:count]

    def _mark(self, start: int) -> bytes:
        """Nothing before the activation; then from where on in the block the other computation is at work."""
        if self._activation is None or start + BLOCK_TOKENS <= self._activation[0]:
            return b""
        return self._activation[1] + max(self._activation[0] - start, 0).to_bytes(1, "big")
