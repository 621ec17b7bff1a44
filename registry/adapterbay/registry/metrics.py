"""The figures of a version, out of the training record of its manifest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from adapterbay.registry.manifest import Manifest


def metrics_of(manifest: Manifest) -> dict[str, float]:
    """The finite numbers among the metrics; what is nested gets a dotted name."""
    return dict(_numbers((manifest.training or {}).get("metrics"), ""))


def _numbers(found: Any, prefix: str) -> Iterator[tuple[str, float]]:
    if isinstance(found, Mapping):
        for key, value in found.items():
            yield from _numbers(value, f"{prefix}.{key}" if prefix else str(key))
    elif prefix and isinstance(found, int | float) and not isinstance(found, bool):
        value = float(found) if abs(found) < 1e300 else math.inf
        if math.isfinite(value):
            yield prefix, value
