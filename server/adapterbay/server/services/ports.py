"""What the services ask of the engine: the narrow side of `adapterbay.server.engine`, as protocols."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from adapterbay.base.text import Tokenizer
from adapterbay.registry import Registry, Resolved
from adapterbay.registry.manifest import Manifest
from adapterbay.server.requests import Request


class BasePort(Protocol):
    """The base that is held."""

    @property
    def fingerprint(self) -> str:
        """`sha256:…` over config, weights, tokenizer and chat template."""

    @property
    def reference(self) -> str:
        """As it was asked for."""

    @property
    def quantization(self) -> str:
        """`none`, `nf4`, `int8`, `int4` or `int8-bnb`."""

    @property
    def kind(self) -> str:
        """`causal-lm`, `encoder` or `encoder-decoder`."""

    @property
    def max_length(self) -> int:
        """The most tokens of one row, prompt and completion together."""


class ResidencyPort(Protocol):
    """Where an adapter's weights are."""

    @property
    def state(self) -> enum.Enum:
        """A member named REGISTRY, LOADING, HOST or DEVICE."""

    @property
    def bytes(self) -> int:
        """Memory taken over all tiers."""

    @property
    def pinned(self) -> bool:
        """Whether eviction passes it by."""

    @property
    def active_rows(self) -> int:
        """Rows that run or wait on it."""


class EventPort(Protocol):
    """One change of residency."""

    @property
    def kind(self) -> str:
        """`loaded`, `unloaded` or `load_failed`."""

    @property
    def digest(self) -> str:
        """The version it happened to."""

    @property
    def message(self) -> str:
        """Why, for a load that failed."""

    @property
    def at(self) -> float:
        """When, as time.time()."""


class AdaptersPort(Protocol):
    """Who holds adapters in memory."""

    @property
    def registry(self) -> Registry:
        """The registry that is served."""

    def resolve(self, reference: str) -> Resolved:
        """What a reference means now. Raises NotFound with near names. May block."""

    def resolve_at_once(self, reference: str) -> Resolved | None:
        """The same; None where it would have to wait, or raise."""

    def manifest(self, digest: str) -> Manifest:
        """The manifest of a version, kept once it was read. Raises NotFound or Corrupted. May block."""

    def load(self, digest: str) -> Future[float]:
        """Brings a version into memory; the future holds the seconds it took, or an AdapterbayError."""

    def unload(self, digest: str) -> Future[int]:
        """Gives its memory back once running rows are done; the future holds the bytes."""

    def pin(self, digest: str, pinned: bool) -> None:
        """Keeps it in memory whatever the load, or lets it go again."""

    def residency(self, digest: str) -> ResidencyPort:
        """Where it is now."""

    def resident(self) -> Sequence[str]:
        """Digests of what is in memory."""

    def subscribe(self, listener: Callable[[EventPort], None]) -> Callable[[], None]:
        """Tells `listener` of every change, on the engine's thread; the returned function ends that."""


class EnginePort(Protocol):
    """Who computes rows."""

    @property
    def base(self) -> BasePort:
        """The base that is held."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The base's tokenizer."""

    @property
    def adapters(self) -> AdaptersPort:
        """Who holds adapters in memory."""

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues rows that run in one batch. Never blocks. Raises QueueFull, Unavailable and what a row cannot do."""

    def cancel(self, request: Request) -> None:
        """Frees a row within one step; its listener gets Cancelled. Nothing happens to a row that has ended."""
