"""What happens to adapters, for everybody who watches: registry events and residency events in one feed.

One task polls the registry, however many watch. Every watcher has a bounded queue: one that does not keep up is told so
and ends, so that memory stays bounded and nobody waits for anybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Self

from adapterbay.registry import RegistryEvent
from adapterbay.registry.errors import AdapterbayError, QueueFull, Unavailable
from adapterbay.server.services.ports import AdaptersPort, EventPort

POLL_SECONDS = 0.1
WATCHER_EVENTS = 1_024
WATCHED = frozenset({"pushed", "alias_set", "alias_removed"})
"""The changes of a registry that a watcher hears of: those that change what a reference means."""

Change = RegistryEvent | EventPort

_logger = logging.getLogger(__name__)


class Watcher:
    """One subscription: changes in order from the moment it was made."""

    def __init__(self, capacity: int) -> None:
        self._changes: asyncio.Queue[Change | None] = asyncio.Queue(capacity + 1)  # one place for the end
        self._capacity = capacity
        self._end: AdapterbayError | None = None

    def put(self, change: Change) -> None:
        """Takes a change, or ends the subscription if it is full. Never blocks."""
        if self._end is not None:
            return
        if self._changes.qsize() >= self._capacity:
            error = QueueFull(
                f"This watcher fell more than {self._capacity} events behind; list the adapters and watch again.",
                retry_after_seconds=1.0,
            )
            error.reason = "WATCHER_TOO_SLOW"
            self.end(error)
            return
        self._changes.put_nowait(change)

    def end(self, error: AdapterbayError) -> None:
        """Ends the subscription: what waits is dropped and the reader gets `error`."""
        if self._end is not None:
            return
        self._end = error
        while not self._changes.empty():
            self._changes.get_nowait()
        self._changes.put_nowait(None)

    async def changes(self) -> AsyncIterator[Change]:
        """The changes as they come. Raises the error that ended the subscription."""
        while True:
            change = await self._changes.get()
            if self._end is not None:
                raise self._end
            if change is not None:
                yield change


class AdapterFeed:
    """Fans registry and residency events out to watchers. Runs inside `async with`."""

    def __init__(self, adapters: AdaptersPort, poll_seconds: float = POLL_SECONDS) -> None:
        self._adapters = adapters
        self._poll_seconds = poll_seconds
        self._watchers: set[Watcher] = set()
        self._seen = 0

    async def __aenter__(self) -> Self:
        self._seen = await asyncio.to_thread(self._adapters.registry.last_event)
        loop = asyncio.get_running_loop()

        def on_engine_thread(event: EventPort) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
                loop.call_soon_threadsafe(self._publish, event)

        self._unsubscribe = self._adapters.subscribe(on_engine_thread)
        self._poller = asyncio.create_task(self._poll(), name="adapter-feed")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._unsubscribe()
        self._poller.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._poller
        for watcher in list(self._watchers):
            watcher.end(Unavailable("The server is stopping.", reason="DRAINING"))

    @contextlib.contextmanager
    def watcher(self, capacity: int = WATCHER_EVENTS) -> Iterator[Watcher]:
        """A subscription for the length of the block."""
        watcher = Watcher(capacity)
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    def _publish(self, change: Change) -> None:
        for watcher in self._watchers:
            watcher.put(change)

    async def _poll(self) -> None:
        failing = False
        while True:
            await asyncio.sleep(self._poll_seconds)
            try:
                events = await asyncio.to_thread(self._new_events)
                failing = False
            except Exception:
                if not failing:
                    _logger.exception("the registry's events cannot be read; trying on")
                failing = True
                continue
            for event in events:
                self._seen = event.sequence
                if event.kind in WATCHED:
                    self._publish(event)

    def _new_events(self) -> list[RegistryEvent]:
        registry = self._adapters.registry
        return list(registry.events(self._seen)) if registry.last_event() > self._seen else []
