"""Memory that was freed goes back to the system. glibc keeps it, in an arena for each thread, for whoever asks next:
after 24 adapters of 10 MB were unloaded, the process was as large as before, and 590 MB smaller after this. A megabyte
takes a third of a millisecond. musl and others give back by themselves."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

DELAY_SECONDS = 0.5
"""How long freed memory is kept for a load that may come at once: fresh pages cost it as much as all of its reading."""


@cache
def _malloc_trim() -> Any:
    """malloc_trim(3), or None where the C library has none."""
    try:
        found = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    found.argtypes, found.restype = [ctypes.c_size_t], ctypes.c_int
    return found


def trim() -> None:
    """Gives back what can be. Other threads go on meanwhile; one that allocates may wait for its arena."""
    malloc_trim = _malloc_trim()
    if malloc_trim is not None:
        malloc_trim(0)
