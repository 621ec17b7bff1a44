"""What of this process's memory is taken, by whom, and whether it grows. Linux."""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Iterable
from pathlib import Path

from adapterbay.server.engine import Engine


def resident_mib() -> float:
    """Resident memory of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _MallInfo(ctypes.Structure):
    """mallinfo2(3)."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


def in_use_mib() -> float:
    """What malloc has given out to this process (glibc 2.33 or later; otherwise 0)."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return 0.0
    mallinfo2.restype = _MallInfo
    info = mallinfo2()
    return float(info.uordblks + info.hblkhd) / 2**20


def taken_bytes(engine: Engine) -> dict[str, int]:
    """What adapters take: as the engine counts it in each tier, and in the pools of the base's layers."""
    stats, layers = engine.stats(), engine._model.sites.linears.values()
    pools = sum(layer.site.pool.bytes for layer in layers if layer.site is not None)
    return {"host": stats.host_bytes, "device": stats.device_bytes, "pools": pools}


def rise(samples: Iterable[tuple[float, float]]) -> float:
    """By how much the straight line through (minute, MiB) rises from the first to the last; 0 for fewer than three."""
    known = list(samples)
    if len(known) < 3:
        return 0.0
    minutes, mib = zip(*known, strict=True)
    slope, _ = statistics.linear_regression(minutes, mib)
    return float(slope * (minutes[-1] - minutes[0]))
