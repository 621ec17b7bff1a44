"""Waiting for several loads at once, without a thread that waits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from adapterbay.registry.errors import AdapterbayError, EngineFault
from adapterbay.server.adapters.residency import Resident


def wait_all(residents: Sequence[Resident], then: Callable[[AdapterbayError | None], None]) -> None:
    """Calls `then` once, when all have loaded or the first has failed; on this thread if that is already so."""
    pending = [resident.loading for resident in residents if resident.form is None]
    left = len(pending)
    if not left:
        then(None)
        return
    lock = threading.Lock()

    told: Callable[[AdapterbayError | None], None] | None = then

    def one_done(future: Future[float]) -> None:
        nonlocal left, told
        error = future.exception()
        with lock:
            if left <= 0:
                return
            left = 0 if error is not None else left - 1
            # A future keeps its callbacks, and `then` knows who holds the futures: a circle with weights in it.
            tell, told = (told, None) if left == 0 else (None, told)
        if tell is not None:
            tell(error if error is None or isinstance(error, AdapterbayError) else EngineFault(repr(error)))

    for future in pending:
        future.add_done_callback(one_done)
