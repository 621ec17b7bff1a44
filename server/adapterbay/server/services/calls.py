"""From the engine's thread to the event loop: the rows of one gRPC call, heard in order and freed for sure."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Self

from adapterbay.registry.errors import AdapterbayError, QueueFull
from adapterbay.server.requests import ArmSpec, Delta, Event, Request, Result, Task
from adapterbay.server.services.arms import named
from adapterbay.server.services.ports import EnginePort

WINDOW_ROWS = 32
"""How many rows of one call may be in flight, so that a call with a thousand texts leaves room for others."""

Key = tuple[int, int]  # (group, member of the group)
RowSpec = tuple[ArmSpec, Task]


class Call:
    """The rows of one call. Used as a context manager: on the way out every row that has not ended is cancelled.

    Events wait in an unbounded queue, yet are bounded by what the rows may produce: `max_tokens` deltas each.
    """

    def __init__(self, engine: EnginePort, time_remaining: float | None, *, streams: bool = False) -> None:
        """`streams`: whether anybody hears of deltas. Each would wake the event loop while the engine computes."""
        self._engine = engine
        self._streams = streams
        self._loop = asyncio.get_running_loop()
        self._heard: asyncio.Queue[tuple[Key, Event]] = asyncio.Queue()
        self._open: dict[Key, Request] = {}
        self._deadline = None if time_remaining is None else time.monotonic() + time_remaining

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for request in self._open.values():
            self._engine.cancel(request)
        self._open.clear()

    def submit(self, group: int, rows: Sequence[RowSpec]) -> None:
        """Submits rows that run in one batch. Raises what the engine refuses them with; nothing is left behind then."""
        requests = {
            (group, member): Request(
                arm=arm, task=task, listener=functools.partial(self._tell, (group, member)), deadline=self._deadline
            )
            for member, (arm, task) in enumerate(rows)
        }
        try:
            self._engine.submit(list(requests.values()))
        except AdapterbayError as error:
            raise named(error, (arm for arm, _ in rows)) from error
        self._open.update(requests)  # before the loop can run _arrive: nothing was awaited since

    async def hear(self) -> tuple[Key, Event]:
        """The next event of any row."""
        return await self._heard.get()

    def hear_now(self) -> tuple[Key, Event] | None:
        """The next event if it is there already."""
        return None if self._heard.empty() else self._heard.get_nowait()

    async def result(self) -> Result:
        """The result of the call's only row. Raises its error."""
        while True:
            _, event = await self.hear()
            if isinstance(event, AdapterbayError):
                raise event
            if not isinstance(event, Delta):
                return event

    def _tell(self, key: Key, event: Event) -> None:
        """Called on the engine's thread."""
        if isinstance(event, Delta) and not self._streams:
            return
        try:
            self._loop.call_soon_threadsafe(self._arrive, key, event)
        except RuntimeError:
            return  # the loop is closed: the server has stopped and nobody listens any more

    def _arrive(self, key: Key, event: Event) -> None:
        if not isinstance(event, Delta):
            request = self._open.pop(key, None)
            if request is not None and isinstance(event, AdapterbayError):
                event = named(event, [request.arm])
        self._heard.put_nowait((key, event))


async def run_groups(
    call: Call, groups: Sequence[Sequence[RowSpec]], window: int = WINDOW_ROWS
) -> AsyncIterator[tuple[Key, Result]]:
    """Runs many groups, a window of rows at a time, and yields results as they come, keyed (group, member).

    When the queue is full while rows of ours are in flight, it waits for one of them and tries again; it raises
    QueueFull only if nothing of ours is in flight. The first row's error ends the whole call.
    """
    submitted = in_flight = 0
    while submitted < len(groups) or in_flight:
        while submitted < len(groups) and (not in_flight or in_flight + len(groups[submitted]) <= window):
            try:
                call.submit(submitted, groups[submitted])
            except QueueFull:
                if not in_flight:
                    raise
                break
            in_flight += len(groups[submitted])
            submitted += 1
        key, event = await call.hear()
        if isinstance(event, AdapterbayError):
            raise event
        if not isinstance(event, Delta):
            in_flight -= 1
            yield key, event
