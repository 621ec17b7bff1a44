"""Compare-and-swap of aliases, the same words wherever they lie."""

from __future__ import annotations

from adapterbay.registry.errors import StaleAlias
from adapterbay.registry.views import ANY, AnyVersion


def check_expected(name: str, alias: str, expected: int | AnyVersion | None, current: int | None) -> None:
    """Raises StaleAlias with both versions unless `current` is `expected` (None: not set; ANY: whatever it is)."""
    if expected is ANY or expected == current:
        return
    there = "is not set" if current is None else f"points at version {current}"
    wanted = "it was expected not to be set" if expected is None else f"version {expected} was expected"
    error = StaleAlias(f"{name}@{alias} {there}, but {wanted}: read it again and decide anew.")
    error.metadata.update(
        {"alias": alias, "current_version": str(current or ""), "expected_version": str(expected or "")}
    )
    raise error
