"""Changes of what is in memory, for whoever wants to hear of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

EventKind = Literal["loaded", "unloaded", "load_failed"]


@dataclass(frozen=True, slots=True)
class AdapterEvent:
    """A change of residency. `at` is time.time()."""

    kind: EventKind
    digest: str
    message: str
    at: float


class Listeners:
    """Who hears of changes. Thread-safe; listeners are called on whatever thread made the change."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: list[Callable[[AdapterEvent], None]] = []

    def subscribe(self, listener: Callable[[AdapterEvent], None]) -> Callable[[], None]:
        """Calls `listener` on every change, which it must not hold up; returns what ends that."""
        with self._lock:
            self._listeners.append(listener)

        def unsubscribe() -> None:
            with self._lock:
                if listener in self._listeners:
                    self._listeners.remove(listener)

        return unsubscribe

    def tell(self, kind: EventKind, digest: str, message: str = "") -> None:
        """Tells everybody of a change that happens now."""
        event = AdapterEvent(kind=kind, digest=digest, message=message, at=time.time())
        with self._lock:
            listeners = tuple(self._listeners)
        for listener in listeners:
            listener(event)
