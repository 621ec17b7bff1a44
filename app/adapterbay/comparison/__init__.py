"""Which of two arms is better on the same inputs, and whether that can be said at all."""

from __future__ import annotations

from adapterbay.comparison.paired import ArmAccuracy, PairedComparison, Verdict, compare_paired, require_statistics

__all__ = ["ArmAccuracy", "PairedComparison", "Verdict", "compare_paired", "require_statistics"]
