"""What an engine must be able to do so that the adapter-isolation suite can examine it.

The suite asks one question of a server of many adapters over one base: does every request get the answer of its own
adapter, whatever happens around it? Names are pushed again while prefixes are cached, slots are reused, memory is too
small, rows are cancelled, loads fail. The right answer is always that of plain PEFT with that adapter alone.

To examine an engine of your own, write the two things below and name the factory:

    pytest tests/isolation --isolation-engine mypackage.mymodule:start

`start(base, work, limits)` is a `Factory`: it starts an engine over the base model in the folder `base` (a tiny Llama
in float32, as `save_pretrained` writes it, with its tokenizer) and returns an `EngineUnderTest`. The engine works in
float32, greedily, and does not end at an end token. `work` is an empty folder of the engine's own. The suite makes
adapters with PEFT and hands them over with `push`. What an engine cannot do at all it leaves out of `features`, and the
tests that need it are skipped with that as the reason. `example.py` is a small engine to begin from.

The suite imports pytest, torch, transformers (with its tokenizers), peft and safetensors, and `tests/tiny.py`. Only
`ours.py` imports adapterbay, and only when our own engine is examined. Where adapterbay is not installed, leave out
what sets up the rest of our tests:

    pytest --confcutdir tests/isolation tests/isolation --isolation-engine mypackage.mymodule:start
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

from torch import Tensor

Selection = str | Mapping[str, float] | None
"""What answers: an adapter by name, a weighted fusion of adapters, or the base alone."""

Feature = Literal[
    "fusion", "classify", "methods", "unload", "cancel", "alias", "versions", "stats", "tamper", "slow-loads"
]
"""What not every engine can do. `fusion`: a weighted sum of adapters, per request. `classify`: an adapter's own head.
`methods`: IA³, prompts and prefixes beside LoRA. `unload`: memory is given back on demand. `cancel`: a row ends before
it is done. `alias`: `NAME@ALIAS` means a version, and can be moved. `versions`: `NAME@1` means the first push for ever.
`stats`: bytes and counts can be read. `tamper`: the stored weights are files that a test can change. `slow-loads`:
loads can be held up, as by a slow disk."""

EVERYTHING: frozenset[Feature] = frozenset(get_args(Feature))


class Failed(Exception):
    """A request, a push or a load that the engine refused or could not do. `str()` is what a user gets to read."""


@dataclass(frozen=True)
class Limits:
    """How much room the engine gets. `adapter_bytes` is what one of the suite's adapters takes in float32; all adapters
    of a test are of that size, or smaller. `cache_bytes` is for keys and values in float32. None is: as much as it
    likes. An engine with one tier keeps to the smaller of the two."""

    rows: int = 8
    host_adapters: int | None = None
    device_adapters: int | None = None
    adapter_bytes: int = 0
    cache_bytes: int | None = None


@dataclass(frozen=True)
class Generated:
    """A whole answer. `tokens` are what was generated; `log_probabilities` the natural logarithm of each under the
    model, `logits` [tokens, vocabulary]: None where the engine does not give them."""

    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...] | None = None
    logits: Tensor | None = None


@dataclass(frozen=True)
class Stats:
    """A moment of the engine: bytes that adapters take in each tier and may take, rows that run or wait, and what
    happened since the start. An engine with one tier calls it "device" and leaves the host's figures 0, its budget
    too."""

    host_bytes: int
    device_bytes: int
    host_budget: int
    device_budget: int
    rows: int
    free_cache: float  # the share of the key/value cache that no row holds, 0 to 1
    hits: Mapping[str, int]  # by tier, "host" and "device"
    misses: Mapping[str, int]
    evictions: Mapping[str, int]
    loads: int  # adapters that were read and became ready; one that is still there is not loaded again
    failures: int  # loads that failed
    generated: int  # tokens of rows that are over, whatever their end: what a cancelled row had, too


class Job(Protocol):
    """One request under way."""

    def tokens_so_far(self) -> int:
        """How many tokens have come."""

    def wait(self, seconds: float = 60) -> Generated:
        """The whole answer. Raises Failed, also for a row that was cancelled, and TimeoutError."""

    def cancel(self) -> None:
        """Ends the row before it is done; only with the feature `cancel`."""


class EngineUnderTest(Protocol):
    """A running engine over one base. Methods may be called from any thread."""

    features: frozenset[Feature]

    def push(self, name: str, folder: Path, *, alias: str | None = None) -> None:
        """Makes the adapter in the PEFT folder what `name` means from now on, without a restart. With the feature
        `versions` it is the next version of that name. `alias` is moved to it in the same moment. Raises Failed for an
        adapter that is refused."""

    def move_alias(self, name: str, alias: str, version: int) -> None:
        """Makes `name@alias` mean another version; only with the feature `alias`."""

    def generate(self, prompt: str, selection: Selection, tokens: int) -> Job:
        """Begins to continue a prompt, greedily, by exactly so many tokens. Raises Failed, or its job does."""

    def classify(self, text: str, adapter: str) -> Sequence[float]:
        """The logits of the adapter's head for a text; only with the feature `classify`. Raises Failed."""

    def load(self, adapter: str) -> None:
        """Brings an adapter into memory and returns when it is there. Raises Failed."""

    def unload(self, adapter: str) -> None:
        """Gives an adapter's memory back once no row runs on it; does not wait for that. Feature `unload`."""

    def stored_weights(self, adapter: str) -> Path:
        """The file that the engine reads an adapter's weights from; only with the feature `tamper`."""

    def hold_loads(self) -> AbstractContextManager[None]:
        """While the context lasts, a load that begins does not come to its end; feature `slow-loads`."""

    def stats(self) -> Stats:
        """A moment of the engine; only with the feature `stats`."""

    def close(self) -> None:
        """Stops it."""


class Factory(Protocol):
    """Starts an engine."""

    def __call__(self, base: Path, work: Path, limits: Limits) -> EngineUnderTest:
        """Over the base in the folder `base`, with the empty folder `work` for what it needs to store."""
