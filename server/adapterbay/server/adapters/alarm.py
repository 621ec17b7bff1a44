"""Being called at a moment to come, where nothing else may happen until then."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)


class Alarm:
    """Calls at the earliest of the moments that it was told; once for those that have passed by then. Thread-safe."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._at = 0.0
        self._closed = False

    def by(self, moment: float) -> None:
        """Sees to it that the call comes soon after `moment`, a time.monotonic(); it may come earlier, too."""
        with self._lock:
            if self._closed or (self._timer is not None and self._at <= moment):
                return
            timer = threading.Timer(max(moment - time.monotonic(), 0.0) + 0.001, self._ring)
            timer.daemon = True
            try:
                timer.start()
            except RuntimeError:  # no thread can be had; a later one that is set stays, and the next to ask tries again
                log.exception("an alarm could not be set")
                return
            if self._timer is not None:
                self._timer.cancel()
            self._timer, self._at = timer, moment

    def close(self) -> None:
        """No call begins any more."""
        with self._lock:
            self._closed = True
            if self._timer is not None:
                self._timer.cancel()

    def _ring(self) -> None:
        with self._lock:
            if self._closed or threading.current_thread() is not self._timer:
                return
            self._timer = None
        self.call()
