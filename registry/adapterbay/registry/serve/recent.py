"""What was found out lately, so that it is not found out again at every request."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """What was found out lately; the oldest is forgotten first. Used by any number of threads."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._found: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        """What is known of `key`."""
        with self._lock:
            return self._found.get(key)

    def put(self, key: Key, value: Value) -> None:
        """Remembers it."""
        with self._lock:
            self._found[key] = value
            self._found.move_to_end(key)
            while len(self._found) > self._size:
                self._found.popitem(last=False)

    def get_or(self, key: Key, make: Callable[[], Value]) -> Value:
        """What is known, or what `make` finds out now."""
        known = self.get(key)
        if known is None:
            known = make()
            self.put(key, known)
        return known
